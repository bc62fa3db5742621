"""k-sparse probing: how well k candidates tell a concept.

    sparse_probing(dictionary, examples, ks=(1, 2, 5)).accuracy[1]              # 0.81 [0.79, 0.83]

For each concept the k candidates with the largest standardised difference of class means,

    |μ₊ - μ₋| / √((σ₊² + σ₋²) / 2),

are chosen and a logistic regression is fitted to them (L2, C = 1, standardised, balanced), all on the chosen
examples; what is given is the balanced accuracy on the others, averaged over the concepts. Chance is 0.5. The
accuracy on the examples of the choice stands beside it: their difference is what choosing among many
candidates pretends.

Gurnee et al. 2023, https://arxiv.org/abs/2305.01610; Karvonen et al. 2025 (SAEBench),
https://arxiv.org/abs/2503.09532. SAEBench ranks by the plain difference of means; latents have no natural
unit, so that we divide by their spread: no score depends on how a candidate is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.judging.dictionaries import Dictionary, logistic
from sae.judging.examples import Examples, balanced_accuracy, clustered, hit_sums, of_share
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.stats import Interval

KS = (1, 2, 5)


@dataclass(frozen=True)
class SparseProbing:
    """Balanced accuracies of k candidates on held-out documents."""

    name: str
    accuracy: Mapping[int, Interval]
    """k -> mean over concepts, with the interval clustered by document."""
    in_sample: Mapping[int, float]
    """k -> the same on the examples of the choice."""
    by_concept: Mapping[str, Mapping[int, float]] = field(repr=False)
    candidates: Mapping[str, list[int]] = field(repr=False)
    """Concept -> the candidates, the best first."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy": {str(k): interval.to_dict() for k, interval in self.accuracy.items()},
            "in_sample": {str(k): value for k, value in self.in_sample.items()},
            "by_concept": {
                name: {str(k): value for k, value in row.items()} for name, row in self.by_concept.items()
            },
            "candidates": dict(self.candidates),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        rows = [
            f"  k = {k}: {interval!r} (in sample {self.in_sample[k]:.3f})"
            for k, interval in self.accuracy.items()
        ]
        return "\n".join([f"Sparse probing of {self.name}, balanced accuracy (chance 0.5)", *rows])


def sparse_probing(dictionary: Dictionary, examples: Examples, *, ks: Sequence[int] = KS) -> SparseProbing:
    """Probe every concept with the best 1, 2, 5 … candidates. Raises InputError for a k that is not 1 or more."""
    if not ks or min(ks) < 1:
        raise InputError(f"k is {min(ks, default=0)}: a probe needs at least one candidate.")
    labels, chosen = examples.labels, examples.chosen
    best = best_candidates(dictionary, examples, max(ks))
    n_ks, n_concepts = len(ks), labels.shape[1]
    correct = np.zeros((n_ks, len(examples), n_concepts), dtype=bool)
    for c in range(n_concepts):
        columns = dictionary.columns(best[c])
        for i, k in enumerate(ks):
            w, b = logistic(columns[chosen, :k], labels[chosen, c])
            correct[i, :, c] = (columns[:, :k] @ w + b > 0) == labels[:, c]

    def accuracy(i: int, part: np.ndarray) -> np.ndarray:
        return hit_sums(correct[i, part], labels[part], examples.groups[part])

    scored = [accuracy(i, ~chosen) for i in range(n_ks)]
    by_concept = np.stack([balanced_accuracy(sums.sum(0)) for sums in scored])
    return SparseProbing(
        dictionary.name,
        {k: mean_interval(sums) for k, sums in zip(ks, scored)},
        {k: float(np.nanmean(balanced_accuracy(accuracy(i, chosen).sum(0)))) for i, k in enumerate(ks)},
        {
            name: {k: float(by_concept[i, c]) for i, k in enumerate(ks)}
            for c, name in enumerate(examples.names)
        },
        {name: best[c].tolist() for c, name in enumerate(examples.names)},
    )


def best_candidates(dictionary: Dictionary, examples: Examples, k: int) -> list[Int[np.ndarray, " k"]]:
    """The k candidates that tell each concept best on the chosen examples, the best first."""
    scores = separation(dictionary, examples.chosen, examples.labels)
    k = min(k, dictionary.size)
    return [np.argsort(-column, kind="stable")[:k] for column in scores.T]


def separation(
    dictionary: Dictionary, part: Bool[np.ndarray, " n"], labels: Bool[np.ndarray, "n concepts"]
) -> Float[np.ndarray, "m concepts"]:
    """Standardised difference of the class means of every candidate, without sign; -1 where it does not vary."""
    values, labels = dictionary.values[part], labels[part]
    squares = values.power(2) if dictionary.sparse else values**2
    mean, square = [], []
    for side in (labels, ~labels):
        weights = side / np.maximum(side.sum(0), 1)
        mean.append(np.asarray(values.T @ weights, dtype=np.float64))
        square.append(np.asarray(squares.T @ weights, dtype=np.float64))
    difference = np.abs(mean[0] - mean[1])
    total = (square[0] + square[1]) / 2
    variance = total - (mean[0] ** 2 + mean[1] ** 2) / 2
    variance = np.where(variance > 1e-9 * total, variance, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = difference / np.sqrt(variance)
    # A candidate that is constant within both classes tells them perfectly, or is constant altogether.
    return np.where(variance > 0, found, np.where(difference > 1e-6 * np.sqrt(total), np.inf, -1.0))


def mean_interval(sums: Float[np.ndarray, "g concepts 4"]) -> Interval:
    """The mean balanced accuracy over concepts, jackknifed over groups."""
    return of_share(clustered(sums, lambda s: np.nanmean(balanced_accuracy(s), axis=-1)), len(sums))
