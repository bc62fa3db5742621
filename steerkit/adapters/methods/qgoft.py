"""qGOFT: GOFT's cascade with free 2 × 2 blocks that are only drawn towards rotations.

    W' = W Q,   Q as in GOFT, its planes mapped by I + M, M (2, 2) free;   loss + λ Σ ⟨α, β⟩²,   α and β the columns of I + M

Ma et al. 2024, https://arxiv.org/abs/2404.04316. Lengths may change at no cost, angles between coordinates at a small one. M = 0 at
the start. λ from 1e-3 to 5e-2, learning rates 5e-4 to 2e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.methods.goft import CascadeEdit
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Edit, Target


@register
@dataclass(frozen=True)
class QGOFT(EditMethod):
    """A cascade of nearly orthogonal 2 × 2 maps."""

    orthogonality: float = 1e-2
    """λ."""

    name: ClassVar[str] = "qgoft"
    paper: ClassVar[str] = "Ma et al. 2024, https://arxiv.org/abs/2404.04316"
    equation: ClassVar[str] = "W' = W Q, Q a product of d_in - 1 free 2 × 2 maps, nearly orthogonal"
    hypothesis: ClassVar[str] = "A rotation is nearly enough: lengths have to change a little too."
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = ""

    def edit(self, target: Target) -> Edit:
        return _QGOFT(target, self.orthogonality)

    def count_at(self, slot: Slot) -> int:
        return 4 * (slot.d_in - 1)


class _QGOFT(CascadeEdit):
    def __init__(self, target: Target, orthogonality: float) -> None:
        super().__init__()
        self.orthogonality = orthogonality
        self.M = nn.Parameter(torch.zeros(target.d_in - 1, 2, 2))

    def blocks(self) -> Float[Tensor, "d_minus_1 2 2"]:
        return torch.eye(2, device=self.M.device) + self.M

    def penalty(self) -> Tensor:
        alpha, beta = self.blocks().unbind(-1)
        return self.orthogonality * (alpha * beta).sum(-1).square().sum()
