"""What an SAE is judged on: labelled examples, in two halves that share no document.

    examples = Examples.of({"mood": ["happy", "sad", …], "tense": […]}, groups=stories, chosen=stories < 600)

Candidates are chosen and probes fitted on the `chosen` examples; every figure is measured on the others, with
intervals clustered by `groups` (stories, documents).

A family is one thing that is labelled (an attribute of the stories, a column of a table), a concept one of
its values: `mood=happy` against the rest. Of a family with two values one concept says everything, so that it
has only one. All concepts are balanced by weights: positives and negatives count half each, whatever their
number, so that chance is 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from steerkit.errors import InputError
from steerkit.stats import Interval, jackknife

Concept = tuple[str, str]
"""(family, value)."""


@dataclass(frozen=True)
class Examples:
    """Labels of n examples, whose values the candidates have."""

    values: Mapping[str, Shaped[np.ndarray, " n"]] = field(repr=False)
    """Family -> the value of each example."""
    concepts: tuple[Concept, ...]
    """What is judged: the commonest values of each family that are common enough in both halves."""
    groups: Int[np.ndarray, " n"] = field(repr=False)
    """The document of each example; intervals are clustered by it."""
    chosen: Bool[np.ndarray, " n"] = field(repr=False)
    """Whether an example serves to choose and to fit, or to be scored."""

    @classmethod
    def of(
        cls,
        values: Mapping[str, Sequence[str | None]],
        groups: Sequence[int] | Int[np.ndarray, " n"],
        chosen: Sequence[bool] | Bool[np.ndarray, " n"],
        *,
        min_groups: int = 20,
        max_values: int = 3,
    ) -> Examples:
        """Examples with the concepts that at least `min_groups` groups of either half have, and as many lack; at
        most `max_values` of a family, the commonest.

        None and "" are no values: such examples are negatives of every concept of the family. Raises InputError
        when a group is in both halves, lengths differ, or no concept is left.
        """
        columns = {
            name: np.asarray(["" if v is None else str(v) for v in column]) for name, column in values.items()
        }
        groups, chosen = np.asarray(groups), np.asarray(chosen, dtype=bool)
        for name, column in columns.items():
            if not len(column) == len(groups) == len(chosen):
                raise InputError(f"{name}: {len(column)} labels for {len(groups)} examples.")
        if np.intersect1d(groups[chosen], groups[~chosen]).size:
            raise InputError(
                "A document stands in both halves: candidates must be chosen on other documents."
            )
        concepts: list[Concept] = []
        for name, column in columns.items():
            found = _common(column, groups, chosen, min_groups)
            two_valued = len(np.unique(column)) == 2
            concepts += [(name, value) for value in found[: 1 if two_valued else max_values]]
        if not concepts:
            raise InputError(
                f"No label is common enough to judge by: each half needs {min_groups} documents that have a value and "
                f"{min_groups} that lack it. Give more labelled text."
            )
        return cls(columns, tuple(concepts), groups, chosen)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{family}={value}" for family, value in self.concepts)

    @property
    def labels(self) -> Bool[np.ndarray, "n concepts"]:
        return np.stack([self.values[family] == value for family, value in self.concepts], axis=1)

    def describe(self) -> str:
        """In words, for the foot of a table."""
        halves = [len(np.unique(self.groups[part])) for part in (self.chosen, ~self.chosen)]
        return f"{len(self.concepts)} concepts; chosen on {halves[0]:,} documents, scored on {halves[1]:,} others"


def hit_sums(
    correct: Bool[np.ndarray, "n concepts"], labels: Bool[np.ndarray, "n concepts"], groups: np.ndarray
) -> Float[np.ndarray, "g concepts 4"]:
    """Per group: positives that were told right, positives, negatives that were told right, negatives."""
    from scipy.sparse import csr_array

    _, index = np.unique(groups, return_inverse=True)
    n, n_concepts = labels.shape
    member = csr_array((np.ones(n), (index, np.arange(n))), shape=(index.max() + 1, n))
    parts = np.concatenate([correct & labels, labels, correct & ~labels, ~labels], axis=1)
    return np.asarray(member @ parts.astype(np.float64)).reshape(-1, 4, n_concepts).swapaxes(1, 2)


def balanced_accuracy(sums: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "..."]:
    """Mean of the accuracies on positives and on negatives."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2


def clustered(sums: Float[np.ndarray, "g ..."], statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """The jackknife's interval for sums of any shape a group; `statistic` broadcasts over axes before that shape."""
    shape = sums.shape[1:]
    return jackknife(sums.reshape(len(sums), -1), lambda s: statistic(s.reshape(*s.shape[:-1], *shape)))


def of_share(found: Interval, groups: int) -> Interval:
    """The interval of a share, its ends within [0, 1].

    Where every group is the same (a share of 0 or 1) the jackknife has nothing to say; then the end that is open
    is Clopper and Pearson's for as many groups: nothing in 338 documents leaves up to 0.011.
    """
    found = found.clipped(0.0, 1.0)
    if found.standard_error > 1e-12:
        return found
    open_end = 1 - ((1 - found.level) / 2) ** (1 / groups)
    if found.estimate < 1e-12:
        return replace(found, high=open_end)
    return replace(found, low=1 - open_end) if found.estimate > 1 - 1e-12 else found


def _common(column: np.ndarray, groups: np.ndarray, chosen: np.ndarray, min_groups: int) -> list[str]:
    """The values that enough groups of both halves have, and enough lack; the commonest among the chosen first."""
    found = []
    for value in np.unique(column[column != ""]):
        has = column == value
        counts = [len(np.unique(groups[part & side])) for part in (chosen, ~chosen) for side in (has, ~has)]
        if min(counts) >= min_groups:
            found.append((-int((has & chosen).sum()), str(value)))
    return [value for _, value in sorted(found)]
