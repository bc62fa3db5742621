"""`steerkit eval sae RUN…`: SAEs on held-out text, beside what they have to beat, and beside each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.architectures import SAE
from sae.comparison import comparison_page, run_names
from sae.concepts import concept_scores
from sae.evaluation import evaluate, evaluate_nulls
from sae.judging import LabelledTexts, judge
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
    """Measure SAEs on held-out text. The figures also go to evaluation.json in each run; of several runs, one page
    compares them."""
    run_names([str(path) for path in runs])
    texts = None
    if labels is not None:
        texts = LabelledTexts.read(
            labels, text_column=text_column or "text", label_columns=label_column or ["label"]
        )
    elif label_column:
        raise InputError("--label-column names columns of a table: give that with --labels.")
    measure = _Measure(
        data,
        tokens,
        text_column if labels is None else None,
        nulls,
        random_model,
        concepts,
        judged or labels is not None,
        texts,
        device,
        quiet,
    )
    results = [measure(path) for path in runs]
    if len(runs) == 1 and out is None:
        emit(results[0], as_json=json)
        return
    out = out or Path(os.path.commonpath([path.resolve().parent for path in runs])) / "comparison"
    page = comparison_page(results, out / "comparison.html")
    write_json(out / "comparison.json", {"runs": results})
    say(f"{page}", quiet=quiet)
    emit({"runs": results, "page": str(page)}, as_json=json)


@dataclass(frozen=True)
class _Measure:
    """What is measured of each run."""

    data: str | None
    tokens: int
    text_column: str | None
    nulls: bool
    random_model: bool
    concepts: bool
    judge: bool
    labels: LabelledTexts | None
    device: str | None
    quiet: bool
    models: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Those that have been loaded."""

    def __call__(self, path: Path) -> dict[str, Any]:
        run = SAERun.load(path)
        if self.concepts and run.config["model"] != "storyworld":
            raise InputError(
                "--concepts needs labels for every token: it works for runs on the model `storyworld`."
            )
        model = self._model(run)
        run.sae.to(model.device)
        run = replace(run, model=model)
        site, data = run.config["site"], self.data or run.config["data"]
        say(f"{path}: {run.sae!r}", quiet=self.quiet)
        result: dict[str, Any] = {
            "run": str(path),
            "arch": run.sae.arch,
            "d_sae": run.sae.d_sae,
            "model": run.config["model"],
            "site": site,
            "data": data,
        }
        baseline = self._baseline(run)
        result |= self._held_out(run, baseline)
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
        write_json(path / "evaluation.json", result)
        return result

    def _model(self, run: SAERun) -> Any:
        """The run's model; runs of one model share it."""
        key = (run.config["model"], run.config["dtype"])
        if key not in self.models:
            self.models[key] = load_model(run.config["model"], self.device, run.config["dtype"])
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

    def _held_out(self, run: SAERun, baseline: SAE | None) -> dict[str, Any]:
        documents = (
            run.held_out() if self.data is None else load_documents(self.data, text_column=self.text_column)
        )
        settings: dict[str, Any] = {
            "tokenization": Tokenization(**run.config["tokenization"]),
            "tokens": self.tokens,
            "sink_threshold": run.sae.metadata.get("sink_threshold"),
            "quiet": self.quiet,
        }
        model, site = run.hooked(), run.config["site"]
        if not self.nulls and not (self.random_model and not self.judge):
            found = evaluate(model, run.sae, documents, site, **settings)
            say(repr(found), quiet=self.quiet)
            return found.to_dict()
        table = evaluate_nulls(model, run.sae, documents, site, random_model_sae=baseline, **settings)
        found = table.evaluations["trained"]
        say(f"{found!r}\n{table!r}", quiet=self.quiet)
        return found.to_dict() | {"nulls": table.to_dict()}
