"""p-anneal sparse autoencoder.

    f = ReLU((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + λ Σ_i ((f_i + ε)^p - ε^p),   p from 1 down to `p_end` along a straight line

Karvonen et al. 2024, https://arxiv.org/abs/2408.00113. Training begins with the convex L1 and comes to something close to L0,
which hardly shrinks what is active. The slope at 0 is infinite for p < 1; ε bounds it. λ is steered to `target_l0` by default,
which also does what the paper does by rescaling λ whenever p changes; a fixed λ (`l1`) stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.architectures.base import SAE, Sparsity, Terms
from sae.architectures.l1 import ReLUSAE
from steerkit.errors import InputError


@dataclass(frozen=True)
class PAnneal(Sparsity):
    """A ReLU encoder under a penalty that goes from L1 towards L0."""

    p_end: float = 0.2
    """The last p."""
    start: float = 0.1
    """Share of the run after which p begins to fall."""
    end: float = 0.7
    """Share of the run at which p has come to `p_end`."""
    epsilon: float = 0.01
    """ε, in units of the latents."""

    name: ClassVar[str] = "p_anneal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p_end <= 1:
            raise InputError(f"p_end is {self.p_end}; it lies between 0 and 1.")
        if not 0 <= self.start < self.end <= 1:
            raise InputError(
                f"start and end are {self.start} and {self.end}: shares of the run, the first before the second."
            )
        if self.epsilon <= 0:
            raise InputError(
                f"epsilon is {self.epsilon}; it must be positive: the slope at 0 is infinite without it."
            )

    def p(self, progress: float) -> float:
        """p when a share `progress` of the run is done."""
        done = min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))
        return 1.0 + done * (self.p_end - 1.0)

    def build(self, d_in: int) -> SAE:
        return PAnnealSAE(self, d_in)


class PAnnealSAE(ReLUSAE):
    """φ(f) = (f + ε)^p - ε^p."""

    config: PAnneal

    def penalty(self, latents: Float[Tensor, "*batch"], terms: Terms) -> Float[Tensor, "*batch"]:
        p, epsilon = self.config.p(terms.progress), self.config.epsilon
        return (latents + epsilon).pow(p) - epsilon**p

    def add_penalty_slope_(self, gradient: Tensor, latents: Tensor, weight: float, terms: Terms) -> None:
        p = self.config.p(terms.progress)
        gradient.add_((latents + self.config.epsilon).pow_(p - 1), alpha=weight * p)
