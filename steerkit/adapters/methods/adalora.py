"""AdaLoRA: ranks where they matter.

    W' = W + (α/r) B diag(E) A,   B, A near orthogonal, E = 0 at first, then pruned by sensitivity to `rank` a module on average

Zhang et al. 2023, https://arxiv.org/abs/2303.10512. It starts with 1.5 × `rank` everywhere and prunes between the shares `begin`
and `1 - end` of the steps. peft adds the orthogonality penalty only to a loss computed inside the model; here it is the
`regulariser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class AdaLoRA(AdapterMethod):
    """Ranks where they matter."""

    rank: int = 8
    """Mean rank at the end."""
    alpha: int = 32
    """Numerator of the scale α/r."""
    begin: float = 0.1
    """Share of the steps before pruning."""
    end: float = 0.3
    """Share of the steps after pruning."""
    orthogonality: float = 0.5
    """Weight of the penalty: the mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all modules."""

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "Zhang et al. 2023, https://arxiv.org/abs/2303.10512"
    equation: ClassVar[str] = "W' = W + (α/r) B diag(E) A, E pruned"
    hypothesis: ClassVar[str] = "Modules differ in how much rank their change needs."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if not (self.begin >= 0 and self.end >= 0 and self.begin + self.end < 1):
            raise InputError(
                f"begin is {self.begin} and end {self.end}: shares of the steps, below 1 together."
            )

    @property
    def first_rank(self) -> int:
        """The rank at the start, 1.5 × `rank`."""
        return self.rank + (self.rank + 1) // 2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import AdaLoraConfig

        check_rank(self.name, self.rank, slots)
        return AdaLoraConfig(
            init_r=self.first_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,
            orth_reg_weight=self.orthogonality,
            total_step=1 << 30,  # set when the number of steps is known
            target_modules=self.paths(slots),
        )

    def hold(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # over a base in half precision peft makes this number trainable
                parameter.requires_grad_(False)
        return 0

    def count_at(self, slot: Slot) -> int:
        return self.first_rank * (slot.d_out + slot.d_in + 1)

    def regulariser(self, model: nn.Module) -> Tensor | None:
        penalties = []
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                penalties.append((gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)).norm())
        return self.orthogonality * torch.stack(penalties).mean()

    def after_step(self, model: nn.Module, step: int, n_steps: int) -> None:
        config: Any = model.peft_config["default"]  # type: ignore[index]
        config.total_step = n_steps
        config.tinit, config.tfinal = round(self.begin * n_steps), round(self.end * n_steps)
        with torch.no_grad():
            model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]
