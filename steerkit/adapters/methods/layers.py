"""Training some layers, or some maps of them: the rest is frozen.

    θ_S' = θ_S + Δθ_S

    get(model, "layers", top=2)                            the last two blocks
    get(model, "layers", layers=[0, 3])                    chosen ones
    get(model, "layers", modules="attention", bottom=1)    the attention's linear maps of the first, with their biases

A block all of whose linear maps are chosen is trained whole, norms too; embeddings, head and final norm never are.
Which layers to choose: Lee et al. 2022, https://arxiv.org/abs/2210.11466 (surgical fine-tuning: first layers for
changed inputs, last ones for changed outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from steerkit import finetuning
from steerkit.adapters.base import SubsetMethod, register
from steerkit.adapters.slots import Slot, find_slots
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class Layers(SubsetMethod):
    """Some layers, or some maps of them, are trained."""

    top: int = 0
    """Blocks at the end …"""
    bottom: int = 0
    """… and at the beginning; both 0: all, or those given as `layers`."""

    name: ClassVar[str] = "layers"
    paper: ClassVar[str] = "Lee et al. 2022, https://arxiv.org/abs/2210.11466"
    equation: ClassVar[str] = "θ_S' = θ_S + Δθ_S"
    hypothesis: ClassVar[str] = "What has to change lies in some layers, or in attention or FFNs alone."
    family: ClassVar[str] = "full"
    size: ClassVar[str] = "top"
    lr: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        if self.top < 0 or self.bottom < 0:
            raise InputError(f"top is {self.top} and bottom {self.bottom}; they are numbers of blocks.")

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        n = model.n_layers
        if self.top or self.bottom:
            if layers is not None:
                raise InputError("Give layers, or top and bottom, not both.")
            if max(self.top, self.bottom) > n:
                raise InputError(
                    f"{model.name} has {n} layers: top {self.top} and bottom {self.bottom} are too many."
                )
            layers = sorted({*range(self.bottom), *range(n - self.top, n)})
        return super().targets(model, modules, layers)

    def trained(self, model: HookedModel, slots: Sequence[Slot]) -> list[str]:
        maps = set(self.paths(slots))
        whole = {slot.layer for slot in slots} - {
            slot.layer for slot in find_slots(model) if slot.path not in maps
        }
        inside = {name for name in finetuning.everything(model) if name.rpartition(".")[0] in maps}
        inside.update(finetuning.layers(*whole)(model))
        return [name for name in finetuning.everything(model) if name in inside]
