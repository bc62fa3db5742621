"""QA-LoRA: a low-rank change that is the same for all inputs of a group.

    W' = W + (α/r) B A P,   P (d_in/g, d_in) the means over groups of g neighbouring inputs

Xu et al. 2023, https://arxiv.org/abs/2309.14717. Made for weights that are quantised in such groups: the change can go into their
zero points without requantising. Here it is added to floating-point weights, exactly. Published: g = 32, a plain mean; A normal of
variance 2/(r + d_in/g) (Xavier), B = 0. α = 2 r unless told. Training also goes over a quantised base, merging does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.sizes import check_rank, greatest_divisor
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class QALoRA(EditMethod):
    """A low-rank change of grouped inputs."""

    rank: int = 8
    alpha: int | None = None
    """Numerator of the scale; 2 r by default."""
    group: int = 32
    """g; the greatest number up to it that divides d_in."""

    name: ClassVar[str] = "qa_lora"
    paper: ClassVar[str] = "Xu et al. 2023, https://arxiv.org/abs/2309.14717"
    equation: ClassVar[str] = "W' = W + (α/r) B A P, P the means of groups of inputs"
    hypothesis: ClassVar[str] = (
        "The change that is needed is coarse on the input side: neighbours can share it."
    )
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"group is {self.group}; it must be at least 1.")

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        slots = super().targets(model, modules, layers)
        check_rank(self.name, self.rank, slots)
        return slots

    def group_of(self, d_in: int) -> int:
        """g for a map with so many inputs."""
        return 1 if self.group == 1 else greatest_divisor(self.group, [d_in], "group")

    def edit(self, target: Target) -> Edit:
        return _QALoRA(target, self)

    def count_at(self, slot: Slot) -> int:
        return self.rank * (slot.d_in // self.group_of(slot.d_in) + slot.d_out)


class _QALoRA(Edit):
    def __init__(self, target: Target, config: QALoRA) -> None:
        super().__init__()
        self.group = config.group_of(target.d_in)
        self.scale = 2.0 if config.alpha is None else config.alpha / config.rank
        n_groups = target.d_in // self.group
        A = torch.randn(config.rank, n_groups, generator=target.generator())
        self.A = nn.Parameter((2 / (config.rank + n_groups)) ** 0.5 * A)
        self.B = nn.Parameter(torch.zeros(target.d_out, config.rank))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        pooled = x.to(self.A.dtype).unflatten(-1, (-1, self.group)).mean(-1)
        return y + (self.scale * (pooled @ self.A.T) @ self.B.T).to(y.dtype)

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        pooled = self.scale / self.group * self.B @ self.A
        return pooled.repeat_interleave(self.group, dim=1)
