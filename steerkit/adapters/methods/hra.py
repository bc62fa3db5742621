"""HRA: a chain of Householder reflections.

    W' = W H_1 … H_r,   H_i = I - 2 u_i u_iᵀ / ‖u_i‖²,   u_1 = u_2, u_3 = u_4, … at first

Yuan et al. 2024, https://arxiv.org/abs/2405.17484. Two equal reflections undo each other, so that the rank is even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class HRA(AdapterMethod):
    """A chain of Householder reflections."""

    rank: int = 8
    """Reflections; even."""

    name: ClassVar[str] = "hra"
    paper: ClassVar[str] = "Yuan et al. 2024, https://arxiv.org/abs/2405.17484"
    equation: ClassVar[str] = "W' = W Π (I - 2 u_i u_iᵀ/‖u_i‖²)"
    hypothesis: ClassVar[str] = (
        "A few reflections are enough: a change of low rank that keeps angles and lengths."
    )
    family: ClassVar[str] = "orthogonal"
    identity: ClassVar[str] = "rounding"
    lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if self.rank % 2:
            raise InputError(f"rank is {self.rank}; hra takes pairs of reflections, an even number.")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import HRAConfig

        check_rank(self.name, self.rank, slots, ["d_in"])
        return HRAConfig(r=self.rank, target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return self.rank * slot.d_in
