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
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures.base import (
    SAE,
    Config,
    Sparsity,
    Step,
    Terms,
    add_product,
    add_sum,
    column_counts,
    gradient,
    set_gradient,
    squared,
)


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

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        product = (x - self.b_dec) @ self.W_enc
        magnitude = self.above_threshold(self.r_mag.exp() * product + self.b_mag)
        return torch.minimum(product + self.b_gate, magnitude)

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
    def set_density(self, x: Float[Tensor, "n d_in"], latents: Tensor | slice = slice(None)) -> None:
        assert isinstance(self.config, Sparsity)
        self.b_gate[latents] = -self.upper_quantile(x, self.config.initial_density, latents)
        self.b_mag[latents] = self.b_gate[latents]
        self.r_mag[latents] = 0.0

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        gate = torch.relu((x - self.b_dec) @ self.W_enc + self.b_gate)
        error = (self.decode(self._encode(x)) - x).square().sum(-1)
        auxiliary = (gate @ self.W_dec.detach() + self.b_dec.detach() - x).square().sum(-1)
        return (error + terms.coefficient * gate.sum(-1) + auxiliary).mean()

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        step = self._sparse_gradients(x, terms) if terms.sparse else self._dense_gradients(x, terms)
        rates = self.r_mag.exp()
        gradient(self.r_mag).mul_(rates)
        gradient(self.b_dec).sub_(self.W_enc @ (gradient(self.b_gate) + rates * gradient(self.b_mag)))
        step.loss += step.mse
        step.l0 += step.counts.sum() / len(x)
        return step

    def _dense_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, coefficient = len(x), terms.dtype or x.dtype, terms.coefficient
        W_enc, W_dec, b_gate, b_mag = (p.to(dtype) for p in (self.W_enc, self.W_dec, self.b_gate, self.b_mag))
        rate = self.r_mag.exp().to(dtype)
        self.clear_gradients()
        step = Step.zero(self)
        for part in self.row_chunks(x):
            centred = part - self.b_dec
            inputs = centred.to(dtype)
            product = inputs @ W_enc
            gate = (product + b_gate).relu_()
            open_ = gate > 0
            latents = torch.addcmul(b_mag, product, rate).relu_().mul_(open_)
            active = latents > 0
            step.counts += column_counts(active)
            error = (latents @ W_dec).to(x.dtype).sub_(centred)
            auxiliary = (gate @ W_dec).to(x.dtype).sub_(centred)
            step.mse += squared(error) / n
            step.loss += squared(auxiliary) / n + coefficient / n * gate.sum(dtype=x.dtype)

            error.mul_(2 / n)
            errors, auxiliaries = error.to(dtype), auxiliary.mul_(2 / n).to(dtype)
            add_product(self.W_dec, latents.T, errors)
            magnitude = torch.mm(errors, W_dec.T, out=latents).mul_(active)
            upstream = torch.mm(auxiliaries, W_dec.T, out=gate).add_(coefficient / n).mul_(open_)
            add_sum(self.b_gate, upstream)
            add_sum(self.b_mag, magnitude)
            add_product(self.W_enc, inputs.T, upstream.addcmul_(magnitude, rate))
            add_sum(self.r_mag, product.mul_(magnitude))
            add_sum(self.b_dec, error)
        return step

    def _sparse_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, coefficient = len(x), terms.dtype or x.dtype, terms.coefficient
        W_dec = self.W_dec.to(dtype)
        centred = x - self.b_dec
        inputs = centred.to(dtype)
        pattern, gate = self.select(inputs, self.b_gate)
        b_gate, b_mag, rate = (
            p.to(dtype)[pattern.columns] for p in (self.b_gate, self.b_mag, self.r_mag.exp())
        )
        product = gate - b_gate
        latents = torch.addcmul(b_mag, product, rate).relu_()
        active = latents > 0
        error = pattern.times(latents, W_dec).to(x.dtype).sub_(centred)
        auxiliary = pattern.times(gate, W_dec).to(x.dtype).sub_(centred)
        step = Step.zero(self)
        step.counts += pattern.counts(active)
        step.mse += squared(error) / n
        step.loss += squared(auxiliary) / n + coefficient / n * gate.sum(dtype=x.dtype)

        error.mul_(2 / n)
        errors, auxiliaries = error.to(dtype), auxiliary.mul_(2 / n).to(dtype)
        magnitude = pattern.sample(errors, W_dec).mul_(active)
        upstream = pattern.sample(auxiliaries, W_dec).add_(coefficient / n)
        self.b_gate.grad, self.b_mag.grad = pattern.column_sums(upstream), pattern.column_sums(magnitude)
        self.r_mag.grad = pattern.column_sums(product.mul_(magnitude))
        self.W_dec.grad = pattern.transposed_times(latents, errors).to(x.dtype)
        set_gradient(self.W_enc, pattern.transposed_times(upstream.addcmul_(magnitude, rate), inputs).T)
        self.b_dec.grad = error.sum(0)
        return step
