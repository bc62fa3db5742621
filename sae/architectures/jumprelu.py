"""JumpReLU sparse autoencoder.

    f = z · 1[z > θ],  z = (x - b_dec) W_enc + b_enc,  θ ≥ 0 one threshold a latent,  x̂ = f W_dec + b_dec
    loss = ‖x - x̂‖² + λ Σ_i 1[z_i > θ_i]                                           sparsity "l0"
    loss = ‖x - x̂‖² + λ L* (L0 / L* - 1)²,  L0 = mean over tokens of Σ_i 1[z_i > θ_i]      sparsity "quadratic", L* = target_l0

Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435. The steps have no useful derivative; θ learns through kernels around
them (straight-through estimators), with K a rectangle and ε its width:

    ∂f/∂θ ≈ -(θ/ε) K((z - θ)/ε),   ∂1[z > θ]/∂θ ≈ -(1/ε) K((z - θ)/ε),   K(u) = 1[|u| < 1/2];   z gets no gradient from the steps

θ is learned as it is, not as its logarithm (which hardly moves under Adam), in float32. λ is steered to `target_l0` by default
(`sae.schedule.Multiplier`). Latents begin as those of a ReLU with a bias, θ in the middle of its window: with high thresholds and
no bias most are silent before they have learned anything. The paper has activations of unit norm and ε = 0.001; here they have unit
mean square per coordinate and are √d_in times as large.
It is also what pruned and BatchTopK SAEs become, and what is read from other toolkits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures.base import (
    SAE,
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
from sae.kernels import make_pattern
from sae.schedule import Controller, Multiplier
from steerkit import distributed
from steerkit.errors import InputError


@dataclass(frozen=True)
class JumpReLU(Sparsity):
    """ReLU latents above learned thresholds."""

    sparsity: str = "l0"
    """`l0`: λ times the number of active latents; `quadratic`: λ times the squared relative distance from `target_l0`."""
    bandwidth: float = 0.05
    """ε, as a share of the activations' norm: √d_in in training units."""

    name: ClassVar[str] = "jumprelu"
    saelens_architecture: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity not in ("l0", "quadratic"):
            raise InputError(f"sparsity is {self.sparsity!r}; it is 'l0' or 'quadratic'.")
        if self.sparsity == "quadratic" and self.target_l0 is None:
            raise InputError("The quadratic sparsity loss needs target_l0.")
        if not self.bandwidth > 0:
            raise InputError(f"bandwidth is {self.bandwidth}; it must be positive.")

    def controller(self, d_in: int, n_steps: int) -> Controller | None:
        if self.l1 is not None or self.target_l0 is None or self.sparsity == "quadratic":
            return None
        return Multiplier(self.target_l0, n_steps)

    def fixed_coefficient(self, d_in: int) -> float:
        return self.l1 if self.l1 is not None else d_in / 128

    def build(self, d_in: int) -> SAE:
        return JumpReLUSAE(self, d_in)


def fixed(d_sae: int) -> JumpReLU:
    """The config of an SAE whose thresholds came from elsewhere: pruning, calibration, another toolkit."""
    return JumpReLU(d_sae, target_l0=None, l1=0.0)


class JumpReLUSAE(SAE):
    """See the module. `threshold` is always set, and a parameter."""

    uses_penalty = True
    config: JumpReLU
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(self, config: JumpReLU, d_in: int) -> None:
        super().__init__(config, d_in)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        del self._buffers["threshold"]
        self.threshold = nn.Parameter(torch.zeros(self.d_sae))
        self.width = config.bandwidth * d_in**0.5

    @property
    def needs_whole_batch(self) -> bool:
        return self.config.sparsity == "quadratic"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "threshold" and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.W_dec.requires_grad)
        super().__setattr__(name, value)

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.above_threshold((x - self.b_dec) @ self.W_enc + self.b_enc)

    @torch.no_grad()
    def set_density(self, x: Float[Tensor, "n d_in"], latents: Tensor | slice = slice(None)) -> None:
        self.threshold[latents] = self.width / 2
        self.b_enc[latents] = self.width / 2 - self.upper_quantile(x, self.config.initial_density, latents)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_min_(0.0)

    def _step_weight(self, l0: Tensor, coefficient: float) -> Tensor:
        """Derivative of the sparsity term by L0."""
        if self.config.sparsity == "l0":
            return torch.full_like(l0, coefficient)
        target = self.config.target_l0
        assert target is not None
        return 2 * coefficient * (l0 / target - 1)

    def _sparsity(self, l0: Tensor, coefficient: float) -> Tensor:
        if self.config.sparsity == "l0":
            return coefficient * l0
        target = self.config.target_l0
        assert target is not None
        return coefficient * target * (l0 / target - 1).square()

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        latents = _Jump.apply(pre, self.threshold, self.width)
        l0 = _Heaviside.apply(pre, self.threshold, self.width).sum(-1).mean()
        return (self.decode(latents) - x).square().sum(-1).mean() + self._sparsity(l0, terms.coefficient)

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        step = (self._sparse_gradients if terms.sparse else self._dense_gradients)(x, terms)
        gradient(self.b_dec).sub_(self.W_enc @ gradient(self.b_enc))
        step.l0 += step.counts.sum() / len(x)
        # Entries in the window count once each, whatever their gradient: that is all that the sparsity term says of θ.
        l0 = distributed.mean(step.l0) if self.config.sparsity == "quadratic" else step.l0
        weight = self._step_weight(l0, terms.coefficient) / len(x)
        threshold = gradient(self.threshold)
        threshold.mul_(self.threshold).add_(self._in_window * weight).mul_(-1 / self.width)
        del self._in_window
        step.loss += step.mse + self._sparsity(l0, terms.coefficient)
        return step

    def _dense_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, half = len(x), terms.dtype or x.dtype, self.width / 2
        W_enc, W_dec, b_enc = self.W_enc.to(dtype), self.W_dec.to(dtype), self.b_enc.to(dtype)
        self.clear_gradients()
        self._in_window = torch.zeros_like(self.threshold)
        step = Step.zero(self)
        for part in self.row_chunks(x):
            centred = part - self.b_dec
            inputs = centred.to(dtype)
            pre = torch.addmm(b_enc, inputs, W_enc)
            above = pre - self.threshold
            active, window = above > 0, above.abs_() < half
            latents = pre.mul_(active)
            step.counts += column_counts(active)
            error = (latents @ W_dec).to(x.dtype).sub_(centred)
            step.mse += squared(error) / n
            error.mul_(2 / n)
            errors = error.to(dtype)
            add_product(self.W_dec, latents.T, errors)
            asked = torch.mm(errors, W_dec.T, out=latents)
            self._in_window += column_counts(window)
            add_sum(self.threshold, torch.mul(asked, window, out=above))
            upstream = asked.mul_(active)
            add_product(self.W_enc, inputs.T, upstream)
            add_sum(self.b_enc, upstream)
            add_sum(self.b_dec, error)
        return step

    def _sparse_gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype, half = len(x), terms.dtype or x.dtype, self.width / 2
        W_dec = self.W_dec.to(dtype)
        centred = x - self.b_dec
        inputs = centred.to(dtype)
        pattern, pre = self.select(inputs, self.b_enc, above=self.threshold - half)
        above = pre - self.threshold[pattern.columns]
        inner = (above > 0).nonzero().squeeze(1)
        window = above.abs_() < half
        active = make_pattern(pattern.rows[inner], pattern.columns[inner], pattern.shape, dtype)
        latents = pre[inner]
        step = Step.zero(self)
        step.counts += active.counts()
        error = active.times(latents, W_dec).to(x.dtype).sub_(centred)
        step.mse += squared(error) / n
        error.mul_(2 / n)
        errors = error.to(dtype)
        asked = pattern.sample(errors, W_dec)
        self._in_window = pattern.counts(window).to(x.dtype)
        upstream = asked[inner]
        self.threshold.grad = pattern.column_sums(asked.mul_(window)).to(x.dtype)
        self.W_dec.grad = active.transposed_times(latents, errors).to(x.dtype)
        set_gradient(self.W_enc, active.transposed_times(upstream, inputs).T)
        self.b_enc.grad, self.b_dec.grad = active.column_sums(upstream).to(x.dtype), error.sum(0)
        return step


class _Jump(torch.autograd.Function):
    """z · 1[z > θ], with the estimator of the module for θ."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        return upstream * (pre > threshold), -threshold / ctx.bandwidth * (upstream * window).sum(0), None


class _Heaviside(torch.autograd.Function):
    """1[z > θ], likewise."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(upstream * window).sum(0) / ctx.bandwidth, None
