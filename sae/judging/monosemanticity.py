"""FMS@p, the feature monosemanticity score: is there one candidate for a concept, and only one?

    monosemanticity(dictionary, examples, ps=(1, 5)).score[1]                   # 0.44 [0.42, 0.46]

For one concept, with trees fitted on the chosen examples and balanced accuracies on the others:

    accs_0        of the best candidate: a stump, that is a Gini decision tree of depth 1 over all candidates
    accs_p        of the best stump once the p best candidates are gone (each the root of a tree without those before)
    accs_cum_i    of a Gini tree over all candidates (of more than 1,024: those with the best stumps), cut at depth i

    FMS_local@p = 2 (accs_0 - accs_p)                          high if nothing else tells the concept
    FMS_global  = 1 - Σ_{i=1..n} (accs_cum_i - accs_0) / n     high if more candidates add nothing
    FMS@p       = accs_0 · (FMS_local@p + FMS_global) / 2,     averaged over concepts

Härle et al. 2025, “Measuring and Guiding Monosemanticity”, https://arxiv.org/abs/2506.19382. What the paper
leaves open, here: trees are always scored on documents that they were not fitted on; FMS_local and FMS_global
are clipped to [0, 1]; depths run from 1 to n = 5 for every concept, and a tree that has ended sooner keeps
its last accuracy; classes are balanced by weights rather than by leaving examples out; of stumps with equal
impurity the first candidate is taken; the p best are removed as candidates, not as directions, and where none
is left accs_p is chance.

Candidates that know nothing do not score 0: accs_0 = 1/2, FMS_local = 0 and FMS_global = 1 give 0.25. And a
perfect detector does not score 1 where its counterpart is in the dictionary too: with a latent for `female`
beside one for `male` each tells the other's concept. Read it beside the rows of the nulls and of the posterior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.judging.dictionaries import Dictionary
from sae.judging.examples import Examples, balanced_accuracy, clustered, hit_sums, of_share
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.stats import Interval

PS = (1, 5)
DEPTH = 5
TREE_CANDIDATES = 1024
"""Deeper trees are grown from so many of the best stumps' candidates; with no more candidates, from all."""


@dataclass(frozen=True)
class ConceptMonosemanticity:
    """One concept's figures on held-out documents."""

    concept: str
    candidate: int
    """The best one."""
    accs_0: float
    accs_p: Mapping[int, float]
    accs_cum: tuple[float, ...]
    """At depths 1, 2, …"""
    local: Mapping[int, float]
    global_: float
    score: Mapping[int, float]


@dataclass(frozen=True)
class Monosemanticity:
    """FMS@p of a dictionary."""

    name: str
    score: Mapping[int, Interval]
    """p -> FMS@p, with the interval clustered by document."""
    accs_0: Interval
    """Mean accuracy of the best candidates."""
    local: Mapping[int, float]
    """p -> mean FMS_local@p."""
    global_: float
    """Mean FMS_global."""
    in_sample: Mapping[int, float]
    """p -> FMS@p with trees scored on the very examples that they were fitted on."""
    concepts: tuple[ConceptMonosemanticity, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "score": {str(p): interval.to_dict() for p, interval in self.score.items()},
            "accs_0": self.accs_0.to_dict(),
            "local": {str(p): value for p, value in self.local.items()},
            "global": self.global_,
            "in_sample": {str(p): value for p, value in self.in_sample.items()},
            "concepts": [
                {
                    "concept": row.concept,
                    "candidate": row.candidate,
                    "accs_0": row.accs_0,
                    "accs_p": {str(p): value for p, value in row.accs_p.items()},
                    "accs_cum": list(row.accs_cum),
                    "score": {str(p): value for p, value in row.score.items()},
                }
                for row in self.concepts
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        rows = [
            f"  FMS@{p} {interval!r}   local {self.local[p]:.3f}   (in sample {self.in_sample[p]:.3f})"
            for p, interval in self.score.items()
        ]
        head = f"Monosemanticity of {self.name} (0.25 for candidates that know nothing)"
        return "\n".join([head, *rows, f"  accs_0 {self.accs_0!r}   global {self.global_:.3f}"])


def monosemanticity(
    dictionary: Dictionary, examples: Examples, *, ps: Sequence[int] = PS, depth: int = DEPTH
) -> Monosemanticity:
    """FMS@p for each p, with trees up to `depth`. Raises InputError unless both are 1 or more."""
    if not ps or min(ps) < 1:
        raise InputError(f"p is {min(ps, default=0)}: at least one candidate is removed.")
    if depth < 1:
        raise InputError(f"depth is {depth}: trees have a depth of 1 or more.")
    labels, chosen = examples.labels, examples.chosen
    stumps = Stumps(dictionary, chosen)
    predictions = np.empty((1 + len(ps) + depth, *labels.shape), dtype=bool)
    fitted_on, asked = _for_trees(dictionary.values[chosen]), _for_trees(dictionary.values)
    roots = []
    for c in range(labels.shape[1]):
        ranked = stumps.ranked(labels[chosen, c], 1 + max(ps), TREE_CANDIDATES)
        roots.append(ranked.candidate[0])
        for row, place in enumerate((0, *ps)):
            predictions[row, :, c] = ranked.predict(dictionary, place)
        predictions[1 + len(ps) :, :, c] = _tree(
            fitted_on[:, ranked.candidates], asked[:, ranked.candidates], labels[chosen, c], depth
        )
    correct = predictions == labels

    def sums(part: np.ndarray) -> Float[np.ndarray, "g rows concepts 4"]:
        of_rows = [hit_sums(rows[part], labels[part], examples.groups[part]) for rows in correct]
        return np.stack(of_rows, axis=1)

    def parts(total: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """accs_0 (…, concepts); FMS_local and FMS_global likewise, local with a row for each p."""
        accs = balanced_accuracy(total)
        best = accs[..., 0, :]
        local = np.clip(2 * (best[..., None, :] - accs[..., 1 : 1 + len(ps), :]), 0, 1)
        gains = accs[..., 1 + len(ps) :, :] - best[..., None, :]
        return best, local, np.clip(1 - gains.mean(-2), 0, 1)

    def scores(total: np.ndarray) -> Float[np.ndarray, "... ps concepts"]:
        best, local, global_ = parts(total)
        return best[..., None, :] * (local + global_[..., None, :]) / 2

    def mean_score(total: np.ndarray, row: int) -> np.ndarray:
        return np.nanmean(scores(total)[..., row, :], axis=-1)

    scored = sums(~chosen)
    accs = balanced_accuracy(scored.sum(0))
    best, local, global_ = parts(scored.sum(0))
    each, within = scores(scored.sum(0)), scores(sums(chosen).sum(0))
    rows = tuple(
        ConceptMonosemanticity(
            name,
            int(roots[c]),
            float(best[c]),
            {p: float(accs[1 + i, c]) for i, p in enumerate(ps)},
            tuple(accs[1 + len(ps) :, c].tolist()),
            {p: float(local[i, c]) for i, p in enumerate(ps)},
            float(global_[c]),
            {p: float(each[i, c]) for i, p in enumerate(ps)},
        )
        for c, name in enumerate(examples.names)
    )
    return Monosemanticity(
        dictionary.name,
        {p: of_share(clustered(scored, partial(mean_score, row=i)), len(scored)) for i, p in enumerate(ps)},
        of_share(clustered(scored, lambda total: np.nanmean(parts(total)[0], axis=-1)), len(scored)),
        {p: float(np.nanmean(local[i])) for i, p in enumerate(ps)},
        float(np.nanmean(global_)),
        {p: float(np.nanmean(within[i])) for i, p in enumerate(ps)},
        rows,
    )


@dataclass(frozen=True)
class RankedStumps:
    """The best stumps for one concept, by their weighted Gini impurity; fewer than asked for if there are fewer."""

    candidate: Int[np.ndarray, " k"]
    threshold: Float[np.ndarray, " k"]
    above: Bool[np.ndarray, " k"]
    """Whether values above the threshold mean yes."""
    candidates: Int[np.ndarray, " m"]
    """The best ones, in their order: more than there are thresholds for."""

    def predict(self, dictionary: Dictionary, place: int) -> Bool[np.ndarray, " n"]:
        """What the stump at a place of the ranking says: no if its candidate is constant, or there is none."""
        if place >= len(self.candidate):
            return np.zeros(dictionary.values.shape[0], dtype=bool)
        values = dictionary.columns(self.candidate[place : place + 1])[:, 0]
        return (values > self.threshold[place]) == self.above[place]


class Stumps:
    """The best stump of every candidate, for one concept after another.

    A stump looks at one candidate, so that the root of a tree without the p best candidates is the candidate
    of rank p: one pass over all candidates ranks them, and no tree is fitted again. Only values that are not
    zero are sorted, once for all concepts; the zeros of a candidate are one more value.
    """

    def __init__(self, dictionary: Dictionary, part: Bool[np.ndarray, " n"]) -> None:
        from scipy.sparse import csc_array

        columns = csc_array(dictionary.values[part])
        columns.eliminate_zeros()
        (n, m), active = columns.shape, np.diff(columns.indptr)
        # Row n stands for all examples on which a candidate is zero, where there are any.
        with_zeros = np.flatnonzero(active < n)
        candidate = np.concatenate([np.repeat(np.arange(m), active), with_zeros])
        values = np.concatenate([columns.data, np.zeros(len(with_zeros), dtype=columns.data.dtype)])
        rows = np.concatenate([columns.indices, np.full(len(with_zeros), n)])
        order = np.lexsort((values, candidate))
        self.candidate, self.values, self.rows = candidate[order], values[order], rows[order]
        self.bounds = np.searchsorted(self.candidate, np.arange(m + 1))
        self.zeros = np.flatnonzero(self.rows == n)
        same = self.candidate[1:] == self.candidate[:-1]
        self.splits = np.append(same & (self.values[1:] > self.values[:-1]), False)
        """Whether a candidate can be split after an entry."""
        self.n = n
        self.examples = self._at_or_below(np.ones(n, dtype=np.int64))

    def ranked(self, labels: Bool[np.ndarray, " n"], k: int, ranking: int) -> RankedStumps:
        """The best k stumps for one concept, the best first, and the candidates of the best `ranking`."""
        hits = self._at_or_below(labels.astype(np.int64))
        # Weights of either class sum to a half; p and q are those of positives and negatives that are not above.
        p = hits * (0.5 / max(labels.sum(), 1))
        q = (self.examples - hits) * (0.5 / max((~labels).sum(), 1))
        impurity = _gini(p, q)
        impurity += _gini(0.5 - p, 0.5 - q)
        # Rounded, so that candidates that are equally good are tied and the first is taken.
        impurity = np.where(self.splits, np.round(impurity, 10), np.inf)
        best = np.minimum.reduceat(impurity, self.bounds[:-1])
        order = np.argsort(best, kind="stable")
        top = order[:k]
        entry = np.array([first + impurity[first:last].argmin() for first, last in self._spans(top)])
        after = np.minimum(entry + 1, len(self.values) - 1)
        threshold = (self.values[entry].astype(np.float64) + self.values[after]) / 2
        constant = np.isinf(best[top])
        threshold[constant] = np.inf
        return RankedStumps(top, threshold, (p < q)[entry] | constant, order[:ranking])

    def _at_or_below(self, counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " entries"]:
        """Sum of the examples' counts at or below each entry, of its candidate."""
        found = np.append(counts, 0)[self.rows]
        first = self.bounds[:-1]
        found[self.zeros] = counts.sum() - np.add.reduceat(found, first)[self.candidate[self.zeros]]
        sums = np.cumsum(found)
        return sums - np.repeat((sums - found)[first], np.diff(self.bounds))

    def _spans(self, candidates: Int[np.ndarray, " k"]) -> list[tuple[int, int]]:
        return [(int(self.bounds[c]), int(self.bounds[c + 1])) for c in candidates]


def _gini(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Gini impurity of a leaf times its weight."""
    total = positive + negative
    np.maximum(total, 1e-12, out=total)
    return 2 * positive * negative / total


def _for_trees(values: Any) -> Any:
    """Values in the types that scikit-learn's trees want, ready for columns to be taken."""
    from scipy.sparse import csc_array

    if isinstance(values, np.ndarray):
        return np.asfortranarray(values, dtype=np.float32)
    columns = csc_array(values)
    parts = (
        columns.data.astype(np.float32),
        columns.indices.astype(np.int32),
        columns.indptr.astype(np.int32),
    )
    return csc_array(parts, shape=values.shape)


def _tree(
    fitted_on: Any, asked: Any, labels: Bool[np.ndarray, " fitted"], depth: int
) -> Bool[np.ndarray, "depth n"]:
    """What a Gini tree says of the examples `asked`, cut at depths 1 … `depth`.

    Growing is greedy, so that a tree that is cut is the tree that would not have grown further.
    """
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=depth, class_weight="balanced", random_state=0)
    tree.fit(fitted_on, labels)
    says = tree.tree_.value[:, 0, :].argmax(1) == list(tree.classes_).index(True)
    depths = _node_depths(tree.tree_)
    paths = tree.decision_path(asked if isinstance(asked, np.ndarray) else asked.tocsr()).tocsr()
    path_depths = depths[paths.indices]
    example = np.repeat(np.arange(paths.shape[0]), np.diff(paths.indptr))
    found = np.empty((depth, paths.shape[0]), dtype=bool)
    for i in range(depth):
        # Nodes are numbered from the root down, so that the last one of a path that is not too deep wins.
        reached = path_depths <= i + 1
        found[i, example[reached]] = says[paths.indices[reached]]
    return found


def _node_depths(tree: Any) -> Int[np.ndarray, " nodes"]:
    depths = np.zeros(tree.node_count, dtype=int)
    for node in range(tree.node_count):
        for child in (tree.children_left[node], tree.children_right[node]):
            if child >= 0:
                depths[child] = depths[node] + 1
    return depths
