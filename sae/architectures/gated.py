"""Gated sparse autoencoder.

    π = (x - b_dec) W_enc                              one encoder product serves gate and magnitude
    f = 1[π + b_gate > 0] · ReLU(exp(r_mag) π + b_mag),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + λ Σ ReLU(π + b_gate) + ‖x - (ReLU(π + b_gate) W̄_dec + b̄_dec)‖²           (W̄, b̄: no gradient)

Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014. The gate decides, unshrunk by the penalty, and the auxiliary term alone
trains it. λ is steered to `target_l0` by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.architectures.base import SAE, Config, Sparsity, Step, write_gradient


@dataclass(frozen=True)
class Gated(Sparsity):
    """A gate that says which latents are active, tied to the magnitudes that say how much."""

    name: ClassVar[str] = "gated"
    saelens_architecture: ClassVar[str] = "gated"

    def build(self, d_in: int) -> SAE:
        return GatedSAE(self, d_in)


class GatedSAE(SAE):
    """See the module."""

    uses_penalty = True
    r_mag: nn.Parameter
    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, config: Config, d_in: int) -> None:
        super().__init__(config, d_in)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        product = (x - self.b_dec) @ self.W_enc
        return torch.relu(self.r_mag.exp() * product + self.b_mag) * (product + self.b_gate > 0)

    @torch.no_grad()
    def jumprelu_weights(self) -> dict[str, Tensor]:
        rate = self.r_mag.exp()
        cut = torch.relu(self.b_mag - rate * self.b_gate)
        return {
            "W_enc": self.W_enc * rate,
            "W_dec": self.W_dec.clone(),
            "b_enc": self.b_mag.clone(),
            "b_dec": self.b_dec.clone(),
            "threshold": cut if self.threshold is None else torch.maximum(cut, self.threshold),
        }

    @torch.no_grad()
    def initialise(self, x: Tensor, mean: Tensor, generator: torch.Generator) -> None:
        super().initialise(x, mean, generator)
        assert isinstance(self.config, Sparsity)
        self.b_gate.copy_(-self.upper_quantile(x, self.config.initial_density))

    def loss(self, x: Float[Tensor, "n d_in"], coefficient: float, dead: Bool[Tensor, " d_sae"]) -> Tensor:
        gate = torch.relu((x - self.b_dec) @ self.W_enc + self.b_gate)
        error = (self.decode(self._encode(x)) - x).square().sum(-1)
        auxiliary = (gate @ self.W_dec.detach() + self.b_dec.detach() - x).square().sum(-1)
        return (error + coefficient * gate.sum(-1) + auxiliary).mean()

    @torch.no_grad()
    def gradients(
        self,
        x: Float[Tensor, "n d_in"],
        coefficient: float,
        dead: Bool[Tensor, " d_sae"],
        dtype: torch.dtype | None = None,
    ) -> Step:
        n, dtype = len(x), dtype or x.dtype
        W_enc, W_dec = self.W_enc.to(dtype), self.W_dec.to(dtype)
        rate = self.r_mag.exp().to(dtype)
        centred = x - self.b_dec
        inputs = centred.to(dtype)
        product = inputs @ W_enc
        gate = (product + self.b_gate.to(dtype)).relu_()
        open_ = gate > 0
        latents = torch.addcmul(self.b_mag.to(dtype), product, rate).relu_().mul_(open_)
        active = latents > 0
        counts = active.sum(0, dtype=torch.float32)

        error = (latents @ W_dec).to(x.dtype).sub_(centred)
        auxiliary = (gate @ W_dec).to(x.dtype).sub_(centred)
        mse = error.square().sum() / n
        loss = mse + coefficient * gate.sum(dtype=x.dtype) / n + auxiliary.square().sum() / n
        error.mul_(2 / n)
        auxiliary.mul_(2 / n)
        errors = error.to(dtype)

        write_gradient(self.W_dec, latents.T @ errors)
        magnitude = torch.mm(errors, W_dec.T, out=latents).mul_(active)
        upstream = torch.mm(auxiliary.to(dtype), W_dec.T, out=gate).add_(coefficient / n).mul_(open_)
        write_gradient(self.b_gate, upstream.sum(0, dtype=x.dtype))
        write_gradient(self.b_mag, magnitude.sum(0, dtype=x.dtype))
        upstream.addcmul_(magnitude, rate)
        write_gradient(self.r_mag, product.mul_(magnitude).sum(0, dtype=x.dtype).mul_(rate))
        write_gradient(self.W_enc, inputs.T @ upstream)
        write_gradient(self.b_dec, error.sum(0) - self.W_enc @ upstream.sum(0, dtype=x.dtype))
        return Step(loss, mse, counts.sum() / n, counts)
