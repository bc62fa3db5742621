"""Rotations made of free parameters: skew matrices, Cayley's map, a bound of the angles.

A = -Aᵀ   ->   R = (I - A/2)⁻¹ (I + A/2),   a plane of A with eigenvalues ± i λ turned by 2 atan(λ/2)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SQUARINGS = 3


def skew(entries: Float[Tensor, " n"], r: int) -> Float[Tensor, "r r"]:
    """The skew matrix with these n = r (r - 1)/2 numbers above its diagonal."""
    rows, columns = torch.triu_indices(r, r, 1, device=entries.device)
    upper = entries.new_zeros(r, r).index_put((rows, columns), entries)
    return upper - upper.T


def turn(A: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """R - I: zero, exactly, where A is."""
    with torch.autocast(A.device.type, enabled=False):
        return torch.linalg.solve(torch.eye(len(A), device=A.device, dtype=A.dtype) - A / 2, A)


def bounded(A: Float[Tensor, "r r"], max_angle: float) -> Float[Tensor, "r r"]:
    """A, shrunk so that no plane turns by more than `max_angle` (radians, below π), however large A is.

    A / √(1 + m²/a²), with a = 2 tan(max_angle/2) and m ≥ ‖A‖₂ (`spectral_bound`). Small ones stay nearly as they are.
    """
    limit = 2 * math.tan(max_angle / 2)
    return A / (1 + spectral_bound(A) / limit**2).sqrt()


def spectral_bound(A: Float[Tensor, "r r"]) -> Tensor:
    """m² with ‖A‖₂ ≤ m ≤ (r/2)^(1/16) ‖A‖₂ for a skew matrix: its Schatten norm of order 16, without a decomposition.

    (tr (AᵀA)⁸ / 2)^(1/8), halved because the singular values come in pairs. For r = 2 it is ‖A‖₂² itself.
    """
    with torch.autocast(A.device.type, enabled=False):
        size = A.square().sum().clamp_min(1e-30)
        power = A.T @ A / size
        for _ in range(SQUARINGS):
            power = power @ power
        order = 2**SQUARINGS
        return size * (power.trace() / 2 + 1e-30) ** (1 / order)  # the gradient at A = 0 is finite
