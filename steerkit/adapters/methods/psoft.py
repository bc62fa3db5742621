"""PSOFT: a rotation inside the principal subspace.

    W' = W + B (diag(b) R diag(a) - I) A,   B A = U_r S_r V_rᵀ of W's greatest singular values;   R = I, a = b = 1 at first

Wu et al. 2025, https://openreview.net/forum?id=FSHrinMArK. R is the Cayley transform of a skew r × r matrix.
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
class PSOFT(AdapterMethod):
    """A rotation inside the principal subspace."""

    rank: int = 32
    magnitudes: bool = True
    """Train a and b too."""

    name: ClassVar[str] = "psoft"
    paper: ClassVar[str] = "Wu et al. 2025, https://openreview.net/forum?id=FSHrinMArK"
    equation: ClassVar[str] = "W' = W + B (diag(b) R diag(a) - I) A"
    hypothesis: ClassVar[str] = "The greatest singular directions have to be turned, the rest stays."
    family: ClassVar[str] = "orthogonal"
    lr: ClassVar[float] = 1e-2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import PsoftConfig

        check_rank(self.name, self.rank, slots)
        if self.rank < 2 and not self.magnitudes:
            raise InputError("A rotation needs rank 2 or more.")
        return PsoftConfig(
            r=self.rank,
            psoft_alpha=self.rank,
            psoft_mag_a=self.magnitudes,
            psoft_mag_b=self.magnitudes,
            random_seed=seed,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank * (self.rank - 1) // 2 + 2 * self.rank * self.magnitudes
