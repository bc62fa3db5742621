"""Linear discriminant analysis: Gaussian classes of one covariance.

    logit_k = μ_kᵀ Σ⁻¹ x − μ_kᵀ Σ⁻¹ μ_k / 2 + log π_k           Σ = (1 − γ) S + γ tr(S)/d I

S is the pooled covariance within classes, divided by n; γ is Ledoit and Wolf's (2004, J. Multivariate
Analysis 88:365) unless it is given, found from the rows about their class means. Fisher 1936; Marks &
Tegmark's mass-mean with a covariance, and for two Gaussian classes N(±δ/2, Σ) the best there is: accuracy
Φ(√(δᵀΣ⁻¹δ) / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.methods.base import LinearFit, Method, Problems, require_all_classes, warn_of_few_rows
from probes.methods.mass_mean import class_means, discriminant


@dataclass(frozen=True)
class Lda(Method):
    """Linear discriminant analysis with a shrunken covariance."""

    shrinkage: float | None = None
    """γ from 0 to 1; None: Ledoit and Wolf's."""

    name: ClassVar[str] = "lda"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> LinearFit:
        require_all_classes(problems)
        warn_of_few_rows(x, problems.train, "the shrinkage")
        center = x.mean(1, dtype=torch.float64)
        x = x.double() - center[:, None]
        means = class_means(x, problems)
        counts = problems.counts()
        weights = []
        for j in range(problems.size):
            rows = problems.train[:, j]
            residuals = x[:, rows] - means[:, j, problems.codes[rows, j]]
            weights.append(torch.linalg.solve(self._covariance(residuals), means[:, j].mT).mT)
        log_prior = (counts / counts.sum(0)).log().T.expand(len(x), -1, -1)
        return discriminant(torch.stack(weights, 1), means, log_prior, center)

    def _covariance(self, residuals: Float[Tensor, "S n d"]) -> Float[Tensor, "S d d"]:
        covariance = residuals.mT @ residuals / residuals.shape[1]
        if self.shrinkage is None:
            gamma = ledoit_wolf(residuals, covariance)
        else:
            gamma = covariance.new_full((len(covariance),), self.shrinkage)
        level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        covariance = covariance * (1 - gamma)[:, None, None]
        # A trace of the identity keeps constant activations, and γ = 0 with few rows, from dividing by zero.
        tiny = 1e-10 * level + torch.finfo(torch.float64).tiny
        covariance.diagonal(dim1=-2, dim2=-1).add_((gamma * level + tiny)[:, None])
        return covariance


def ledoit_wolf(residuals: Float[Tensor, "S n d"], covariance: Float[Tensor, "S d d"]) -> Float[Tensor, " S"]:
    """Ledoit and Wolf's shrinkage of rows about zero, 0 to 1: min(β, δ) / δ with

    δ = |S − μI|² / d,  β = (mean |xᵢ|⁴ − |S|²) / (n d),  μ = tr(S) / d.
    """
    n, d = residuals.shape[1:]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    squares = covariance.square().sum((-1, -2))
    delta = squares / d - level.square()
    beta = (residuals.square().sum(-1).square().mean(1) - squares) / (n * d)
    return torch.where(delta > 0, torch.minimum(beta, delta) / delta.clamp_min(1e-300), 0.0)
