"""`steerkit eval sae RUN…`: SAEs on held-out text, beside what they have to beat, and beside each other.

A RUN is what `steerkit dashboard` takes: a run of ours, or an SAE from elsewhere with the model, text and site that it does not
name. The figures go to evaluation.json in each run of ours, and to comparison.json beside the page; nothing is written into other
directories.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.architectures import SAE
from sae.comparison import comparison_page, run_names
from sae.concepts import concept_scores
from sae.evaluation import evaluate, evaluate_nulls
from sae.judging import LabelledTexts, judge
from sae.pretrained import attach, is_run, open_run
from sae.pruning import prune_curve
from sae.random_model import train_on_random_model
from sae.training import SAERun
from steerkit.activation_cache import ActivationCache, is_cache
from steerkit.cli.common import Device, Json, Quiet, TextColumn, emit, load_model, say
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError
from steerkit.pair import ModelPair
from steerkit.runs import write_json
from steerkit.tokens import Tokenization

CURVE_TOKENS = 50_000
"""Most tokens that each of the ten SAEs of a pruning curve is measured on."""
CALIBRATION_TOKENS = 16_384
"""Tokens, of other documents, that its thresholds are measured on."""


def eval_sae(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN…",
            help="Runs of `steerkit train sae`; directories of other toolkits, hf://user/repo/folder, saelens:release/id.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model, if RUN does not say it, or another one.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Text, all of which is measured on; the run's own held-out text by default."
        ),
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", "-s", help="The site, if RUN does not say it, or another one.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens to measure on.")] = 200_000,
    text_column: TextColumn = None,
    nulls: Annotated[
        bool, typer.Option("--nulls", help="Beside it a random SAE of the same sparsity, and ablations.")
    ] = False,
    random_model: Annotated[
        bool,
        typer.Option(
            "--random-model",
            help="Train an SAE of the randomly initialised model too, to stand beside it in all that is measured.",
        ),
    ] = False,
    concepts: Annotated[
        bool,
        typer.Option(
            "--concepts", help="StoryWorld: AUROC of the best latent for each attribute, and its ceiling."
        ),
    ] = False,
    judged: Annotated[
        bool,
        typer.Option(
            "--judge",
            help="Sparse probing, monosemanticity, absorption, SCR and TPP by StoryWorld's labels, beside all baselines.",
        ),
    ] = False,
    pruned: Annotated[
        bool,
        typer.Option(
            "--prune-curve",
            help=f"What removing each latent's lowest activations costs, in steps of 10 %, on at most {CURVE_TOKENS:,} tokens.",
        ),
    ] = False,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Judge by this table of labelled text instead.")
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option("--label-column", help="Column of a label in --labels; may be repeated. [label]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Directory of the page; of several runs `comparison` beside them by default."
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure SAEs on held-out text. The figures also go to evaluation.json in each run of `steerkit train sae`; of several
    SAEs, one page compares them."""
    run_names(runs)
    if out is None and len(runs) > 1:
        out = _beside(runs)
    texts = None
    if labels is not None:
        texts = LabelledTexts.read(
            labels, text_column=text_column or "text", label_columns=label_column or ["label"]
        )
    elif label_column:
        raise InputError("--label-column names columns of a table: give that with --labels.")
    measure = _Measure(
        model=model,
        data=data,
        site=site,
        tokens=tokens,
        text_column=text_column if labels is None else None,
        nulls=nulls,
        random_model=random_model,
        concepts=concepts,
        judge=judged or labels is not None,
        prune_curve=pruned,
        labels=texts,
        device=device,
        quiet=quiet,
    )
    # All of them are opened first, so that what is wrong with the last is said before hours have gone into the others.
    opened = [measure.open(source) for source in runs]
    results = [measure(source, run) for source, run in zip(runs, opened)]
    if out is None:
        emit(results[0], as_json=json)
        return
    page = comparison_page(results, out / "comparison.html")
    write_json(out / "comparison.json", {"runs": results})
    say(f"{page}", quiet=quiet)
    emit({"runs": results, "page": str(page)}, as_json=json)


def _beside(runs: list[str]) -> Path:
    """Where the page of several goes without --out."""
    for source in runs:
        if not Path(source).exists():
            raise InputError(f"{source} is no directory to write the page beside: give --out, a directory.")
    return Path(os.path.commonpath([Path(source).resolve().parent for source in runs])) / "comparison"


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """What is measured of each run."""

    model: str | None
    data: str | None
    site: str | None
    tokens: int
    text_column: str | None
    nulls: bool
    random_model: bool
    concepts: bool
    judge: bool
    prune_curve: bool
    labels: LabelledTexts | None
    device: str | None
    quiet: bool
    models: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Those that have been loaded."""

    def open(self, source: str) -> SAERun:
        """The run, without its model. InputError for what cannot be measured of it."""
        # Of a run of ours --data is text to measure on; the run's own stays the text of training.
        data = {} if is_run(source) else {"data": self.data, "text_column": self.text_column}
        run = open_run(source, model=self.model, site=self.site, **data)
        if self.random_model and not is_run(source):
            raise InputError(
                f"{source} does not say how it was trained: --random-model repeats a run of `steerkit train sae`."
            )
        if self.concepts and run.config["model"] != "storyworld":
            raise InputError(
                "--concepts needs labels for every token: it works for runs on the model `storyworld`."
            )
        more = self.nulls or self.random_model or self.concepts or self.judge or self.prune_curve
        if more and len(run.sae.config.inputs(run.config["site"])) > 1:
            raise InputError(
                f"{source} is a crosscoder: it is evaluated at each of its sites; --nulls, --random-model, --concepts, "
                "--judge and --prune-curve are for SAEs of one site."
            )
        return run

    def __call__(self, source: str, run: SAERun) -> dict[str, Any]:
        model = self._model(run)
        run = attach(run, model)
        site = run.config["site"]
        say(f"{source}: {run.sae!r}", quiet=self.quiet)
        caution = run.sae.metadata.get("caution")
        if caution:
            say(caution, quiet=self.quiet)
        result: dict[str, Any] = {
            "run": source,
            "arch": run.sae.arch,
            "d_sae": run.sae.d_sae,
            "model": run.config["model"],
            "site": site,
            "data": self.data or run.config["data"],
            **({"caution": caution} if caution else {}),
        }
        baseline = self._baseline(run)
        result |= self._held_out(run, baseline)
        if self.prune_curve:
            settings = self._settings(run) | {"tokens": min(self.tokens, CURVE_TOKENS)}
            settings["calibration_tokens"] = CALIBRATION_TOKENS
            curve = prune_curve(model, run.sae, self._documents(run), site, **settings)
            say(repr(curve), quiet=self.quiet)
            result["prune_curve"] = curve.to_dict()
        if self.concepts:
            scores = concept_scores(
                model, run.sae, site, per="story", random_model_sae=baseline, quiet=self.quiet
            )
            say(repr(scores), quiet=self.quiet)
            result["concepts"] = scores.to_dict()
        if self.judge:
            judgement = judge(
                model,
                run.sae,
                site,
                data=self.labels,
                random_model_sae=baseline,
                tokenization=Tokenization(**run.config["tokenization"]),
                quiet=self.quiet,
            )
            say(repr(judgement), quiet=self.quiet)
            result["judgement"] = judgement.to_dict()
        if is_run(source):
            write_json(run.path / "evaluation.json", result)
        return result

    def _model(self, run: SAERun) -> Any:
        """The run's model, or its pair of models; runs of one model share it."""
        name, dtype, tuned = run.config["model"], run.config["dtype"], run.config["arch"].get("tuned")
        key = (name, dtype, tuned or "")
        if key not in self.models:
            model = load_model(name, self.device, dtype)
            self.models[key] = model if tuned is None else ModelPair.of(model, tuned)
        return self.models[key]

    def _baseline(self, run: SAERun) -> SAE | None:
        """The SAE of the randomly initialised model: trained if asked for, taken for a judgement if it is there."""
        if self.random_model:
            found = train_on_random_model(run, quiet=self.quiet)
        elif self.judge and (run.path / "random-model" / "summary.json").is_file():
            found = SAERun.load(run.path / "random-model")
        else:
            return None
        return found.sae.to(run.hooked().device)

    def _documents(self, run: SAERun) -> Documents:
        if self.data is None:
            return run.held_out()
        if is_cache(self.data):
            return ActivationCache.open(self.data, verify=False).held_out
        return load_documents(self.data, text_column=self.text_column)

    def _settings(self, run: SAERun) -> dict[str, Any]:
        return {
            "tokenization": Tokenization(**run.config["tokenization"]),
            "tokens": self.tokens,
            "sink_threshold": run.sae.metadata.get("sink_threshold"),
            "quiet": self.quiet,
        }

    def _held_out(self, run: SAERun, baseline: SAE | None) -> dict[str, Any]:
        model, site, documents = run.hooked(), run.config["site"], self._documents(run)
        if not self.nulls and not (self.random_model and not self.judge):
            found = evaluate(model, run.sae, documents, site, **self._settings(run))
            say(repr(found), quiet=self.quiet)
            return found.to_dict()
        table = evaluate_nulls(
            model, run.sae, documents, site, random_model_sae=baseline, **self._settings(run)
        )
        found = table.evaluations["trained"]
        say(f"{found!r}\n{table!r}", quiet=self.quiet)
        return found.to_dict() | {"nulls": table.to_dict()}
