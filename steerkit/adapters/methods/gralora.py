"""GraLoRA: a LoRA in each of k × k blocks.

    W' = W + (α/r) [B_ij A_ij],   W cut into k × k blocks, each with a rank of r/k;   B = 0 at first

Jung et al. 2025, https://arxiv.org/abs/2505.20355. As many parameters as LoRA of rank r, up to k times the rank.
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
class GraLoRA(AdapterMethod):
    """A LoRA in each of k × k blocks."""

    rank: int = 8
    """A multiple of k."""
    alpha: int | None = None
    """Numerator of the scale; 2 r by default."""
    k: int = 2
    dropout: float = 0.0

    name: ClassVar[str] = "gralora"
    paper: ClassVar[str] = "Jung et al. 2025, https://arxiv.org/abs/2505.20355"
    equation: ClassVar[str] = "W' = W + (α/r) [B_ij A_ij]"
    hypothesis: ClassVar[str] = "A few outlying channels should not govern the change of all others."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 2e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import GraloraConfig

        check_rank(self.name, self.rank, slots)
        if self.k < 1 or self.rank % self.k:
            raise InputError(f"rank is {self.rank}; gralora takes a multiple of k, which is {self.k}.")
        for slot in slots:
            if slot.d_out % self.k or slot.d_in % self.k:
                raise InputError(
                    f"k is {self.k}; it must divide both sides of {slot.path}, {slot.d_out} × {slot.d_in}."
                )
        return GraloraConfig(
            r=self.rank,
            alpha=self.alpha if self.alpha is not None else 2 * self.rank,
            gralora_k=self.k,
            gralora_dropout=self.dropout,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_out + slot.d_in)
