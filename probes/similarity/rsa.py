"""Representational similarity analysis.

    S_ij = cosine of x_i and x_j,    value = correlation of S of one side with S of the other over pairs i < j

Kriegeskorte et al. 2008; on fine-tuned encoders, Merchant et al. 2020, https://arxiv.org/abs/2004.14448. Pearson's
correlation by default, Spearman's as an option. Cosines change when a vector is added to all rows. Costs O(n² d), so
rows are drawn evenly from all where there are more than `max_rows`. Paired at random, either correlation is 0 on
average (the Mantel test's null).

The jackknife leaves out a document's rows with all their pairs; Spearman's ranks stay those of all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from probes.similarity.base import Fitter, Invariances, Measure, Settings
from probes.similarity.gram import GramFitter, GramMethod, GramSums, Kernel
from steerkit.errors import InputError
from steerkit.stats import midranks


@dataclass(frozen=True)
class RSA(Measure):
    """Correlation of the sides' cosines between rows."""

    name: ClassVar[str] = "rsa"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=False, translation=False
    )

    correlation: Literal["pearson", "spearman"] = "pearson"
    max_rows: int = 2000
    """Rows compared at most."""
    seed: int = 0
    """Of the draw."""

    def fitter(self, **settings: Any) -> Fitter:
        method = GramMethod(
            cosines if self.correlation == "pearson" else ranked_cosines,
            _pearson,
            lambda sums: torch.zeros_like(sums.products[0]),
            diagonal=False,
            max_rows=self.max_rows,
            seed=self.seed,
        )
        return GramFitter(self, method, Settings(**settings))


def cosines(x: Float[Tensor, "n d"]) -> Kernel:
    """Cosines between rows. Raises InputError for a row that is zero."""
    norms = x.norm(dim=1)
    if not norms.all():
        raise InputError(f"{int((norms == 0).sum())} rows are zero and have no cosine: mask them out.")
    unit = F.normalize(x, dim=1)
    return lambda start, end: unit[start:end] @ unit.T


def ranked_cosines(x: Float[Tensor, "n d"]) -> Kernel:
    """Ranks of the cosines between different rows."""
    n = len(x)
    i, j = torch.triu_indices(n, n, 1)
    values = cosines(x)(0, n)
    ranks = torch.zeros_like(values)
    ranks[i, j] = torch.from_numpy(midranks(values[i, j].cpu().double().numpy())).to(values)
    ranks += ranks.T.clone()
    return lambda start, end: ranks[start:end] / n**2


def _pearson(sums: GramSums) -> Float[Tensor, "1_and_g s s"]:
    """Over ordered pairs of different rows."""
    pairs = (sums.n * (sums.n - 1))[:, None, None]
    covariance = sums.products - sums.totals[:, :, None] * sums.totals[:, None, :] / pairs
    variance = covariance.diagonal(0, -2, -1)
    return covariance / (variance[:, :, None] * variance[:, None, :]).sqrt()
