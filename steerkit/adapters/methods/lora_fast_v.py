"""LoRA of the attention's projections whose value projection learns faster.

    W' = W + (α/r) B A,   lr(W_v) = ratio · lr(W_q)

Yao et al. 2024, https://arxiv.org/abs/2410.02247, argue that W_v has the greater effect and should learn faster than W_q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from steerkit.adapters.base import register
from steerkit.adapters.methods.lora import LoRA
from steerkit.adapters.slots import NAMES
from steerkit.errors import InputError


@register
@dataclass(frozen=True)
class FastVLoRA(LoRA):
    """LoRA whose value projection learns faster."""

    ratio: float = 4.0
    """Of W_v's learning rate to the others'."""

    name: ClassVar[str] = "lora_fast_v"
    paper: ClassVar[str] = "Yao et al. 2024, https://arxiv.org/abs/2410.02247"
    equation: ClassVar[str] = "W' = W + (α/r) B A, lr(W_v) = ratio · lr(W_q)"
    hypothesis: ClassVar[str] = "In attention it is the values that a task has to change."
    modules: ClassVar[str | tuple[str, ...]] = ("q", "v")

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise InputError(f"ratio is {self.ratio}; it must be positive.")

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        trained = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
        values = [p for parts, p in trained if set(parts) & set(NAMES["v"])]
        others = [p for parts, p in trained if not set(parts) & set(NAMES["v"])]
        if not values:
            raise InputError("lora_fast_v finds no value projection that is a module of its own here.")
        return [
            {"params": values, "lr": self.ratio * lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": weight_decay},
        ]
