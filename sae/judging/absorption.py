"""Feature absorption: a latent that seems to stand for a concept is silent, and a more specific latent carries the
concept instead.

    found = absorption(dictionary, token_examples)
    found.rate, found.missed, found.f1                                      # 0.11 [0.09, 0.13] …

Examples are tokens; a concept is whether the token's word says so (`mood=happy`: joyful, smiles, glee …). For each

    w        unit direction of a logistic probe, fitted on chosen tokens (all positives, five negatives for each)
    main     the latents of the concept: greedily those that raise the F1 of “any of them fires” most on the chosen
             tokens, while it rises by more than 0.03, at most 10; of latents with d · w > 0
    c_l      = f_l (d_l · w), what latent l adds along the probe
    p        = w · (x - x̄), how far the token is from the mean of the chosen negatives

A scored positive that the probe tells right is *missed* when no main latent fires on it, and *absorbed* when, besides,
latents that are not main but specific to the concept add Σ c_l >= 0.4 p. Specific are latents with d · w > 0 of which at least half
of the firings on chosen tokens are positives. Then

    rate       share of the positives that are absorbed
    missed     share that are missed, whatever the reason
    fraction   mean of Σ_specific c / (Σ_specific c + Σ_main c): absorption in part counts too

averaged over the concepts. A dictionary without good main latents (see `f1`) has little to be absorbed: read the rate
beside it.

After Chanin et al. 2024, “A is for Absorption”, https://arxiv.org/abs/2409.14507, which asks it of first letters and
measures by ablation; contributions along the probe and the 0.4 are as in SAEBench, https://arxiv.org/abs/2503.09532. The
precision of the specific latents and the greedy choice of the main ones are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.judging.dictionaries import Dictionary, logistic
from sae.judging.examples import Examples, clustered, of_share
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.stats import Interval, group_sums

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SHARE = 0.4
"""Part of the probe's projection that specific latents must carry."""
F1_GAIN = 0.03
MAX_MAIN = 10
PRECISION = 0.5
NEGATIVES = 5
"""Negatives for each positive that the probe is fitted on."""


@dataclass(frozen=True)
class ConceptAbsorption:
    """One concept's figures; shares of the scored positives that the probe tells right."""

    concept: str
    main: tuple[int, ...]
    f1: float
    """F1 of “a main latent fires” on scored tokens."""
    specific: tuple[int, ...]
    """Latents that absorbed at least one token, the busiest first."""
    rate: float
    missed: float
    fraction: float
    tokens: int


@dataclass(frozen=True)
class Absorption:
    """Absorption in a dictionary, averaged over concepts."""

    name: str
    rate: Interval
    missed: Interval
    fraction: Interval
    f1: float
    concepts: tuple[ConceptAbsorption, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rate": self.rate.to_dict(),
            "missed": self.missed.to_dict(),
            "fraction": self.fraction.to_dict(),
            "f1": self.f1,
            "concepts": [
                {**vars(row), "main": list(row.main), "specific": list(row.specific)} for row in self.concepts
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        return (
            f"Absorption in {self.name}: rate {self.rate!r}, fraction {self.fraction!r}\n"
            f"  missed {self.missed!r}; F1 of the main latents {self.f1:.3f}; {len(self.concepts)} concepts"
        )


def absorption(dictionary: Dictionary, examples: Examples, *, seed: int = 0) -> Absorption:
    """Look for absorption of every concept. Examples are tokens.

    Raises InputError for a dictionary without directions, or with values below zero: there is no silence.
    """
    if dictionary.directions is None or dictionary.acts is None:
        raise InputError(f"{dictionary.name} has no directions: nothing of it can be absorbed.")
    if not dictionary.sparse or dictionary.values.min() < 0:
        raise InputError(
            f"{dictionary.name} is not sparse and non-negative: its candidates are never silent."
        )
    fires = _fires(dictionary)
    found = [
        _concept(dictionary, fires, examples, c, np.random.default_rng([seed, c]))
        for c in range(len(examples.concepts))
    ]
    rows = tuple(row for row, _ in found)
    # (groups, concepts, 4): absorbed, missed, fraction, tokens
    sums = np.stack([counts for _, counts in found], axis=1)

    def interval(column: int) -> Interval:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = clustered(sums, lambda s: np.nanmean(s[..., column] / s[..., 3], axis=-1))
        return of_share(found, len(sums))

    f1 = float(np.mean([row.f1 for row in rows]))
    return Absorption(dictionary.name, interval(0), interval(1), interval(2), f1, rows)


def _fires(dictionary: Dictionary) -> csr_array:
    from scipy.sparse import csr_array

    fires = csr_array(dictionary.values, copy=True)
    fires.eliminate_zeros()
    fires.data = np.ones_like(fires.data)
    return fires


def _concept(
    dictionary: Dictionary, fires: csr_array, examples: Examples, c: int, generator: np.random.Generator
) -> tuple[ConceptAbsorption, Float[np.ndarray, "g 4"]]:
    """The figures of one concept, and the sums of every scored group."""
    acts, directions = dictionary.acts, dictionary.directions
    assert acts is not None
    assert directions is not None
    family, value = examples.concepts[c]
    label = examples.values[family] == value
    chosen, scored = np.flatnonzero(examples.chosen), np.flatnonzero(~examples.chosen)
    w, bias = _probe(acts, label, chosen, generator)
    along = directions @ w / np.linalg.norm(w)
    aligned = along > 0
    main = _main_latents(fires[chosen], label[chosen], aligned)
    hits = np.asarray(fires[chosen].T @ label[chosen].astype(float))
    firings = np.asarray(fires[chosen].sum(0)).ravel()
    specific = aligned & (hits >= PRECISION * np.maximum(firings, 1))
    specific[main] = False

    told = scored[label[scored] & (acts[scored] @ w + bias > 0)]
    latents = dictionary.values[told]
    origin = acts[chosen[~label[chosen]]].mean(0)
    projection = (acts[told] - origin) @ (w / np.linalg.norm(w))
    by_specific = np.asarray(latents @ np.where(specific, along, 0.0))
    is_main = np.isin(np.arange(dictionary.size), main)
    by_main = np.asarray(latents @ np.where(is_main, along, 0.0))
    missed = np.asarray(fires[told] @ is_main.astype(float)) == 0
    absorbed = missed & (by_specific > 0) & (by_specific >= SHARE * projection)
    both = by_specific + by_main
    fraction = np.where(both > 0, by_specific / np.where(both > 0, both, 1.0), 0.0)
    groups = np.unique(examples.groups[scored])
    counts = np.stack([absorbed, missed, fraction, np.ones(len(told))], axis=1)
    # Every scored group has a row, also one without a positive.
    padded = np.concatenate([counts, np.zeros((len(groups), 4))])
    sums = group_sums(padded, np.concatenate([examples.groups[told], groups]))
    total = sums.sum(0)
    busiest = np.asarray(fires[told[absorbed]].sum(0)).ravel() * specific
    n = max(len(told), 1)
    any_main = np.asarray(fires[scored] @ is_main.astype(float)) > 0
    row = ConceptAbsorption(
        f"{family}={value}",
        tuple(int(latent) for latent in main),
        _f1(any_main & label[scored], any_main & ~label[scored], label[scored]),
        tuple(int(latent) for latent in np.argsort(-busiest, kind="stable")[: int((busiest > 0).sum())]),
        float(total[0] / n),
        float(total[1] / n),
        float(total[2] / n),
        len(told),
    )
    return row, sums


def _probe(
    acts: np.ndarray, label: np.ndarray, chosen: np.ndarray, generator: np.random.Generator
) -> tuple[Float[np.ndarray, " d"], float]:
    positives, negatives = chosen[label[chosen]], chosen[~label[chosen]]
    n = min(len(negatives), max(NEGATIVES * len(positives), 100))
    used = np.concatenate([positives, generator.choice(negatives, n, replace=False)])
    return logistic(acts[used], label[used])


def _main_latents(
    fires: csr_array, label: Bool[np.ndarray, " n"], allowed: Bool[np.ndarray, " m"]
) -> Int[np.ndarray, " main"]:
    """Latents whose union tells the label, greedily by F1; ties go to the first."""
    main: list[int] = []
    covered = np.zeros(len(label), dtype=bool)
    best = 0.0
    while len(main) < MAX_MAIN:
        new_hits = np.asarray(fires.T @ (label & ~covered).astype(float))
        new_false = np.asarray(fires.T @ (~label & ~covered).astype(float))
        hits, false = (covered & label).sum() + new_hits, (covered & ~label).sum() + new_false
        f1 = np.where(allowed, 2 * hits / (hits + false + label.sum()), -1.0)
        latent = int(f1.argmax())
        if f1[latent] <= best + (F1_GAIN if main else 0.0):
            break
        best = float(f1[latent])
        main.append(latent)
        covered |= np.asarray(fires[:, [latent]].todense()).ravel() > 0
    return np.array(main, dtype=int)


def _f1(hits: np.ndarray, false: np.ndarray, label: np.ndarray) -> float:
    return float(2 * hits.sum() / max(hits.sum() + false.sum() + label.sum(), 1))
