"""HiRA: a low-rank factor on each weight.

    W' = W + W ∘ (B A),   B = 0 at first

Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS. The change has the rank of W, not that of B A.
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
class HiRA(AdapterMethod):
    """A low-rank factor on each weight."""

    rank: int = 8
    dropout: float = 0.0

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS"
    equation: ClassVar[str] = "W' = W + W ∘ (B A)"
    hypothesis: ClassVar[str] = "Weights change in proportion to what they are, by factors of low rank."
    family: ClassVar[str] = "magnitude"
    lr: ClassVar[float] = 5e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import HiraConfig

        check_rank(self.name, self.rank, slots)
        return HiraConfig(r=self.rank, hira_dropout=self.dropout, target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_out + slot.d_in)
