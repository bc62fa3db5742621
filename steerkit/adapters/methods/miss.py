"""MiSS: one small block, shared by all shards of the input.

    plain:  y' = y + Dᵀ Σ_g x_g           x cut into shards of r, D (r, d_out) = 0 at first
    mini:   D repeats a block of r × `width`
    bat:    W' = W + W D + D, block by block of r × r

Kang et al. 2024, https://arxiv.org/abs/2409.15371. `bat` was called Bone.
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

VARIANTS: dict[str, Any] = {"plain": True, "mini": "mini", "bat": "bat"}


@register
@dataclass(frozen=True)
class MiSS(AdapterMethod):
    """One small block, shared by all shards of the input."""

    rank: int = 16
    variant: str = "plain"
    """`plain`, `mini` or `bat`."""
    width: int = 1
    """Columns of mini's block."""

    name: ClassVar[str] = "miss"
    paper: ClassVar[str] = "Kang et al. 2024, https://arxiv.org/abs/2409.15371"
    equation: ClassVar[str] = "y' = y + Dᵀ Σ_g x_g"
    hypothesis: ClassVar[str] = "All shards of the input can be read by the same weights."
    family: ClassVar[str] = "fixed-basis"
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant is {self.variant!r}; miss has {', '.join(VARIANTS)}.")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import MissConfig

        check_rank(self.name, self.rank, slots)
        for slot in slots:
            if self.variant == "bat" and (slot.d_out % self.rank or slot.d_in % self.rank):
                raise InputError(
                    f"miss bat cuts {slot.path}, {slot.d_out} × {slot.d_in}, into squares: rank {self.rank} must divide both."
                )
            if self.variant == "mini" and slot.d_out % self.width:
                raise InputError(
                    f"miss mini repeats {self.width} columns: that must divide the {slot.d_out} outputs of {slot.path}."
                )
        return MissConfig(
            r=self.rank,
            mini_r=self.width,
            init_weights=VARIANTS[self.variant],
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank * (self.width if self.variant == "mini" else slot.d_out)
