"""`steerkit adapt`: fine-tune with an adapter, compare adapters, merge one, look inside one."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Seed,
    Set,
    TextColumn,
    emit,
    is_finished,
    items,
    load_model,
    say,
)
from steerkit.cli.settings import build, merge
from steerkit.errors import InputError
from steerkit.runs import Run, write_json

if TYPE_CHECKING:
    from steerkit.adapters import Adapted
    from steerkit.adapters.tasks import Task
    from steerkit.cli.adapt_settings import BenchSettings, TrainSettings

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="`storyworld` (its liars, the default), storyworld:sad and so on, or a file, with labels or without.",
    ),
]
Modules = Annotated[
    str | None,
    typer.Option(
        "--modules",
        help="Where adapters go: all, attention, ffn, q, k, v, o, up, … or ends of paths; with commas.",
    ),
]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers they go to, with commas; all by default.")
]
Groups = Annotated[
    str | None,
    typer.Option(
        "--groups",
        help="Column whose rows stay together in splits; `phrases`: rows that contain each other.",
    ),
]
Label = Annotated[str | None, typer.Option("--label-column", help="Column of the labels. [label]")]
OOD = Annotated[str | None, typer.Option("--ood", help="A file of the same kind to judge on besides.")]
Unrelated = Annotated[str | None, typer.Option("--unrelated", help="Text whose loss says what is forgotten.")]


def train_adapter(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the run, which is the adapter's too.")
    ],
    method: Annotated[
        str | None, typer.Option("--method", help="A name that `adapt methods` lists. [lora]")
    ] = None,
    model: Model = None,
    data: Data = None,
    modules: Modules = None,
    layers: Layers = None,
    rank: Annotated[int | None, typer.Option("--rank", help="The method's size, where it has one.")] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; the method's own by default.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Times every example is seen. [1]")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples a step. [16]")] = None,
    n_train: Annotated[int | None, typer.Option("--n-train", help="Training examples. [4000]")] = None,
    text_column: TextColumn = None,
    label_column: Label = None,
    groups: Groups = None,
    ood: OOD = None,
    unrelated: Unrelated = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most 600 training examples.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run; start if there is none.")
    ] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with one adapter; `--model` takes the run's directory."""
    from steerkit import adapters
    from steerkit.adapters.training import train
    from steerkit.cli.adapt_settings import TrainSettings

    flags: dict[str, Any] = {
        "model": model, "data": data, "method": method, "modules": items(modules), "layers": _whole(layers),
        "text_column": text_column, "label_column": label_column, "groups": groups, "ood": ood, "unrelated": unrelated,
        "n_train": n_train, "device": device, "dtype": dtype, "training.lr": lr, "training.epochs": epochs,
        "training.batch_size": batch_size, "training.seed": seed,
    }  # fmt: skip
    values = merge(config, set_ or [], flags)
    kind = adapters.METHODS.get(values.get("method", "lora"))
    if kind is not None:
        values.setdefault("training", {}).setdefault("lr", kind.lr)
        if rank is not None:
            if not kind.size:
                raise InputError(f"--rank was given, but {kind.name} has no size to set.")
            values.setdefault("settings", {})[kind.size] = rank
    if quick:
        values["n_train"] = min(600, values.get("n_train", 600))
    chosen = build(TrainSettings, values)
    if is_finished(out, resume, as_json=json, quiet=quiet, key="scores"):
        return
    hooked = load_model(chosen.model, chosen.device, chosen.dtype)
    tuned = adapters.get(
        hooked,
        chosen.method,
        modules=chosen.modules,
        layers=chosen.layers,
        seed=chosen.training.seed,
        **chosen.settings,
    )
    task = _task(hooked, chosen)
    with tuned.disabled():
        before = task.scores(tuned)
    say(f"{chosen.method}: {tuned.n_trainable:,} of {_total(tuned):,} parameters are trained", quiet=quiet)
    outcome = train(
        tuned, task.objective, chosen.training, out=out, resume=resume, quiet=quiet, settings=asdict(chosen)
    )
    after = task.scores(tuned)
    tuned.save(out / "adapter")
    summary = {
        **outcome.summary(),
        "method": chosen.method,
        "settings": tuned.method.settings(),
        "trainable_params": tuned.n_trainable,
        "metric": task.metric,
        "scores": after["scores"],
        "scores_base": before["scores"],
        "forgetting": None if before["unrelated"] is None else after["unrelated"] - before["unrelated"],
    }
    write_json(out / "summary.json", summary)
    for name, value in after["scores"].items():
        say(f"{task.metric}, {name}: {before['scores'][name]:.4f} -> {value:.4f}", quiet=quiet)
    if summary["forgetting"] is not None:
        say(f"loss on unrelated text: {summary['forgetting']:+.4f} nats a token", quiet=quiet)
    say(f"{out}", quiet=quiet)
    emit(summary, as_json=json)


QUICK = {"n_train": 400, "n_test": 150}


def bench_adapters(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the runs and the report.")],
    model: Model = None,
    data: Data = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Names with commas, or `all`; with settings: svft(pattern=plain).",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets", help="Numbers of trained parameters, with commas; LoRA's of rank 8 by default."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Runs that are reported, each with its own. [3]")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Times every example is seen. [1]")] = None,
    modules: Modules = None,
    layers: Layers = None,
    text_column: TextColumn = None,
    label_column: Label = None,
    groups: Groups = None,
    ood: OOD = None,
    unrelated: Unrelated = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="400 training examples and a grid drawn out once: minutes.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that are done.")] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare adapters at one budget of parameters, each at its own best learning rate, and write one report."""
    from steerkit import adapters
    from steerkit.adapters.bench import bench
    from steerkit.adapters.bench_report import write_report
    from steerkit.cli.adapt_settings import BenchSettings

    names = items(methods)
    flags: dict[str, Any] = {
        "model": model, "data": data, "text_column": text_column, "label_column": label_column, "groups": groups, "ood": ood,
        "unrelated": unrelated, "device": device, "bench.methods": sorted(adapters.METHODS) if names == ["all"] else names,
        "bench.budgets": _whole(budgets), "bench.seeds": seeds, "bench.epochs": epochs, "bench.modules": items(modules),
        "bench.layers": _whole(layers), "bench.seed": seed, "bench.dtype": dtype,
    }  # fmt: skip
    values = merge(config, set_ or [], flags)
    if quick:
        values = {**QUICK, **values, "bench": {"extend": 1, **values.get("bench", {})}}
    chosen = build(BenchSettings, values)
    run = Run.open(out, "adapt-bench", asdict(chosen), resume=resume)
    hooked = load_model(chosen.model, chosen.device, None)
    result = bench(hooked, _task(hooked, chosen), chosen.bench, out=out, quiet=quiet)
    write_report(result, out / "report.html")
    summary = {"base": result.base, "results": result.rows, "skipped": result.skipped}
    run.finish(summary)
    for row in result.rows:
        sd = "" if row["metric_sd"] is None else f" ± {row['metric_sd']:.3f}"
        say(
            f"{row['method']:<24}{row['trainable_params']:>10,}  {row['metric']} {row['metric_mean']:.4f}{sd}",
            quiet=quiet,
        )
    for entry in result.skipped:
        say(f"{entry['method']:<24}left out: {entry['reason']}", quiet=quiet)
    say(f"{out / 'report.html'}", quiet=quiet)
    emit(summary, as_json=json)


def merge_adapter(
    run: Annotated[Path, typer.Argument(help="Directory of an adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the whole model.")],
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Although it was made for another base model.")
    ] = False,
    model: Model = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put an adapter into its model's weights: an ordinary checkpoint, which anything serves."""
    tuned = _load(run, model, device, other_model)
    tuned.merge(out)
    say(f"{out}", quiet=quiet)
    emit({"method": tuned.method.name, "out": str(out)}, as_json=json)


def inspect_adapter(
    run: Annotated[Path, typer.Argument(help="Directory of an adapter.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of a page about it.")] = None,
    model: Model = None,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Although it was made for another base model.")
    ] = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What an adapter changes: norms, rank, directions, rotation and gain of every module's effective change."""
    from steerkit.adapters.inside import summarise
    from steerkit.adapters.inside_figures import report

    tuned = _load(run, model, device, other_model)
    method = tuned.method
    say(
        f"{method.name}: {method.equation}\n{method.paper}\n{tuned.n_trainable:,} trained parameters",
        quiet=quiet,
    )
    changes = tuned.changes()
    rows = summarise(changes)
    for row in rows:
        figures = "  ".join(
            f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float) and math.isfinite(v)
        )
        say(f"{row['path']}: {figures}", quiet=quiet)
    if out is not None:
        report({method.name: changes}, out / "report.html", title=f"Inside {method.name}")
        say(f"{out / 'report.html'}", quiet=quiet)
    emit({"method": method.name, "modules": rows}, as_json=json)


_TOLD = ("name", "family", "paper", "equation", "hypothesis", "identity", "merge", "size", "lr")


def list_methods(json: Json = False) -> None:
    """The adapters there are, and what each claims."""
    from steerkit import adapters

    rows = []
    for name, method in sorted(adapters.METHODS.items(), key=lambda item: (item[1].family, item[0])):
        say(f"{method.family:<12}{name:<18}{method.equation}", quiet=json)
        say(f"{'':<30}{method.hypothesis}", quiet=json)
        rows.append({key: getattr(method, key) for key in _TOLD})
    emit({"methods": rows}, as_json=json)


def _task(model: Any, settings: TrainSettings | BenchSettings) -> Task:
    from steerkit.adapters.tasks import make_task

    return make_task(
        model,
        settings.data,
        ood=settings.ood,
        unrelated=settings.unrelated,
        text_column=settings.text_column,
        label_column=settings.label_column,
        groups=settings.groups,
        n_train=settings.n_train,
        n_test=settings.n_test,
    )


def _load(run: Path, model: str | None, device: str | None, other_model: bool) -> Adapted:
    from steerkit import adapters

    if not run.is_dir():
        raise InputError(f"There is no directory {run}.")
    base = None if model is None else load_model(model, device, None)
    run = run / "adapter" if (run / "adapter").is_dir() else run
    return adapters.load(run, base, other_model=other_model)


def _total(tuned: Adapted) -> int:
    return sum(p.numel() for p in tuned.model.parameters())


def _whole(text: str | None) -> list[int] | None:
    found = items(text)
    try:
        return None if found is None else [int(item) for item in found]
    except ValueError:
        raise InputError(f"{text!r} is no list of whole numbers.") from None
