"""RoAd: scaled rotations of pairs of outputs.

    y' = R y,   R of 2 × 2 blocks α (cos θ, -sin θ; sin θ, cos θ);   θ = 0, α = 1 at first

Liao and Monz 2024, https://arxiv.org/abs/2409.00119. `variant` 1 has one θ and α for each pair, 2 one for each row, 4 one for
each entry. Pairs are the halves of groups of `group` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class RoAd(AdapterMethod):
    """Scaled rotations of pairs of outputs."""

    variant: int = 1
    """1, 2 or 4: numbers of each kind for a pair."""
    group: int = 64
    """Greatest size of a group, even; the greatest that divides the outputs of all modules is taken."""

    name: ClassVar[str] = "road"
    paper: ClassVar[str] = "Liao and Monz 2024, https://arxiv.org/abs/2409.00119"
    equation: ClassVar[str] = "y' = blockdiag(α_i Rot(θ_i)) y"
    hypothesis: ClassVar[str] = "Fine-tuning turns and scales outputs in the plane, two at a time."
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = "variant"
    lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 4):
            raise InputError(f"variant is {self.variant}; road has 1, 2 and 4.")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import RoadConfig

        sizes = [slot.d_out for slot in slots]
        return RoadConfig(
            variant=f"road_{self.variant}",
            group_size=greatest_divisor(self.group, sizes, "road's group", multiple_of=2),
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.variant * slot.d_out
