"""`steerkit dashboard RUN`: the pages of the latents of a run, or of any SAE that can be read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.concepts import ConceptScores, concept_scores
from sae.dashboard.pages import check_exports
from sae.dashboard.second import Second
from sae.dashboard.serve import Reader
from sae.dashboard.serve import serve as serve_dashboard
from sae.formats import is_remote, load
from sae.pretrained import attach, is_run, open_run
from sae.training import SAERun
from steerkit.cli.common import Device, Json, Quiet, TextColumn, emit, items, load_model, say
from steerkit.cli.directions import holds_directions, open_directions
from steerkit.errors import InputError
from steerkit.tokens import Tokenization

_TELLING = 0.8
"""A latent is said to be about a concept from this AUROC on."""


def dashboard(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run of `steerkit train sae`; a directory of another toolkit, hf://user/repo/folder, saelens:release/id; "
            "or directions: a steering vector's file, probes', or an adapter's run.",
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
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Measure the model's loss without each latent.")
    ] = False,
    steer: Annotated[
        bool, typer.Option("--steer", help="Generate text with each latent made stronger.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What --steer continues; a text's first words by default.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="RUN2", help="Another SAE, of the same width, to match latents with."
        ),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option("--export", help="Files beside the pages: csv, json, neuronpedia, with commas between."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it with the model, to read and steer your own text.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="Where --serve listens, on this machine only.")] = 8000,
    module: Annotated[
        str | None,
        typer.Option("--module", help="Of an adapter: the module, by default the one that changed most."),
    ] = None,
    writes: Annotated[
        bool, typer.Option("--writes", help="Of an adapter: what ΔW writes, not what it reads.")
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
    if serve and single_file:
        raise InputError("A single file is not served: leave out --single-file.")
    folder = out or Path(run) / "dashboard"
    exports = items(export) or []
    check_exports(exports, single_file)
    kept = serve and (folder / "index.html").exists()
    if holds_directions(run):
        if latents != "all":
            raise InputError("--latents is for an SAE: directions are all drawn.")
        if ablate or steer or compare or exports:
            raise InputError("--ablate, --steer, --compare and --export are for an SAE.")
        directions = open_directions(run, model, data, site, text_column, device, module, writes)
        page = folder / "index.html" if kept else directions.draw(folder, tokens, single_file, quiet)
        _finish(run, page, directions.reader() if serve else None, port, json, quiet)
        return
    if module is not None or writes:
        raise InputError("--module and --writes are for an adapter.")
    found = open_run(run, model=model, data=data, site=site, text_column=text_column)
    hooked = load_model(found.config["model"], device, found.config["dtype"])
    found = attach(found, hooked)
    if (ablate or steer) and not (hooked.is_causal and hooked.has_lm_head):
        raise InputError(f"{hooked.name} predicts no next token: leave out --ablate and --steer.")
    second = None if compare is None else _second(compare)
    if "caution" in found.sae.metadata:
        say(found.sae.metadata["caution"], quiet=quiet)
    concepts = None
    if found.config["model"] == "storyworld" and not kept:
        say("Scoring the latents on StoryWorld's attributes.", quiet=quiet)
        scores = concept_scores(hooked, found.sae, found.config["site"], per="story", posterior=False)
        concepts = best_concepts(scores)
    chosen: Any = latents
    if latents != "all" and not latents.startswith("top:"):
        if not all(part.strip().isdigit() for part in latents.split(",")):
            raise InputError(f"--latents is {latents!r}; give all, top:512, or ids such as 3,17,99.")
        chosen = [int(part) for part in latents.split(",")]
    if kept:
        page = folder / "index.html"
    else:
        drawn = found.dashboard(latents=chosen, tokens=tokens, concepts=concepts, quiet=quiet)
        page = drawn.save(
            folder,
            single_file=single_file,
            quiet=quiet,
            ablate=ablate,
            steer=prompt if steer and prompt is not None else steer,
            second=second,
            exports=exports,
        )
    tokenization, threshold = (
        Tokenization(**found.config["tokenization"]),
        found.sae.metadata["sink_threshold"],
    )
    reader = Reader(hooked, found.sae, found.config["site"], tokenization, threshold) if serve else None
    _finish(run, page, reader, port, json, quiet)


def _second(source: str) -> Second:
    """The SAE to compare with, which need not say its model or site."""
    if is_run(source):
        run = SAERun.load(source)
        return Second(source, run.sae, run.config["site"], run.summary)
    if not is_remote(source) and not Path(source).exists():
        raise InputError(
            f"{source} (--compare) does not exist: give a run's directory, or any SAE that can be read."
        )
    found = load(source)
    return Second(source, found, found.metadata.get("site") or "site unknown")


def _finish(run: str, page: Path, reader: Reader | None, port: int, json: bool, quiet: bool) -> None:
    """Tell where the page is; serve it until Ctrl-C if there is a reader."""
    if reader is None:
        say(f"Open {page.resolve()}", quiet=quiet)
    emit({"run": run, "page": str(page.resolve())}, as_json=json)
    if reader is not None:
        serve_dashboard(page.parent, reader, port=port, announce=partial(say, quiet=quiet))


def best_concepts(scores: ConceptScores) -> dict[int, tuple[str, float]]:
    """Latent -> (attribute=value, AUROC) of the latents that tell a concept well."""
    found = {}
    for latent in range(len(scores.selection)):
        attribute, value, auroc = scores.best_concept(latent)
        if auroc >= _TELLING:
            found[latent] = (f"{attribute}={value}", auroc)
    return found
