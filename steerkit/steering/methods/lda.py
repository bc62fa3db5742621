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

from steerkit.steering.methods.base import register
from steerkit.steering.methods.moments import Covariant, Moments


@register
@dataclass(frozen=True)
class LDA(Covariant):
    """Fisher's discriminant direction."""

    name: ClassVar[str] = "lda"

    def turned(self, moments: Moments) -> Tensor:
        return torch.linalg.solve(
            moments.covariance(within=True, shrinkage=self.shrinkage), moments.mean_difference
        )
