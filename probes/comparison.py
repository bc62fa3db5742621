"""What training changed: a base and a tuned model on the same text, layer by layer, and how sure that is.

    found = compare(base, tuned, "storyworld")          # or a table, texts, a LabelledData; the models by any way to load them
    found.layers[3].cka, found.probes["mood"].change["blocks.3.hook_resid_post"], found.rollback["loss"]["single", 3]
    found.save("report.html")

Both models read the same tokens of the same texts, a bounded number of each, and all of this is made of those rows: CKA of
every layer with every other, Procrustes and RSA of like layers, how far each moved, probes on the same rows and folds. Beside
them the loss on the text, what it becomes when layers are rolled back, and how far the weights went. Where tokenizers differ a
row is a text; where sizes differ what makes no sense is named in `left_out`.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from probes.comparison_report import findings, write_report
from probes.crossval import cross_validate
from probes.data import LabelledData, ProbeRows, Reading, ceiling, load_labelled, read_rows
from probes.freezing import FreezingSweep
from probes.methods import Logistic, ProbeWarning
from probes.rollback import Evaluate, RollbackSweep, Scored, rollback_sweep
from probes.scores import HeldOut, Scores, difference
from probes.similarity import Drift, Null, Pair, Similarity, SimilarityWarning, drift, similarity
from probes.similarity.base import as_groups
from probes.similarity.pairwise import shuffled
from probes.splits import Classes, encode_labels
from probes.study import EMBEDDING, default_sites
from probes.weights import matched, parts, weights_of, weights_set
from steerkit import storyworld
from steerkit.data import load_documents
from steerkit.errors import InputError, SteerkitError
from steerkit.loading import Loaded
from steerkit.models import HookedModel
from steerkit.objectives import Evaluation, LanguageModelling, Score
from steerkit.runs import peak_memory_mb, progress, write_json
from steerkit.stats import Comparison as PairedDifference
from steerkit.stats import Interval
from steerkit.tokens import DEFAULT_CONTEXT, Tokenization, token_batches

Layer = int | str
"""A block's index, or the site's name where it is in no block."""
STORY_LABELS = ("honesty", "mood")
"""What is probed in StoryWorld's own stories, unless labels are named."""
_NATS = Score("loss", "loss", higher_is_better=False, bounds=(0.0, math.inf))


@dataclass(frozen=True)
class ComparisonConfig:
    """How much is read, and how closely it is looked at."""

    texts: int = 400
    """Texts at most."""
    per_text: int = 16
    """Tokens of each at most, drawn at random: the rows."""
    context: int | None = None
    """Tokens of a text that are read at most; by default what both models have, at most 512."""
    sites: tuple[str, ...] = ()
    """Default: the embedding and the residual stream after each block."""
    permutations: int = 100
    """Of whole documents, for the nulls."""
    Cs: tuple[float, ...] = Logistic.Cs
    """Penalties that probes choose from."""
    n_folds: int = 5
    rollback: bool = True
    score_texts: int = 100
    """Texts whose loss is measured, also while layers are rolled back."""
    seed: int = 0

    def quick(self) -> ComparisonConfig:
        """The same with less of everything: about a minute on two cores for StoryWorld."""
        return replace(
            self,
            texts=min(self.texts, 200),
            permutations=min(self.permutations, 40),
            Cs=(1e-3, 1e-2, 1e-1) if self.Cs == Logistic.Cs else self.Cs,
            score_texts=min(self.score_texts, 40),
        )


@dataclass(frozen=True)
class LayerComparison:
    """One site in both models."""

    layer: Layer
    site: str
    cka: Pair
    """Debiased linear CKA; its null: documents permuted."""
    procrustes: Pair
    """Cosine after the best rotation, on documents it was not fitted on."""
    rsa: Pair
    drift: Drift | None
    """None where widths or depths differ: there are no same neurons."""
    cosine_null: Null | None
    """Of the drift's cosine, documents permuted: what the mean that all rows share gives."""

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"layer": self.layer, "site": self.site}
        for name in ("cka", "procrustes", "rsa"):
            pair: Pair = getattr(self, name)
            null = pair.null
            found |= {name: pair.value, f"{name}_ci": [pair.interval.low, pair.interval.high]}
            found[f"{name}_null"] = None if null is None else {"expected": null.expected, "high": null.high}
        return found | {
            "drift": self.drift and self.drift.to_dict(),
            "cosine_null": self.cosine_null
            and {"expected": self.cosine_null.expected, "high": self.cosine_null.high},
        }


@dataclass(frozen=True)
class ProbeComparison:
    """Probes of one label before and after, on the same rows and folds."""

    label: str
    classes: Classes
    reading: Reading
    rows: int
    base: dict[str, Scores]
    """By site of the base."""
    tuned: dict[str, Scores]
    change: dict[str, PairedDifference]
    """Accuracy in the tuned model less that in the base, at each site that both have."""
    majority: Interval
    ceiling: Interval | None
    """Accuracy of the exact posterior, where it is known."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "classes": list(self.classes),
            "reading": self.reading,
            "rows": self.rows,
            "base": {site: scores.to_dict() for site, scores in self.base.items()},
            "tuned": {site: scores.to_dict() for site, scores in self.tuned.items()},
            "change": {site: change.to_dict() for site, change in self.change.items()},
            "majority": self.majority.to_dict(),
            "ceiling": self.ceiling and self.ceiling.to_dict(),
        }


@dataclass(frozen=True)
class ScoreChange:
    """What both models are worth, on the same examples."""

    base: Interval
    tuned: Interval
    change: PairedDifference
    """Tuned less base."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.to_dict(),
            "tuned": self.tuned.to_dict(),
            "change": self.change.to_dict(),
        }


@dataclass(frozen=True)
class WeightChange:
    """How far one parameter went."""

    name: str
    layer: int | None
    norm: float
    """‖tuned - base‖, Frobenius."""
    relative: float
    """Divided by ‖base‖; NaN for a parameter of zeros."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """All that was found."""

    base: str
    tuned: str
    data: str
    reading: Reading
    """What a row of the similarities is."""
    rows: int
    texts: int
    layers: tuple[LayerComparison, ...]
    cka: Similarity
    """Every site of the base with every site of the tuned model."""
    probes: dict[str, ProbeComparison]
    scores: dict[str, ScoreChange]
    rollback: dict[str, RollbackSweep]
    freezing: FreezingSweep | None
    """How far the base comes when fewer blocks of it are trained, where that was given."""
    weights: tuple[WeightChange, ...]
    left_out: tuple[str, ...]
    """What makes no sense for these two, and why."""
    notes: tuple[str, ...]
    config: ComparisonConfig
    seconds: float = 0.0

    @property
    def findings(self) -> tuple[str, ...]:
        """In words, what the intervals support."""
        return findings(self._figures())

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        figures = self._figures()
        return {"findings": list(findings(figures)), **figures}

    def _figures(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "tuned": self.tuned,
            "data": self.data,
            "reading": self.reading,
            "rows": self.rows,
            "texts": self.texts,
            "layers": self._layer_rows(),
            "cka": {
                "base": list(self.cka.sites_a),
                "tuned": list(self.cka.sites_b),
                "pairs": self.cka.to_rows(),
            },
            "probes": {name: found.to_dict() for name, found in self.probes.items()},
            "scores": {name: found.to_dict() for name, found in self.scores.items()},
            "rollback": {name: found.to_dict() for name, found in self.rollback.items()},
            "freezing": self.freezing and self.freezing.to_dict(),
            "weights": [vars(change) for change in self.weights],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "seed": self.config.seed,
            "permutations": self.config.permutations,
            "seconds": self.seconds,
            "peak_memory_mb": peak_memory_mb(),
        }

    def _layer_rows(self) -> list[dict[str, Any]]:
        """Probes are those of the first label, rollback that of single layers and the first score."""
        probe = next(iter(self.probes.values()), None)
        sweep = next(iter(self.rollback.values()), None)
        alone = {} if sweep is None else {s.at: s.change.difference.estimate for s in sweep.of_kind("single")}
        return [
            found.to_dict()
            | {
                "probe_base": None if probe is None else probe.base[found.site].accuracy.estimate,
                "probe_tuned": None if probe is None else probe.tuned[found.site].accuracy.estimate,
                "rollback_delta": alone.get(found.layer),
            }
            for found in self.layers
        ]

    def save(self, path: str | Path) -> Path:
        """Write the page, with plotly.min.js beside it."""
        return write_report(self.to_dict(), path)

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"{self.base} and {self.tuned} on {self.data}: {self.rows:,} rows of {self.texts:,} texts",
                *(f"  {finding}" for finding in self.findings),
                *(f"  left out: {reason}" for reason in self.left_out),
            ]
        )


def compare(
    base: HookedModel,
    tuned: HookedModel,
    data: Any = "storyworld",
    *,
    labels: Sequence[str] | None = None,
    scores: Mapping[str, Evaluate] | None = None,
    tuned_in: Callable[[], AbstractContextManager[Any]] | None = None,
    freezing: FreezingSweep | None = None,
    config: ComparisonConfig = ComparisonConfig(),
    quick: bool = False,
    text_column: str | None = None,
    out: str | Path | None = None,
    quiet: bool = True,
) -> Comparison:
    """Compare two models on a text.

    `data` is `storyworld`, one of its attributes or variants, a table, a list of texts, or a `LabelledData` (read whole);
    `labels` name attributes of StoryWorld or columns of the table (default: honesty and mood; `label` where there is one).
    `scores` are what a model is worth besides its loss on the text, the most important first. `tuned_in` opens what has to be
    around each forward of the tuned model: `lambda: model.steer(vector)` with the model on both sides. An adapter from
    `adapters.get` is compared with the model it is in. `freezing` is what training fewer blocks of the base comes to
    (`probes.freezing`), told and shown beside rollback. `out` is a directory for summary.json and report.html.

    Raises InputError for one class only, data without text, and models that have no site in common; NumericsError on NaN.
    """
    started = time.perf_counter()
    config = config.quick() if quick else config
    before, after = _sides(base, tuned, tuned_in)
    left_out: list[str] = []
    with (
        warnings.catch_warnings(record=True) as caught,
        progress(5, "comparing", "steps", quiet=quiet) as bar,
    ):
        warnings.simplefilter("always", SimilarityWarning)
        warnings.simplefilter("always", ProbeWarning)
        texts, labelled = _load(data, labels, config, text_column)
        reader = _Reader(before, after, config, _same_tokens(base, tuned, texts.texts))
        rows = reader(texts, "token" if reader.same_tokens else "mean")
        bar.advance(1, done="rows read")
        cka, layers = _similarities(rows, reader, left_out)
        bar.advance(1, done="layers compared")
        probes = {own.name: _probes(own, rows, reader, left_out) for own in labelled}
        bar.advance(1, done="probes fitted")
        evaluations = _evaluations(reader, texts, scores or {}, left_out)
        changes = {
            name: _score_change(before, after, evaluate, config.seed)
            for name, evaluate in evaluations.items()
        }
        bar.advance(1, done="scored")
        weights, sweeps = _weights_and_rollback(reader, texts, evaluations, left_out)
        bar.advance(1, done="rolled back")
    notes = dict.fromkeys(
        str(w.message) for w in caught if issubclass(w.category, (SimilarityWarning, ProbeWarning))
    )
    found = Comparison(
        base=base.name,
        tuned=tuned.name,
        data=texts.name,
        reading=rows[0].reading,
        rows=len(rows[0]),
        texts=len(np.unique(rows[0].text)),
        layers=layers,
        cka=cka,
        probes={name: own for name, own in probes.items() if own is not None},
        scores=changes,
        rollback=sweeps,
        freezing=freezing,
        weights=weights,
        left_out=tuple(left_out),
        notes=tuple(notes),
        config=config,
        seconds=time.perf_counter() - started,
    )
    if out is not None:
        found.save(Path(out) / "report.html")
        write_json(Path(out) / "summary.json", found.to_dict())
    return found


# -- the two models, and what they read ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    model: HookedModel
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    without_adapter: bool = False
    """Whether `inside` switches an adapter off."""


def _sides(
    base: HookedModel, tuned: HookedModel, tuned_in: Callable[[], AbstractContextManager[Any]] | None
) -> tuple[_Side, _Side]:
    """An adapter that sits in the very base is switched off for the base's side."""
    if getattr(tuned, "base", None) is base and hasattr(tuned, "disabled"):
        return _Side(tuned, tuned.disabled, without_adapter=True), _Side(tuned, tuned_in or nullcontext)
    return _Side(base), _Side(tuned, tuned_in or nullcontext)


def _load(
    data: Any, labels: Sequence[str] | None, config: ComparisonConfig, text_column: str | None
) -> tuple[LabelledData, list[LabelledData]]:
    """(the texts, the same with each label)"""
    if isinstance(data, LabelledData):
        if labels:
            raise InputError(f"{data.name} has its labels already: leave out labels.")
        return _bare(data, data.name), [replace(data, name=data.attribute or data.name)]
    story, _, what = str(data).partition(":") if isinstance(data, (str, Path)) else ("", "", "")
    if story == "storyworld" and what not in storyworld.VARIANTS:
        if what and labels:
            raise InputError(f"{data} names its label already: leave out labels, or give storyworld.")
        names = [what] if what else list(labels or STORY_LABELS)
        read = [load_labelled(f"storyworld:{n}", n_texts=config.texts, seed=config.seed) for n in names]
        return _bare(read[0], str(data)), [replace(r, name=n) for n, r in zip(names, read)]
    documents = load_documents(data, text_column=text_column)
    chosen = list(labels or [])
    if labels is None and _has_column(documents, "label"):
        chosen = ["label"]
    order = np.random.default_rng(config.seed).permutation(len(documents)).tolist()
    kept = [i for i in order if documents[i].strip()][: config.texts]
    found = [documents[i] for i in kept]
    same_text = np.unique(np.asarray(found, dtype=str), return_inverse=True)[1]
    texts = LabelledData(found, [""] * len(found), same_text, name=documents.name)
    columns = {name: documents.column(name) for name in chosen}
    return texts, [
        LabelledData.of(found, [value(i) for i in kept], name=name) for name, value in columns.items()
    ]


def _bare(data: LabelledData, name: str) -> LabelledData:
    """The texts without their labels."""
    return replace(data, labels=[""] * len(data), name=name)


def _has_column(documents: Any, name: str) -> bool:
    try:
        documents.column(name)(0)
    except InputError:
        return False
    return True


def _same_tokens(base: HookedModel, tuned: HookedModel, texts: Sequence[str]) -> bool:
    """Whether both models are given the same ids, special ones included. Raises InputError without a tokenizer."""
    for model in (base, tuned):
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer: load the model with tokenizer=….")
    if base.tokenizer is tuned.tokenizer:
        return True
    ids = [model.tokenizer(list(texts))["input_ids"] for model in (base, tuned)]
    return bool(ids[0] == ids[1])


class _Reader:
    """Reads the same rows of both models."""

    def __init__(self, before: _Side, after: _Side, config: ComparisonConfig, same_tokens: bool) -> None:
        self.before, self.after, self.config, self.same_tokens = before, after, config, same_tokens
        least = min(before.model.context, after.model.context, DEFAULT_CONTEXT)
        context = min(config.context or least, least)
        self.tokenization = Tokenization(context=context if same_tokens else config.context)
        self.sites = [list(config.sites) or default_sites(side.model) for side in (before, after)]
        self.common = [site for site in self.sites[0] if site in self.sites[1]]
        if not self.common:
            raise InputError(
                f"{before.model.name} and {after.model.name} have no layer of one name in common "
                f"({self.sites[0][0]}, …; {self.sites[1][0]}, …): name sites that both have."
            )
        self._read: dict[str, tuple[ProbeRows, ProbeRows]] = {}

    @property
    def same_sizes(self) -> bool:
        a, b = self.before.model, self.after.model
        return (a.n_layers, a.d_model) == (b.n_layers, b.d_model)

    def layer(self, site: str) -> Layer:
        found = self.before.model.site(site).layer
        return found if found is not None else "embed" if site == EMBEDDING else site

    def __call__(self, texts: LabelledData, reading: Reading) -> tuple[ProbeRows, ProbeRows]:
        """The rows of both models; read once, whatever asks for them."""
        if reading not in self._read:
            config = self.config
            found = []
            for side, sites in zip((self.before, self.after), self.sites):
                with side.inside():
                    found.append(
                        read_rows(
                            side.model,
                            texts,
                            sites,
                            reading=reading,
                            per_text=config.per_text,
                            tokenization=self.tokenization,
                            seed=config.seed,
                        )
                    )
            self._read[reading] = found[0], found[1]
        return self._read[reading]


# -- similarity ------------------------------------------------------------------------------------------------------


def _similarities(
    rows: tuple[ProbeRows, ProbeRows], reader: _Reader, left_out: list[str]
) -> tuple[Similarity, tuple[LayerComparison, ...]]:
    before, after = rows
    config, common = reader.config, reader.common
    options: dict[str, Any] = {"documents": before.groups, "seed": config.seed}
    whole = similarity(before.acts, after.acts, **options)
    options |= {"pairs": [(site, site) for site in common], "top_rows": None}
    cka = similarity(before.acts, after.acts, permutations=config.permutations, **options)
    procrustes = similarity(before.acts, after.acts, "procrustes", **options)
    rsa = similarity(before.acts, after.acts, "rsa", **options)
    moved: dict[str, Drift] = {}
    if not reader.same_tokens:
        left_out.append("tokens: the tokenizers differ, so each row is a text, the mean of its tokens")
    if reader.same_sizes:
        own = [{site: side.acts[site] for site in common} for side in rows]
        moved = drift(own[0], own[1], documents=as_groups(before.groups))
    else:
        a, b = reader.before.model, reader.after.model
        left_out.append(
            f"drift: {a.name} has {a.n_layers} layers of width {a.d_model}, {b.name} {b.n_layers} of width {b.d_model}, so there "
            "are no same neurons; layers of one number stand beside each other, and the heat map has all pairs"
        )
    layers = tuple(
        LayerComparison(
            reader.layer(site),
            site,
            cka[site, site],
            procrustes[site, site],
            rsa[site, site],
            moved.get(site),
            _cosine_null(before, after, site, config) if site in moved else None,
        )
        for site in common
    )
    return whole, layers


def _cosine_null(before: ProbeRows, after: ProbeRows, site: str, config: ComparisonConfig) -> Null | None:
    """Mean cosine of a row with a row of another document in its place."""
    if not config.permutations:
        return None
    x, y = (F.normalize(side.acts[site].double(), dim=1) for side in (before, after))
    groups = as_groups(before.groups)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = np.array(
        [
            float((x * y[shuffled(len(x), groups, generator)]).sum(1).mean())
            for _ in range(config.permutations)
        ]
    )
    return Null(float(drawn.mean()), len(drawn), float(np.quantile(drawn, 0.95)))


# -- probes ----------------------------------------------------------------------------------------------------------


def _probes(
    data: LabelledData, rows: tuple[ProbeRows, ProbeRows], reader: _Reader, left_out: list[str]
) -> ProbeComparison | None:
    """Probes of one label in both models; None, and named, where they cannot be."""
    config, model = reader.config, reader.before.model
    by_token = any(isinstance(label, list) for label in data.labels)
    if by_token and not reader.same_tokens:
        left_out.append(f"probes of {data.name}: it labels tokens, and the tokenizers differ")
        return None
    reading = _reading(data, reader, by_token)
    before, after = rows if reading == rows[0].reading else reader(data, reading)
    labels = _row_labels(data, before)
    kept = _common_enough(labels, before.groups, config.n_folds)
    if not kept.all():
        left_out.append(
            f"of {data.name}: classes with fewer than {config.n_folds} texts, {int((~kept).sum())} rows"
        )
    before, after = (_subset(side, labels, kept) for side in (before, after))
    found = [_validated(side.acts, before, config) for side in (before, after)]
    unread = {"": torch.arange(len(before))[:, None].float()}
    codes, classes = encode_labels(before.labels)
    exact = ceiling(model, data, before, classes) if reader.same_tokens else None
    return ProbeComparison(
        label=data.name,
        classes=classes,
        reading=reading,
        rows=len(before),
        base={site: own.scores() for site, own in found[0].items()},
        tuned={site: own.scores() for site, own in found[1].items()},
        change={site: difference(found[1][site], found[0][site], seed=config.seed) for site in reader.common},
        majority=_validated(unread, before, config, "prior")[""].scores().accuracy,
        ceiling=None if exact is None else HeldOut(exact, codes, before.groups).scores().accuracy,
    )


def _reading(data: LabelledData, reader: _Reader, by_token: bool) -> Reading:
    both_causal = reader.before.model.is_causal and reader.after.model.is_causal
    if not (reader.same_tokens and both_causal):
        return "token" if by_token else "mean"
    return "token" if by_token or data.attribute else "last"


def _row_labels(data: LabelledData, rows: ProbeRows) -> np.ndarray:
    """Raises InputError where a text has fewer labels than tokens."""
    found = []
    for text, position in zip(rows.text.tolist(), rows.position.tolist()):
        label = data.labels[text]
        if isinstance(label, list) and position >= len(label):
            raise InputError(
                f"Text {text} has {len(label)} labelled tokens and more tokens: labels must be of the model's tokens."
            )
        found.append(label[position] if isinstance(label, list) else label)
    return np.array(found)


def _common_enough(labels: np.ndarray, groups: np.ndarray, least: int) -> np.ndarray:
    """Rows whose class as many groups have as there are folds. Raises InputError where one class or none is left."""
    counts = {name: len(np.unique(groups[labels == name])) for name in np.unique(labels)}
    enough = [name for name, n in counts.items() if n >= least]
    if len(enough) < 2:
        raise InputError(
            f"A probe tells classes apart, and of {len(counts)} only {len(enough)} stand in {least} texts or more: give more "
            "texts, or leave the labels out."
        )
    return np.isin(labels, enough)


def _subset(rows: ProbeRows, labels: np.ndarray, kept: np.ndarray) -> ProbeRows:
    index = torch.from_numpy(np.flatnonzero(kept))
    return replace(
        rows,
        acts={site: acts[index] for site, acts in rows.acts.items()},
        labels=labels[kept],
        groups=rows.groups[kept],
        text=rows.text[kept],
        position=rows.position[kept],
        token_ids=rows.token_ids[kept],
    )


def _validated(
    acts: Mapping[str, Tensor], rows: ProbeRows, config: ComparisonConfig, method: str = "logistic"
) -> dict[str, HeldOut]:
    probe = Logistic(Cs=config.Cs, exact=False) if method == "logistic" else method
    return cross_validate(
        acts, rows.labels, rows.groups, method=probe, shuffled=False, n_folds=config.n_folds, seed=config.seed
    ).held_out


# -- scores, weights, rollback ---------------------------------------------------------------------------------------


def _evaluations(
    reader: _Reader, texts: LabelledData, scores: Mapping[str, Evaluate], left_out: list[str]
) -> dict[str, Evaluate]:
    """Those given, and the loss on the text where both models have one of the same tokens."""
    models = (reader.before.model, reader.after.model)
    for model in models:
        if not (model.is_causal and model.has_lm_head):
            left_out.append(f"the loss: {model.name} does not predict the next token")
            return dict(scores)
    if not reader.same_tokens:
        left_out.append("the loss: nats a token are not comparable where the tokenizers differ")
        return dict(scores)
    some = texts.texts[: reader.config.score_texts]
    objective = LanguageModelling(models[0], None, test=list(some), context=reader.tokenization.context)

    def loss(model: HookedModel) -> Evaluation:
        return replace(objective.evaluate(model, "test"), judged_by=_NATS)

    return {**scores, "loss": loss}


def _score_change(before: _Side, after: _Side, evaluate: Evaluate, seed: int) -> ScoreChange:
    found = []
    for side in (before, after):
        with side.inside():
            found.append(Scored.of(evaluate(side.model), None, side.model.name))
    return ScoreChange(found[0].interval(), found[1].interval(), found[1].less(found[0], 2000, seed))


def _weights_and_rollback(
    reader: _Reader, texts: LabelledData, evaluations: Mapping[str, Evaluate], left_out: list[str]
) -> tuple[tuple[WeightChange, ...], dict[str, RollbackSweep]]:
    """Empty, and named, where the change is not one of weights of the same shapes."""
    try:
        plain, base, tuned = _effective_weights(reader.before, reader.after)
        with weights_set(plain, tuned):
            _require_equal(plain, reader, texts)
            changes = _weight_changes(plain, base, tuned)
            if not reader.config.rollback:
                return changes, {}
            kinds = ("single", "prefix", "suffix", "part")
            seed = reader.config.seed
            return changes, {
                name: rollback_sweep(plain, base, evaluate, kinds=kinds, seed=seed)
                for name, evaluate in evaluations.items()
            }
    except InputError as error:
        left_out.append(f"weight changes and rollback: {str(error).rstrip('.')}")
        return (), {}


def _effective_weights(
    before: _Side, after: _Side
) -> tuple[HookedModel, dict[str, Tensor], dict[str, Tensor]]:
    """(the base as an ordinary model, its weights, the tuned ones by the same names): copies."""
    if after.inside is not nullcontext:
        raise InputError(
            "the tuned model is the base with something around its forwards, no weights of its own"
        )
    kept = []
    for side in (before, after):
        with side.inside():
            plain = _plain(side)
            kept.append((plain, {name: weight.clone() for name, weight in weights_of(plain).items()}))
    (plain, base), (_, tuned) = kept
    names = [name for name, _ in plain.model.named_parameters()]
    return plain, matched(plain, base, names), matched(plain, tuned, names)


def _plain(side: _Side) -> HookedModel:
    """The model itself, or a copy with its adapter put into the weights or taken out."""
    model, own = side.model.model, side.model
    if not hasattr(model, "merge_and_unload"):
        return own
    copied: Any = copy.deepcopy(model)
    try:
        merged = copied.unload() if side.without_adapter else copied.merge_and_unload(safe_merge=True)
    except (
        ValueError,
        NotImplementedError,
        AttributeError,
        SteerkitError,
    ) as error:  # peft has no error of its own
        raise InputError(f"the adapter of {own.name} is no change of weights ({error})") from error
    return HookedModel(Loaded(merged, own.tokenizer, own.name, own.revision, own.has_lm_head))


@torch.inference_mode()
def _require_equal(plain: HookedModel, reader: _Reader, texts: LabelledData) -> None:
    """Raise InputError unless the weights alone make the tuned model what it is."""
    batch = next(iter(token_batches(plain, list(texts.texts[:4]), reader.tokenization)))
    own, tuned = (model.final(batch.input_ids, batch.attention_mask) for model in (plain, reader.after.model))
    rounding = 1e-3 if plain.dtype == torch.float32 else 5e-2
    keep = batch.keep.to(own.device)
    apart = float((own - tuned.to(own.device))[keep].abs().max() / tuned.abs().max())
    if not apart < rounding:
        raise InputError(
            f"{reader.after.model.name} is not what its weights alone would be (final states are {apart:.2g} apart): its "
            "adapter does more than change them"
        )


def _weight_changes(
    plain: HookedModel, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> tuple[WeightChange, ...]:
    layers = {name: part for part, names in parts(plain).items() for name in names if isinstance(part, int)}
    found = []
    for name, before in base.items():
        norm, size = float((tuned[name].double() - before.double()).norm()), float(before.double().norm())
        found.append(WeightChange(name, layers.get(name), norm, norm / size if size else math.nan))
    return tuple(found)
