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

from steerkit.steering.methods.base import register
from steerkit.steering.methods.moments import Covariant, Moments


@register
@dataclass(frozen=True)
class Whitened(Covariant):
    """Mean difference in whitened coordinates."""

    name: ClassVar[str] = "whitened"

    def turned(self, moments: Moments) -> Tensor:
        values, vectors = torch.linalg.eigh(moments.covariance(within=False, shrinkage=self.shrinkage))
        return vectors @ (
            (vectors.T @ moments.mean_difference) * values.clamp_min(1e-12 * values[-1]).rsqrt()
        )
