"""`steerkit eval sae RUN…`: SAEs on held-out text, beside what they have to beat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.concepts import concept_scores
from sae.evaluation import evaluate, evaluate_nulls
from sae.random_model import train_on_random_model
from sae.training import SAERun
from steerkit.cli.common import Device, Json, Quiet, TextColumn, emit, load_model, say
from steerkit.data import load_documents
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.tokens import Tokenization


def eval_sae(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Runs of `steerkit train sae`.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Other text; the run's own held-out text by default.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to measure on.")] = 200_000,
    text_column: TextColumn = None,
    nulls: Annotated[
        bool, typer.Option("--nulls", help="Beside it a random SAE of the same sparsity, and ablations.")
    ] = False,
    random_model: Annotated[
        bool,
        typer.Option(
            "--random-model", help="With --nulls: train an SAE of the randomly initialised model too."
        ),
    ] = False,
    concepts: Annotated[
        bool,
        typer.Option(
            "--concepts", help="StoryWorld: AUROC of the best latent for each attribute, and its ceiling."
        ),
    ] = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure SAEs on held-out text. The figures also go to evaluation.json in each run."""
    results = [
        _evaluate(
            path, data, tokens, text_column, nulls or random_model, random_model, concepts, device, quiet
        )
        for path in runs
    ]
    emit(results[0] if len(results) == 1 else {"runs": results}, as_json=json)


def _evaluate(
    path: Path,
    data: str | None,
    tokens: int,
    text_column: str | None,
    nulls: bool,
    random_model: bool,
    concepts: bool,
    device: str | None,
    quiet: bool,
) -> dict[str, Any]:
    run = SAERun.load(path)
    model = load_model(run.config["model"], device, run.config["dtype"])
    run.sae.to(model.device)
    documents = run.held_out() if data is None else load_documents(data, text_column=text_column)
    settings: dict[str, Any] = {
        "tokenization": Tokenization(**run.config["tokenization"]),
        "tokens": tokens,
        "sink_threshold": run.sae.metadata.get("sink_threshold"),
        "quiet": quiet,
    }
    site = run.config["site"]
    run = replace(run, model=model)
    baseline = train_on_random_model(run, quiet=quiet).sae.to(model.device) if random_model else None
    result: dict[str, Any] = {"run": str(path), "arch": run.sae.arch, "data": data or run.config["data"]}
    say(f"{path}: {run.sae!r}", quiet=quiet)
    if nulls:
        table = evaluate_nulls(model, run.sae, documents, site, random_model_sae=baseline, **settings)
        found = table.evaluations["trained"]
        say(f"{found!r}\n{table!r}", quiet=quiet)
        result |= found.to_dict() | {"nulls": table.to_dict()}
    else:
        found = evaluate(model, run.sae, documents, site, **settings)
        say(repr(found), quiet=quiet)
        result |= found.to_dict()
    if concepts:
        if run.config["model"] != "storyworld":
            raise InputError(
                "--concepts needs labels for every token: it works for runs on the model `storyworld`."
            )
        scores = concept_scores(model, run.sae, site, per="story", random_model_sae=baseline, quiet=quiet)
        say(repr(scores), quiet=quiet)
        result["concepts"] = scores.to_dict()
    write_json(path / "evaluation.json", result)
    return result
