"""Changes inside some singular dimensions of a weight: what SVFT, SSVD and AntiPaSTO have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.adapters.svd import svd
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError


class SingularEdit(Edit):
    """W + U C Vᵀ with U and V the singular vectors of `rank` dimensions of W, the greatest unless they are `chosen`, all for None.

    A subclass makes C, which is 0 where nothing is changed. Raises InputError for more dimensions than there are.
    """

    U: Float[Tensor, "d_out r"]
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r d_in"]

    def __init__(self, target: Target, rank: int | None = None, chosen: Sequence[int] | None = None) -> None:
        super().__init__()
        U, S, Vh = svd(target.weight)
        if rank is not None:
            kept = list(range(rank) if chosen is None else chosen)
            if rank > len(S):
                raise InputError(f"rank is {rank}, but {target.path} has {len(S)} singular dimensions.")
            if len({*kept} & {*range(len(S))}) != rank or len(kept) != rank:
                raise InputError(
                    f"The dimensions of {target.path} must be {rank} different ones of 0–{len(S) - 1}."
                )
            U, S, Vh = U[:, kept], S[kept], Vh[kept]
        for name, value in (("U", U), ("S", S), ("Vh", Vh)):
            self.register_buffer(name, value.contiguous(), persistent=False)

    def core(self) -> Float[Tensor, "r r"]:
        """C."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        inside = x.to(self.S.dtype) @ self.Vh.T @ self.core().T
        return y + (inside @ self.U.T).to(y.dtype)

    def coupled(self) -> Float[Tensor, "r d_in"]:
        """C Vᵀ."""
        return self.core() @ self.Vh

    def folded(self, weight: Float[Tensor, "d_out d_in"], n_tokens: int) -> Tensor | None:
        r, (d_out, d_in) = len(self.S), weight.shape  # multiplications, forward and backward
        apart = 2 * n_tokens * r * (d_in + r + d_out)
        together = n_tokens * d_in * d_out + 2 * r * d_in * (d_out + r)
        return torch.addmm(weight, self.U, self.coupled()) if together < apart else None

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return self.U @ self.coupled()
