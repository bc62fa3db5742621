"""One latent of a sparse autoencoder: the one that tells the sides apart best, as a vector to add.

    i = argmax_j AUROC(mean_t f_j(h+), mean_t f_j(h-)),   f: latents of the SAE
    v = |mean_i(h+_i) - mean_i(h-_i)| d_i / |d_i|         d_i: its decoder row

Chosen by AUROC as in AxBench, Wu et al. 2025, https://arxiv.org/abs/2501.17148 (SAE-A); of latents that are equally good the one
whose part of the activations, f_i |d_i|, differs most. The autoencoder itself was trained without the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE
from steerkit.errors import InputError
from steerkit.finetune import Example, padded
from steerkit.models import HookedModel
from steerkit.stats import auroc
from steerkit.steering.features import add_latents
from steerkit.steering.methods.base import Method, register
from steerkit.steering.methods.fgaa import sae_and_site
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import collect_pairs, encode_side
from steerkit.steering.vector import SteeringVector

_BATCH = 32


@register
@dataclass(frozen=True)
class SAELatent(Method):
    """One decoder row at the SAE's site."""

    sae: Any = None
    """A `sae.SAE`, or the directory of one."""
    name: ClassVar[str] = "sae_latent"
    needs: ClassVar[tuple[str, ...]] = ("sae",)
    of_sites: ClassVar[bool] = False

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str] = ()) -> SteeringVector:
        sae, site = sae_and_site(self.sae, model, sites)
        positive, negative = side_latents(model, sae, site, pairs)
        difference = positive.mean(0) - negative.mean(0)
        norms = sae.W_dec.detach().float().cpu().norm(dim=1)
        candidates = (difference > 0).nonzero().flatten().tolist()
        if not candidates:
            raise InputError(f"No latent of the SAE is more active on the positive sides of {pairs.name}.")
        labels = np.repeat([True, False], len(pairs))
        both = torch.cat([positive, negative]).double().numpy()
        areas = {i: auroc(both[:, i], labels) for i in candidates}
        best = max(candidates, key=lambda i: (round(areas[i], 6), float(difference[i] * norms[i])))
        positive_acts, negative_acts = collect_pairs(model, pairs, [site])[site]
        shift = (positive_acts - negative_acts).mean(0).norm()
        vector = add_latents(sae, {best: float(shift.cpu() / norms[best])}, site)
        provenance = {
            **self.provenance(model, pairs, [site]),
            "settings": {},
            "latent": best,
            "auroc": round(areas[best], 6),
        }
        return SteeringVector(vector.edits, provenance)


def side_latents(
    model: HookedModel, sae: SAE, site: str, pairs: Pairs
) -> tuple[Float[Tensor, "n d_sae"], Float[Tensor, "n d_sae"]]:
    """Each side's latents, of the positive and of the negative sides: the mean over its tokens after the prompt, special ones left
    out. Raises InputError for a side that has none."""
    found = torch.zeros(2, len(pairs), sae.d_sae)
    for side in (0, 1):
        encoded = [encode_side(model, p.prompt, (p.positive, p.negative)[side]) for p in pairs]
        for first in range(0, len(encoded), _BATCH):
            batch = [Example(tuple(ids), start) for ids, start in encoded[first : first + _BATCH]]
            with torch.inference_mode():
                acts = model.run(*padded(model, batch), sites=[site])[site].float()
                latents = sae.encode(acts.to(sae.device)).float().cpu()
            for row, example in enumerate(batch):
                own = [
                    i for i in range(example.start, len(example)) if example.ids[i] not in model.special_ids
                ]
                if not own:
                    raise InputError(f"A side of {pairs.name} has no tokens of its own beside special ones.")
                found[side, first + row] = latents[row, own].mean(0)
    return found[0], found[1]
