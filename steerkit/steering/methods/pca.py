"""First principal component of the pairs' differences, about the origin.

    v = argmax_{|v| = 1} Σ_i (v · d_i)²,   d_i = h+_i - h-_i;   its sign: mean_i(v · d_i) > 0

Zou et al. 2023 (RepE), https://arxiv.org/abs/2310.01405. The differences are not centred: that would take their mean away, which
is what the pairs have in common, and leave the largest of what they do not. (Taking each difference both ways, as RepE's shuffled
pairs do, comes to the same.) Of unit norm.
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
class PCA(Direction):
    """The direction in which the two sides differ most, pair by pair."""

    name: ClassVar[str] = "pca"

    def fitter(self, width: int) -> Fitter:
        return _Fitter(width, of_differences=True)


class _Fitter(Moments, Fitter):
    def direction(self) -> Tensor:
        assert self.differences is not None
        vector = torch.linalg.eigh(self.differences).eigenvectors[:, -1]
        return (vector if vector @ self.mean_difference >= 0 else -vector).float()
