"""Contrastive mean difference (CAA).

    v = mean_i(h+_i) - mean_i(h-_i)                      h: activations of the pairs' sides, (n, width)

Rimsky et al. 2024, https://arxiv.org/abs/2312.06681, where the one token of an answer's letter is read; here by default the mean
over a side's tokens, which is the same for such answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steerkit.steering.methods.base import Direction, Fitter, register
from steerkit.steering.methods.moments import Moments


@register
@dataclass(frozen=True)
class MeanDiff(Direction):
    """Positive mean minus negative mean."""

    name: ClassVar[str] = "mean_diff"

    def fitter(self, width: int) -> Fitter:
        return _Fitter(width)


class _Fitter(Moments, Fitter):
    def direction(self) -> Tensor:
        return self.mean_difference.float()
