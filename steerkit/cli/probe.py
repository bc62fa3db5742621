"""`steerkit probe`: what a model's activations know about labels, by site, beside baselines, null and ceiling."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from probes.data import READINGS, load_labelled
from probes.methods import REGISTRY
from probes.report import save_study
from probes.study import StudyConfig, probe_model
from sae.training import SAERun
from steerkit.cli.common import (
    Config,
    Context,
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
from steerkit.runs import Run, make_provenance
from steerkit.tokens import Tokenization

QUICK_TEXTS, QUICK_PER_TEXT, QUICK_CS = 300, 8, (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Probe:
    """Every setting of `probe`."""

    model: str = "storyworld"
    data: str = "storyworld:mood"
    text_column: str | None = None
    label_column: str = "label"
    group_column: str | None = None
    sae: str | None = None
    device: str | None = None
    dtype: str | None = None
    tokenization: Tokenization = field(default_factory=Tokenization)
    study: StudyConfig = field(default_factory=StudyConfig)


def probe(
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="`storyworld:mood` (the default), another attribute, one value (`storyworld:mood=happy`), a table, a data set id.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run and its report.")
    ] = None,
    reading: Annotated[
        str | None, typer.Option("--reading", help=f"What is read: {', '.join(READINGS)}.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites", "-s", help="Hook sites, with commas between; by default embedding and residual stream."
        ),
    ] = None,
    heads: Annotated[bool | None, typer.Option("--heads", help="Probe every attention head too.")] = None,
    probes: Annotated[
        str | None,
        typer.Option("--probes", help=f"Of {', '.join(REGISTRY)}; with commas between, the main one first."),
    ] = None,
    texts: Annotated[int | None, typer.Option("--texts", "-n", help="Texts at most. [1000]")] = None,
    sae: Annotated[
        str | None,
        typer.Option("--sae", help="A run of `steerkit train sae` on this model: probe its latents too."),
    ] = None,
    text_column: TextColumn = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Column of the label. [label]")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option("--group-column", help="Column that says which texts belong together.")
    ] = None,
    context: Context = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave a finished run as it is; start again otherwise.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"At most {QUICK_TEXTS} texts, {QUICK_PER_TEXT} tokens of each, fewer penalties."
        ),
    ] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Probe all layers of a model for labels, and write one report."""
    flags = {
        "model": model,
        "data": data,
        "text_column": text_column,
        "label_column": label_column,
        "group_column": group_column,
        "sae": sae,
        "device": device,
        "dtype": dtype,
        "tokenization.context": context,
        "study.reading": reading,
        "study.sites": items(sites),
        "study.heads": heads,
        "study.methods": items(probes),
        "study.texts": texts,
        "study.seed": seed,
    }
    settings = build(Probe, merge(config, set_ or [], flags))
    if quick:
        settings = replace(settings, study=_quick(settings.study))
    if out is None:
        raise InputError("--out is needed: a directory for the run.")
    if is_finished(out, resume, as_json=json, quiet=quiet):
        return
    _check(settings.study)
    hooked = load_model(settings.model, settings.device, settings.dtype)
    for site in settings.study.sites:
        hooked.site(site)
    labelled = load_labelled(
        settings.data,
        n_texts=settings.study.texts,
        text_column=settings.text_column,
        label_column=settings.label_column,
        group_column=settings.group_column,
        seed=settings.study.seed,
    )
    latents: dict[str, Any] = {}
    if settings.sae is not None:
        trained = SAERun.load(settings.sae)
        latents = {"sae": trained.sae, "sae_site": trained.config["site"]}
    provenance = make_provenance(model=hooked.name, fingerprint=hooked.fingerprint, texts=len(labelled))
    run = Run.open(out, "probe", asdict(settings), resume=resume, provenance=provenance)
    found = probe_model(
        hooked, labelled, settings.study, tokenization=settings.tokenization, quiet=quiet, **latents
    )
    page = save_study(found, run.path)
    say(f"{found!r}", quiet=quiet)
    if found.causal is not None:
        say(f"{found.causal!r}", quiet=quiet)
    say(f"{page}", quiet=quiet)
    emit(run.summary, as_json=json)


def _quick(config: StudyConfig) -> StudyConfig:
    return replace(
        config,
        texts=min(config.texts, QUICK_TEXTS),
        per_text=min(config.per_text, QUICK_PER_TEXT),
        Cs=QUICK_CS if config.Cs == StudyConfig.Cs else config.Cs,
    )


def _check(config: StudyConfig) -> None:
    """Raise InputError for settings that no study can have."""
    if not config.methods:
        raise InputError("--probes is empty: name at least one.")
    for name in config.methods:
        config.method(name)
    for name, least in (("texts", 2), ("per_text", 1), ("n_folds", 2)):
        if getattr(config, name) < least:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least {least}.")
