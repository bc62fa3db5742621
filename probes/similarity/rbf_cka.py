"""CKA with a Gaussian kernel.

    K_ij = exp(-|x_i - x_j|² / (2 σ²)),  σ² = fraction² · median over all i, j of |x_i - x_j|²

Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, whose fractions are 0.2, 0.4 and 0.8; 0.8 here. A small
fraction compares near neighbours only; a large one tends to the linear CKA. Debiased like `LinearCKA`. Costs O(n² d),
so rows are drawn evenly from all where there are more than `max_rows`; the bandwidth is that of all rows drawn, also
where the jackknife leaves out a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.similarity.base import Fitter, Invariances, Measure, Settings
from probes.similarity.cka import KERNEL_INVARIANCES, cka_method
from probes.similarity.gram import GramFitter, Kernel
from steerkit.errors import InputError


@dataclass(frozen=True)
class RBFCKA(Measure):
    """CKA with a Gaussian kernel."""

    name: ClassVar[str] = "rbf_cka"
    invariances: ClassVar[Invariances] = KERNEL_INVARIANCES

    fraction: float = 0.8
    """Bandwidth as a share of the median distance; above 0."""
    debiased: bool = True
    """Use the unbiased HSIC."""
    max_rows: int = 2000
    """Rows compared at most."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if not self.fraction > 0:
            raise InputError(f"fraction is {self.fraction}: a bandwidth lies above 0.")

    def fitter(self, **settings: Any) -> Fitter:
        kernel = partial(rbf_kernel, fraction=self.fraction)
        return GramFitter(
            self, cka_method(kernel, self.debiased, self.max_rows, self.seed), Settings(**settings)
        )


def rbf_kernel(x: Float[Tensor, "n d"], fraction: float) -> Kernel:
    """The Gaussian kernel of a site's rows. Raises InputError where the bandwidth is so small that no row is near another."""
    x = x - x.mean(0)  # distances are the same, and lose no digits to the mean
    squares = x.square().sum(1)

    def distances(start: int, end: int) -> Float[Tensor, "rows n"]:
        return torch.addmm(squares[start:end, None] + squares, x[start:end], x.T, alpha=-2).clamp_min_(0)

    of_all = distances(0, len(x))
    bandwidth = 2 * fraction**2 * of_all.median()
    if not bandwidth > 0:
        raise InputError("Half of all rows or more are the same: the Gaussian kernel has no bandwidth.")
    if of_all.fill_diagonal_(torch.inf).min() > -bandwidth * math.log(torch.finfo(x.dtype).eps):
        raise InputError(
            f"At {fraction} of the median distance no row is near another: take a larger fraction (0.2 to 2 is usual)."
        )
    return lambda start, end: distances(start, end).div_(-bandwidth).exp_()
