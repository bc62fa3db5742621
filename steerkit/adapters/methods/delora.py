"""DeLoRA: low-rank directions apart from how far they go.

    W' = W + (λ/r) B diag(1 / ‖b_i‖ ‖a_i‖) A diag(‖W_:j‖),   B = 0 at first, λ one number

Bini et al. 2025, https://arxiv.org/abs/2503.18225. λ bounds the change, whatever A and B: ‖ΔW‖ ≤ λ max_j ‖W_:j‖. Beside ‖W‖ that is
some λ / √d, and since B is scaled to unit length the first step goes nearly there, however small the learning rate. The λ of 15
that is usual for d = 4,096 would be twice W at d = 64, and nothing would be learned: λ therefore begins at 15 √(d / 4,096).
"""

from __future__ import annotations

import math
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
    bound: int | None = None
    """What λ starts from; by default 15 √(d_model / 4,096) as a whole number, at least 1."""
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
            delora_lambda=self.bound or max(1, round(15 * math.sqrt(model.d_model / 4096))),
            module_dropout=self.dropout,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_out + slot.d_in) + 1
