"""TPP, targeted probe perturbation: do a concept's latents carry that concept and leave its siblings alone?

    tpp(dictionary, examples, ns=(1, 2, 5, 10, 20)).score[10]                      # 0.08 [0.06, 0.10]

Of each family with at least two concepts (the moods, the places …), every concept has a probe, fitted on the chosen
examples. The n candidates with the largest attribution to the probe of concept i,

    (E[f_l | i] - E[f_l | not i]) (d_l · w_i),

are taken out of the activations (set to their mean, as in `sae.judging.scr`), and every probe j of the family is asked again:

    score@n = mean_i (A_i - A_i,i) - mean_{i≠j} (A_j - A_i,j)

with A_i,j the balanced accuracy of probe j on held-out examples without the candidates of i: the accuracy that the concept
loses, less what the others lose. From -0.5 to 0.5; 0 for an ablation that does nothing, and for one that does the same to
all. `null` takes out n candidates drawn at random for each concept
among those that are active.

Karvonen et al. 2024, https://arxiv.org/abs/2411.18895. Chanin 2026 (https://arxiv.org/abs/2605.18229) finds it unreliable at its
usual settings: read it beside the nulls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae.judging.dictionaries import Dictionary, fit_probes
from sae.judging.examples import Examples, balanced_accuracy, clustered, hit_sums
from sae.judging.scr import NS, ablation_effect, active_candidates, attribution, check_ablation
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.stats import Interval


@dataclass(frozen=True)
class TargetedPerturbation:
    """TPP scores, in balanced accuracy."""

    name: str
    score: Mapping[int, Interval]
    null: Mapping[int, float]
    """n -> the score of random candidates."""
    on_target: Mapping[int, float]
    """n -> accuracy lost by the concept whose candidates are ablated."""
    off_target: Mapping[int, float]
    """n -> accuracy lost by its siblings."""
    accuracy: float
    """Mean accuracy of the probes before."""
    concepts: Mapping[str, Mapping[int, float]] = field(repr=False)
    """Concept -> n -> accuracy that it loses."""

    def to_dict(self) -> dict[str, Any]:
        def plain(values: Mapping[int, float]) -> dict[str, float]:
            return {str(n): value for n, value in values.items()}

        return {
            "score": {str(n): interval.to_dict() for n, interval in self.score.items()},
            "null": plain(self.null),
            "on_target": plain(self.on_target),
            "off_target": plain(self.off_target),
            "accuracy": self.accuracy,
            "concepts": {name: plain(row) for name, row in self.concepts.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        rows = [
            f"  {n} ablated: {interval!r}   on target -{self.on_target[n]:.3f}, off -{self.off_target[n]:.3f}"
            f"   (random ones {self.null[n]:.3f})"
            for n, interval in self.score.items()
        ]
        head = f"TPP of {self.name}: probes {self.accuracy:.3f}, {len(self.concepts)} concepts"
        return "\n".join([head, *rows])


def tpp(
    dictionary: Dictionary, examples: Examples, *, ns: Sequence[int] = NS, seed: int = 0
) -> TargetedPerturbation:
    """Perturb every concept of the families that have several.

    Raises InputError for a dictionary without directions, and when no family has two concepts.
    """
    check_ablation(dictionary, ns)
    families = [family for family, _ in examples.concepts]
    siblings = [
        [c for c, name in enumerate(families) if name == family] for family in dict.fromkeys(families)
    ]
    siblings = [members for members in siblings if len(members) > 1]
    if not siblings:
        raise InputError("TPP needs a label with at least two values that are judged.")
    pairs = [(i, j) for members in siblings for i, j in product(members, members)]
    sums = _sums(dictionary, examples, pairs, ns, seed)
    on = np.array([i == j for i, j in pairs])
    k = len(ns)

    def losses(s: np.ndarray) -> Float[np.ndarray, "... pairs rows"]:
        accuracy = balanced_accuracy(s)
        return accuracy[..., :1] - accuracy[..., 1:]

    def score(s: np.ndarray, row: int) -> np.ndarray:
        lost = losses(s)[..., row]
        return np.nanmean(lost[..., on], axis=-1) - np.nanmean(lost[..., ~on], axis=-1)

    lost = losses(sums.sum(0))
    before = balanced_accuracy(sums.sum(0))[on, 0]
    return TargetedPerturbation(
        dictionary.name,
        {n: clustered(sums, partial(score, row=i)) for i, n in enumerate(ns)},
        {n: float(score(sums.sum(0), k + i)) for i, n in enumerate(ns)},
        {n: float(lost[on, i].mean()) for i, n in enumerate(ns)},
        {n: float(lost[~on, i].mean()) for i, n in enumerate(ns)},
        float(before.mean()),
        {
            examples.names[i]: {n: float(lost[p, r]) for r, n in enumerate(ns)}
            for p, (i, j) in enumerate(pairs)
            if i == j
        },
    )


def _sums(
    dictionary: Dictionary, examples: Examples, pairs: list[tuple[int, int]], ns: Sequence[int], seed: int
) -> Float[np.ndarray, "g pairs rows 4"]:
    """Hits of every scored group; rows are before, without the n candidates …, without n random ones …"""
    labels, chosen = examples.labels, examples.chosen
    acts = dictionary.acts
    assert acts is not None
    w, b = fit_probes(acts, examples)
    logits = acts @ w + b
    sides = [side & chosen[:, None] for side in (labels, ~labels)]
    positive, negative = (side / np.maximum(side.sum(0), 1) for side in sides)
    active = active_candidates(dictionary, chosen)
    mean = chosen / chosen.sum()
    found = []
    effects: dict[int, list[Float[np.ndarray, "n c"]]] = {}
    for i, j in pairs:
        if i not in effects:
            drawn = np.random.default_rng([seed, i]).permutation(active)
            order = np.argsort(
                -attribution(dictionary, positive[:, i], negative[:, i], w[:, i]), kind="stable"
            )
            effects = {i: [ablation_effect(dictionary, o[:n], mean, w) for o in (order, drawn) for n in ns]}
        rows = [logits[:, j], *(logits[:, j] + effect[:, j] for effect in effects[i])]
        found.append(_hits(np.stack(rows, axis=1), labels[:, j], examples))
    return np.stack(found, axis=1)


def _hits(
    logits: Float[np.ndarray, "n rows"], label: Bool[np.ndarray, " n"], examples: Examples
) -> Float[np.ndarray, "g rows 4"]:
    scored = ~examples.chosen
    labels = np.repeat(label[scored, None], logits.shape[1], axis=1)
    return hit_sums((logits[scored] > 0) == labels, labels, examples.groups[scored])
