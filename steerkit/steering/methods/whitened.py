"""Whitened mean difference.

    v = Σ^(-1/2) (μ+ - μ-),   Σ = (1 - λ) Σ_all + λ (tr Σ_all / width) I

The mean difference with the directions in which all activations vary most turned down (ZCA whitening): between the mean difference,
which keeps them, and the discriminant (`lda`), which divides by them twice as strongly. Scaled to the norm of the mean difference.
λ is 0.1.
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
class Whitened(Direction):
    """Mean difference in whitened coordinates."""

    shrinkage: float = 0.1
    """λ, how far the covariance is drawn to a multiple of the identity."""
    name: ClassVar[str] = "whitened"

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
        values, vectors = torch.linalg.eigh(self.covariance(within=False, shrinkage=self.shrinkage))
        found = vectors @ ((vectors.T @ difference) * values.clamp_min(1e-12 * values[-1]).rsqrt())
        return (found * (difference.norm() / found.norm().clamp_min(1e-300))).float()
