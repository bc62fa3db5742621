"""Sparse products on GPUs, in Triton: none touches what is zero.

    TritonPattern(rows, columns, (n, d_sae)).times(values, W_dec)         like `Pattern`, to which all is equal but for rounding

Products are multiplied and added one by one in float32 (float64 for float64), whatever the inputs' dtype: never as TF32, which is
`torch.set_float32_matmul_precision`'s business and concerns torch's own products. Results do not change from run to run: each
number is the work of one program in a fixed order, and nothing is added atomically.

Imported only where it is used: needs triton, and tensors on a GPU – or TRITON_INTERPRET=1 before the import, for tests on a CPU.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.pattern import Pattern

_BYTES = 1024
"""Of a row of a matrix, what a program reads at once: such a strip of all rows of W_dec stays in an L2 cache of some 40 MB."""


class TritonPattern(Pattern):
    """See `Pattern`. Matrices are returned in float32 at least."""

    @cached_property
    def _row_starts(self) -> Int[Tensor, " n_plus_1"]:
        return _starts(self.rows.contiguous(), self.shape[0])

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(starts of the columns, columns in order, rows in the order of columns, that order)."""
        columns, order = torch.sort(self.columns.int(), stable=True)
        return _starts(columns, self.shape[1]), columns, self.rows[order], order

    def times(
        self, values: Float[Tensor, " entries"], matrix: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "n d"]:
        return _weighted_sums(self._row_starts, self.columns.contiguous(), values.contiguous(), matrix)

    def transposed_times(
        self, values: Float[Tensor, " entries"], left: Float[Tensor, "n d"]
    ) -> Float[Tensor, "d_sae d"]:
        starts, _, rows, order = self._by_column
        return _weighted_sums(starts, rows, values[order], left)

    def sample(
        self, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, " entries"]:
        # In the order of columns: each row of the large matrix is read once.
        _, columns, rows, order = self._by_column
        left, right, d = left.contiguous(), right.contiguous(), left.shape[1]
        out = left.new_empty(len(self))
        width = _width(d, right)
        with torch.cuda.device_of(left):
            _dots_kernel[(triton.cdiv(len(self), 8),)](
                rows, columns, order, left, right, out, len(self), d, 8, width, _sum_type(left)
            )
        return out

    def column_sums(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " d_sae"]:
        starts, _, _, order = self._by_column
        values = values[order]
        out = torch.empty(self.shape[1], dtype=_at_least_float32(values), device=values.device)
        with torch.cuda.device_of(values):
            _sums_kernel[(self.shape[1],)](starts, values, out, 128, _sum_type(values), num_warps=1)
        return out

    def counts(self, active: Tensor | None = None) -> Float[Tensor, " d_sae"]:
        if active is not None:
            return self.column_sums(active.float())
        return self._by_column[0].diff().float()


def _starts(ordered: Int[Tensor, " entries"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of the numbers 0 … n - 1 begins in `ordered`. (Unlike counting, this does not make the CPU wait.)"""
    numbers = torch.arange(n + 1, device=ordered.device, dtype=ordered.dtype)
    return torch.searchsorted(ordered, numbers, out_int32=True)


def _weighted_sums(starts: Tensor, indices: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    n, d = len(starts) - 1, matrix.shape[1]
    matrix = matrix.contiguous()
    out = torch.empty(n, d, dtype=_at_least_float32(matrix), device=matrix.device)
    width = _width(d, matrix)
    with torch.cuda.device_of(matrix):
        _weighted_sums_kernel[(n, triton.cdiv(d, width))](
            starts, indices, values, matrix, out, d, 8, width, _sum_type(matrix)
        )
    return out


def _width(d: int, matrix: Tensor) -> int:
    return min(_BYTES // matrix.element_size(), triton.next_power_of_2(d))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum_type(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
def _weighted_sums_kernel(
    starts, indices, values, matrix, out, d, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr
):
    """out[i] = Σ values[e] · matrix[indices[e]] over the entries e from starts[i] to starts[i + 1]."""
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    coordinates = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = coordinates < d
    sums = tl.zeros((ENTRIES, WIDTH), SUM)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        index = tl.load(indices + entries, mask=there, other=0).to(tl.int64)
        value = tl.load(values + entries, mask=there, other=0.0).to(SUM)
        where = matrix + index[:, None] * d + coordinates[None, :]
        sums += value[:, None] * tl.load(where, mask=there[:, None] & inside[None, :], other=0.0).to(SUM)
    tl.store(out + segment * d + coordinates, tl.sum(sums, 0), mask=inside)


@triton.jit
def _dots_kernel(
    left_rows,
    right_rows,
    places,
    left,
    right,
    out,
    n_entries,
    d,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SUM: tl.constexpr,
):
    """out[places[e]] = left[left_rows[e]] · right[right_rows[e]]."""
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < n_entries
    left_row = left + tl.load(left_rows + entries, mask=there, other=0).to(tl.int64)[:, None] * d
    right_row = right + tl.load(right_rows + entries, mask=there, other=0).to(tl.int64)[:, None] * d
    sums = tl.zeros((ENTRIES, WIDTH), SUM)
    for first in range(0, d, WIDTH):
        coordinates = first + tl.arange(0, WIDTH)[None, :]
        mask = there[:, None] & (coordinates < d)
        one = tl.load(left_row + coordinates, mask=mask, other=0.0).to(SUM)
        other = tl.load(right_row + coordinates, mask=mask, other=0.0).to(SUM)
        sums += one * other
    tl.store(out + tl.load(places + entries, mask=there, other=0), tl.sum(sums, 1), mask=there)


@triton.jit
def _sums_kernel(starts, values, out, ENTRIES: tl.constexpr, SUM: tl.constexpr):
    """out[i] = Σ values[e] over the entries e from starts[i] to starts[i + 1]."""
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    sums = tl.zeros((ENTRIES,), SUM)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        sums += tl.load(values + entries, mask=entries < end, other=0.0).to(SUM)
    tl.store(out + segment, tl.sum(sums, 0))
