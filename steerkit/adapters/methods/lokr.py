"""LoKr: a Kronecker product.

    W' = W + (α/r) C ⊗ (B A),   C (f_out, f_in) = 0 at first;  f the factor of each side below its root, or near `factor`

Edalati et al. 2022 (KronA), https://arxiv.org/abs/2212.10650; Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859. Where
r is at least half of what is left of a side, B A is one full matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class LoKr(AdapterMethod):
    """A Kronecker product."""

    rank: int = 8
    alpha: int | None = None
    """Numerator of the scale; r by default."""
    factor: int = -1
    """Sides of C; -1 for the greatest divisor below the root."""

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "Edalati et al. 2022, https://arxiv.org/abs/2212.10650"
    equation: ClassVar[str] = "W' = W + (α/r) C ⊗ (B A)"
    hypothesis: ClassVar[str] = "The change repeats one small pattern all over the matrix."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 5e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import LoKrConfig

        if self.rank < 1 or (self.factor < 1 and self.factor != -1):
            raise InputError(
                f"rank is {self.rank}, factor {self.factor}; lokr takes 1 or more (or factor -1)."
            )
        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha if self.alpha is not None else self.rank,
            decompose_factor=self.factor,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        from peft.tuners.lokr.layer import factorization

        (f_out, rest_out), (f_in, rest_in) = (factorization(d, self.factor) for d in (slot.d_out, slot.d_in))
        whole = self.rank >= max(rest_out, rest_in) / 2
        return f_out * f_in + (rest_out * rest_in if whole else self.rank * (rest_out + rest_in))
