"""SHiRA: a sparse change of high rank.

    W' = W + S,   S with r (d_out + d_in) trained places drawn from the seed;   S = 0 at first

Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175.
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
class SHiRA(AdapterMethod):
    """A sparse change of high rank."""

    rank: int = 8
    """As many places as a LoRA of this rank has."""

    name: ClassVar[str] = "shira"
    paper: ClassVar[str] = "Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175"
    equation: ClassVar[str] = "W' = W + S, S sparse"
    hypothesis: ClassVar[str] = "Few weights have to change, but anywhere."
    family: ClassVar[str] = "sparse"
    lr: ClassVar[float] = 1e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import ShiraConfig

        check_rank(self.name, self.rank, slots)
        for slot in slots:
            if self.count_at(slot) > slot.d_out * slot.d_in:
                raise InputError(
                    f"rank is {self.rank}: {self.count_at(slot)} places are more than {slot.path} has."
                )
        return ShiraConfig(r=self.rank, random_seed=seed, target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_out + slot.d_in)
