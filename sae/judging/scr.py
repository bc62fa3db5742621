"""SCR, spurious correlation removal: can a probe be freed of what it should not have learned by ablating a few latents?

    scr(dictionary, examples, ns=(1, 2, 5, 10, 20)).score[10]                      # 0.31 [0.25, 0.37]

For an ordered pair of families, a target t and a spurious s, each with two values, all by balanced examples:

    base      a probe of t fitted on chosen examples on which t and s agree: it cannot know which of them is meant
    oracle    a probe of t fitted on chosen examples of all four cells, weighted alike
    ablated   the base probe, after the n candidates that say most about s are taken out of the activations

    score@n = (A_ablated - A_base) / (A_oracle - A_base)

where A are accuracies for t on scored examples, the four cells weighing alike, and the sums of both differences over all
pairs are divided, so that no pair with a small denominator rules. Candidates are chosen by attribution to a probe of s,

    (E[f_l | s=1] - E[f_l | s=0]) (d_l · w_s),           on the chosen examples of all four cells

and taken out by setting them to their mean: x - Σ (f_l - f̄_l) d_l; what the SAE leaves unexplained stays in x. With means
instead of the paper's zeros a threshold of the probe keeps its place, and candidates that are never silent (principal
components, coordinates) can be ablated too. `null` takes out n candidates drawn at random among those that are active.
Scores can be negative, and exceed 1.

Karvonen et al. 2024, “Evaluating Sparse Autoencoders on Targeted Concept Erasure Tasks”,
https://arxiv.org/abs/2411.18895, after SHIFT of Marks et al. 2024. Chanin 2026 (https://arxiv.org/abs/2605.18229) finds that SCR
and TPP hardly tell good SAEs from bad ones at their usual settings: read them beside the nulls, at several n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.judging.dictionaries import Dictionary, fit_probes
from sae.judging.examples import Examples, clustered
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.stats import Interval, group_sums

NS = (1, 2, 5, 10, 20)
MIN_CELL = 20
"""Documents that each of the four cells needs in either half."""
MAX_FAMILIES = 5


@dataclass(frozen=True)
class SpuriousRemoval:
    """SCR scores; accuracies are means over pairs, on balanced held-out examples."""

    name: str
    score: Mapping[int, Interval]
    """n -> share of the lost accuracy that ablating n candidates gives back."""
    null: Mapping[int, float]
    """n -> the same for random candidates."""
    base: float
    oracle: float
    ablated: Mapping[int, float]
    pairs: Mapping[str, Mapping[str, float]] = field(repr=False)
    """`target / spurious` -> its accuracies."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "score": {str(n): interval.to_dict() for n, interval in self.score.items()},
            "null": {str(n): value for n, value in self.null.items()},
            "base": self.base,
            "oracle": self.oracle,
            "ablated": {str(n): value for n, value in self.ablated.items()},
            "pairs": {name: dict(row) for name, row in self.pairs.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        head = f"SCR of {self.name}: base {self.base:.3f}, oracle {self.oracle:.3f}, {len(self.pairs)} pairs"
        rows = [
            f"  {n} ablated: {interval!r}   (random ones {self.null[n]:.3f})"
            for n, interval in self.score.items()
        ]
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class Pair:
    """Two families with two values each."""

    target: str
    spurious: str
    used: Bool[np.ndarray, " n"]
    """Examples that have one of the two values in both."""
    t: Bool[np.ndarray, " n"]
    s: Bool[np.ndarray, " n"]

    @property
    def cell(self) -> Int[np.ndarray, " n"]:
        """0 … 3, or -1 for examples that are not used."""
        return np.where(self.used, 2 * self.t + self.s, -1)


def scr(
    dictionary: Dictionary,
    examples: Examples,
    *,
    ns: Sequence[int] = NS,
    pairs: Sequence[tuple[str, str]] | None = None,
    min_cell: int = MIN_CELL,
    seed: int = 0,
) -> SpuriousRemoval:
    """Debias probes of all pairs of families, or of those in `pairs` (target, spurious).

    Raises InputError for a dictionary without directions, and when no pair of families has enough examples of
    all four cells.
    """
    check_ablation(dictionary, ns)
    tasks = _pairs(examples, pairs, min_cell)
    results = [_accuracies(dictionary, examples, pair, ns, seed) for pair in tasks]
    # (groups, pairs, rows, cells, 2): right and all; rows are base, oracle, ablated@n …, random@n …
    sums = np.stack(results, axis=1)

    def accuracies(s: np.ndarray) -> Float[np.ndarray, "... pairs rows"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (s[..., 0] / s[..., 1]).mean(-1)

    def score(s: np.ndarray, row: int) -> np.ndarray:
        found = accuracies(s)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(
                (found[..., row] - found[..., 0]).sum(-1) / (found[..., 1] - found[..., 0]).sum(-1)
            )

    total = accuracies(sums.sum(0))
    mean = total.mean(0)
    return SpuriousRemoval(
        dictionary.name,
        {n: clustered(sums, partial(score, row=2 + i)) for i, n in enumerate(ns)},
        {n: float(score(sums.sum(0), 2 + len(ns) + i)) for i, n in enumerate(ns)},
        float(mean[0]),
        float(mean[1]),
        {n: float(mean[2 + i]) for i, n in enumerate(ns)},
        {
            f"{pair.target} / {pair.spurious}": {
                "base": float(row[0]),
                "oracle": float(row[1]),
                **{f"ablated@{n}": float(row[2 + i]) for i, n in enumerate(ns)},
            }
            for pair, row in zip(tasks, total)
        },
    )


def check_ablation(dictionary: Dictionary, ns: Sequence[int]) -> None:
    """Raise InputError unless candidates can be ablated and every n is 1 or more."""
    if dictionary.directions is None or dictionary.acts is None:
        raise InputError(
            f"{dictionary.name} has no directions: its candidates cannot be taken out of activations."
        )
    if not ns or min(ns) < 1:
        raise InputError(f"n is {min(ns, default=0)}: at least one candidate is ablated.")


def attribution(
    dictionary: Dictionary,
    positive: Float[np.ndarray, " n"],
    negative: Float[np.ndarray, " n"],
    w: Float[np.ndarray, " d"],
) -> Float[np.ndarray, " m"]:
    """(E₊[f_l] - E₋[f_l]) (d_l · w) for weights of the positives and of the negatives that sum to one."""
    assert dictionary.directions is not None
    difference = np.asarray(dictionary.values.T @ (positive - negative)).ravel()
    return difference * (dictionary.directions @ w)


def ablation_effect(
    dictionary: Dictionary,
    candidates: Int[np.ndarray, " k"],
    mean_weights: Float[np.ndarray, " n"],
    probes: Float[np.ndarray, "d c"],
) -> Float[np.ndarray, "n c"]:
    """What setting candidates to their mean adds to the logits of probes: -Σ (f_l - f̄_l) (d_l · w)."""
    assert dictionary.directions is not None
    columns = dictionary.columns(candidates)
    return -(columns - mean_weights @ columns) @ (dictionary.directions[candidates] @ probes)


def active_candidates(dictionary: Dictionary, chosen: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " active"]:
    """Candidates that are not zero on every chosen example."""
    total = abs(dictionary.values[chosen]).sum(0)
    return np.flatnonzero(np.asarray(total).ravel())


def _pairs(examples: Examples, wanted: Sequence[tuple[str, str]] | None, min_cell: int) -> list[Pair]:
    """The pairs whose four cells are full enough; without `wanted`, of the families that are most often usable."""
    binary = {name: both for name in examples.values if (both := _two_values(examples, name)) is not None}
    most = len(binary)
    if wanted is None:
        most = MAX_FAMILIES
        wanted = list(
            permutations(
                sorted(binary, key=lambda name: -float((binary[name][0] | binary[name][1]).mean())), 2
            )
        )
    found = []
    families: set[str] = set()
    for target, spurious in wanted:
        if target not in binary or spurious not in binary:
            continue
        (t, not_t), (s, not_s) = binary[target], binary[spurious]
        pair = Pair(target, spurious, (t | not_t) & (s | not_s), t, s)
        cells = [
            len(np.unique(examples.groups[half & (pair.cell == cell)]))
            for half in (examples.chosen, ~examples.chosen)
            for cell in range(4)
        ]
        if min(cells) >= min_cell and len(families | {target, spurious}) <= most:
            families |= {target, spurious}
            found.append(pair)
    if not found:
        raise InputError(
            f"No two labels can be told apart: SCR needs {min_cell} documents of each of the four combinations of two "
            "labels in both halves."
        )
    return found


def _two_values(examples: Examples, family: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Which examples have the commonest value of the chosen ones, and which the second commonest."""
    column = examples.values[family]
    names, counts = np.unique(column[examples.chosen & (column != "")], return_counts=True)
    if len(names) < 2:
        return None
    first, second = names[np.argsort(-counts, kind="stable")[:2]]
    return column == first, column == second


def _accuracies(
    dictionary: Dictionary, examples: Examples, pair: Pair, ns: Sequence[int], seed: int
) -> Float[np.ndarray, "g rows cells 2"]:
    """Right answers and examples of every scored group, per cell."""
    acts = dictionary.acts
    assert acts is not None
    cell, chosen = pair.cell, examples.chosen & pair.used
    of_cell = np.stack([(cell == c) & chosen for c in range(4)], axis=1)
    each = of_cell / of_cell.sum(0)
    all_cells = each.sum(1) / 4
    agreeing = np.where(pair.t == pair.s, all_cells, 0.0)
    w, b = fit_probes(
        acts,
        examples,
        labels=np.stack([pair.t, pair.t, pair.s], axis=1),
        weights=np.stack([agreeing, all_cells, all_cells], axis=1),
    )
    effect = attribution(dictionary, (each[:, 1] + each[:, 3]) / 2, (each[:, 0] + each[:, 2]) / 2, w[:, 2])
    top = np.argsort(-effect, kind="stable")
    drawn = np.random.default_rng(seed).permutation(active_candidates(dictionary, examples.chosen))
    logits = acts @ w[:, :2] + b[:2]
    rows = [logits[:, 0], logits[:, 1]]
    for order in (top, drawn):
        for n in ns:
            rows.append(logits[:, 0] + ablation_effect(dictionary, order[:n], all_cells, w[:, :1])[:, 0])
    right = (np.stack(rows, axis=1) > 0) == pair.t[:, None]
    scored = ~examples.chosen
    in_cell = np.stack([cell == c for c in range(4)], axis=1)[scored]
    both = np.stack(
        [right[scored][:, :, None] & in_cell[:, None, :], np.repeat(in_cell[:, None, :], len(rows), axis=1)],
        axis=-1,
    )
    sums = group_sums(both.reshape(len(both), -1), examples.groups[scored])
    return sums.reshape(-1, len(rows), 4, 2)
