"""Another SAE to stand beside one: which of its latents has the same decoder direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sae.architectures.base import SAE
from steerkit.errors import InputError

SAME = 0.7
"""Decoder cosine below which a latent counts as having no match."""


@dataclass(frozen=True)
class Second:
    """An SAE to compare with."""

    name: str
    sae: SAE
    site: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Figures of its evaluation, as in `summary.json`."""

    @torch.no_grad()
    def matches(self, sae: SAE, ids: Sequence[int]) -> list[tuple[int, float]]:
        """For each latent of `sae` in `ids`: the latent here with the nearest decoder direction, and the cosine. InputError when
        the decoders are of different widths."""
        if self.sae.W_dec.shape[1] != sae.W_dec.shape[1]:
            raise InputError(
                f"{self.name} reconstructs activations of width {self.sae.W_dec.shape[1]}, and this SAE of width "
                f"{sae.W_dec.shape[1]}: compare SAEs of one model and site."
            )
        mine = F.normalize(sae.W_dec.detach().float().cpu()[torch.as_tensor(ids)], dim=1)
        others = F.normalize(self.sae.W_dec.detach().float().cpu(), dim=1)
        found = [(part @ others.T).max(1) for part in mine.split(1024)]
        best = torch.cat([f.indices for f in found]).tolist()
        cosine = torch.cat([f.values for f in found]).tolist()
        return list(zip(best, cosine))
