"""Sums over pairs that directions are made from, in float64; memory is that of one or a few (width, width) matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.errors import InputError
from steerkit.steering.methods.base import Direction, Fitter


class Moments:
    """Means of both sides, and those second moments that are asked for."""

    def __init__(self, width: int, *, of_differences: bool = False, of_sides: bool = False) -> None:
        self.n = 0
        self.positive = torch.zeros(width, dtype=torch.float64)
        self.negative = torch.zeros(width, dtype=torch.float64)
        self.differences = torch.zeros(width, width, dtype=torch.float64) if of_differences else None
        """Σ (h+ - h-)(h+ - h-)ᵀ"""
        self.sides = torch.zeros(width, width, dtype=torch.float64) if of_sides else None
        """Σ h+ h+ᵀ + Σ h- h-ᵀ"""

    def update(self, positive: Float[Tensor, "b width"], negative: Float[Tensor, "b width"]) -> None:
        positive, negative = positive.double(), negative.double()
        self.n += len(positive)
        self.positive += positive.sum(0)
        self.negative += negative.sum(0)
        if self.differences is not None:
            difference = positive - negative
            self.differences += difference.T @ difference
        if self.sides is not None:
            self.sides += positive.T @ positive + negative.T @ negative

    @property
    def mean_difference(self) -> Float[Tensor, " width"]:
        return (self.positive - self.negative) / self.n

    def covariance(self, *, within: bool, shrinkage: float) -> Float[Tensor, "width width"]:
        """Of both sides about their own means (`within`) or about the mean of all, drawn by a share towards a multiple of I.

        Raises InputError when the activations do not vary at all.
        """
        assert self.sides is not None
        means = (self.positive / self.n, self.negative / self.n)
        if not within:
            middle = (means[0] + means[1]) / 2
            means = (middle, middle)
        found = self.sides / (2 * self.n) - sum(torch.outer(m, m) for m in means) / 2
        spread = float(found.trace()) / len(found)
        if not spread > 0:
            raise InputError("The activations of the pairs do not vary: there is no covariance.")
        return (1 - shrinkage) * found + shrinkage * spread * torch.eye(len(found), dtype=torch.float64)


@dataclass(frozen=True)
class Covariant(Direction):
    """The mean difference turned by a covariance, and as long as it was."""

    shrinkage: float = 0.1
    """λ, how far the covariance is drawn to a multiple of the identity."""

    def __post_init__(self) -> None:
        if not 0 < self.shrinkage <= 1:
            raise InputError(f"shrinkage is {self.shrinkage}; it lies above 0 and at most at 1.")

    def turned(self, moments: Moments) -> Float[Tensor, " width"]:
        """The direction, of any length."""
        raise NotImplementedError

    def fitter(self, width: int) -> Fitter:
        return _Turned(width, self)


class _Turned(Moments, Fitter):
    def __init__(self, width: int, method: Covariant) -> None:
        super().__init__(width, of_sides=True)
        self.method = method

    def direction(self) -> Float[Tensor, " width"]:
        found = self.method.turned(self)
        return (found * (self.mean_difference.norm() / found.norm().clamp_min(1e-300))).float()
