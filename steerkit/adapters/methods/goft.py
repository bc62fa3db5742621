"""GOFT: the input turned by a cascade of Givens rotations.

    W' = W Q,   Q = … Q_2 Q_1,   Q_1 turns the planes of coordinates (i, i + d_in/2), Q_2 those of (i, i + d_in/4) for i < d_in/4, …

Ma et al. 2024, https://arxiv.org/abs/2404.04316. Each rotation hands one coordinate on to the next stride, so that there are
d_in - 1 of them, with an angle each, 0 at the start: enough to gather any vector in one coordinate, not for all of SO(d_in). Q is
orthogonal, to rounding (the published code pairs neighbours at every stride, which is not). Published strides are 1, 2, 4, …: the
same cascade with its coordinates renamed; falling ones read memory in order. With `gains` each turned coordinate is stretched
besides, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target


@register
@dataclass(frozen=True)
class GOFT(EditMethod):
    """A cascade of Givens rotations."""

    gains: bool = False
    """Train a factor of each turned coordinate too: Q is orthogonal no more."""

    name: ClassVar[str] = "goft"
    paper: ClassVar[str] = "Ma et al. 2024, https://arxiv.org/abs/2404.04316"
    equation: ClassVar[str] = "W' = W Q, Q a product of d_in - 1 Givens rotations"
    hypothesis: ClassVar[str] = (
        "Neurons are right relative to each other: turning them all together is enough, with one angle a coordinate."
    )
    family: ClassVar[str] = "orthogonal"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 5e-3

    def edit(self, target: Target) -> Edit:
        return _GOFT(target, self.gains)

    def count_at(self, slot: Slot) -> int:
        return slot.d_in - 1 + self.gains * slot.d_in


def cascade(x: Float[Tensor, "... d"], blocks: Float[Tensor, "d_minus_1 2 2"]) -> Float[Tensor, "... d"]:
    """Q x with these 2 × 2 blocks instead of rotations: those of the greatest stride first. An odd coordinate is handed on too."""
    return _Cascade.apply(x.reshape(-1, x.shape[-1]), blocks).view_as(x) if len(blocks) else x


class _Cascade(torch.autograd.Function):
    """Each stride computes its lower half, which stays, and hands on the upper; a few passes over either, forth and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        handed, stay = [x], []
        for (aa, ab), (ba, bb) in _strides(x.shape[-1], blocks):
            a, b, odd = handed[-1].tensor_split([len(aa), 2 * len(aa)], dim=-1)
            stay.append(torch.mul(a, ba).addcmul_(b, bb))
            on = torch.mul(a, aa).addcmul_(b, ab)
            handed.append(torch.cat([on, odd], dim=-1) if odd.numel() else on)
        y = handed.pop()
        for below in reversed(stay):
            n = below.shape[-1]
            y = torch.cat([y[:, :n], below, y[:, n:]], dim=-1)
        ctx.save_for_backward(blocks, *handed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        blocks, *handed = ctx.saved_tensors
        strides, stay = _strides(grad.shape[-1], blocks), []
        for (aa, _), _ in strides:
            on, below, odd = grad.tensor_split([len(aa), 2 * len(aa)], dim=-1)
            stay.append(below)
            grad = torch.cat([on, odd], dim=-1) if odd.numel() else on
        parts = []
        for ((aa, ab), (ba, bb)), below, x in zip(reversed(strides), reversed(stay), reversed(handed)):
            n = len(aa)
            a, b, on = x[:, :n], x[:, n : 2 * n], grad[:, :n]
            parts.append(torch.stack([(g * side).sum(0) for g in (on, below) for side in (a, b)], dim=-1))
            first, second = torch.mul(on, aa).addcmul_(below, ba), torch.mul(on, ab).addcmul_(below, bb)
            grad = torch.cat([first, second, grad[:, n:]], dim=-1)
        return grad, torch.cat(parts[::-1]).view_as(blocks)


def _strides(d: int, blocks: Float[Tensor, "d_minus_1 2 2"]) -> list[Any]:
    """The entries ((aa, ab), (ba, bb)) of the blocks of each stride, the greatest first."""
    sizes = []
    while d > 1:
        sizes.append(d // 2)
        d -= d // 2
    return [[row.unbind(-1) for row in part.unbind(-2)] for part in blocks.split(sizes)]


class CascadeEdit(Edit):
    """W Q; a subclass makes Q's blocks."""

    def blocks(self) -> Float[Tensor, "d_minus_1 2 2"]:
        raise NotImplementedError

    def turned(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Q x."""
        return cascade(x, self.blocks())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(self.turned(x.to(next(self.parameters()).dtype)).to(x.dtype))

    def rotation(self) -> Float[Tensor, "d d"]:
        """Q, dense."""
        blocks = self.blocks()
        return self.turned(torch.eye(len(blocks) + 1, device=blocks.device, dtype=blocks.dtype)).T

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return weight @ self.rotation() - weight


class _GOFT(CascadeEdit):
    def __init__(self, target: Target, gains: bool) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.zeros(target.d_in - 1))
        self.gains = nn.Parameter(torch.ones(target.d_in)) if gains else None

    def blocks(self) -> Float[Tensor, "d_minus_1 2 2"]:
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))

    def turned(self, x: Tensor) -> Tensor:
        y = super().turned(x)
        return y if self.gains is None else self.gains * y
