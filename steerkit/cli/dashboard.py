"""`steerkit dashboard RUN`: the pages of the latents of a run, or of any SAE that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sae.concepts import ConceptScores, concept_scores
from sae.formats import is_remote
from sae.pretrained import attach, open_run
from steerkit.cli.common import Device, Json, Quiet, TextColumn, emit, load_model, say
from steerkit.errors import InputError

_TELLING = 0.8
"""A latent is said to be about a concept from this AUROC on."""


def dashboard(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run of `steerkit train sae`; or a directory of another toolkit, hf://user/repo/folder, saelens:release/id.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model, if RUN does not say it, or another one.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="The text, likewise.")] = None,
    site: Annotated[str | None, typer.Option("--site", "-s", help="The site, likewise.")] = None,
    text_column: TextColumn = None,
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
    if not is_remote(run) and not Path(run).exists():
        raise InputError(
            f"{run} does not exist: give a run's directory, hf://user/repo/folder or saelens:release/id."
        )
    if out is None and not Path(run).is_dir():
        raise InputError(f"{run} is no directory to write the dashboard into: give --out, a directory.")
    found = open_run(run, model=model, data=data, site=site, text_column=text_column)
    hooked = load_model(found.config["model"], device, found.config["dtype"])
    found = attach(found, hooked)
    if "caution" in found.sae.metadata:
        say(found.sae.metadata["caution"], quiet=quiet)
    concepts = None
    if found.config["model"] == "storyworld":
        say("Scoring the latents on StoryWorld's attributes.", quiet=quiet)
        scores = concept_scores(hooked, found.sae, found.config["site"], per="story", posterior=False)
        concepts = best_concepts(scores)
    chosen: Any = latents
    if latents != "all" and not latents.startswith("top:"):
        if not all(part.strip().isdigit() for part in latents.split(",")):
            raise InputError(f"--latents is {latents!r}; give all, top:512, or ids such as 3,17,99.")
        chosen = [int(part) for part in latents.split(",")]
    drawn = found.dashboard(latents=chosen, tokens=tokens, concepts=concepts, quiet=quiet)
    page = drawn.save(out or Path(run) / "dashboard", single_file=single_file)
    say(f"Open {page.resolve()}", quiet=quiet)
    emit({"run": run, "page": str(page.resolve())}, as_json=json)


def best_concepts(scores: ConceptScores) -> dict[int, tuple[str, float]]:
    """Latent -> (attribute=value, AUROC) of the latents that tell a concept well."""
    found = {}
    for latent in range(len(scores.selection)):
        attribute, value, auroc = scores.best_concept(latent)
        if auroc >= _TELLING:
            found[latent] = (f"{attribute}={value}", auroc)
    return found
