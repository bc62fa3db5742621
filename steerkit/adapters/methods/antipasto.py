"""AntiPaSTO: some singular dimensions turned and stretched, by an amount α that can be chosen afterwards, also negative.

    W(α) = W + U [diag(S + α dS) R(α)ᵀ - diag(S)] Vᵀ,   α from -1 to 1, 1 where nothing is said
    R(α) = (I - α A/2)⁻¹ (I + α A/2),   A = B / √(1 + m²/a²),   B = -Bᵀ (r, r),   a = 2 tan(max_angle/2),   ‖B‖₂ ≤ m

AntiPaSTO, 2026, https://arxiv.org/abs/2601.07473. U, S, V are r singular dimensions of W: the greatest, or those of `dimensions`
(`steerkit.steering.methods.antipasto.select` finds those that data excites). R(-α) = R(α)⁻¹, R(0) = I, and no plane turns by more
than `max_angle`; the published bound is one of A's elements, under which the planes of a large r turn by much more. B = 0 and
dS = 0 at the start (published: small random numbers). W is not kept a second time. This is the parametrisation, for any loss;
the contrastive loss that it was made for is the steering method of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.rotations import bounded, skew, turn
from steerkit.adapters.singular import SingularEdit
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Edit, Target
from steerkit.errors import InputError


@register
@dataclass(frozen=True)
class AntiPaSTO(EditMethod):
    """Singular dimensions turned both ways."""

    rank: int = 64
    """r, the singular dimensions of a module."""
    max_angle: float = math.pi / 2
    """Radians: no plane turns by more at α from -1 to 1."""
    dimensions: Mapping[str, Sequence[int]] | None = None
    """Module path -> r singular dimensions, 0 the greatest; where there is none, the greatest r."""

    name: ClassVar[str] = "antipasto"
    paper: ClassVar[str] = "AntiPaSTO, 2026, https://arxiv.org/abs/2601.07473"
    equation: ClassVar[str] = "W(α) = W + U [(S + α dS) R(α)ᵀ - S] Vᵀ, R a rotation"
    hypothesis: ClassVar[str] = (
        "A behaviour is a rotation among the model's own singular directions; its opposite is the inverse rotation."
    )
    family: ClassVar[str] = "singular"
    modules: ClassVar[tuple[str, ...]] = ("o", "down")
    lr: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it must be at least 1.")
        if not 0 < self.max_angle < math.pi:
            raise InputError(
                f"max_angle is {self.max_angle}; it is in radians, above 0 and below π ({math.pi:.4f})."
            )

    def edit(self, target: Target) -> Edit:
        return _AntiPaSTO(target, self)

    def count_at(self, slot: Slot) -> int:
        return self.rank * (self.rank - 1) // 2 + self.rank


class _AntiPaSTO(SingularEdit):
    alpha: float

    def __init__(self, target: Target, config: AntiPaSTO) -> None:
        super().__init__(target, config.rank, (config.dimensions or {}).get(target.path))
        self.max_angle, self.alpha = config.max_angle, 1.0
        self.angles = nn.Parameter(torch.zeros(config.rank * (config.rank - 1) // 2))
        self.dS = nn.Parameter(torch.zeros(config.rank))

    def _turn(self) -> Float[Tensor, "r r"]:
        """R(α) - I."""
        return turn(self.alpha * bounded(skew(self.angles, len(self.S)), self.max_angle))

    def rotation(self) -> Float[Tensor, "r r"]:
        """R(α)."""
        return self._turn() + torch.eye(len(self.S), device=self.S.device)

    def core(self) -> Float[Tensor, "r r"]:
        """diag(S + α dS) R(α)ᵀ - diag(S)."""
        stretched = self.alpha * self.dS
        return (self.S + stretched)[:, None] * self._turn().T + torch.diag(stretched)
