"""VeRA: two vectors a module about random matrices that all share.

    W' = W + diag(λ_b) B diag(λ_d) A,   A and B random and frozen, cut from one pair for all modules;  λ_b = 0,  λ_d = 0.1

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454. A and B follow from the seed and are not stored.
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
class VeRA(AdapterMethod):
    """Two vectors a module about random matrices that all share."""

    rank: int = 256
    """Rows of A; it may exceed the matrices."""
    d_initial: float = 0.1
    """What λ_d starts from."""
    dropout: float = 0.0

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454"
    equation: ClassVar[str] = "W' = W + diag(λ_b) B diag(λ_d) A"
    hypothesis: ClassVar[str] = "Random directions will do: only how strongly each acts has to be learned."
    family: ClassVar[str] = "fixed-basis"
    lr: ClassVar[float] = 2e-2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import VeraConfig

        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; vera takes 1 or more.")
        return VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=seed,
            save_projection=False,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank + slot.d_out
