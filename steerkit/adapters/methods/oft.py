"""OFT: rotations of the input, block by block.

    W' = W R,   R = blockdiag(R_1 … R_n),   R_i = (I + Q_i)(I - Q_i)⁻¹,   Q_i skew, 0 at first

Qiu et al. 2023, https://arxiv.org/abs/2306.07280; as in OFTv2 (Qiu et al. 2025, https://arxiv.org/abs/2506.19847) x is rotated,
not W, and the inverse is a Neumann series of `terms` terms: R is orthogonal up to Q's power `terms`. `exact` solves for the
inverse.
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
class OFT(AdapterMethod):
    """Rotations of the input, block by block."""

    block: int = 32
    """Greatest size of a block; the greatest that divides the inputs of all modules is taken."""
    exact: bool = False
    """Solve for the inverse, in place of the series."""
    terms: int = 5
    """Terms of the series."""

    name: ClassVar[str] = "oft"
    paper: ClassVar[str] = (
        "Qiu et al. 2023, https://arxiv.org/abs/2306.07280 (v2: https://arxiv.org/abs/2506.19847)"
    )
    equation: ClassVar[str] = "W' = W blockdiag(R_i), R_i = Cayley(Q_i)"
    hypothesis: ClassVar[str] = "Angles between neurons hold what was learned: turn them all alike."
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = "block"
    lr: ClassVar[float] = 5e-3

    def block_in(self, slots: Sequence[Slot]) -> int:
        """The size of a block that divides them all."""
        return greatest_divisor(self.block, [slot.d_in for slot in slots], "oft's block")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block_in(slots),
            use_cayley_neumann=not self.exact,
            num_cayley_neumann_terms=self.terms,
            target_modules=self.paths(slots),
        )

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        block = self.block_in(slots)
        return sum(slot.d_in * (block - 1) // 2 for slot in slots)
