"""Measures that compare n × n matrices of similarities between rows: all pairs of sites and all leave-one-document-out
values from one walk over the rows of those matrices.

For kernels K_1 … K_s (both sides' sites) and the documents g, of all rows and of all rows without each document:

    T_pq = Σ_ij K_p,ij K_q,ij        k_p = Σ_ij K_p,ij        R_pq = Σ_i (Σ_j K_p,ij)(Σ_j K_q,ij)

are sums over rows i, so that no n × n matrix need be held. Leaving out a document takes its rows and its columns, and
gives back what lies in both. HSIC, biased or not, and Pearson's correlation of two such matrices are functions of these
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.similarity.base import Estimate, Fitter, Measure, Settings, SitePair, constant

Kernel = Callable[[int, int], Float[Tensor, "rows n"]]
"""Rows of a symmetric matrix of similarities, from the one to before the other."""

_MEMORY = 2**24
"""Numbers that may be held at once while walking over the rows."""


@dataclass(frozen=True)
class GramSums:
    """Sums over kernels of all rows (first) and of all rows without each document (the others)."""

    n: Float[Tensor, " 1_and_g"]
    products: Float[Tensor, "1_and_g s s"]
    """T"""
    totals: Float[Tensor, "1_and_g s"]
    """k"""
    row_products: Float[Tensor, "1_and_g s s"]
    """R"""
    traces: Float[Tensor, " s"]
    """Σ_i K_p,ii, of all rows; zero without diagonal."""

    def hsic(self, *, debiased: bool) -> Float[Tensor, "1_and_g s s"]:
        """HSIC of every pair of kernels, times (n - 1)² (biased) or n (n - 3) (debiased, of kernels without diagonal).

        Gretton et al. 2005; Song et al. 2012, equation 5.
        """
        n = self.n[:, None, None]
        totals = self.totals[:, :, None] * self.totals[:, None, :]
        if debiased:
            return self.products + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * self.row_products
        return self.products + totals / n**2 - 2 / n * self.row_products


def gram_sums(
    kernels: Sequence[Kernel], groups: Int[Tensor, " n"], n_groups: int, *, diagonal: bool
) -> GramSums:
    """The sums of all pairs of kernels; `n_groups` = 0: of all rows only. Without `diagonal` it counts as zero."""
    n = len(groups)
    like = kernels[0](0, 1)
    s, groups = len(kernels), groups.to(like.device)
    products, inside = like.new_zeros(n_groups + 1, s, s), like.new_zeros(n_groups + 1, s, s)
    rows_of_group = like.new_zeros(n_groups, s, s)
    row_products = like.new_zeros(n_groups + 1, s, s)
    traces = like.new_zeros(s)
    row_totals, row_inside = like.new_zeros(s, n), like.new_zeros(s, n)
    step = max(1, _MEMORY // (s * (3 * n + 2 * n_groups)))
    for start in range(0, n, step):
        end = min(start + step, n)
        block = torch.stack([kernel(start, end) for kernel in kernels])
        if not diagonal:
            block.diagonal(start, 1, 2).zero_()
        traces += block.diagonal(start, 1, 2).sum(1)
        row_totals[:, start:end] = block.sum(2)
        flat = block.flatten(1)
        products[0] += flat @ flat.T
        if not n_groups:
            continue
        own = groups[start:end]
        by_row = block.transpose(0, 1)
        rows_of_group.index_add_(0, own, by_row @ by_row.mT)
        within = by_row * (own[:, None] == groups)[:, None]
        inside[1:].index_add_(0, own, within @ by_row.mT)
        row_inside[:, start:end] = within.sum(2).T
        outside = row_totals[:, start:end, None] - like.new_zeros(s, end - start, n_groups).index_add_(
            2, groups, block
        )
        outside[:, torch.arange(end - start, device=own.device), own] = 0
        by_group = outside.permute(2, 0, 1)
        row_products[1:] += by_group @ by_group.mT
    products[1:] = products[0] - 2 * rows_of_group + inside[1:]
    row_products[0] = row_totals @ row_totals.T
    totals = row_totals.sum(1).expand(n_groups + 1, s).clone()
    counts = torch.full((n_groups + 1,), float(n), dtype=like.dtype, device=like.device)
    if n_groups:
        counts[1:] -= groups.bincount(minlength=n_groups)
        totals[1:].index_add_(0, groups, (row_inside - 2 * row_totals).T)
    return GramSums(counts, products, totals, row_products, traces)


def linear_kernel(x: Float[Tensor, "n d"]) -> Kernel:
    """Inner products of centred rows. (HSIC centres the kernel in any case; this keeps its digits.)"""
    centred = x - x.mean(0)
    return lambda start, end: centred[start:end] @ centred.T


@dataclass(frozen=True)
class GramMethod:
    """What `GramFitter` needs to know of a measure."""

    kernel: Callable[[Float[Tensor, "n d"]], Kernel]
    """Similarities of a site's rows. Raises InputError where they have none."""
    of_sums: Callable[[GramSums], Float[Tensor, "1_and_g s s"]]
    """The value of every pair of kernels."""
    expected_null: Callable[[GramSums], Float[Tensor, "s s"]]
    """Its mean over permutations of one side's rows."""
    diagonal: bool
    """Whether similarities of rows with themselves count."""
    note: Callable[[GramSums, int, int], str] = lambda sums, p, q: ""
    """What there is to be said against the value of two kernels."""
    max_rows: int | None = None
    """Rows that are kept, drawn evenly from all; None: all of them."""
    seed: int = 0


@dataclass(frozen=True)
class _Rows:
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    documents: Int[Tensor, " n"]
    draws: Float[Tensor, " n"]

    def take(self, index: Int[Tensor, " m"]) -> _Rows:
        a, b = (
            {site: acts[index.to(acts.device)] for site, acts in side.items()} for side in (self.a, self.b)
        )
        return _Rows(a, b, self.documents[index], self.draws[index])


class GramFitter(Fitter):
    """Keeps rows, of all sites the same, and compares them at the end; leaves out documents one by one."""

    def __init__(self, measure: Measure, method: GramMethod, settings: Settings) -> None:
        super().__init__(measure, settings)
        self._method = method
        self._kept: list[_Rows] = []
        self._draws = torch.Generator().manual_seed(method.seed)

    def _add(self, a: dict[str, Tensor], b: dict[str, Tensor], documents: Int[Tensor, " n"]) -> None:
        draws = torch.rand(len(documents), generator=self._draws, dtype=torch.float64)
        a, b = (
            {site: acts.clone() for site, acts in side.items()} for side in (a, b)
        )  # buffers may be used again
        self._kept.append(_Rows(a, b, documents, draws))
        limit = self._method.max_rows
        if limit is not None and sum(len(kept.draws) for kept in self._kept) > 2 * limit:
            self._kept = [self._rows()]

    def _rows(self) -> _Rows:
        """The rows kept so far in one piece: those with the smallest of evenly drawn numbers, in their order."""
        rows = _Rows(
            {site: torch.cat([kept.a[site] for kept in self._kept]) for site in self._kept[0].a},
            {site: torch.cat([kept.b[site] for kept in self._kept]) for site in self._kept[0].b},
            torch.cat([kept.documents for kept in self._kept]),
            torch.cat([kept.draws for kept in self._kept]),
        )
        limit = self._method.max_rows
        if limit is None or len(rows.draws) <= limit:
            return rows
        return rows.take(rows.draws.argsort()[:limit].sort().values)

    def _units(self) -> int:
        return len(self._rows().documents.unique())

    def _n_compared(self) -> int:
        limit = self._method.max_rows
        return self.n_rows if limit is None else min(limit, self.n_rows)

    def _estimates(self) -> dict[SitePair, Estimate]:
        rows = self._rows()
        _, groups = rows.documents.unique(return_inverse=True)
        n_groups = int(groups.max()) + 1 if self.settings.interval else 0
        kernels = [self._kernel(site, acts) for side in (rows.a, rows.b) for site, acts in side.items()]
        sums = gram_sums(kernels, groups, n_groups if n_groups > 1 else 0, diagonal=self._method.diagonal)
        values = self._method.of_sums(sums).cpu().double().numpy()
        expected = self._method.expected_null(sums)
        places_a = {site: i for i, site in enumerate(rows.a)}
        places_b = {site: len(rows.a) + i for i, site in enumerate(rows.b)}
        return {
            (one, other): Estimate(
                self.interval(float(values[0, p, q]), values[1:, p, q]),
                float(expected[p, q]),
                self._method.note(sums, p, q),
            )
            for one, other in self.pairs
            for p, q in [(places_a[one], places_b[other])]
        }

    def _kernel(self, site: str, acts: Tensor) -> Kernel:
        acts = acts.to(self.settings.dtype)
        if bool((acts == acts[0]).all()):
            raise constant(site)
        return self._method.kernel(acts)
