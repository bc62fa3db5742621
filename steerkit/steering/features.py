"""Steering by the latents of a sparse autoencoder.

    steering.add_latents(sae, {239: 1.0})               # h + s Σ_i a_i d_i: decoder rows
    steering.clamp_latents(sae, [239], value=8.0)       # h + s Σ_i (c - f_i(h)) d_i: what else is in h stays
    steering.ablate_latents(sae, [239, 17])             # the same with c = 0

f_i is the latent as the SAE computes it, d_i its decoder row in the activations' units. The error that the SAE makes is left in h.
Templeton et al. 2024, https://transformer-circuits.pub/2024/scaling-monosemanticity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE, TopK
from sae.architectures.crosscoder import CrosscoderSAE
from sae.architectures.transcoder import TranscoderSAE
from sae.formats import as_jumprelu
from steerkit.errors import InputError
from steerkit.steering.edits import Edit, Strength, register
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Tokens


@register
@dataclass(frozen=True, eq=False, repr=False)
class ClampLatents(Edit):
    """h + s (c - f(h)) W_dec over a few latents, f = z 1[z > θ], z = ReLU((h - b_dec) W_enc + b_enc)."""

    W_enc: Float[Tensor, "width k"]
    b_enc: Float[Tensor, " k"]
    """b_dec is folded in."""
    threshold: Float[Tensor, " k"]
    W_dec: Float[Tensor, "k width"]
    value: float = 0.0
    """c, in units of the latents."""
    name: ClassVar[str] = "clamp_latents"
    sized_by: ClassVar[str] = "W_dec"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        z = torch.relu(h @ self.W_enc + self.b_enc)
        latents = z * (z > self.threshold)
        return h + s * ((self.value - latents) @ self.W_dec)


def add_latents(sae: SAE, weights: Mapping[int, float], site: str | None = None) -> SteeringVector:
    """The decoder rows of latents, times their weights. Raises InputError for a latent that does not exist."""
    ids = _checked(sae, list(weights))
    factors = torch.tensor([float(weights[i]) for i in ids])
    vector = factors @ sae.W_dec.detach().float().cpu()[ids]
    return SteeringVector.add(
        {_site(sae, site): vector}, **_provenance(sae, "sae_latents", latents=dict(weights))
    )


def clamp_latents(sae: SAE, latents: Sequence[int], value: float, site: str | None = None) -> SteeringVector:
    """Latents set to a value, at strength 1.

    Raises InputError for a TopK SAE without thresholds: which of its latents are active depends on all of them.
    """
    ids = _checked(sae, latents)
    if isinstance(sae.config, TopK) and sae.threshold is None:
        raise InputError(
            "A TopK SAE's latents depend on each other and cannot be clamped one by one: give it thresholds of its own first, "
            "sae.prune(sae, acts, quantile=0.0)."
        )
    plain = as_jumprelu(sae)
    encoder = plain.W_enc.detach().float().cpu()
    bias = plain.b_enc.detach().float().cpu() - plain.b_dec.detach().float().cpu() @ encoder  # type: ignore[operator]
    threshold = plain.threshold
    assert threshold is not None
    edit = ClampLatents(
        _site(sae, site),
        W_enc=encoder[:, ids].contiguous(),
        b_enc=bias[ids],
        threshold=threshold.detach().float().cpu()[ids],
        W_dec=plain.W_dec.detach().float().cpu()[ids],
        value=float(value),
    )
    return SteeringVector((edit,), _provenance(sae, "clamp_latents", latents=ids, value=float(value)))


def ablate_latents(sae: SAE, latents: Sequence[int], site: str | None = None) -> SteeringVector:
    """Latents taken out."""
    return clamp_latents(sae, latents, 0.0, site)


def _checked(sae: SAE, latents: Sequence[int]) -> list[int]:
    if isinstance(sae, (TranscoderSAE, CrosscoderSAE)):
        raise InputError(
            f"A {sae.arch} writes to other sites than it reads: its latents cannot be steered so."
        )
    ids = [int(i) for i in latents]
    if not ids:
        raise InputError("Give at least one latent.")
    for i in ids:
        if not 0 <= i < sae.d_sae:
            raise InputError(f"There is no latent {i}: the SAE has {sae.d_sae}, from 0.")
    return ids


def _site(sae: SAE, site: str | None) -> str:
    found = site or sae.metadata.get("site")
    if found is None:
        raise InputError("The SAE does not say which site it is for: give site=….")
    return found


def _provenance(sae: SAE, method: str, **settings: Any) -> dict[str, Any]:
    return {"method": method, "settings": settings, "model": sae.metadata.get("model"), "arch": sae.arch}
