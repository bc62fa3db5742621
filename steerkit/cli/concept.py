"""`steerkit concept`: one page of all ways to detect and to steer one concept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    emit,
    is_finished,
    items,
    load_model,
    say,
)
from steerkit.cli.settings import build, merge
from steerkit.errors import InputError
from steerkit.steering.concept import ConceptConfig, study_concept
from steerkit.steering.concept_report import write_report


def concept(
    model: Model = None,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs", "-p", help="A file of pairs, or storyworld:mood=happy and the like (the default)."
        ),
    ] = "storyworld:mood=happy",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run and its page.")
    ] = None,
    sae: Annotated[
        Path | None,
        typer.Option(
            "--sae", exists=True, help="A trained autoencoder's run; on storyworld a small one by default."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help=f"Names with commas. [{','.join(ConceptConfig.methods)}]"),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option("--at", help="The divergence to compare at, nats a sequence, one of kl_targets. [3]"),
    ] = None,
    n_pairs: Annotated[
        int | None, typer.Option("--n-pairs", "-n", help="Pairs to learn from, the same for all. [256]")
    ] = None,
    effect: Annotated[
        str | None,
        typer.Option(
            "--effect",
            help="What counts as success: words:happy,glad. By default StoryWorld's judge, or the pairs' most telling words.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A file with a prompt a line; by default the pairs' own, or StoryWorld's."
        ),
    ] = None,
    prompting: Annotated[
        str | None,
        typer.Option("--prompting", help="The instruction to compare with; StoryWorld has its own."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Studies with seeds of their own, told as mean and spread.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few pairs, prompts and sites, no null of trained methods: minutes."),
    ] = False,
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
    """Detect and steer one concept by every means, on equal data and at equal divergence, on one page."""
    flags: dict[str, Any] = {
        "methods": items(methods),
        "at": at,
        "n_pairs": n_pairs,
        "seeds": seeds,
        "seed": seed,
    }
    values = merge(config, set_ or [], flags)
    build(ConceptConfig, values)
    if out is None:
        raise InputError("--out is needed: a directory for the run.")
    if is_finished(out, resume, as_json=json, quiet=quiet):
        return
    hooked = load_model(model or "storyworld", device, dtype)
    if quick:
        values = {**ConceptConfig.quick(hooked), **values}
    if sae is None:
        say("No --sae: the built-in model is given a small one; other models go without.", quiet=quiet)
    study = study_concept(
        hooked,
        pairs,
        out,
        build(ConceptConfig, values),
        effect=effect,
        prompts=prompts,
        instruction=prompting,
        sae=sae,
        resume=resume,
        quiet=quiet,
    )
    write_report(study, out / "report.html")
    say(f"{study!r}", quiet=quiet)
    for text in study.warnings:
        say(f"Note: {text}", quiet=quiet)
    say(f"{out / 'report.html'}", quiet=quiet)
    emit(study.to_dict(), as_json=json)
