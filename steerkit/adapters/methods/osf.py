"""OSF: learn only in what the greatest singular directions leave free.

    W' = U_k S_k V_kᵀ + Ũ S̃ Ṽᵀ,   the greatest k frozen, all other singular triples trained with gradients orthogonal to these

Nayak et al. 2025, https://arxiv.org/abs/2504.07097. For learning one task after another. It trains more numbers than W has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import check_upright
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class OSF(AdapterMethod):
    """Learn only in what the greatest singular directions leave free."""

    keep: float = 0.5
    """Share of the singular directions that is frozen."""

    name: ClassVar[str] = "osf"
    paper: ClassVar[str] = "Nayak et al. 2025, https://arxiv.org/abs/2504.07097"
    equation: ClassVar[str] = "W' = U_k S_k V_kᵀ (frozen) + Ũ S̃ Ṽᵀ"
    hypothesis: ClassVar[str] = (
        "What a model knows lies in its greatest singular directions: learn in the others, and nothing is forgotten."
    )
    family: ClassVar[str] = "singular"
    identity: ClassVar[str] = "rounding"
    size: ClassVar[str] = "keep"
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise InputError(f"keep is {self.keep}; it is a share, above 0 and below 1.")

    def frozen_at(self, slot: Slot) -> int:
        """Singular directions that are frozen there."""
        k = min(slot.d_out, slot.d_in)
        return min(max(1, round(self.keep * k)), k - 1)

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import OSFConfig

        check_upright(self.name, model, slots)
        ranks: dict[str, int | float] = {slot.path: self.frozen_at(slot) for slot in slots}
        return OSFConfig(rank_pattern=ranks, target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        free = min(slot.d_out, slot.d_in) - self.frozen_at(slot)
        return free * (slot.d_out + slot.d_in + 1)
