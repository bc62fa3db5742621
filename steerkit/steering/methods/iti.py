"""Inference-time intervention (ITI): attention heads that tell the sides apart are moved along the direction that does.

    for every head: how well the mean difference of its outputs tells held-out pairs apart;  of the best K:
    z_head ← z_head + s σ u,     u = (mean z+ - mean z-) / its norm,   σ: standard deviation of u·z over both sides

Li et al. 2023, https://arxiv.org/abs/2306.03341 (K = 48 of 1,024 heads, s = 15, u the "mass mean shift"). Heads are ranked by
accuracy on a fifth of the pairs that u was not made of, where the paper trains a logistic probe for each. Acts on every block's
`attn.hook_z`, or on those that are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.edits import Add
from steerkit.steering.methods.base import Method, register
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import collect_pairs
from steerkit.steering.vector import SteeringVector

_HELD_OUT = 0.2


@register
@dataclass(frozen=True)
class ITI(Method):
    """Additions to the outputs of a few heads."""

    heads: int | None = None
    """K; by default a twentieth of all heads, at least 2."""
    read: str | int = "mean"
    """Which tokens of a side are read: see `Direction`."""
    name: ClassVar[str] = "iti"
    of_sites: ClassVar[bool] = False

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str] = ()) -> SteeringVector:
        sites = [s for s in sites if s.endswith("attn.hook_z")] or [
            name for name, site in model.sites.items() if name.endswith("attn.hook_z") and site.verified
        ]
        if not sites:
            raise InputError(
                f"{model.name} has no attn.hook_z: the outputs of its heads cannot be told apart."
            )
        if len(pairs) < 5:
            raise InputError(
                f"ITI ranks heads on a fifth of the pairs: {len(pairs)} are too few, give 5 or more."
            )
        n_heads = model.n_heads
        total = n_heads * len(sites)
        keep = max(2, total // 20) if self.heads is None else self.heads
        if not 1 <= keep <= total:
            raise InputError(f"heads is {keep}; {model.name} has {total} at these sites.")
        found = collect_pairs(model, pairs, sites, read=self.read)
        ranked: list[tuple[float, str, int, Tensor]] = []
        for site in sites:
            positive, negative = (side.cpu().unflatten(1, (n_heads, -1)) for side in found[site])
            for head in range(n_heads):
                accuracy, shift = _judged(positive[:, head], negative[:, head])
                ranked.append((accuracy, site, head, shift))
        ranked.sort(key=lambda entry: -entry[0])
        chosen = ranked[:keep]
        if not any(shift.any() for *_, shift in chosen):
            raise InputError(f"The two sides of {pairs.name} do not differ at any head.")
        vectors: dict[str, Tensor] = {}
        for _, site, head, shift in chosen:
            whole = vectors.setdefault(site, torch.zeros(n_heads, len(shift)))
            whole[head] = shift
        provenance = self.provenance(model, pairs, list(vectors))
        provenance["heads"] = [
            {"site": site, "head": head, "accuracy": round(accuracy, 4)} for accuracy, site, head, _ in chosen
        ]
        return SteeringVector(
            tuple(Add(site, vector.flatten()) for site, vector in vectors.items()), provenance
        )


def _judged(positive: Tensor, negative: Tensor) -> tuple[float, Tensor]:
    """(accuracy of the mean difference on the held-out pairs, σ u of all pairs) of one head."""
    cut = len(positive) - max(1, round(_HELD_OUT * len(positive)))
    shift = positive[:cut].mean(0) - negative[:cut].mean(0)
    middle = 0.5 * (positive[:cut].mean(0) + negative[:cut].mean(0)) @ shift
    right = torch.cat([positive[cut:] @ shift > middle, negative[cut:] @ shift < middle])
    shift = positive.mean(0) - negative.mean(0)
    unit = shift / shift.norm().clamp_min(1e-12)
    return float(right.float().mean()), (torch.cat([positive, negative]) @ unit).std() * unit
