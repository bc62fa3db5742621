"""`steerkit`: the command line's root. Commands are imported here; what they need, when they run."""

from __future__ import annotations

import typer

from steerkit.cli import (
    adapt,
    cache,
    compare,
    concept,
    convert,
    dashboard,
    demo,
    doctor,
    evaluate,
    inspect,
    probe,
    steer,
    sweep,
    train,
)
from steerkit.cli.common import command

app = typer.Typer(
    name="steerkit",
    help="See inside a language model, and change what it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(help="Train on a model's activations.", no_args_is_help=True, rich_markup_mode=None)
sweep_app = typer.Typer(
    help="Train many in one pass, and compare them.", no_args_is_help=True, rich_markup_mode=None
)
eval_app = typer.Typer(help="Evaluate on held-out text.", no_args_is_help=True, rich_markup_mode=None)
convert_app = typer.Typer(help="Convert between file formats.", no_args_is_help=True, rich_markup_mode=None)
adapt_app = typer.Typer(
    help="Fine-tune with adapters, and compare them.", no_args_is_help=True, rich_markup_mode=None
)
steer_app = typer.Typer(help="Make and use steering vectors.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")
app.add_typer(sweep_app, name="sweep")
app.add_typer(eval_app, name="eval")
app.add_typer(convert_app, name="convert")
app.add_typer(steer_app, name="steer")
app.add_typer(adapt_app, name="adapt")

app.command("doctor")(command(doctor.doctor))
app.command("demo")(command(demo.demo))
app.command("inspect")(command(inspect.inspect))
app.command("cache")(command(cache.cache))
app.command("dashboard")(command(dashboard.dashboard))
app.command("probe")(command(probe.probe))
app.command("compare")(command(compare.compare))
app.command("concept")(command(concept.concept))
train_app.command("sae")(command(train.train_sae))
sweep_app.command("sae")(command(sweep.sweep_sae))
eval_app.command("sae")(command(evaluate.eval_sae))
convert_app.command("sae")(command(convert.convert_sae))
steer_app.command("extract")(command(steer.extract))
steer_app.command("apply")(command(steer.apply))
steer_app.command("sweep")(command(steer.sweep_vectors))
steer_app.command("inspect")(command(steer.inspect))
steer_app.command("convert")(command(steer.convert))
steer_app.command("merge")(command(steer.merge_vector))
adapt_app.command("train")(command(adapt.train_adapter))
adapt_app.command("bench")(command(adapt.bench_adapters))
adapt_app.command("merge")(command(adapt.merge_adapter))
adapt_app.command("inspect")(command(adapt.inspect_adapter))
adapt_app.command("methods")(command(adapt.list_methods))

if __name__ == "__main__":
    app()
