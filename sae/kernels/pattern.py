"""Products with a matrix S (n, d_sae) that is zero but for a few entries, computed densely: reference and fallback."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Pattern:
    """Where the entries of S are; their values come with each product, (entries,), in the order of `rows` and `columns`.

    `rows` never decreases. No entry is there twice.
    """

    def __init__(
        self, rows: Int[Tensor, " entries"], columns: Int[Tensor, " entries"], shape: tuple[int, int]
    ) -> None:
        self.rows, self.columns, self.shape = rows, columns, shape

    def __len__(self) -> int:
        return len(self.columns)

    def dense(self, values: Float[Tensor, " entries"]) -> Float[Tensor, "n d_sae"]:
        """S itself."""
        return values.new_zeros(self.shape).index_put_((self.rows, self.columns), values)

    def times(
        self, values: Float[Tensor, " entries"], matrix: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "n d"]:
        """S @ matrix."""
        return self.dense(values) @ matrix

    def sample(
        self, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, " entries"]:
        """(left @ right.T) at the entries."""
        return (left @ right.T)[self.rows, self.columns]

    def transposed_times(
        self, values: Float[Tensor, " entries"], left: Float[Tensor, "n d"]
    ) -> Float[Tensor, "d_sae d"]:
        """S.T @ left."""
        return self.dense(values).T @ left

    def column_sums(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " d_sae"]:
        """Sums over the columns of S, in float32 at least."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.zeros(self.shape[1], dtype=dtype, device=values.device).index_add_(
            0, self.columns, values.to(dtype)
        )

    def counts(self, active: Tensor | None = None) -> Float[Tensor, " d_sae"]:
        """Number of entries in each column; of those that are `active` (entries,), if given."""
        columns = self.columns if active is None else self.columns[active]
        return torch.bincount(columns, minlength=self.shape[1]).float()
