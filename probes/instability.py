"""Instability: how far apart runs end that differ in nothing but the seed, and what is known to help.

    runs = seed_runs(model, objective, FinetuneConfig(epochs=3), seeds=range(5), remedies=Remedies(reinitialised=2))
    runs.instability()                              # SD of scores, disagreement, Fleiss' κ, Jensen–Shannon, failed runs
    representation_instability(runs.acts, "linear_cka")                     # {site: 1 - similarity, mean over pairs of runs}

    SD            = √(Σ_s (m_s - m̄)² / (S - 1)),                          interval from χ² with S - 1 degrees of freedom
    disagreement  = mean over pairs of runs of the share of examples with different predictions
    κ             = (P̄ - P_e) / (1 - P_e),   P̄ = 1 - disagreement,   P_e = Σ_c p_c²   (p_c: share of all predictions that are c)
    JSD           = mean over pairs and examples of H((p + q)/2) - (H(p) + H(q))/2, in nats, from 0 to ln 2

Du and Nguyen 2023, “Measuring the Instability of Fine-Tuning”, https://arxiv.org/abs/2302.07778; Fleiss 1971. Pairs share runs, so
intervals leave out runs, not pairs. A run has failed where it is no better than always giving the most frequent class (Mosbach et
al. 2021, https://arxiv.org/abs/2006.04884).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.regularisation import SpectralPenalty, WithMargin
from probes.similarity import similarity
from probes.similarity.base import Side
from probes.weights import preserved
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, Outcome, Select, everything, finetune, layers, trainable
from steerkit.models import HookedModel
from steerkit.objectives import Classification, Evaluation, Objective, autocast
from steerkit.plots import error_bars
from steerkit.runs import write_json
from steerkit.sites import evaluating
from steerkit.stats import Interval, jackknife_of

Likeness = Callable[[Side, Side], Mapping[str, float]]
"""Activations of two runs -> similarity at each site, 1 for equal."""
_DEFAULTS = FinetuneConfig()


# -- measures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Instability:
    """How far apart runs are. Intervals are over runs; their ends are NaN with two runs, except the SD's."""

    scores: tuple[float, ...]
    """Accuracy of each run."""
    sd: Interval
    disagreement: Interval
    fleiss_kappa: Interval
    """1: all agree; 0: no more than by chance. NaN where every prediction is of one class."""
    jsd: Interval
    failed: tuple[int, ...]
    """Runs no better than the most frequent class, by position."""
    n_examples: int

    def __repr__(self) -> str:
        return (
            f"Instability of {len(self.scores)} runs on {self.n_examples:,} examples: accuracy "
            f"{np.mean(self.scores):.4g} ± {self.sd!r}, disagreement {self.disagreement!r}, Fleiss κ {self.fleiss_kappa!r}, "
            f"JSD {self.jsd!r} nats, {len(self.failed)} failed"
        )

    def to_dict(self) -> dict[str, Any]:
        intervals = ("sd", "disagreement", "fleiss_kappa", "jsd")
        return {
            "scores": list(self.scores),
            "failed": list(self.failed),
            "n_examples": self.n_examples,
            **{name: getattr(self, name).to_dict() for name in intervals},
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())


def instability(
    probabilities: Float[np.ndarray, "runs n classes"] | Float[Tensor, "runs n classes"],
    labels: Int[np.ndarray, " n"] | Sequence[int],
) -> Instability:
    """Compare runs by what they predict for the same examples, whose classes are `labels`.

    Raises InputError with fewer than two runs and for probabilities that are none, NumericsError for NaN.
    """
    p, y = _checked(probabilities, labels)
    predicted = p.argmax(-1)
    scores = (predicted == y).mean(1)
    majority = np.bincount(y).max() / len(y)
    kinds = np.eye(p.shape[-1])[predicted]
    return Instability(
        tuple(scores.tolist()),
        standard_deviation(scores),
        over_pairs(_pairwise(lambda i, j: float((predicted[i] != predicted[j]).mean()), len(p))),
        _over_runs(lambda runs: fleiss_kappa(kinds[runs].sum(0)), len(p)),
        over_pairs(_pairwise(lambda i, j: float(jensen_shannon(p[i], p[j]).mean()), len(p))),
        tuple(np.flatnonzero(scores <= majority).tolist()),
        len(y),
    )


def _checked(probabilities: Any, labels: Any) -> tuple[Float[np.ndarray, "runs n classes"], np.ndarray]:
    p = np.asarray(
        probabilities.cpu() if isinstance(probabilities, Tensor) else probabilities, dtype=np.float64
    )
    y = np.asarray(labels, dtype=np.int64)
    if p.ndim != 3 or not p.size or p.shape[1] != len(y):
        raise InputError(f"Probabilities are (runs, n, classes), not {p.shape}, for {len(y)} labels.")
    _need_two(len(p))
    if not np.isfinite(p).all():
        run = int(np.flatnonzero(~np.isfinite(p).all((1, 2)))[0])
        raise NumericsError(f"Run {run} has probabilities that are NaN or infinite: leave it out.")
    if (p < 0).any() or not np.allclose(p.sum(-1), 1, atol=1e-3):
        raise InputError("Probabilities must be at least 0 and add up to 1: give softmax's, not logits.")
    if y.min() < 0 or y.max() >= p.shape[2]:
        raise InputError(f"Labels are classes from 0 to {p.shape[2] - 1}, not {y.min()} to {y.max()}.")
    return p, y


def _need_two(n: int) -> None:
    if n < 2:
        raise InputError(f"{n} run: instability is a matter of several; give at least two seeds.")


def standard_deviation(scores: Sequence[float] | Float[np.ndarray, " runs"], level: float = 0.95) -> Interval:
    """SD of scores over runs, with the interval of normal scores: √((S-1) s² / χ²). InputError with one run."""
    from scipy.special import chdtri

    n = len(scores)
    _need_two(n)
    sd = float(np.std(scores, ddof=1))
    low, high = (float(chdtri(n - 1, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return Interval(
        sd, sd * math.sqrt((n - 1) / low), sd * math.sqrt((n - 1) / high), sd / math.sqrt(2 * (n - 1)), level
    )


def fleiss_kappa(counts: Float[np.ndarray, "n classes"]) -> float:
    """Fleiss' κ of how many runs put each example in each class; every row adds up to the number of runs. NaN if P_e = 1."""
    runs = counts[0].sum()
    agreement = (np.square(counts).sum(1) - runs).mean() / (runs * (runs - 1))
    chance = np.square(counts.sum(0) / counts.sum()).sum()
    return float((agreement - chance) / (1 - chance)) if chance < 1 else math.nan


def jensen_shannon(
    p: Float[np.ndarray, "... classes"], q: Float[np.ndarray, "... classes"]
) -> Float[np.ndarray, "..."]:
    """Jensen–Shannon divergence in nats; 0 log 0 is 0."""
    return np.maximum(0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(p: Float[np.ndarray, "... classes"]) -> Float[np.ndarray, "..."]:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def representation_instability(
    acts: Sequence[Side], measure: str | Likeness = "linear_cka", **options: Any
) -> dict[str, Interval]:
    """1 - similarity of the runs' activations at each site, mean over pairs, interval over runs.

    `measure` is a name of `probes.similarity.MEASURES` (with `options` of `similarity`) or a function. Raises InputError with one
    run, and as the measure does.
    """
    _need_two(len(acts))

    def by_name(a: Side, b: Side) -> Mapping[str, float]:
        assert isinstance(measure, str)
        found = similarity(a, b, measure, pairs="matched", interval=False, top_rows=None, **options)
        return {pair.a: pair.value for pair in found.pairs.values()}

    likeness = by_name if isinstance(measure, str) else measure
    found = {(i, j): dict(likeness(acts[i], acts[j])) for i, j in itertools.combinations(range(len(acts)), 2)}
    sites = list(found[0, 1])
    return {
        site: over_pairs(_pairwise(lambda i, j, at=site: 1 - found[i, j][at], len(acts))) for site in sites
    }


def representation_figure(measures: Mapping[str, Mapping[str, Interval]]) -> Any:
    """{name of a measure: what `representation_instability` gave} as a Plotly figure: a line each, over sites."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, found in measures.items():
        values = list(found.values())
        figure.add_scatter(
            x=list(found),
            y=[v.estimate for v in values],
            error_y=error_bars(values),
            mode="lines+markers",
            name=name,
        )
    figure.update_layout(
        yaxis={"title": {"text": "1 − similarity between runs"}}, showlegend=True, height=400
    )
    return figure


def over_pairs(values: Float[np.ndarray, "runs runs"]) -> Interval:
    """Mean of a symmetric matrix of pairs, without its diagonal, with a jackknife over runs; NaN ends with two runs."""

    def mean(runs: np.ndarray) -> float:
        own = values[np.ix_(runs, runs)]
        return float(own.sum() / (len(own) * (len(own) - 1)))

    return _over_runs(mean, len(values))


def _pairwise(of: Callable[..., float], n: int) -> Float[np.ndarray, "runs runs"]:
    values = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        values[i, j] = values[j, i] = of(i, j)
    return values


def _over_runs(statistic: Callable[[np.ndarray], float], n: int) -> Interval:
    every = np.arange(n)
    estimate = statistic(every)
    if n == 2:
        return Interval(estimate, math.nan, math.nan, math.nan)
    return jackknife_of(estimate, np.array([statistic(np.delete(every, i)) for i in every]))


# -- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedies:
    """What is known to make fine-tuning more stable. What is None is left as the configuration has it.

    Warm-up, bias correction and many epochs at a small rate: Mosbach et al. 2021, https://arxiv.org/abs/2006.04884; bias
    correction, epochs and re-initialisation: Zhang et al. 2021, https://arxiv.org/abs/2006.05987; the penalties:
    `probes.regularisation`.
    """

    bias_correction: bool | None = None
    """True: AdamW. False: AdamW without bias correction, which BERT was first fine-tuned with."""
    lr: float | None = None
    warmup: float | None = None
    """Share of the steps over which the rate rises."""
    epochs: float | None = None
    reinitialised: int = 0
    """Blocks at the top that begin from fresh weights, other ones for each seed."""
    margin: float = 0.0
    """Weight of the penalty on classes that are near each other; of a classification only."""
    spectral: float = 0.0
    """Weight of the penalty on the spectral norms of what is trained."""

    def config(self, config: FinetuneConfig) -> FinetuneConfig:
        """The configuration with the remedies in it."""
        changed: dict[str, Any] = {
            name: value for name in ("lr", "warmup", "epochs") if (value := getattr(self, name)) is not None
        }
        if self.bias_correction is not None:
            changed["optimiser"] = "AdamW" if self.bias_correction else "UncorrectedAdamW"
        return replace(config, **changed)

    def train(self, model: HookedModel, objective: Objective[Any], config: FinetuneConfig) -> Outcome:
        """Fine-tune with the penalties, from the weights that the model has. InputError for a margin without classes."""
        regulariser = SpectralPenalty(self.spectral) if self.spectral else None
        if self.margin:
            if not isinstance(objective, Classification):
                raise InputError(
                    f"A margin is one between classes, and {objective.name} has none: leave out margin."
                )
            objective = cast(Classification, WithMargin(objective, self.margin))
        return finetune(model, objective, config, regulariser=regulariser)

    def initialise(self, model: HookedModel, seed: int) -> None:
        """Fresh weights in the top blocks, in place. Raises InputError for more blocks than there are."""
        if not 0 <= self.reinitialised <= model.n_layers:
            raise InputError(
                f"reinitialised is {self.reinitialised}; {model.name} has {model.n_layers} blocks."
            )
        if self.reinitialised:
            names = layers(*range(model.n_layers - self.reinitialised, model.n_layers))(model)
            fresh = dict(model.randomized(seed).model.named_parameters())
            with torch.no_grad():
                for name, parameter in model.model.named_parameters():
                    if name in set(names):
                        parameter.copy_(fresh[name])


STABLE = Remedies(bias_correction=True, lr=2e-5, warmup=0.1, epochs=20)
"""The recipe of 2006.04884."""


@dataclass(frozen=True, repr=False)
class SeedRuns:
    """Runs that differ in the seed: head, order of examples, dropout, and weights that were made anew."""

    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...] = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    probabilities: Float[np.ndarray, "runs n classes"] | None = field(repr=False)
    """Of classes; None where the objective has none."""
    labels: Int[np.ndarray, " n"] | None = field(repr=False)
    acts: tuple[Side, ...] = field(repr=False)
    """What `read` gave for each run."""

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(evaluation.score for evaluation in self.evaluations)

    @property
    def sd(self) -> Interval:
        """SD of the scores."""
        return standard_deviation(self.scores)

    def instability(self) -> Instability:
        """All measures on predictions. Raises InputError for an objective without classes: see `sd` there."""
        if self.probabilities is None or self.labels is None:
            raise InputError("Only runs of a classification predict classes; of others there is the `sd`.")
        return instability(self.probabilities, self.labels)

    def __repr__(self) -> str:
        name = self.evaluations[0].judged_by.name
        return f"SeedRuns({len(self.seeds)} seeds; {name} {np.mean(self.scores):.4g}, SD {self.sd!r})"


def seed_runs(
    model: HookedModel,
    objective: Objective[Any],
    config: FinetuneConfig = _DEFAULTS,
    seeds: Iterable[int] = range(5),
    *,
    remedies: Remedies = Remedies(),
    select: Select | None = None,
    read: Callable[[HookedModel], Side] | None = None,
    split: str = "test",
) -> SeedRuns:
    """Fine-tune the model once a seed, from the same weights, and keep what the runs predict on `split`.

    `select` says what is trained: everything, if None (`trainable`). `read` gives activations to compare, as
    `lambda m: m.activations(texts, sites)`. Afterwards model and head are as before. Raises InputError with fewer than two seeds
    or twice the same, NumericsError when a run fails.
    """
    chosen = tuple(seeds)
    _need_two(len(chosen))
    if len(set(chosen)) < len(chosen):
        raise InputError(
            f"A seed is there twice ({', '.join(map(str, chosen))}): runs of one seed are the same."
        )
    settings = remedies.config(config)
    outcomes, evaluations, predicted, acts = [], [], [], []
    for seed in chosen:
        with preserved(model, objective), trainable(model, select or everything):
            remedies.initialise(model, seed)
            outcomes.append(remedies.train(model, objective, replace(settings, seed=seed)))
            evaluations.append(objective.evaluate(model, split, settings.dtype))
            if isinstance(objective, Classification):
                predicted.append(class_probabilities(model, objective, split, settings.dtype))
            if read is not None:
                with torch.no_grad():
                    acts.append(read(model))
    labels = None
    if isinstance(objective, Classification):
        labels = np.array([example.label for example in objective.examples(split)])
    probabilities = np.stack(predicted) if predicted else None
    return SeedRuns(chosen, tuple(outcomes), tuple(evaluations), probabilities, labels, tuple(acts))


@torch.no_grad()
def class_probabilities(
    model: HookedModel, objective: Classification, split: str = "test", dtype: str | None = None
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of the classes for the examples of a split, in their order."""
    examples = objective.examples(split)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    found = np.zeros((len(examples), len(objective.classes)))
    with evaluating(model.model), autocast(model, dtype):
        for first in range(0, len(order), 64):
            part = order[first : first + 64]
            states = objective.pooled(model, [examples[i] for i in part])
            logits = objective.head(states.to(objective.head.weight.device))
            found[part] = logits.double().softmax(-1).cpu().numpy()
    return found
