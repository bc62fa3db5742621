"""`steerkit sweep sae`: many SAEs in one pass over the activations, and one report of them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

import sae
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
    items,
    load_model,
    say,
)
from steerkit.cli.settings import build, merge
from steerkit.cli.train import QUICK_TOKENS
from steerkit.errors import InputError
from steerkit.runs import read_json
from steerkit.tokens import Tokenization


@dataclass(frozen=True)
class SweepSAE:
    """Every setting of `sweep sae`. All that go together are trained: sites × architectures × widths × sparsities × seeds."""

    sites: list[str]
    tokens: int
    archs: list[str]
    d_saes: list[int] = field(default_factory=list)
    expansions: list[float] = field(default_factory=list)
    """Numbers of latents, as multiples of a site's width."""
    ks: list[int] = field(default_factory=list)
    target_l0s: list[float] = field(default_factory=list)
    """Where only one of `ks` and `target_l0s` is given, it serves for all architectures."""
    l1s: list[float] = field(default_factory=list)
    seeds: int = 1
    """SAEs of each setting, alike but for their initial weights."""
    model: str = "storyworld"
    data: str = "storyworld"
    text_column: str | None = None
    device: str | None = None
    dtype: str | None = None
    tokenization: Tokenization = field(default_factory=Tokenization)
    training: sae.TrainConfig = field(default_factory=sae.TrainConfig)


def sweep_sae(
    model: Model = None,
    data: Data = None,
    sites: Annotated[
        str | None, typer.Option("--sites", "-s", help="Hook sites, separated by commas.")
    ] = None,
    archs: Annotated[
        str | None, typer.Option("--archs", "-a", help=f"Of {', '.join(sae.REGISTRY)}; separated by commas.")
    ] = None,
    d_saes: Annotated[str | None, typer.Option("--d-saes", help="Numbers of latents.")] = None,
    expansions: Annotated[
        str | None, typer.Option("--expansions", help="Numbers of latents, as multiples of the width.")
    ] = None,
    ks: Annotated[str | None, typer.Option("--ks", help="Active latents a token (topk and its kin).")] = None,
    target_l0s: Annotated[
        str | None, typer.Option("--target-l0s", help="Mean active latents to steer to (the others).")
    ] = None,
    l1s: Annotated[str | None, typer.Option("--l1s", help="Fixed coefficients of the penalty.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="SAEs of each setting. [1]")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", help="Tokens to train on.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the runs and the report.")
    ] = None,
    context: Context = None,
    packing: Packing = None,
    text_column: TextColumn = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished sweep; start if there is none.")
    ] = False,
    force: Force = False,
    quick: Annotated[bool, typer.Option("--quick", help=f"At most {QUICK_TOKENS:,} tokens.")] = False,
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
    """Train many sparse autoencoders in one pass over a model's activations, and write one report of all of them."""
    flags = {
        "model": model,
        "data": data,
        **{
            name: items(value)
            for name, value in (
                ("sites", sites),
                ("archs", archs),
                ("d_saes", d_saes),
                ("expansions", expansions),
                ("ks", ks),
                ("target_l0s", target_l0s),
                ("l1s", l1s),
            )
        },
        "seeds": seeds,
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
    settings = build(SweepSAE, values)
    if out is None:
        raise InputError("--out is needed: a directory for the runs and the report.")
    if settings.seeds < 1:
        raise InputError(f"--seeds is {settings.seeds}; it must be at least 1.")
    if is_finished(out, resume, as_json=json, quiet=quiet):
        return
    hooked = load_model(settings.model, settings.device, settings.dtype)
    jobs = _jobs(settings, {site: hooked.site(site).width for site in settings.sites})
    names = sae.job_names(jobs)
    say(
        f"{len(jobs)} SAE{'s' * (len(jobs) != 1)}: {', '.join(names[:4])}{' …' * (len(names) > 4)}",
        quiet=quiet,
    )
    sae.train_many(
        hooked,
        settings.data,
        jobs,
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
    summary = read_json(out / "summary.json")
    for group in summary["groups"]:
        figures = "   ".join(
            f"{key} {group[key]['mean']:.4g}"
            for key in ("l0", "fvu", "ce_recovered", "delta_ce")
            if group[key]
        )
        say(
            f"{group['site']}  {group['arch']}, {group['d_sae']} latents, {group['sparsity']}: {figures}",
            quiet=quiet,
        )
    say(f"{out / 'report.html'}", quiet=quiet)
    emit(summary, as_json=json)


def _jobs(settings: SweepSAE, widths: dict[str, int]) -> list[sae.Job]:
    """Every SAE of the sweep. Raises InputError when a list is empty that must not be, or does not fit an architecture."""
    for name in ("sites", "archs"):
        if not getattr(settings, name):
            raise InputError(f"--{name} is needed: at least one.")
    if bool(settings.d_saes) == bool(settings.expansions):
        raise InputError("Give --d-saes or --expansions: how many latents?")
    first = settings.training.seed
    jobs = []
    for site, arch in itertools.product(settings.sites, settings.archs):
        sizes = settings.d_saes or [round(factor * widths[site]) for factor in settings.expansions]
        for d_sae, sparsity in itertools.product(sizes, _sparsities(settings, arch)):
            made = build(sae.get(arch), {"d_sae": d_sae, **sparsity}, "arch.")
            jobs += [sae.Job(site, made, seed) for seed in range(first, first + settings.seeds)]
    return jobs


def _sparsities(settings: SweepSAE, arch: str) -> list[dict[str, Any]]:
    """The sparsities to train an architecture with: those of its own kind, else the other kind's; its default without any."""
    if any(item.name == "k" for item in dataclasses.fields(sae.get(arch))):
        return [{"k": k} for k in settings.ks or settings.target_l0s] or [{}]
    fixed = [{"l1": l1} for l1 in settings.l1s]
    steered = settings.target_l0s or ([] if fixed else settings.ks)
    return [*({"target_l0": target} for target in steered), *fixed] or [{}]
