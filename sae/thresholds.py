"""Thresholds per latent that keep a share of its activations, measured on activations of text.

    sae.threshold = strongest(sae, acts, share=0.9)

Common ground of `sae.pruning` and of the random SAE that evaluations stand beside.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE

_ENTRIES = 1 << 24


@torch.no_grad()
def strongest(sae: SAE, acts: Float[Tensor, "n d_in"], share: float) -> Float[Tensor, " d_sae"]:
    """Thresholds above which lie the strongest `share` of each latent's activations on `acts`; 0 for a latent
    that is silent there or keeps all of them.

    Of m activations the strongest round(share · m) are kept; ties at the threshold fall with it.
    """
    found = torch.zeros(sae.d_sae, device=sae.device, dtype=sae.dtype)
    for part, columns in _columns(sae, acts):
        ordered = columns.sort(dim=0, descending=True).values
        active = (columns > 0).sum(0)
        keep = (active * share).round().long()
        first_dropped = ordered.gather(0, keep.clamp(max=len(acts) - 1)[None])[0]
        found[part] = torch.where(keep < active, first_dropped, torch.zeros_like(first_dropped))
    return found


@torch.no_grad()
def mean_l0(sae: SAE, acts: Float[Tensor, "n d_in"]) -> float:
    """Active latents a token."""
    chunk = max(1, _ENTRIES // sae.d_sae)
    return sum(int((encode(sae, part) > 0).sum()) for part in acts.split(chunk)) / len(acts)


def encode(sae: SAE, acts: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Latents of activations that may lie on another device or be of another dtype."""
    return sae.encode(acts.to(sae.device, sae.dtype))


def _columns(sae: SAE, acts: Tensor) -> list[tuple[slice, Tensor]]:
    """The latents' activations, a few latents at a time. Encoders are run whole (top-k needs all latents)."""
    latents = torch.cat([encode(sae, part) for part in acts.split(max(1, _ENTRIES // sae.d_sae))])
    return [(part, latents[:, part]) for part in sae.latent_chunks(max(1, _ENTRIES // len(acts)))]
