"""JumpReLU sparse autoencoder: ReLU latents that are cut off at a threshold each.

    z = ReLU((x - b_dec) W_enc + b_enc),  f = z · 1[z > threshold],  x̂ = f W_dec + b_dec

Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435. What pruned SAEs of every architecture become, and what is read from
other toolkits; there is no training of thresholds here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures.base import SAE, Config


@dataclass(frozen=True)
class JumpReLU(Config):
    """ReLU latents above thresholds."""

    name: ClassVar[str] = "jumprelu"
    saelens_architecture: ClassVar[str] = "jumprelu"

    def build(self, d_in: int) -> SAE:
        return JumpReLUSAE(self, d_in)


class JumpReLUSAE(SAE):
    """See the module. `threshold` is always set."""

    b_enc: nn.Parameter

    def __init__(self, config: JumpReLU, d_in: int) -> None:
        super().__init__(config, d_in)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.threshold = torch.zeros(self.d_sae)

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
