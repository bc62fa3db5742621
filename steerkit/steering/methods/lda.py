"""Linear discriminant: the mean difference in units of the spread within the sides.

    v = Σ⁻¹ (μ+ - μ-),   Σ = (1 - λ) Σ_within + λ (tr Σ_within / width) I

Fisher 1936; for steering e.g. Marks & Tegmark 2023, https://arxiv.org/abs/2310.06824 (their covariance-corrected mass mean). The
best linear detector of normal classes need not be the best thing to add. Scaled to the norm of the mean difference. λ is 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.steering.methods.base import Direction, Fitter, register
from steerkit.steering.methods.moments import Moments, require_shrinkage


@register
@dataclass(frozen=True)
class LDA(Direction):
    """Fisher's discriminant direction."""

    shrinkage: float = 0.1
    """λ, how far the covariance is drawn to a multiple of the identity."""
    name: ClassVar[str] = "lda"

    def __post_init__(self) -> None:
        require_shrinkage(self.shrinkage)

    def fitter(self, width: int) -> Fitter:
        return _Fitter(width, self.shrinkage)


class _Fitter(Moments, Fitter):
    def __init__(self, width: int, shrinkage: float) -> None:
        super().__init__(width, of_sides=True)
        self.shrinkage = shrinkage

    def direction(self) -> Tensor:
        difference = self.mean_difference
        found = torch.linalg.solve(self.covariance(within=True, shrinkage=self.shrinkage), difference)
        return (found * (difference.norm() / found.norm().clamp_min(1e-300))).float()
