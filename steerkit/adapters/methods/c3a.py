"""C3A: circular convolutions.

    W' = W + C / d_in,   C of `block` × `block` circulant blocks, each of `block` numbers;   C = 0 at first

Chen et al. 2024, https://arxiv.org/abs/2407.19342. peft's own default starts at random, not as the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class C3A(AdapterMethod):
    """Circular convolutions."""

    block: int = 256
    """Greatest size of a block; in each module the greatest that divides both sides is taken. Parameters fall with it."""

    name: ClassVar[str] = "c3a"
    paper: ClassVar[str] = "Chen et al. 2024, https://arxiv.org/abs/2407.19342"
    equation: ClassVar[str] = "W' = W + blockcirculant(c)/d_in"
    hypothesis: ClassVar[str] = (
        "Rank and number of parameters are two things: circulant blocks have much of the one for little of the other."
    )
    family: ClassVar[str] = "fixed-basis"
    size: ClassVar[str] = "block"
    lr: ClassVar[float] = 1e-1

    def block_at(self, slot: Slot) -> int:
        """The size of a block there."""
        return greatest_divisor(self.block, [slot.d_out, slot.d_in], f"c3a's block in {slot.path}")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import C3AConfig

        return C3AConfig(
            block_size=self.block,
            block_size_pattern={slot.path: self.block_at(slot) for slot in slots},
            init_weights=True,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return slot.d_out * slot.d_in // self.block_at(slot)
