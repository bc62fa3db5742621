"""How good held-out probabilities are, with intervals clustered by group, and which of two probes is better.

    scores = held_out.scores()
    scores.accuracy, scores.auroc, scores.cross_entropy, scores.ece       # 0.91 [0.89, 0.93] …
    difference(tuned, base, "accuracy")                                   # paired: the same rows, resampled together

`auroc` is one class against the rest, averaged over classes; `cross_entropy` is in nats (`bits` in bits);
`ece` is the expected calibration error of the most probable class, in 15 bins of equal width (Guo et al.
2017, https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from steerkit.errors import InputError
from steerkit.stats import (
    Comparison,
    Interval,
    auroc,
    auroc_interval,
    group_sums,
    jackknife,
    jackknife_of,
    paired_test,
)

PROBABILITY_FLOOR = 1e-12
"""Probabilities are not taken as less in a cross-entropy: a certain error costs at most 27.6 nats."""
_BINS = 15
_BLOCKS = 20
"""Blocks of groups that the jackknife of an AUROC over more than two classes leaves out."""


@dataclass(frozen=True)
class Scores:
    """What a probe reaches on rows that it was not fitted on."""

    accuracy: Interval
    balanced_accuracy: Interval
    """Mean over classes of the share of a class's rows that are told right."""
    auroc: Interval
    cross_entropy: Interval
    """Nats a row."""
    ece: Interval

    @property
    def bits(self) -> Interval:
        """The cross-entropy in bits a row."""
        ce = self.cross_entropy
        scale = 1 / math.log(2)
        return Interval(
            ce.estimate * scale, ce.low * scale, ce.high * scale, ce.standard_error * scale, ce.level
        )

    def to_dict(self) -> dict[str, Any]:
        names = ("accuracy", "balanced_accuracy", "auroc", "cross_entropy", "bits", "ece")
        return {name: getattr(self, name).to_dict() for name in names}

    def __repr__(self) -> str:
        return (
            f"accuracy {self.accuracy!r}, AUROC {self.auroc!r}, cross-entropy {self.cross_entropy!r} nats, "
            f"calibration error {self.ece!r}"
        )


@dataclass(frozen=True, repr=False)
class HeldOut:
    """Probabilities of rows, each from a probe that was not fitted on its group."""

    probabilities: Float[np.ndarray, "n classes"] = field(repr=False)
    codes: Int[np.ndarray, " n"] = field(repr=False)
    """The true class of each row."""
    groups: Shaped[np.ndarray, " n"] = field(repr=False)

    @cached_property
    def correct(self) -> Float[np.ndarray, " n"]:
        """1 where the most probable class is the true one; ties share."""
        top = self.probabilities == self.probabilities.max(1, keepdims=True)
        return top[np.arange(len(top)), self.codes] / top.sum(1)

    @cached_property
    def losses(self) -> Float[np.ndarray, " n"]:
        """−log of the true class's probability, in nats."""
        return -np.log(
            np.maximum(self.probabilities[np.arange(len(self.codes)), self.codes], PROBABILITY_FLOOR)
        )

    def of_rows(self, chosen: Shaped[np.ndarray, " k"]) -> HeldOut:
        """Some of the rows."""
        return HeldOut(self.probabilities[chosen], self.codes[chosen], self.groups[chosen])

    def scores(self) -> Scores:
        """All of them. Raises InputError with fewer than two groups."""
        mean = _mean_of(np.stack([self.correct, self.losses]), self.groups)
        return Scores(mean[0].clipped(0, 1), self._balanced(), self._auroc(), mean[1], self._ece())

    def __repr__(self) -> str:
        return f"HeldOut({len(self.codes):,} rows of {len(np.unique(self.groups)):,} groups)"

    def _balanced(self) -> Interval:
        member = np.eye(self.probabilities.shape[1])[self.codes]
        sums = group_sums(np.concatenate([member * self.correct[:, None], member], axis=1), self.groups)
        k = member.shape[1]

        def mean_recall(s: np.ndarray) -> np.ndarray:
            recall = np.where(s[..., k:] > 0, s[..., :k] / np.maximum(s[..., k:], 1), np.nan)
            return np.nanmean(recall, axis=-1)

        return jackknife(sums, mean_recall).clipped(0, 1)

    def _auroc(self) -> Interval:
        if self.probabilities.shape[1] == 2:
            return auroc_interval(self.probabilities[:, 1], self.codes == 1, self.groups)
        _, group = np.unique(self.groups, return_inverse=True)
        block = group % _BLOCKS
        everything = self._mean_auroc(np.ones(len(block), dtype=bool))
        parts = [self._mean_auroc(block != b) for b in range(int(block.max()) + 1)]
        if len(parts) < 2 or not np.isfinite(parts).all():
            return Interval(everything, math.nan, math.nan, math.nan)
        return jackknife_of(everything, np.array(parts)).clipped(0, 1)

    def _mean_auroc(self, rows: np.ndarray) -> float:
        found = [auroc(p[rows], self.codes[rows] == k) for k, p in enumerate(self.probabilities.T)]
        found = [area for area in found if not math.isnan(area)]
        return float(np.mean(found)) if found else math.nan

    def _ece(self) -> Interval:
        confidence = self.probabilities.max(1)
        bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        gaps = np.zeros((len(bins), _BINS + 1))
        gaps[np.arange(len(bins)), bins] = confidence - self.correct
        gaps[:, _BINS] = 1
        found = jackknife(
            group_sums(gaps, self.groups), lambda s: np.abs(s[..., :_BINS]).sum(-1) / s[..., _BINS]
        )
        return found.clipped(0, 1)


def difference(
    a: HeldOut,
    b: HeldOut,
    of: Literal["accuracy", "cross_entropy"] = "accuracy",
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """a − b on the same rows, groups resampled together. Raises InputError when the rows or their labels differ."""
    require_same_rows(a, b)
    return _paired(_values(a, of), _values(b, of), a.groups, resamples, seed)


def difference_on_other_labels(a: HeldOut, b: HeldOut, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Accuracy of a less that of b on the same rows with other labels: selectivity, if b's are a control task's."""
    if not np.array_equal(a.groups, b.groups):
        raise InputError("A paired comparison needs the same rows on both sides.")
    return _paired(a.correct, b.correct, a.groups, resamples, seed)


def require_same_rows(a: HeldOut, b: HeldOut) -> None:
    """Raise InputError unless both are of the same rows and labels."""
    if not (np.array_equal(a.groups, b.groups) and np.array_equal(a.codes, b.codes)):
        raise InputError(
            "A paired comparison needs the same rows and labels on both sides: probe both on one set of rows."
        )


def _values(held_out: HeldOut, of: str) -> np.ndarray:
    if of not in ("accuracy", "cross_entropy"):
        raise InputError(f"of is {of!r}; it is 'accuracy' or 'cross_entropy'.")
    return held_out.correct if of == "accuracy" else held_out.losses


def _paired(a: np.ndarray, b: np.ndarray, groups: np.ndarray, resamples: int, seed: int) -> Comparison:
    sums = [group_sums(np.stack([v, np.ones_like(v)], axis=1), groups) for v in (a, b)]
    return paired_test(sums[0], sums[1], lambda s: s[..., 0] / s[..., 1], resamples=resamples, seed=seed)


def _mean_of(columns: Float[np.ndarray, "k n"], groups: np.ndarray) -> list[Interval]:
    return [
        jackknife(group_sums(np.stack([c, np.ones_like(c)], axis=1), groups), lambda s: s[..., 0] / s[..., 1])
        for c in columns
    ]
