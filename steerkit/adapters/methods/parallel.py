"""Scaled parallel adapter: a small network beside the FFN.

    y' = FFN(x) + s (U f(D x + b_D) + b_U),    x the FFN's input

He et al. 2022, https://arxiv.org/abs/2110.04366: f = ReLU, U = 0 at the start, s = 4, width 512 for 1,024 units (in
their best). x is read where it enters the FFN's first map; the sum is made at the last map's output. So it fits FFNs
that are a module of their own and those that are a few maps of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from typing import Any, ClassVar

from torch import Tensor

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.bottleneck import Bottleneck, check_bottleneck
from steerkit.adapters.slots import Slot, find_slots
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class Parallel(EditMethod):
    """A small network beside the FFN."""

    rank: int = 16
    """Width of the bottleneck."""
    scale: float = 4.0
    """s."""
    activation: str = "relu"
    """relu, gelu or silu."""

    name: ClassVar[str] = "parallel"
    paper: ClassVar[str] = "He et al. 2022, https://arxiv.org/abs/2110.04366"
    equation: ClassVar[str] = "y' = FFN(x) + s (U f(D x + b_D) + b_U)"
    hypothesis: ClassVar[str] = "A task needs a few more neurons: what they read is the FFN's own input."
    family: ClassVar[str] = "activation"
    merge: ClassVar[str] = "it is a nonlinear function of activations, no change of weights"
    linear: ClassVar[bool] = False
    modules: ClassVar[str] = "down"
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        check_bottleneck(self.rank, self.activation)

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        downs = [slot for slot in super().targets(model, modules, layers) if slot.kind == "down"]
        if not downs:
            raise InputError(f"{self.name} stands beside FFNs, and {modules!r} has no down projection.")
        return [slot for down in downs for slot in (_first_map(model, down), down)]

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        return parallel_facts(slots)

    def edit(self, target: Target) -> Edit:
        return parallel_edit(target, self.rank, self.scale, self.activation)

    def count_at(self, slot: Slot) -> int:
        return parallel_count(slot, self.rank)


def _first_map(model: HookedModel, down: Slot) -> Slot:
    """The first map of the FFN that ends in `down`: of those of its layer that are as wide as the stream, the nearest by path."""
    found = [
        slot
        for slot in find_slots(model)
        if slot.layer == down.layer and slot.kind in ("gate", "up", "gate_up") and slot.d_in == down.d_out
    ]
    if not found:
        raise InputError(f"The FFN that ends in {down.path} has no map that reads its input.")
    return max(
        found, key=lambda slot: len(commonpath([path.replace(".", "/") for path in (slot.path, down.path)]))
    )


def parallel_facts(slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
    """What the two edits of each FFN have to know: which map reads its input, and whether they are its last map's."""
    facts, first = {}, ""
    for slot in slots:
        first = first if slot.kind == "down" else slot.path
        facts[slot.path] = {"reads": first, "adds": slot.kind == "down"}
    return facts


def parallel_edit(target: Target, rank: int, scale: float, activation: str) -> Edit:
    """The edit of an FFN's first or last map, as `parallel_facts` says."""
    handed_on = target.shared.setdefault(target.facts["reads"], [])
    if target.facts["adds"]:
        d = target.d_out
        return _Adds(handed_on, Bottleneck(d, d, rank, activation, target.generator()), scale)
    return _Reads(handed_on)


def parallel_count(slot: Slot, rank: int) -> int:
    """Trained parameters at an FFN's first or last map."""
    return 2 * slot.d_out * rank + rank + slot.d_out if slot.kind == "down" else 0


class _Reads(Edit):
    def __init__(self, handed_on: list[Tensor]) -> None:
        super().__init__()
        self.handed_on = handed_on

    def forward(self, x: Tensor, base: Base) -> Tensor:
        self.handed_on[:] = [x]
        return base(x)


class _Adds(Edit):
    alpha = 1.0

    def __init__(self, handed_on: list[Tensor], adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.handed_on, self.adapter, self.scale = handed_on, adapter, scale

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.alpha * self.scale * self.adapter(self.handed_on.pop()).to(y.dtype)
