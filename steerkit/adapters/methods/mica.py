"""MiCA: read anew into the least singular directions.

    W' = W + (α/r) U_r A,   U_r (d_out, r) the left singular vectors of the r smallest singular values, frozen;   A = 0 at first

2026, https://arxiv.org/abs/2604.01694.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.methods.lora import LoRA
from steerkit.adapters.slots import Slot


@register
@dataclass(frozen=True)
class MiCA(LoRA):
    """Read anew into the least singular directions."""

    name: ClassVar[str] = "mica"
    paper: ClassVar[str] = "MiCA 2026, https://arxiv.org/abs/2604.01694"
    equation: ClassVar[str] = "W' = W + (α/r) U_r A, U_r of the smallest singular values"
    hypothesis: ClassVar[str] = (
        "What the model hardly uses is where new knowledge fits without displacing old."
    )
    family: ClassVar[str] = "singular"
    options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "mica"}

    def paths(self, slots: Sequence[Slot]) -> list[str]:
        return AdapterMethod.paths(self, slots)

    def count_at(self, slot: Slot) -> int:
        return self.rank_at(slot) * slot.d_in
