"""The unembedding direction of the pairs' own words: is a method more than a boost of these words' logits?

    v = Σ_t (share of t in the positive sides - share of t in the negative ones) W_U[:, t]

A baseline: where a vector does no better than this one at equal divergence, it has found which words to say, not what they are
about. v is of unit norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.methods.base import Method, register
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import encode_side
from steerkit.steering.vector import SteeringVector


@register
@dataclass(frozen=True)
class Unembedding(Method):
    """One vector, of unit norm, at every site."""

    name: ClassVar[str] = "unembedding"
    needs_lm_head: ClassVar[bool] = True

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        counts = torch.zeros(2, model.d_vocab, dtype=torch.float64)
        for pair in pairs:
            for side, text in enumerate((pair.positive, pair.negative)):
                ids, start = encode_side(model, pair.prompt, text)
                own = torch.tensor([i for i in ids[start:] if i not in model.special_ids], dtype=torch.int64)
                counts[side] += torch.bincount(own, minlength=model.d_vocab)
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        vector = (shares[0] - shares[1]).float() @ model.W_U.detach().float().cpu().T
        norm = float(vector.norm())
        if not norm > 0:
            raise InputError(
                f"The two sides of {pairs.name} have the same tokens: there is no word to boost."
            )
        for site in sites:
            if model.site(site).width != len(vector):
                raise InputError(
                    f"{site} is {model.site(site).width} wide and the unembedding {len(vector)}: take hook_resid_post."
                )
        return SteeringVector.add(dict.fromkeys(sites, vector / norm), **self.provenance(model, pairs, sites))
