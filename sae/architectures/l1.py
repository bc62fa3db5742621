"""L1 sparse autoencoder.

    f = ReLU((x - b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + λ Σ_i f_i

Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features; Cunningham et al. 2023,
https://arxiv.org/abs/2309.08600. λ is steered to `target_l0` by default.
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
class L1(Sparsity):
    """A ReLU encoder under an L1 penalty."""

    name: ClassVar[str] = "l1"

    def build(self, d_in: int) -> SAE:
        return ReLUSAE(self, d_in)


class ReLUSAE(SAE):
    """ReLU encoder, unit decoder rows, and a penalty Σ φ(f_i); φ(f) = f here."""

    uses_penalty = True
    b_enc: nn.Parameter

    def __init__(self, config: Config, d_in: int) -> None:
        super().__init__(config, d_in)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.above_threshold((x - self.b_dec) @ self.W_enc + self.b_enc)

    @torch.no_grad()
    def set_density(self, x: Float[Tensor, "n d_in"], latents: Tensor | slice = slice(None)) -> None:
        assert isinstance(self.config, Sparsity)
        self.b_enc[latents] = -self.upper_quantile(x, self.config.initial_density, latents)

    def penalty(self, latents: Float[Tensor, "*batch"], terms: Terms) -> Float[Tensor, "*batch"]:
        """φ(f)."""
        return latents

    def add_penalty_slope_(self, gradient: Tensor, latents: Tensor, weight: float, terms: Terms) -> None:
        """gradient += weight · φ'(f), in place; inactive latents are masked afterwards."""
        gradient.add_(weight)

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        latents = self._encode(x)
        error = (self.decode(latents) - x).square().sum(-1)
        return (error + terms.coefficient * self.penalty(latents, terms).sum(-1)).mean()

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        step = self._sparse_gradients(x, terms) if terms.sparse else self._dense_gradients(x, terms)
        gradient(self.b_dec).sub_(self.W_enc @ gradient(self.b_enc))
        step.loss += step.mse
        step.l0 += step.counts.sum() / len(x)
        return step

    def _dense_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, weight = len(x), terms.dtype or x.dtype, terms.coefficient / len(x)
        W_enc, W_dec, b_enc = self.W_enc.to(dtype), self.W_dec.to(dtype), self.b_enc.to(dtype)
        self.clear_gradients()
        step = Step.zero(self)
        for part in self.row_chunks(x):
            centred = part - self.b_dec
            inputs = centred.to(dtype)
            latents = torch.addmm(b_enc, inputs, W_enc).relu_()
            active = latents > 0
            step.counts += column_counts(active)
            error = (latents @ W_dec).to(x.dtype).sub_(centred)
            step.mse += squared(error) / n
            if weight:
                step.loss += weight * self.penalty(latents, terms).sum(dtype=x.dtype)

            error.mul_(2 / n)
            errors = error.to(dtype)
            upstream = errors @ W_dec.T
            self.add_penalty_slope_(upstream, latents, weight, terms)
            upstream.mul_(active)
            add_product(self.W_dec, latents.T, errors)
            add_product(self.W_enc, inputs.T, upstream)
            add_sum(self.b_enc, upstream)
            add_sum(self.b_dec, error)
        return step

    def _sparse_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, weight = len(x), terms.dtype or x.dtype, terms.coefficient / len(x)
        W_dec = self.W_dec.to(dtype)
        centred = x - self.b_dec
        inputs = centred.to(dtype)
        pattern, latents = self.select(inputs, self.b_enc)
        error = pattern.times(latents, W_dec).to(x.dtype).sub_(centred)
        step = Step.zero(self)
        step.counts += pattern.counts()
        step.mse += squared(error) / n
        if weight:
            step.loss += weight * self.penalty(latents, terms).sum(dtype=x.dtype)

        error.mul_(2 / n)
        errors = error.to(dtype)
        upstream = pattern.sample(errors, W_dec)
        self.add_penalty_slope_(upstream, latents, weight, terms)
        self.W_dec.grad = pattern.transposed_times(latents, errors).to(x.dtype)
        set_gradient(self.W_enc, pattern.transposed_times(upstream, inputs).T)
        self.b_enc.grad, self.b_dec.grad = pattern.column_sums(upstream), error.sum(0)
        return step
