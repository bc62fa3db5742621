"""ETHER+: input and output passed through two opposed hyperplane projections a block.

    W' = H̃ W H,   both of blocks I - û ûᵀ + v̂ v̂ᵀ of their own

Bini et al. 2024, https://arxiv.org/abs/2405.20271. For each block ‖H_b - I‖_F ≤ √2 (the paper says 2), and it need not be
orthogonal. v = u at the start, a random one: exactly the base. The module's bias stays. Learning rate 5e-3 with 32 blocks, no
weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.methods.ether import check_blocks, columns, random_normals
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target


@register
@dataclass(frozen=True)
class ETHERPlus(EditMethod):
    """Bounded changes on both sides."""

    blocks: int = 4
    """On either side; the greatest number up to it that divides it."""

    name: ClassVar[str] = "ether+"
    paper: ClassVar[str] = "Bini et al. 2024, https://arxiv.org/abs/2405.20271"
    equation: ClassVar[str] = "W' = H̃ W H, both of blocks I - û ûᵀ + v̂ v̂ᵀ"
    hypothesis: ClassVar[str] = (
        "A few directions have to be exchanged for others, on both sides, never further than a bounded distance."
    )
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    def edit(self, target: Target) -> Edit:
        return _ETHERPlus(target, self.blocks)

    def count_at(self, slot: Slot) -> int:
        return 2 * (slot.d_in + slot.d_out)


class _ETHERPlus(Edit):
    bias: Tensor

    def __init__(self, target: Target, blocks: int) -> None:
        super().__init__()
        u_in, u_out = (random_normals(target, d, blocks) for d in (target.d_in, target.d_out))
        self.u_in, self.v_in = nn.Parameter(u_in), nn.Parameter(u_in.clone())
        self.u_out, self.v_out = nn.Parameter(u_out), nn.Parameter(u_out.clone())
        self.register_buffer("bias", target.bias, persistent=False)

    def into(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """(H - I) x."""
        return _change(x, self.u_in, self.v_in)

    def out_of(self, y: Float[Tensor, "... d_out"]) -> Float[Tensor, "... d_out"]:
        """(H̃ - I) y."""
        return _change(y, self.u_out, self.v_out)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x + self.into(x.to(self.u_in.dtype)).to(x.dtype))
        return y + self.out_of(y.to(self.bias.dtype) - self.bias).to(y.dtype)

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        half = weight + self.into(weight)
        return half + self.out_of(half.T).T - weight


def _change(
    x: Float[Tensor, "... d"], u: Float[Tensor, "n block"], v: Float[Tensor, "n block"]
) -> Float[Tensor, "... d"]:
    """(v̂ v̂ᵀ - û ûᵀ) x of each block, as ½ (s tᵀ + t sᵀ) x with s = v̂ + û and t = v̂ - û: exactly 0 where v = u."""
    u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    s, t = columns(v + u), columns(v - u)
    return x @ torch.cat([t, s], dim=1) @ torch.cat([s, t], dim=1).T / 2
