"""The null: a random direction as long as the mean difference.

    v = |mean_i(h+_i) - mean_i(h-_i)| g / |g|,   g ~ N(0, I)

What a method does beyond this is what it has found in the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.steering.methods.base import Direction, Fitter, register
from steerkit.steering.methods.moments import Moments


@register
@dataclass(frozen=True)
class RandomDirection(Direction):
    """A direction drawn at random, the same for the same seed and width."""

    seed: int = 0
    name: ClassVar[str] = "random"
    of_sides: ClassVar[bool] = False

    def fitter(self, width: int) -> Fitter:
        return _Fitter(width, self.seed)


class _Fitter(Moments, Fitter):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__(width)
        self.drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def direction(self) -> Tensor:
        return (self.drawn * (self.mean_difference.norm() / self.drawn.norm())).float()
