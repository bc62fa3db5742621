"""ETHER: the input reflected at one learned hyperplane a block.

    W' = W H,   H = blockdiag(H_1 … H_n),   H_b = I - 2 û_b û_bᵀ,   û = u / ‖u‖

Bini et al. 2024, https://arxiv.org/abs/2405.20271. ‖H_b - I‖_F = 2 whatever u is: training can't leave the base's
neighbourhood, and starts at its edge, at a random u. Learning rate 2e-3 with n = 32, no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.sizes import greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError


@register
@dataclass(frozen=True)
class ETHER(EditMethod):
    """A reflection of the input."""

    blocks: int = 4
    """n; the greatest number up to it that divides d_in."""

    name: ClassVar[str] = "ether"
    paper: ClassVar[str] = "Bini et al. 2024, https://arxiv.org/abs/2405.20271"
    equation: ClassVar[str] = "W' = W H, H of blocks I - 2 û ûᵀ"
    hypothesis: ClassVar[str] = (
        "The change that is needed is one of direction, of bounded size; which direction is all there is to learn."
    )
    family: ClassVar[str] = "orthogonal"
    identity: ClassVar[str] = "a reflection is never the identity: each block is at distance 2 from it"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    def edit(self, target: Target) -> Edit:
        return _ETHER(target, self.blocks)

    def count_at(self, slot: Slot) -> int:
        return slot.d_in


def check_blocks(n: int) -> None:
    """Raises InputError for less than one block."""
    if n < 1:
        raise InputError(f"blocks is {n}; it must be at least 1.")


def random_normals(target: Target, d: int, blocks: int) -> Float[Tensor, "n block"]:
    """A random vector for each block of d coordinates."""
    n = 1 if blocks == 1 else greatest_divisor(blocks, [d], "blocks")
    return torch.randn(n, d // n, generator=target.generator())


def columns(vectors: Float[Tensor, "n block"]) -> Float[Tensor, "d n"]:
    """Each block's vector in a column of its own, 0 elsewhere."""
    return torch.block_diag(*vectors.unsqueeze(-1))


class _ETHER(Edit):
    def __init__(self, target: Target, blocks: int) -> None:
        super().__init__()
        self.u = nn.Parameter(random_normals(target, target.d_in, blocks))

    def reflected(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """H x."""
        normals = columns(F.normalize(self.u, dim=-1))
        return x - 2 * (x @ normals) @ normals.T

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self.reflected(x.to(self.u.dtype)).to(x.dtype))

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return self.reflected(weight) - weight
