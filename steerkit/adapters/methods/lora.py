"""LoRA: a low-rank change.

    W' = W + (α/r) B A,   B (d_out, r) = 0,  A (r, d_in) uniform

Hu et al. 2021, https://arxiv.org/abs/2106.09685. α = 2 r by default; `rslora` scales by α/√r (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732). Of a fused map, some rows alone can be adapted: the others' rows of B stay 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class LoRA(AdapterMethod):
    """A low-rank change."""

    rank: int = 8
    alpha: int | None = None
    """Numerator of the scale; 2 r by default."""
    dropout: float = 0.0

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2106.09685"
    equation: ClassVar[str] = "W' = W + (α/r) B A"
    hypothesis: ClassVar[str] = "What fine-tuning changes has low rank."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 2e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha if self.alpha is not None else 2 * self.rank,
            lora_dropout=self.dropout,
            target_modules=[slot.path for slot in slots],
        )

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        return sum(self.rank * (slot.d_in + slot.d_out) for slot in slots)
