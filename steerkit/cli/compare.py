"""`steerkit compare`: what training changed, between any two of models, adapters, steering files and SAE runs."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.comparison import ComparisonConfig
from steerkit import storyworld
from steerkit.cli.common import (
    Config,
    Data,
    Device,
    Dtype,
    Json,
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
from steerkit.finetuning import FinetuneConfig
from steerkit.loading import ADAPTER_RECORD
from steerkit.runs import Run, make_provenance, read_json

if TYPE_CHECKING:
    from probes.freezing import FreezingSweep
    from sae.training import SAERun
    from steerkit.models import HookedModel

TASK_EXAMPLES = 80


@dataclass(frozen=True)
class Freezing:
    """What the base is trained on again, with fewer and fewer blocks frozen."""

    data: str | None = None
    """What `adapt train --data` takes; None: no freezing sweep."""
    label_column: str = "label"
    groups: str | None = None
    n_train: int = 600
    n_test: int = 200
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    extend: int = 1
    """Rates that are tried beyond the grid, at most, where the best is at its edge."""
    seeds: int = 1
    training: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class Compare:
    """Every setting of `compare`."""

    base: str
    tuned: str
    data: str = "storyworld"
    labels: tuple[str, ...] | None = None
    text_column: str | None = None
    task: str | None = None
    """A shifted set of StoryWorld whose score is measured besides the loss; `none`: none."""
    strength: float = 1.0
    """Of a steering file."""
    device: str | None = None
    dtype: str | None = None
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    freezing: Freezing = field(default_factory=Freezing)


def compare(
    base: Annotated[str, typer.Argument(help="`storyworld`, a Hugging Face id, a directory, or an SAE run.")],
    tuned: Annotated[
        str, typer.Argument(help="The same, an adapter's directory, or a steering file for BASE.")
    ],
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run and its report.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="What is probed, with commas: attributes of StoryWorld [honesty,mood] or columns of the table [label].",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="`storyworld:liars` (the default with storyworld: the share of lies), another variant, or none.",
        ),
    ] = None,
    texts: Annotated[int | None, typer.Option("--texts", "-n", help="Texts at most. [400]")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", "-x", help="Of a steering file. [1]")
    ] = None,
    text_column: TextColumn = None,
    freezing: Annotated[
        str | None,
        typer.Option(
            "--freezing",
            help="Train BASE again, none to all of its blocks, on what `adapt train --data` takes. Minutes.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 200 texts, fewer permutations and penalties.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave a finished run as it is; start again otherwise.")
    ] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two models layer by layer, or the latents of two SAEs, and write one report."""
    flags = {
        "base": base,
        "tuned": tuned,
        "data": data,
        "labels": items(labels),
        "text_column": text_column,
        "task": task,
        "strength": strength,
        "device": device,
        "dtype": dtype,
        "freezing.data": freezing,
        "comparison.texts": texts,
        "comparison.seed": seed,
    }
    settings = build(Compare, merge(config, set_ or [], flags))
    if quick:
        settings = replace(settings, comparison=settings.comparison.quick())
    _check(settings.comparison)
    if out is None:
        raise InputError("--out is needed: a directory for the run.")
    if is_finished(out, resume, as_json=json, quiet=quiet):
        return
    dictionaries = [_is_sae_run(source) for source in (settings.base, settings.tuned)]
    if any(dictionaries) and not all(dictionaries):
        raise InputError(
            f"{settings.base} and {settings.tuned}: an SAE run is compared with another SAE run."
        )
    work = _dictionaries if all(dictionaries) else _models
    told = work(settings, out, resume, quiet)
    say(f"{told}\n{out / 'report.html'}", quiet=quiet)
    emit(read_json(out / "summary.json"), as_json=json)


def _check(config: ComparisonConfig) -> None:
    """Raise InputError for settings that no comparison can have."""
    for name, least in (
        ("texts", 4),
        ("per_text", 1),
        ("n_folds", 2),
        ("permutations", 0),
        ("score_texts", 2),
    ):
        if getattr(config, name) < least:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least {least}.")


def _is_sae_run(source: str) -> bool:
    return (Path(source) / "sae_weights.safetensors").is_file()


# -- two models ------------------------------------------------------------------------------------------------------


def _models(settings: Compare, out: Path, resume: bool, quiet: bool) -> str:
    from probes import comparison

    base = _load(settings.base, settings)
    around: dict[str, Any] = {}
    if settings.tuned.endswith(".safetensors"):
        tuned, around["tuned_in"] = _steered(base, settings)
    else:
        tuned = _load(settings.tuned, settings)
    provenance = make_provenance(
        base=base.name, tuned=tuned.name, fingerprints=[base.fingerprint, tuned.fingerprint]
    )
    scores = _scores(base, settings)
    run = Run.open(out, "compare", asdict(settings), resume=resume, provenance=provenance)
    found = comparison.compare(
        base,
        tuned,
        settings.data,
        labels=settings.labels,
        scores=scores,
        config=settings.comparison,
        text_column=settings.text_column,
        freezing=_freezing(base, settings.freezing, run.path, quiet),
        out=run.path,
        quiet=quiet,
        **around,
    )
    return repr(found)


def _freezing(base: HookedModel, settings: Freezing, out: Path, quiet: bool) -> FreezingSweep | None:
    """The sweep, whose trainings are kept beside the report."""
    if settings.data is None:
        return None
    from probes.freezing import freezing_sweep
    from steerkit.adapters.tasks import make_task

    task = make_task(
        base,
        settings.data,
        label_column=settings.label_column,
        groups=settings.groups,
        n_train=settings.n_train,
        n_test=settings.n_test,
    )
    return freezing_sweep(
        base,
        task.objective,
        settings.training,
        learning_rates=settings.learning_rates,
        seeds=range(settings.seeds),
        extend=settings.extend,
        out=out / "freezing",
        resume=True,
        quiet=quiet,
    )


def _load(source: str, settings: Compare) -> HookedModel:
    """A model, or an adapter that steerkit wrote on the model it was made for."""
    from steerkit import adapters

    folder = Path(source) / "adapter" if (Path(source) / "adapter").is_dir() else Path(source)
    if not (folder / ADAPTER_RECORD).is_file():
        return load_model(source, settings.device, settings.dtype)
    base = load_model(read_json(folder / ADAPTER_RECORD)["base"], settings.device, settings.dtype)
    return adapters.load(folder, base)


def _steered(base: HookedModel, settings: Compare) -> tuple[HookedModel, Callable[[], Any]]:
    """The base under a vector at every token but BOS, by the file's name."""
    from steerkit.steering import SteeringVector, Where

    vector = SteeringVector.load(settings.tuned)
    vector.require_fit(base)
    steered = copy(base)
    steered.name = f"{base.name} + {settings.strength:g} × {Path(settings.tuned).name}"
    return steered, partial(base.steer, vector, strength=settings.strength, where=Where.everywhere())


def _scores(base: HookedModel, settings: Compare) -> dict[str, Any]:
    """The task's score on test examples."""
    from steerkit.adapters.tasks import storyworld_task

    named = settings.task
    if named is None and settings.data == "storyworld" and _reads_stories(base):
        named = "storyworld:liars"
    if named is None or named == "none":
        return {}
    story, _, variant = named.partition(":")
    if story != "storyworld" or not variant:
        raise InputError(
            f"--task {named!r} is none of {', '.join(f'storyworld:{v}' for v in storyworld.VARIANTS)}, none."
        )
    if not _reads_stories(base):
        raise InputError(f"--task {named}: {base.name} does not read StoryWorld's words as tokens.")
    task = storyworld_task(base, variant, n_train=1, n_test=TASK_EXAMPLES, shifted=False)
    name = f"share of {task.metric}" if variant == "liars" else f"{task.metric} on {named}"
    return {name: lambda model: task.measure(model)["test"]}


def _reads_stories(model: HookedModel) -> bool:
    """Whether every word of the language is one token."""
    known = {} if model.tokenizer is None else model.tokenizer.get_vocab()
    return (
        model.is_causal
        and model.has_lm_head
        and all(f" {w}" in known for w in storyworld.ATTRIBUTES["colour"])
    )


# -- two dictionaries ------------------------------------------------------------------------------------------------


def _dictionaries(settings: Compare, out: Path, resume: bool, quiet: bool) -> str:
    import numpy as np

    from probes.data import LabelledData, read_rows
    from probes.dictionaries import compare_dictionaries
    from probes.dictionaries_report import write_dictionaries
    from sae.training import SAERun
    from steerkit.data import load_documents

    runs = [SAERun.load(source) for source in (settings.base, settings.tuned)]
    site = _one_site(runs)
    documents = load_documents(settings.data, text_column=settings.text_column)
    config = settings.comparison
    texts = [documents[i] for i in range(min(config.texts, len(documents)))]
    data = LabelledData(texts, [""] * len(texts), np.arange(len(texts)), name=documents.name)
    models = [load_model(r.config["model"], settings.device, settings.dtype) for r in runs]
    provenance = make_provenance(
        models=[model.name for model in models], fingerprints=[model.fingerprint for model in models]
    )
    run = Run.open(out, "compare", asdict(settings), resume=resume, provenance=provenance)
    rows = [read_rows(m, data, [site], per_text=config.per_text, seed=config.seed) for m in models]
    if not np.array_equal(rows[0].token_ids, rows[1].token_ids):
        raise InputError(
            "The SAEs' models have different tokenizers: latents are matched on the same tokens."
        )
    tokens = models[0].tokenizer.convert_ids_to_tokens(rows[0].token_ids.tolist())
    (sae_a, sae_b), (acts_a, acts_b) = [r.sae for r in runs], [side.acts[site] for side in rows]
    found = compare_dictionaries(sae_a, sae_b, acts_a, acts_b, tokens=tokens, seed=config.seed)
    write_dictionaries(found, (settings.base, settings.tuned), run.path / "report.html")
    run.finish({"base": settings.base, "tuned": settings.tuned, "site": site, **found.to_dict()})
    return repr(found)


def _one_site(runs: list[SAERun]) -> str:
    """The site of both. Raises InputError where there is none, and for crosscoders."""
    for run in runs:
        if run.config["arch"].get("tuned") is not None:
            raise InputError(
                f"{run.path} is a crosscoder of two models: it has both dictionaries in it already."
            )
    a, b = (run.config["site"] for run in runs)
    if a != b:
        raise InputError(f"The SAEs read {a} and {b}: latents of one site are compared.")
    return str(a)
