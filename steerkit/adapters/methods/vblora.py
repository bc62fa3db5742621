"""VB-LoRA: all factors mixed from one bank of vectors.

    W' = W + B A;   each piece of B and A = Σ over the top k of softmax(logits) · bank,   bank shared by all modules

Li et al. 2024, https://arxiv.org/abs/2405.15179.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import check_rank, greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class VBLoRA(AdapterMethod):
    """All factors mixed from one bank of vectors."""

    rank: int = 4
    vectors: int = 256
    """In the bank."""
    length: int = 256
    """Greatest length of a vector; the greatest that divides both sides of all modules is taken."""
    top: int = 2
    """Vectors in a mixture."""

    name: ClassVar[str] = "vblora"
    paper: ClassVar[str] = "Li et al. 2024, https://arxiv.org/abs/2405.15179"
    equation: ClassVar[str] = "W' = W + B A, pieces = top-k softmax mixtures of a shared bank"
    hypothesis: ClassVar[str] = "Modules share the pieces that their changes are made of."
    family: ClassVar[str] = "low-rank"
    identity: ClassVar[str] = (
        "near the base: mixtures start at random, and no choice of logits makes B A zero"
    )
    lr: ClassVar[float] = 5e-3

    def length_in(self, slots: Sequence[Slot]) -> int:
        """The length of a vector."""
        sizes = [size for slot in slots for size in (slot.d_out, slot.d_in)]
        return greatest_divisor(self.length, sizes, "vblora's length")

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import VBLoRAConfig

        check_rank(self.name, self.rank, slots)
        if not 1 <= self.top <= self.vectors:
            raise InputError(f"top is {self.top}; it is 1 to {self.vectors}, the vectors in the bank.")
        return VBLoRAConfig(
            r=self.rank,
            num_vectors=self.vectors,
            vector_length=self.length_in(slots),
            topk=self.top,
            target_modules=self.paths(slots),
        )

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        length = self.length_in(slots)
        pieces = sum((slot.d_out + slot.d_in) // length for slot in slots)
        return self.vectors * (self.rank * pieces + length)
