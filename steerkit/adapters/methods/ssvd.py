"""SSVD: the leading right singular vectors turned, their singular values stretched; the left ones stay.

    W' = U diag(S + [dS, 0]) [G, I] Vᵀ,   W = U diag(S) Vᵀ,   G = (I - A/2)⁻¹ (I + A/2),   A = -Aᵀ (r, r)

Wang et al. 2025, https://arxiv.org/abs/2509.02830. dS = 0 and A = 0 at the start. G is the strict Cayley map, so orthogonal
whatever A is; the paper's default is its first-order approximation, and its r a share of the dimensions. Learning rates 1e-4 to
1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.rotations import skew, turn
from steerkit.adapters.singular import SingularEdit
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Edit, Target
from steerkit.errors import InputError


@register
@dataclass(frozen=True)
class SSVD(EditMethod):
    """Rotated leading right singular vectors."""

    rank: int = 16
    """r, the leading singular dimensions that are turned and stretched."""

    name: ClassVar[str] = "ssvd"
    paper: ClassVar[str] = "Wang et al. 2025, https://arxiv.org/abs/2509.02830"
    equation: ClassVar[str] = "W' = U (S + dS) G Vᵀ, G orthogonal on the leading r dimensions"
    hypothesis: ClassVar[str] = (
        "What a layer writes is right; a new domain needs it read from turned input directions."
    )
    family: ClassVar[str] = "singular"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it must be at least 1.")

    def edit(self, target: Target) -> Edit:
        return _SSVD(target, self.rank)

    def count_at(self, slot: Slot) -> int:
        return self.rank * (self.rank - 1) // 2 + self.rank


class _SSVD(SingularEdit):
    def __init__(self, target: Target, rank: int) -> None:
        super().__init__(target, rank)
        self.angles = nn.Parameter(torch.zeros(rank * (rank - 1) // 2))
        self.dS = nn.Parameter(torch.zeros(rank))

    def _turn(self) -> Float[Tensor, "r r"]:
        return turn(skew(self.angles, len(self.S)))

    def rotation(self) -> Float[Tensor, "r r"]:
        """G."""
        return self._turn() + torch.eye(len(self.S), device=self.S.device)

    def core(self) -> Float[Tensor, "r r"]:
        """diag(S + dS) G - diag(S)."""
        return (self.S + self.dS)[:, None] * self._turn() + torch.diag(self.dS)
