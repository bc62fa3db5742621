"""Canonical correlations: CCA, SVCCA and PWCCA.

    ρ = singular values of (Sxx^-½)' Sxy Syy^-½                Sxy: the sides' centred scatter; inverses on what rows span

    CCA      mean of ρ, or of ρ² (Kornblith et al. 2019)
    SVCCA    the same after each side is projected on its leading principal components, as many as hold `variance` of
             Σ s²: of the variance, that is, not of the sum of singular values s, which some implementations cumulate
             (Raghu et al. 2017, https://arxiv.org/abs/1706.05806; 99 %)
    PWCCA    Σ α_i ρ_i / Σ α_i,  α_i = Σ_j |<h_i, x_j>|,  h_i: side a's i-th canonical variate, x_j: the n values of its neuron j
             (Morcos et al. 2018, https://arxiv.org/abs/1806.05759). Not symmetric: side a is the one that weights.

CCA is blind to any invertible linear map, so also to which directions are large, and needs many rows: with k_x + k_y >=
n some correlations are 1 whatever the data, and this is refused; paired at random, Σ ρ² = k_x k_y / (n - 1) on average.
Have n >= 10 (k_x + k_y). PWCCA's weights are sums over neurons: side a may only be scaled and moved, side b mapped by
any invertible map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.similarity.base import Invariances
from probes.similarity.moments import MomentMeasure, PairSums
from steerkit.errors import InputError


@dataclass(frozen=True)
class Whitened:
    """A site's principal axes that are kept."""

    axes: Float[Tensor, "d k"]
    deviations: Float[Tensor, " k"]
    """Singular values of the centred rows."""


@dataclass(frozen=True)
class CCA(MomentMeasure):
    """Mean canonical correlation."""

    name: ClassVar[str] = "cca"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=True, translation=True
    )

    statistic: Literal["mean", "squares"] = "mean"
    """Of ρ, or of ρ²: R² of the narrower side's variates regressed on the other side."""

    def of_site(self, own: PairSums) -> Whitened:
        return _whitened(own.scatter, 1.0)

    def of_pair(self, x: Whitened, y: Whitened, joint: PairSums) -> Tensor:
        return self._powers(torch.linalg.svdvals(_between(x, y, joint))).mean()

    def expected_null(self, x: Whitened, y: Whitened, joint: PairSums) -> float | None:
        return None if self.statistic == "mean" else _expected_square(x, y, joint)

    def note(self, x: Whitened, y: Whitened, joint: PairSums) -> str:
        dimensions = len(x.deviations) + len(y.deviations)
        if joint.n >= 10 * dimensions:
            return ""
        return (
            f"{int(joint.n):,} rows are few for {dimensions} canonical dimensions: if rows are paired at random the mean ρ² "
            f"is {_expected_square(x, y, joint):.2f}"
        )

    def _powers(self, correlations: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return correlations if self.statistic == "mean" else correlations.square()


@dataclass(frozen=True)
class SVCCA(CCA):
    """Mean canonical correlation of leading principal components."""

    name: ClassVar[str] = "svcca"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=False, translation=True
    )

    variance: float = 0.99
    """Share of each side's variance that the components hold; above 0, up to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.variance <= 1:
            raise InputError(f"variance is {self.variance}: a share lies above 0 and at most at 1.")

    def of_site(self, own: PairSums) -> Whitened:
        return _whitened(own.scatter, self.variance)


@dataclass(frozen=True)
class PWCCA(CCA):
    """Canonical correlations weighted by how much of side a's neurons they account for."""

    name: ClassVar[str] = "pwcca"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=False, scaling=True, linear=False, translation=True
    )

    def of_pair(self, x: Whitened, y: Whitened, joint: PairSums) -> Tensor:
        turns, correlations, _ = torch.linalg.svd(_between(x, y, joint), full_matrices=False)
        # <h_i, x_j>: the variates are h = Xc axes deviations⁻¹ turns, and Xc'Xc = axes deviations² axes'
        weights = (turns.T * x.deviations @ x.axes.T).abs().sum(1)
        return (weights * self._powers(correlations)).sum() / weights.sum()

    def expected_null(self, x: Whitened, y: Whitened, joint: PairSums) -> None:
        return None


def _whitened(scatter: Float[Tensor, "d d"], variance: float) -> Whitened:
    """Axes of the centred rows, without those that are zero to rounding, until `variance` of their squares is reached."""
    squares, axes = torch.linalg.eigh(scatter.double())
    squares, axes = squares.flip(0), axes.flip(1)
    rank = int((squares > squares[0] * len(squares) * torch.finfo(scatter.dtype).eps).sum())
    if variance < 1:
        held = squares[:rank].cumsum(0) / squares[:rank].sum()
        rank = min(rank, int((held < variance).sum()) + 1)
    return Whitened(axes[:, :rank], squares[:rank].sqrt())


def _between(x: Whitened, y: Whitened, joint: PairSums) -> Float[Tensor, "k_x k_y"]:
    """The whitened cross-scatter. Raises InputError where correlations are 1 whatever the data."""
    k_x, k_y = len(x.deviations), len(y.deviations)
    if joint.n <= k_x + k_y:
        raise InputError(
            f"{int(joint.n):,} rows (without a block of documents, if intervals are made) are too few for canonical "
            f"correlations of {k_x} and {k_y} dimensions, some of which are then 1 whatever the data: give 10 × {k_x + k_y} rows, "
            "or keep fewer dimensions by SVCCA(variance=…)."
        )
    return x.axes.T @ joint.scatter.double() @ y.axes / torch.outer(x.deviations, y.deviations)


def _expected_square(x: Whitened, y: Whitened, joint: PairSums) -> float:
    """Mean ρ² over permutations of one side's rows."""
    return max(len(x.deviations), len(y.deviations)) / (joint.n - 1)
