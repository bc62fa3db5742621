"""Weights of a logistic regression between the sides.

    v = argmin_v 2 Σ_i log(1 + exp(-v · c_i)) + |v|² / (2 C),   c_i = (h+_i - h-_i) / 2

Each pair is centred on its own mean, so that its two sides are c_i and -c_i and there is no intercept; the vector is scaled to unit
norm. As a probing direction e.g. Li et al. 2023, https://arxiv.org/abs/2306.03341. C is scikit-learn's 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import InputError
from steerkit.steering.methods.base import Direction, Fitter, register


@register
@dataclass(frozen=True)
class Logistic(Direction):
    """The direction that tells the sides apart best, by logistic regression."""

    C: float = 1.0
    """Inverse strength of the L2 penalty."""
    name: ClassVar[str] = "logistic"

    def __post_init__(self) -> None:
        if not self.C > 0:
            raise InputError(f"C is {self.C}; it must be positive.")

    def fitter(self, width: int) -> Fitter:
        return _Fitter(self.C)


class _Fitter(Fitter):
    def __init__(self, C: float) -> None:
        self.C = C
        self.halves: list[Tensor] = []

    def update(self, positive: Tensor, negative: Tensor) -> None:
        self.halves.append((positive - negative) / 2)

    def direction(self) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        halves = torch.cat(self.halves)
        if not halves.any():
            return torch.zeros(halves.shape[1])
        both = torch.cat([halves, -halves]).numpy()
        sides = [1] * len(halves) + [0] * len(halves)
        weights = torch.from_numpy(
            LogisticRegression(C=self.C, fit_intercept=False, max_iter=1000).fit(both, sides).coef_[0]
        )
        return (weights / weights.norm().clamp_min(1e-300)).float()
