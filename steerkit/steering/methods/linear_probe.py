"""The direction of a linear probe: what tells the sides apart best, as a vector to add.

    v = |mean_i(h+_i) - mean_i(h-_i)| w / |w|,   w: weights of a logistic regression on all sides, whose penalty folds choose

The probe is `probes.fit_linear`: unlike `logistic` it does not know which sides are a pair, but for keeping them in one fold. That
what reads a concept best need not write it best: Li et al. 2023, https://arxiv.org/abs/2306.03341; Wu et al. 2025,
https://arxiv.org/abs/2501.17148.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from probes.linear import fit_linear
from steerkit.steering.methods.base import Direction, Fitter, register


@register
@dataclass(frozen=True)
class LinearProbeDirection(Direction):
    """The weights of a probe between the sides, as long as the mean difference."""

    seed: int = 0
    """Of the folds."""
    name: ClassVar[str] = "linear_probe"

    def fitter(self, width: int) -> Fitter:
        return _Fitter(self.seed)


class _Fitter(Fitter):
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.positive: list[Tensor] = []
        self.negative: list[Tensor] = []

    def update(self, positive: Tensor, negative: Tensor) -> None:
        self.positive.append(positive)
        self.negative.append(negative)

    def direction(self) -> Tensor:
        positive, negative = torch.cat(self.positive), torch.cat(self.negative)
        n = len(positive)
        probe = fit_linear(
            torch.cat([positive, negative]),
            np.repeat([1, 0], n),
            groups=np.tile(np.arange(n), 2),
            seed=self.seed,
        )
        weights = probe.direction(1)
        size = (positive.mean(0) - negative.mean(0)).norm()
        return (weights * (size / weights.norm().clamp_min(1e-30))).float()
