"""BOFT: a rotation as a product of sparse ones, in a butterfly.

    W' = diag(s) W R_1 … R_m,   R_j block-diagonal after a permutation, blocks (I + Q)(I - Q)⁻¹,   Q = 0, s = 1 at first

Liu et al. 2023, https://arxiv.org/abs/2311.06243. peft trains Q = P - Pᵀ for a full P. More than one factor needs its CUDA
extension (peft takes one without it, silently; here that is an error). Weight decay would draw s to 0 and is left out for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class BOFT(AdapterMethod):
    """A rotation as a product of sparse ones."""

    block: int = 4
    """Greatest size of a block; the greatest that divides the inputs of all modules is taken."""
    factors: int = 1
    """m."""

    name: ClassVar[str] = "boft"
    paper: ClassVar[str] = "Liu et al. 2023, https://arxiv.org/abs/2311.06243"
    equation: ClassVar[str] = "W' = diag(s) W R_1 … R_m"
    hypothesis: ClassVar[str] = "The rotation that a task needs is dense, but made of few sparse ones."
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = "block"
    lr: ClassVar[float] = 5e-3

    def block_in(self, slots: Sequence[Slot]) -> int:
        """The size of a block that divides them all."""
        sizes = [slot.d_in for slot in slots]
        return greatest_divisor(self.block, sizes, "boft's block", multiple_of=2 if self.factors > 1 else 1)

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import BOFTConfig
        from peft.tuners.boft.layer import get_fbd_cuda

        if self.factors < 1:
            raise InputError(f"factors is {self.factors}; boft takes 1 or more.")
        if self.factors > 1 and get_fbd_cuda() is None:
            raise InputError(
                f"boft with {self.factors} factors needs peft's CUDA extension, which does not build here: take 1."
            )
        return BOFTConfig(
            boft_block_size=self.block_in(slots),
            boft_n_butterfly_factor=self.factors,
            target_modules=self.paths(slots),
        )

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        turns = [p for name, p in trained if "boft_s" not in name]
        scales = [p for name, p in trained if "boft_s" in name]
        return [
            {"params": turns, "lr": lr, "weight_decay": weight_decay},
            {"params": scales, "lr": lr, "weight_decay": 0.0},
        ]

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        block = self.block_in(slots)
        return sum(self.factors * slot.d_in * block + slot.d_out for slot in slots)
