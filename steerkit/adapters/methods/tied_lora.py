"""Tied-LoRA: one pair of factors for all layers, two vectors for each.

    W_l' = W_l + diag(v_l) B diag(u_l) A,   A (r, d_in) and B (d_out, r) common to the layers' maps of the same kind and shape

Renduchintala, Konuk and Kuchaiev 2023, https://arxiv.org/abs/2311.09578. All four are trained. A uniform as
LoRA's, B = 0, u = v = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class TiedLoRA(EditMethod):
    """A low-rank change that the layers share."""

    rank: int = 8

    name: ClassVar[str] = "tied_lora"
    paper: ClassVar[str] = "Renduchintala, Konuk and Kuchaiev 2023, https://arxiv.org/abs/2311.09578"
    equation: ClassVar[str] = "W_l' = W_l + diag(v_l) B diag(u_l) A"
    hypothesis: ClassVar[str] = (
        "All layers need the same few directions; they differ in how much of each they take."
    )
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 2e-3

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        slots = super().targets(model, modules, layers)
        check_rank(self.name, self.rank, slots)
        return slots

    def edit(self, target: Target) -> Edit:
        return _TiedLoRA(target, self.rank)

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        return {slot.path: {"kind": slot.kind} for slot in slots}

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        shapes = {(slot.kind, slot.d_out, slot.d_in) for slot in slots}
        shared = sum(self.rank * (d_out + d_in) for _, d_out, d_in in shapes)
        return shared + sum(self.rank + slot.d_out for slot in slots)


class _TiedLoRA(Edit):
    A: Tensor
    B: Tensor

    def __init__(self, target: Target, rank: int) -> None:
        super().__init__()
        d_out, d_in = target.d_out, target.d_in
        key = f"{target.facts['kind']} {d_out} {d_in}"
        bound = d_in**-0.5
        uniform = torch.rand(rank, d_in, generator=target.generator())
        self.tie("A", target, f"A {key}", lambda: bound * (2 * uniform - 1))
        self.tie("B", target, f"B {key}", lambda: torch.zeros(d_out, rank))
        self.u = nn.Parameter(torch.ones(rank))
        self.v = nn.Parameter(torch.ones(d_out))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        inside = (x.to(self.u.dtype) @ self.A.T) * self.u
        return y + ((inside @ self.B.T) * self.v).to(y.dtype)

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return self.v[:, None] * (self.B @ (self.u[:, None] * self.A))
