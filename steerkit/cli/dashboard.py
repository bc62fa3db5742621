"""`steerkit dashboard RUN`: the pages of a run's latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.concepts import ConceptScores, concept_scores
from sae.training import SAERun
from steerkit.cli.common import Device, Json, Quiet, emit, load_model, say
from steerkit.errors import InputError

_TELLING = 0.8
"""A latent is said to be about a concept from this AUROC on."""


def dashboard(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `steerkit train sae`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory; RUN/dashboard by default.")
    ] = None,
    latents: Annotated[
        str, typer.Option("--latents", help="all (living ones), top:512, or ids: 3,17,99.")
    ] = "all",
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="Tokens of text to show latents on.")
    ] = 200_000,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="One HTML file, for some hundred latents.")
    ] = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a page for each latent: static, offline, opened from disk."""
    found = SAERun.load(run)
    model = load_model(found.config["model"], device, found.config["dtype"])
    found.sae.to(model.device)
    concepts = None
    if found.config["model"] == "storyworld":
        say("Scoring the latents on StoryWorld's attributes.", quiet=quiet)
        scores = concept_scores(model, found.sae, found.config["site"], per="story", posterior=False)
        concepts = best_concepts(scores)
    chosen: Any = latents
    if latents != "all" and not latents.startswith("top:"):
        if not all(part.strip().isdigit() for part in latents.split(",")):
            raise InputError(f"--latents is {latents!r}; give all, top:512, or ids such as 3,17,99.")
        chosen = [int(part) for part in latents.split(",")]
    drawn = replace(found, model=model).dashboard(
        latents=chosen, tokens=tokens, concepts=concepts, quiet=quiet
    )
    page = drawn.save(out or run / "dashboard", single_file=single_file)
    say(f"Open {page.resolve()}", quiet=quiet)
    emit({"run": str(run), "page": str(page.resolve())}, as_json=json)


def best_concepts(scores: ConceptScores) -> dict[int, tuple[str, float]]:
    """Latent -> (attribute=value, AUROC) of the latents that tell a concept well."""
    found = {}
    for latent in range(len(scores.selection)):
        attribute, value, auroc = scores.best_concept(latent)
        if auroc >= _TELLING:
            found[latent] = (f"{attribute}={value}", auroc)
    return found
