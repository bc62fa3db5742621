"""LoHa: the elementwise product of two low-rank matrices.

    W' = W + (α/r) (B_1 A_1) ∘ (B_2 A_2),   of rank up to r²;   one factor 0 at first

Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098; Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class LoHa(AdapterMethod):
    """The elementwise product of two low-rank matrices."""

    rank: int = 4
    """Of each factor."""
    alpha: int | None = None
    """Numerator of the scale; r by default."""

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098"
    equation: ClassVar[str] = "W' = W + (α/r) (B_1 A_1) ∘ (B_2 A_2)"
    hypothesis: ClassVar[str] = "The change has a rank too high for a product, but the structure of two."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 5e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import LoHaConfig

        check_rank(self.name, self.rank, slots)
        alpha = self.alpha if self.alpha is not None else self.rank
        return LoHaConfig(r=self.rank, alpha=alpha, target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return 2 * self.rank * (slot.d_out + slot.d_in)
