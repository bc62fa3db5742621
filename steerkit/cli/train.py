"""`steerkit train sae`: the main job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

import sae
from sae.plan import plan
from steerkit.activation_cache import is_cache
from steerkit.cli.common import (
    Config,
    Context,
    Data,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Packing,
    Quiet,
    Seed,
    Set,
    TextColumn,
    emit,
    is_finished,
    load_model,
    say,
    summary_line,
)
from steerkit.cli.settings import build, merge
from steerkit.data import load_documents
from steerkit.errors import InputError
from steerkit.tokens import Tokenization

QUICK_TOKENS = 300_000


@dataclass(frozen=True)
class TrainSAE:
    """Every setting of `train sae`; run.yaml has the same names."""

    site: str
    tokens: int
    model: str = "storyworld"
    data: str = "storyworld"
    arch: dict[str, Any] = field(default_factory=dict)
    """`name`, and the settings of that architecture."""
    text_column: str | None = None
    device: str | None = None
    dtype: str | None = None
    tokenization: Tokenization = field(default_factory=Tokenization)
    training: sae.TrainConfig = field(default_factory=sae.TrainConfig)


def train_sae(
    model: Model = None,
    data: Data = None,
    site: Annotated[
        str | None,
        typer.Option(
            "--site",
            "-s",
            help="Hook site (`steerkit inspect MODEL` lists them); a crosscoder's with commas.",
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", "-a", help=f"One of {', '.join(sae.REGISTRY)}.")
    ] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Number of latents.")] = None,
    expansion: Annotated[
        float | None, typer.Option("--expansion", help="Number of latents, as a multiple of the width.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents a token (the TopK family).")] = None,
    l1: Annotated[float | None, typer.Option("--l1", help="Fixed coefficient of the penalty.")] = None,
    target_l0: Annotated[
        float | None, typer.Option("--target-l0", help="Mean active latents a token to steer to.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="What a guided SAE's first latents are taught: mood=happy,tense=past."),
    ] = None,
    target_site: Annotated[
        str | None, typer.Option("--target-site", help="The site that a transcoder reconstructs.")
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option("--tuned", help="The fine-tuned copy that a crosscoder reads beside the model."),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", help="Tokens to train on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the run.")] = None,
    context: Context = None,
    packing: Packing = None,
    text_column: TextColumn = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run; start if there is none.")
    ] = False,
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shapes, parameters, memory and time; train nothing.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"At most {QUICK_TOKENS:,} tokens: a look, in a minute or so on 2 cores."
        ),
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", help="Time between checkpoints.")
    ] = 60.0,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a sparse autoencoder on a site of a model, evaluate it on held-out text, and write it in SAELens's layout."""
    flags = {
        "model": model,
        "data": data,
        "site": site,
        "arch.name": arch,
        "arch.d_sae": d_sae,
        "arch.k": k,
        "arch.l1": l1,
        "arch.target_l0": target_l0,
        "arch.labels": None if labels is None else [part.strip() for part in labels.split(",")],
        "arch.target_site": target_site,
        "arch.tuned": tuned,
        "tokens": tokens,
        "text_column": text_column,
        "device": device,
        "dtype": dtype,
        "tokenization.context": context,
        "tokenization.packing": packing,
        "training.seed": seed,
    }
    values = merge(config, set_ or [], flags)
    if quick:
        values["tokens"] = min(int(values.get("tokens", QUICK_TOKENS)), QUICK_TOKENS)
    settings = build(TrainSAE, values)
    if out is None and not dry_run:
        raise InputError("--out is needed: a directory for the run.")
    if out is not None and is_finished(out, resume, as_json=json, quiet=quiet):
        return
    hooked = load_model(settings.model, settings.device, settings.dtype)
    architecture = _architecture(settings.arch, expansion, hooked, settings.site)
    if dry_run:
        planned = plan(
            hooked,
            load_documents(settings.data, text_column=settings.text_column),
            site=settings.site,
            arch=architecture,
            tokens=settings.tokens,
            tokenization=settings.tokenization,
            config=settings.training,
        )
        say(str(planned), quiet=quiet)
        emit(planned.to_dict(), as_json=json)
        return
    assert out is not None
    run = sae.train(
        hooked,
        settings.data,
        settings.site,
        architecture,
        settings.tokens,
        out,
        config=settings.training,
        tokenization=None if is_cache(settings.data) else settings.tokenization,
        text_column=settings.text_column,
        checkpoint_seconds=checkpoint_seconds,
        resume=resume,
        force=force,
        quiet=quiet,
    )
    say(summary_line(run.summary), quiet=quiet)
    say(f"{run.path}: steerkit eval sae {run.path} --nulls; steerkit dashboard {run.path}", quiet=quiet)
    emit(run.summary, as_json=json)


def _architecture(values: dict[str, Any], expansion: float | None, model: Any, site: str) -> sae.Config:
    """The architecture's config; its number of latents from `d_sae` or as a multiple of the width."""
    values = dict(values)
    if "name" not in values:
        raise InputError(f"--arch is needed: one of {', '.join(sae.REGISTRY)}.")
    schema = sae.get(values.pop("name"))
    if expansion is not None:
        if "d_sae" in values:
            raise InputError("Give --d-sae or --expansion, not both.")
        sites = site.split(",") if schema is sae.Crosscoder else [site]
        copies = 1 if values.get("tuned") is None else 2
        values["d_sae"] = round(expansion * copies * sum(model.site(name.strip()).width for name in sites))
    if "d_sae" not in values:
        raise InputError("--d-sae or --expansion is needed: how many latents?")
    return build(schema, values, "arch.")
