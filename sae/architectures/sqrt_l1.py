"""sqrt-L1 sparse autoencoder.

    f = ReLU((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + λ Σ_i (√(f_i + ε) - √ε)

The root presses small activations to zero and hardly shrinks large ones. Its slope at 0 is infinite, and the gradient of a plain √
is NaN there; ε bounds the slope by 1/(2√ε). Riggs & Brinkmann 2024, “Improving SAEs by Sqrt-ing L1 & Removing Lowest
Activating Features” (the removal is `sae.prune`). λ is steered to `target_l0` by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.architectures.base import SAE, Config, Sparsity, Terms
from sae.architectures.l1 import ReLUSAE


@dataclass(frozen=True)
class SqrtL1(Sparsity):
    """A ReLU encoder under a penalty on the square roots of the activations."""

    epsilon: float = 0.01
    """ε, in units of the latents."""

    name: ClassVar[str] = "sqrt_l1"

    def build(self, d_in: int) -> SAE:
        return SqrtReLUSAE(self, d_in)


class SqrtReLUSAE(ReLUSAE):
    """φ(f) = √(f + ε) - √ε."""

    def __init__(self, config: Config, d_in: int) -> None:
        super().__init__(config, d_in)
        assert isinstance(config, SqrtL1)
        self.epsilon = config.epsilon

    def penalty(self, latents: Float[Tensor, "*batch"], terms: Terms) -> Float[Tensor, "*batch"]:
        return (latents + self.epsilon).sqrt() - self.epsilon**0.5

    def add_penalty_slope_(self, gradient: Tensor, latents: Tensor, weight: float, terms: Terms) -> None:
        gradient.add_((latents + self.epsilon).rsqrt_(), alpha=weight / 2)
