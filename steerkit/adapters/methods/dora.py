"""DoRA: direction apart from magnitude.

    W' = diag(m / ‖W + (α/r) B A‖_row) (W + (α/r) B A),   m = ‖W‖_row and B = 0 at first;  no gradient through the norm

Liu et al. 2024, https://arxiv.org/abs/2402.09353. Rows of W are outputs. Of a fused map some rows alone can be adapted. Over a base
in half precision the norms, and so the start, are rounded. Weight decay would draw magnitudes to 0 and is left out for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from steerkit.adapters.base import register
from steerkit.adapters.methods.lora import LoRA
from steerkit.adapters.slots import Slot


@register
@dataclass(frozen=True)
class DoRA(LoRA):
    """Direction apart from magnitude."""

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "Liu et al. 2024, https://arxiv.org/abs/2402.09353"
    equation: ClassVar[str] = "W' = m (W + (α/r) B A) / ‖W + (α/r) B A‖"
    hypothesis: ClassVar[str] = (
        "Fine-tuning changes direction and magnitude of weights apart from each other."
    )
    family: ClassVar[str] = "magnitude"
    options: ClassVar[Mapping[str, Any]] = {"use_dora": True}

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        factors = [p for name, p in trained if "magnitude" not in name]
        magnitudes = [p for name, p in trained if "magnitude" in name]
        return [
            {"params": factors, "lr": lr, "weight_decay": weight_decay},
            {"params": magnitudes, "lr": lr, "weight_decay": 0.0},
        ]

    def count_at(self, slot: Slot) -> int:
        return super().count_at(slot) + slot.n_rows
