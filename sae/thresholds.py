"""Thresholds per latent that keep a share of its activations, measured on activations of text.

    sae.threshold = strongest(sae, acts, share=0.9)

Common ground of `sae.pruning` and of the random SAE that evaluations stand beside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.base import column_counts

_ENTRIES = 1 << 24
"""Latents that are computed at once."""
CALIBRATION_ENTRIES = 1 << 28
"""Latents that are held at once: activations beyond that are not looked at."""


@torch.no_grad()
def strongest(sae: SAE, acts: Float[Tensor, "n d_in"], share: float) -> Float[Tensor, " d_sae"]:
    """Thresholds under which each latent keeps `share` of the activations that it has on `acts`, the
    strongest.

    A latent that is active on m tokens is, with its threshold, active on round(share · m) of them (fewer if
    activations tie). The threshold lies halfway to the strongest activation that goes, so that rounding, here
    or in another format, does not decide. A TopK SAE with thresholds is no longer limited to k latents a
    token; its densities and its mean L0 are what they would be.
    """
    return strongest_of_each(sae, acts, [share])[0]


@torch.no_grad()
def strongest_of_each(
    sae: SAE, acts: Float[Tensor, "n d_in"], shares: Sequence[float]
) -> list[Float[Tensor, " d_sae"]]:
    """`strongest` for several shares: the activations are sorted once."""
    acts = acts[: max(1, CALIBRATION_ENTRIES // sae.d_sae)]
    bare = copy.deepcopy(sae)
    bare.threshold = torch.zeros(sae.d_sae, device=sae.device, dtype=sae.dtype)
    counts = torch.stack([column_counts(part > 0) for part in encoded(sae, acts)]).sum(0)
    latents = torch.cat(list(encoded(bare, acts)))
    found = [torch.zeros(sae.d_sae, device=sae.device, dtype=sae.dtype) for _ in shares]
    for part in sae.latent_chunks(max(1, _ENTRIES // len(acts))):
        ordered = latents[:, part].sort(dim=0, descending=True).values
        for share, thresholds in zip(shares, found):
            keep = (counts[part] * share).round().long()
            weakest_kept = ordered.gather(0, (keep - 1).clamp(min=0)[None])[0]
            weakest_kept[keep == 0] *= 1.01
            dropped = ordered.gather(0, keep.clamp(max=len(acts) - 1)[None])[0]
            halfway = torch.where(dropped > 0, (weakest_kept + dropped) / 2, dropped)
            thresholds[part] = halfway.masked_fill_(keep >= len(acts), 0)
    return found


@torch.no_grad()
def mean_l0(sae: SAE, acts: Float[Tensor, "n d_in"]) -> float:
    """Active latents a token."""
    return sum(int((latents > 0).sum()) for latents in encoded(sae, acts)) / len(acts)


def encoded(sae: SAE, acts: Float[Tensor, "n d_in"]) -> Iterator[Float[Tensor, "part d_sae"]]:
    """The latents of activations, a part of the tokens at a time."""
    for part in acts.split(max(1, _ENTRIES // sae.d_sae)):
        yield sae.encode(part.to(sae.device, sae.dtype))
