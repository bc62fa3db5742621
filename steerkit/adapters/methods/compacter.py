"""Compacter: bottlenecks whose matrices are sums of Kronecker products, one factor of which is shared.

    y' = y + U f(D y + b_D) + b_U,    D = Σ_i A_i ⊗ s_i t_iᵀ,   U = Σ_i A_i ⊗ u_i v_iᵀ,   i = 1 … n

A_i (n, n) are shared by all matrices of all layers; s_i (m/n), t_i (d/n), u_i (d/n), v_i (m/n) are each matrix's own.
Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647: n = 4, width 24, f = GELU, behind attention and behind
the FFN; learning rate 3e-3 (T5). u = 0 at the start, so U is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.bottleneck import ACTIVATIONS, check_bottleneck
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class Compacter(EditMethod):
    """Bottlenecks of Kronecker products."""

    rank: int = 24
    """Width of the bottleneck; a multiple of n."""
    n: int = 4
    """Kronecker products in a sum."""
    activation: str = "gelu"
    """relu, gelu or silu."""

    name: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647"
    equation: ClassVar[str] = "y' = y + U f(D y + b_D) + b_U, D = Σ A_i ⊗ s_i t_iᵀ"
    hypothesis: ClassVar[str] = "What layers need has structure in common; only rank-one parts are their own."
    family: ClassVar[str] = "activation"
    merge: ClassVar[str] = "it is a nonlinear function of activations, no change of weights"
    linear: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ("o", "down")
    lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        check_bottleneck(self.rank, self.activation)
        if self.n < 1 or self.rank % self.n:
            raise InputError(f"n is {self.n}; it must divide the rank, {self.rank}.")

    def edit(self, target: Target) -> Edit:
        if target.d_out % self.n:
            raise InputError(f"n is {self.n}; it must divide the width of {target.path}, {target.d_out}.")
        return _Compacter(target, self)

    def count_at(self, slot: Slot) -> int:
        return 3 * (slot.d_out + self.rank)

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        return super().count(model, slots) + self.n**3


class _Compacter(Edit):
    alpha = 1.0
    A: nn.Parameter

    def __init__(self, target: Target, config: Compacter) -> None:
        super().__init__()
        n, m, d = config.n, config.rank, target.d_out
        generator = target.generator()

        def normal(*shape: int, variance: float) -> Tensor:
            return torch.randn(*shape, generator=generator) * variance**0.5

        self.activation = ACTIVATIONS[config.activation]
        self.tie("A", target, "A", lambda: normal(n, n, n, variance=1 / n))
        self.s = nn.Parameter(normal(n, m // n, variance=1.0))
        self.t = nn.Parameter(normal(n, d // n, variance=1 / d))
        self.u = nn.Parameter(torch.zeros(n, d // n))
        self.v = nn.Parameter(normal(n, m // n, variance=1 / m))
        self.b_D = nn.Parameter(torch.zeros(m))
        self.b_U = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        inner = self.activation(kronecker(y.to(self.s.dtype), self.A, self.s, self.t).add_(self.b_D))
        return y + self.alpha * (kronecker(inner, self.A, self.u, self.v) + self.b_U).to(y.dtype)


def kronecker(
    x: Float[Tensor, "*any n*q"], A: Float[Tensor, "n n n"], s: Float[Tensor, "n p"], t: Float[Tensor, "n q"]
) -> Float[Tensor, "*any n*p"]:
    """(Σ_i A_i ⊗ s_i t_iᵀ) x. The matrix, whose rank is n² at most, is not made."""
    inside = torch.einsum("iab,...bi->...ai", A, x.unflatten(-1, (len(A), -1)) @ t.T)
    return (inside @ s).flatten(-2)
