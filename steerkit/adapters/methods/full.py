"""Full fine-tuning: every parameter is trained.

    θ' = θ + Δθ

Kept here as a method like any other, for comparison. Learning rates are a tenth or less of an adapter's: Biderman et
al. 2024, https://arxiv.org/abs/2405.09673, find 1e-5 to 5e-5 for 7 billion parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from steerkit.adapters.base import SubsetMethod, register
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.finetuning import everything
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class Full(SubsetMethod):
    """Every parameter is trained."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Biderman et al. 2024, https://arxiv.org/abs/2405.09673 (beside LoRA)"
    equation: ClassVar[str] = "θ' = θ + Δθ"
    hypothesis: ClassVar[str] = "What fine-tuning changes has no structure that could be known before."
    family: ClassVar[str] = "full"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 2e-4

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if modules is not None or layers is not None:
            raise InputError(
                "full trains every parameter: to train some modules or layers alone, take layers."
            )
        return super().targets(model, None, None)

    def trained(self, model: HookedModel, slots: Sequence[Slot]) -> list[str]:
        return everything(model)
