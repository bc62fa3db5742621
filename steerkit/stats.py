"""Intervals and tests for quantities that are measured on texts: clustered by document, and beside a null.

Tokens of one document resemble each other, so the document (story, prompt, seed) is the unit: every function
takes one row of sums per group, and a statistic of the summed row, so that ratios, differences and recovered
shares are all one line.

    sums = group_sums(np.stack([errors, squares], 1), documents)          # (n_groups, 2)
    jackknife(sums, lambda s: s[..., 0] / s[..., 1])                      # 0.0312 [0.0304, 0.0320]

Efron & Tibshirani 1993, “An Introduction to the Bootstrap”; Obuchowski 1997 for ROC areas of clustered data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from steerkit.errors import InputError

Statistic = Callable[[Float[np.ndarray, "... k"]], Float[np.ndarray, "..."]]
"""A quantity as a function of summed rows; it must act on the last axis and broadcast over the others."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. All NaN where the estimate has no value."""

    estimate: float
    low: float
    high: float
    standard_error: float
    level: float = 0.95

    def __repr__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def clipped(self, low: float, high: float) -> Interval:
        """The same with its ends inside the range of what is estimated."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A difference, its interval, and the two-sided p-value against no difference."""

    difference: Interval
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return {"difference": self.difference.to_dict(), "p_value": self.p_value}


def group_sums(
    values: Float[np.ndarray, "n k"], groups: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "g k"]:
    """Sums of the rows of each group, in the order of the groups' sorted names."""
    values = np.asarray(values, dtype=np.float64)
    _, index = np.unique(groups, return_inverse=True)
    return np.stack([np.bincount(index, weights=column) for column in values.T], axis=1)


def jackknife(sums: Float[np.ndarray, "g k"], statistic: Statistic, *, level: float = 0.95) -> Interval:
    """Delete-one-group jackknife: SE² = (g-1)/g Σ (θ_(i) - θ̄)², with Student's t on g-1 degrees of freedom.

    For the mean of one value a group, SE is the standard error of the mean. Raises InputError with fewer than
    two groups.
    """
    sums = _checked(sums)
    total = sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return jackknife_of(float(statistic(total)), statistic(total - sums), level=level)


def jackknife_of(estimate: float, left_out: Float[np.ndarray, " g"], *, level: float = 0.95) -> Interval:
    """The jackknife's interval from the estimates without each group."""
    g = len(left_out)
    if g < 2:
        raise InputError(f"{g} group: an interval needs at least two documents.")
    standard_error = math.sqrt((g - 1) / g * float(np.square(left_out - left_out.mean()).sum()))
    return _student(estimate, standard_error, g - 1, level)


def mean_interval(values: Sequence[float] | Float[np.ndarray, " n"], *, level: float = 0.95) -> Interval:
    """Mean of independent values (one a seed, say) with Student's t on n-1 degrees of freedom.

    Raises InputError with fewer than two values.
    """
    found = np.asarray(values, dtype=np.float64)
    n = len(found)
    if n < 2:
        raise InputError(f"{n} value: an interval needs at least two.")
    return _student(float(found.mean()), float(found.std(ddof=1)) / math.sqrt(n), n - 1, level)


def _student(estimate: float, standard_error: float, freedom: int, level: float) -> Interval:
    from scipy.special import stdtrit

    margin = float(stdtrit(freedom, (1 + level) / 2)) * standard_error
    return Interval(estimate, estimate - margin, estimate + margin, standard_error, level)


def bootstrap(
    sums: Float[np.ndarray, "g k"],
    statistic: Statistic,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval over resamples of whole groups. Raises InputError with fewer than two groups."""
    sums = _checked(sums)
    return _percentile(float(statistic(sums.sum(0))), _resampled(sums, statistic, resamples, seed), level)


def paired_test(
    a: Float[np.ndarray, "g k"],
    b: Float[np.ndarray, "g k"],
    statistic: Statistic,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """statistic(a) - statistic(b) on the same groups, resampled together; groups of `a` and `b` stand in the
    same order.

    The p-value is the share of resampled differences that lie as far from the difference found as that lies
    from zero, the found one counted among them. Raises InputError if the groups do not match.
    """
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape:
        raise InputError(f"A paired test needs the same groups on both sides, not {a.shape} and {b.shape}.")
    k = a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[..., :k]) - statistic(sums[..., k:])

    both = np.concatenate([a, b], axis=1)
    found = float(difference(both.sum(0)))
    drawn = _resampled(both, difference, resamples, seed)
    beyond = np.abs(drawn - found) >= abs(found) * (1 - 1e-12)
    return Comparison(_percentile(found, drawn, level), float(1 + beyond.sum()) / (1 + resamples))


def permutation_test(
    statistic: Callable[[np.ndarray], float],
    labels: Shaped[np.ndarray, " n"],
    *,
    groups: Shaped[np.ndarray, " n"] | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> tuple[float, float, Float[np.ndarray, " permutations"]]:
    """(statistic of the labels as they are, one-sided p-value, statistics of permuted labels).

    With `groups`, whole groups change labels with each other: every group must have one label. The p-value is
    the share of labellings, the true one among them, that reach the true statistic.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    index = np.arange(len(labels))
    of_group = labels
    if groups is not None:
        _, first, index = np.unique(groups, return_index=True, return_inverse=True)
        of_group = labels[first]
        if not np.array_equal(of_group[index], labels):
            raise InputError("A permutation over groups needs one label for all of a group.")
    found = float(statistic(labels))
    null = np.array(
        [statistic(of_group[generator.permutation(len(of_group))][index]) for _ in range(permutations)]
    )
    return found, float(1 + (null >= found).sum()) / (1 + permutations), null


def auroc(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> float:
    """P(a positive scores above a negative), ties counting half; NaN if either class is empty."""
    labels = np.asarray(labels, dtype=bool)
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    if not n_positive or not n_negative:
        return math.nan
    rank_sum = float(midranks(np.asarray(scores))[labels].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def auroc_interval(
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    level: float = 0.95,
) -> Interval:
    """AUROC with the exact delete-one-group jackknife, its ends within [0, 1].

    All leave-one-out areas come from the ranks: taking a group out takes from the sum over pairs its members'
    pairs with everyone, and gives back the pairs inside the group, which were taken twice. Where leaving out
    changes nothing (an area of 1, say) the interval is Newcombe's for as many groups of either class. NaN
    where either class is empty.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    _, group = np.unique(groups, return_inverse=True)
    area = auroc(scores, labels)
    if math.isnan(area):
        return Interval(math.nan, math.nan, math.nan, math.nan, level)
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    won = _pairs_won(scores, labels)
    positive, negative = np.bincount(group, weights=labels), np.bincount(group, weights=~labels)
    inside = np.zeros(len(positive))
    for number, members in _members(group, np.flatnonzero((positive > 0) & (negative > 0))):
        inside[number] = _pairs_won(scores[members], labels[members])[labels[members]].sum()
    pairs = area * n_positive * n_negative - np.bincount(group, weights=won) + inside
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out = pairs / ((n_positive - positive) * (n_negative - negative))
    left_out = left_out[np.isfinite(left_out)]
    if len(left_out) < 2:
        return Interval(area, 0.0, 1.0, math.nan, level)
    found = jackknife_of(area, left_out, level=level).clipped(0.0, 1.0)
    if found.standard_error > 1e-12:
        return found
    low, high = _newcombe(area, int((positive > 0).sum()), int((negative > 0).sum()), level)
    return replace(found, low=low, high=high)


def _newcombe(area: float, n_positive: int, n_negative: int, level: float) -> tuple[float, float]:
    """Score interval of an AUROC of independent items: from which true areas `area` is within z standard
    errors of Hanley and McNeil. Newcombe 2006, Statistics in Medicine 25:559, method 5."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    more = (n_positive + n_negative) / 2 - 1

    def excess(true: float) -> float:
        spread = 1 + more * ((1 - true) / (2 - true) + true / (1 + true))
        return (area - true) ** 2 - z**2 * true * (1 - true) * spread / (n_positive * n_negative)

    edge = 1e-12
    low = brentq(excess, edge, area - edge) if area > 2 * edge else 0.0
    high = brentq(excess, area + edge, 1 - edge) if area < 1 - 2 * edge else 1.0
    return low, high


def midranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 1, ties sharing their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


def _pairs_won(scores: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, " n"]:
    """For each item, over the items of the other class: the sum of the pairs' worth to the positive side."""
    ranks = midranks(scores)
    own = np.empty(len(scores))
    own[labels], own[~labels] = midranks(scores[labels]), midranks(scores[~labels])
    above = ranks - own
    above[~labels] = labels.sum() - above[~labels]
    return above


def _members(group: Int[np.ndarray, " n"], which: Int[np.ndarray, " m"]) -> Iterator[tuple[int, np.ndarray]]:
    """(group, indices of its members) for each group of `which`."""
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], [which, which + 1])
    for number, start, end in zip(which, *bounds):
        yield int(number), order[start:end]


def _resampled(sums: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    g = len(sums)
    drawn = []
    for start in range(0, resamples, 256):
        n = min(256, resamples - start)
        counts = np.stack([np.bincount(row, minlength=g) for row in generator.integers(0, g, (n, g))])
        drawn.append(statistic(counts @ sums))
    return np.concatenate(drawn)


def _percentile(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), float(drawn.std(ddof=1)), level)


def _checked(sums: Float[np.ndarray, "g k"]) -> Float[np.ndarray, "g k"]:
    sums = np.asarray(sums, dtype=np.float64)
    if len(sums) < 2:
        raise InputError(f"{len(sums)} group: an interval needs at least two documents.")
    return sums
