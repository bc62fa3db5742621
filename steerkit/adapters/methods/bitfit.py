"""BitFit: the biases alone.

    y' = y + db   for every linear map and every norm that has a bias

Ben Zaken, Ravfogel and Goldberg 2022, https://arxiv.org/abs/2106.10199. Only biases that the model has: many have few or none.
Those of all modules inside the blocks, unless `modules` names some; learning rates about ten times those of full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.slots import Slot, choose, is_norm, layer_of
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class BitFit(EditMethod):
    """The biases alone."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "Ben Zaken, Ravfogel and Goldberg 2022, https://arxiv.org/abs/2106.10199"
    equation: ClassVar[str] = "y' = y + db"
    hypothesis: ClassVar[str] = (
        "Fine-tuning brings out what is there: shifting which neurons are on suffices."
    )
    family: ClassVar[str] = "magnitude"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 5e-3

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        chosen = choose(model, "all" if modules is None else modules, layers)
        if modules is None:
            chosen += _norms(model, {slot.layer for slot in chosen})
        found = [
            slot for slot in chosen if getattr(model.model.get_submodule(slot.path), "bias", None) is not None
        ]
        if not found:
            raise InputError(f"{model.name} has no biases there: bitfit has nothing to train.")
        return found

    def edit(self, target: Target) -> Edit:
        bias = target.module.bias
        assert isinstance(bias, Tensor)
        return _BitFit(len(bias))

    def count_at(self, slot: Slot) -> int:
        return slot.d_out


def _norms(model: HookedModel, layers: set[int]) -> list[Slot]:
    return [
        Slot(path, layer, "norm", len(norm.weight), 0)
        for path, norm in model.model.named_modules()
        if is_norm(norm) and (layer := layer_of(path)) in layers
    ]


class _BitFit(Edit):
    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.db = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.db.to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    def delta_bias(self, bias: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
        return self.db
