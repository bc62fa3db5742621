"""Sparse products on CPUs, through torch's compressed-row matrices (MKL where torch has it): none touches what is zero."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.pattern import Pattern


class CSRPattern(Pattern):
    """See `Pattern`. float32 and float64."""

    @cached_property
    def _row_starts(self) -> Int[Tensor, " n_plus_1"]:
        counts = torch.bincount(self.rows, minlength=self.shape[0])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """(starts of the columns, rows in the order of columns, that order)."""
        from scipy.sparse import csr_array

        entries = (torch.arange(len(self)), self.columns, self._row_starts)
        turned = csr_array(
            tuple(t.numpy() for t in entries), self.shape
        ).tocsc()  # counts where a sort compares
        starts, rows, order = (
            torch.from_numpy(a).long() for a in (turned.indptr, turned.indices, turned.data)
        )
        return starts, rows, order

    def times(
        self, values: Float[Tensor, " entries"], matrix: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "n d"]:
        return _product(_csr(self._row_starts, self.columns, values, self.shape), matrix)

    def sample(
        self, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, " entries"]:
        where = _csr(self._row_starts, self.columns, left.new_zeros(len(self)), self.shape)
        return torch.sparse.sampled_addmm(where, left, right.T, beta=0.0).values()

    def transposed_times(
        self, values: Float[Tensor, " entries"], left: Float[Tensor, "n d"]
    ) -> Float[Tensor, "d_sae d"]:
        starts, rows, order = self._by_column
        return _product(_csr(starts, rows, values[order], (self.shape[1], self.shape[0])), left)


def _product(csr: Tensor, matrix: Tensor) -> Tensor:
    """csr @ matrix, which itself would first fill and copy what it then writes over."""
    out = matrix.new_empty(csr.shape[0], matrix.shape[1])
    return torch.addmm(out, csr, matrix, beta=0.0, out=out)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
