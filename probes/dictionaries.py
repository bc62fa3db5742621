"""Two dictionaries of latents, one of a base and one of a tuned model: what appeared, vanished or turned.

    found = compare_dictionaries(sae_base, sae_tuned, acts_base, acts_tuned)
    found.counts                                     # {"kept": 812, "rotated": 95, "appeared": 31, …}

Latents are matched by the cosine of their decoder directions: a pair is one where each is the other's nearest.

    kept        a pair of cosine ≥ 0.9
    rotated     a pair of a lower cosine, above chance
    split       nearest to a latent above chance that is nearer to another: several for one
    vanished    of the base, appeared: of the tuned one – nearest cosine not above chance

Chance is the 99th percentile of the nearest cosine to as many random directions with the covariance of the other dictionary's.
Latents that never fire on the rows are left out: their directions say nothing. Two SAEs of one model, trained apart, differ too;
how much of the difference is training's is told by a second run on the base with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.architectures import SAE
from steerkit.errors import InputError

KEPT = 0.9
"""Least cosine of a latent that is called the same."""
_PERCENTILE = 0.99
_ROWS_AT_ONCE = 4096
_LOOKED_AT, _SHOWN = 40, 5


@dataclass(frozen=True)
class Match:
    """A latent of either side, and the nearest of the other."""

    kind: str
    """kept, rotated, split, vanished or appeared."""
    base: int | None
    tuned: int | None
    cosine: float
    """Of their decoder directions; of one that vanished or appeared to the nearest there is."""
    correlation: float
    """Of their activations on the same rows; NaN without a pair."""


@dataclass(frozen=True, repr=False)
class DictionaryComparison:
    """All living latents of both sides; a pair stands once."""

    matches: tuple[Match, ...]
    chance: float
    """Cosine up to which the nearest direction is called chance."""
    living_base: int
    living_tuned: int
    rows: int
    nearest_base: Float[Tensor, " living_base"] = field(repr=False)
    """Each living latent's cosine to the nearest of the tuned dictionary."""
    nearest_null: Float[Tensor, " living_base"] = field(repr=False)
    """The same to random directions."""
    examples: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict, repr=False)
    """("base" or "tuned", latent) -> different tokens that it fires on most, if tokens were given."""

    def of_kind(self, kind: str) -> list[Match]:
        return [match for match in self.matches if match.kind == kind]

    @property
    def counts(self) -> dict[str, int]:
        kinds = ("kept", "rotated", "split", "vanished", "appeared")
        return {kind: len(self.of_kind(kind)) for kind in kinds}

    def __repr__(self) -> str:
        told = ", ".join(f"{kind} {n}" for kind, n in self.counts.items())
        return f"{self.living_base} and {self.living_tuned} living latents: {told} (chance: cosine {self.chance:.2f})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "chance": self.chance,
            "living_base": self.living_base,
            "living_tuned": self.living_tuned,
            "rows": self.rows,
            "matches": [vars(match) for match in self.matches],
        }


@torch.inference_mode()
def compare_dictionaries(
    base: SAE,
    tuned: SAE,
    acts_base: Float[Tensor, "n d"],
    acts_tuned: Float[Tensor, "n d"],
    *,
    tokens: Sequence[str] | None = None,
    seed: int = 0,
) -> DictionaryComparison:
    """Match two dictionaries of one width of activations, on the same rows of both models; `tokens` names the rows.

    Raises InputError for widths or rows that differ, and where no latent of a side fires.
    """
    if base.W_dec.shape[1] != tuned.W_dec.shape[1]:
        raise InputError(
            f"The dictionaries are of activations {base.W_dec.shape[1]} and {tuned.W_dec.shape[1]} wide: directions "
            "of different spaces have no cosine."
        )
    if len(acts_base) != len(acts_tuned):
        raise InputError(
            f"{len(acts_base)} and {len(acts_tuned)} rows: both sides need the same tokens, row by row."
        )
    latents = [_encoded(sae, acts) for sae, acts in ((base, acts_base), (tuned, acts_tuned))]
    alive = [(x > 0).any(0).nonzero().flatten() for x in latents]
    for name, own in zip(("base", "tuned"), alive):
        if len(own) < 2:
            raise InputError(
                f"{len(own)} latents of the {name} dictionary fire on these rows: give more text."
            )
    unit = [
        F.normalize(sae.W_dec.detach().double().cpu()[own], dim=1) for sae, own in zip((base, tuned), alive)
    ]
    cosines = unit[0] @ unit[1].T
    generator = torch.Generator().manual_seed(seed)
    nulls = [(unit[0] @ _random_like(unit[1], generator).T).amax(1)]
    nulls.append((unit[1] @ _random_like(unit[0], generator).T).amax(1))
    chance = float(torch.cat(nulls).quantile(_PERCENTILE))
    sides = zip(("base", "tuned"), latents, alive)
    return DictionaryComparison(
        tuple(_matches(cosines, chance, alive, latents)),
        chance,
        len(alive[0]),
        len(alive[1]),
        len(acts_base),
        cosines.amax(1),
        nulls[0],
        {(side, i): _top_tokens(x[:, i], tokens) for side, x, own in sides for i in own.tolist() if tokens},
    )


def _encoded(sae: SAE, acts: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
    return torch.cat(
        [sae.encode(part.to(sae.device, sae.dtype)).float().cpu() for part in acts.split(_ROWS_AT_ONCE)]
    )


def _random_like(unit: Float[Tensor, "m d"], generator: torch.Generator) -> Float[Tensor, "m d"]:
    """Random directions with the dictionary's second moment."""
    mixed = torch.randn(len(unit), len(unit), dtype=unit.dtype, generator=generator) @ unit
    return F.normalize(mixed, dim=1)


def _matches(
    cosines: Float[Tensor, "a b"], chance: float, alive: list[Int[Tensor, " m"]], latents: list[Tensor]
) -> list[Match]:
    best_of_base, best_of_tuned = cosines.argmax(1), cosines.argmax(0)
    found = []
    for i, j in enumerate(best_of_base.tolist()):
        cosine, mutual = float(cosines[i, j]), int(best_of_tuned[j]) == i
        a, b = int(alive[0][i]), int(alive[1][j])
        if cosine <= chance:
            found.append(Match("vanished", a, None, cosine, math.nan))
        else:
            kind = ("kept" if cosine >= KEPT else "rotated") if mutual else "split"
            found.append(Match(kind, a, b, cosine, _correlation(latents[0][:, a], latents[1][:, b])))
    for j, i in enumerate(best_of_tuned.tolist()):
        cosine = float(cosines[i, j])
        a, b = int(alive[0][i]), int(alive[1][j])
        if cosine <= chance:
            found.append(Match("appeared", None, b, cosine, math.nan))
        elif int(best_of_base[i]) != j:
            found.append(Match("split", a, b, cosine, _correlation(latents[0][:, a], latents[1][:, b])))
    return found


def _correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _top_tokens(activations: Float[Tensor, " n"], tokens: Sequence[str]) -> tuple[str, ...]:
    top = activations.topk(min(_LOOKED_AT, len(activations)))
    fired = [tokens[i] for i, value in zip(top.indices.tolist(), top.values.tolist()) if value > 0]
    return tuple(dict.fromkeys(fired))[:_SHOWN]
