"""DeLoRA: low-rank directions apart from how far they go.

    W' = W + (λ/r) B diag(1 / ‖b_i‖ ‖a_i‖) A diag(‖W_:j‖),   B = 0 at first, λ one number

Bini et al. 2025, https://arxiv.org/abs/2503.18225. λ bounds the change, whatever A and B.
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
class DeLoRA(AdapterMethod):
    """Low-rank directions apart from how far they go."""

    rank: int = 8
    bound: int = 15
    """What λ starts from."""
    dropout: float = 0.0

    name: ClassVar[str] = "delora"
    paper: ClassVar[str] = "Bini et al. 2025, https://arxiv.org/abs/2503.18225"
    equation: ClassVar[str] = "W' = W + (λ/r) B diag(1/(‖b_i‖‖a_i‖)) A diag(‖W_:j‖)"
    hypothesis: ClassVar[str] = "Where a change goes and how far are two things: bound the second."
    family: ClassVar[str] = "magnitude"
    lr: ClassVar[float] = 1e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import DeloraConfig

        check_rank(self.name, self.rank, slots)
        return DeloraConfig(
            r=self.rank,
            delora_lambda=self.bound,
            module_dropout=self.dropout,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_out + slot.d_in) + 1
