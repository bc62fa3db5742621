"""RandLoRA: a full-rank change out of random low-rank bases.

    W' = W + s Σ_j B_j diag(λ_j) A diag(γ_j),   B_j (j = 1 … ⌈k/r⌉) and A random, frozen and shared;  λ = 0,  k = min(d_out, d_in)

Albert et al. 2025, https://arxiv.org/abs/2502.00987. Fewer parameters with a greater rank r of each basis. A and B follow from
the seed.
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
class RandLoRA(AdapterMethod):
    """A full-rank change out of random low-rank bases."""

    rank: int = 32
    """Of each basis; parameters fall with it."""
    alpha: int | None = None
    """Numerator of the scale; 20 r by default."""
    dropout: float = 0.0

    name: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "Albert et al. 2025, https://arxiv.org/abs/2502.00987"
    equation: ClassVar[str] = "W' = W + (α/r) Σ_j B_j diag(λ_j) A diag(γ_j)"
    hypothesis: ClassVar[str] = "It is rank that LoRA lacks, not parameters."
    family: ClassVar[str] = "fixed-basis"
    lr: ClassVar[float] = 1e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import RandLoraConfig

        check_rank(self.name, self.rank, slots)
        return RandLoraConfig(
            r=self.rank,
            randlora_alpha=self.alpha if self.alpha is not None else 20 * self.rank,
            randlora_dropout=self.dropout,
            projection_prng_key=seed,
            save_projection=False,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        k = min(slot.d_out, slot.d_in)
        return -(-k // self.rank) * (self.rank + k)
