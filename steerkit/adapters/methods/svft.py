"""SVFT: sparse changes inside the singular basis.

    W' = U (S + M) Vᵀ,   W = U S Vᵀ,   M sparse and trained: its diagonal (`plain`), a band about it, or random places

Lingam et al. 2024, https://arxiv.org/abs/2405.19597. M starts at 0 (their code perturbs it). Learning rates 5e-2 (plain), 1e-3 to
5e-3 (banded, random).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.singular import SingularEdit
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Edit, Target
from steerkit.errors import InputError

BAND = 32
"""Rows of M that are multiplied together where it is banded."""


@register
@dataclass(frozen=True)
class SVFT(EditMethod):
    """Sparse changes inside the singular basis."""

    pattern: str = "banded"
    """Which entries of M are trained: `plain` (the diagonal), `banded`, `random`."""
    rank: int = 2
    """banded: diagonals on either side; random: entries in each row. plain has none."""

    name: ClassVar[str] = "svft"
    paper: ClassVar[str] = "Lingam et al. 2024, https://arxiv.org/abs/2405.19597"
    equation: ClassVar[str] = "W' = U (S + M) Vᵀ, M sparse"
    hypothesis: ClassVar[str] = (
        "The directions a model needs are its own singular vectors; only how they are coupled has to change."
    )
    family: ClassVar[str] = "singular"
    lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if self.pattern not in ("plain", "banded", "random"):
            raise InputError(f"pattern is {self.pattern!r}; it is plain, banded or random.")
        if self.rank < (self.pattern == "random"):
            raise InputError(f"rank is {self.rank}; it must be at least {int(self.pattern == 'random')}.")

    def places(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(rows, columns) of M, k × k, that are trained."""
        rows, columns = torch.arange(k)[:, None], torch.arange(k)[None]
        if self.pattern == "random":
            kept = torch.rand(k, k, generator=generator).topk(min(self.rank, k), dim=1).indices
            return rows.expand(kept.shape).flatten(), kept.flatten()
        width = self.rank if self.pattern == "banded" else 0
        found = ((rows - columns).abs() <= width).nonzero()
        return found[:, 0], found[:, 1]

    def edit(self, target: Target) -> Edit:
        return _SVFT(target, self)

    def count_at(self, slot: Slot) -> int:
        k = min(slot.d_out, slot.d_in)
        if self.pattern == "random":
            return k * min(self.rank, k)
        b = min(self.rank, k - 1) if self.pattern == "banded" else 0
        return k * (2 * b + 1) - b * (b + 1)


class _SVFT(SingularEdit):
    rows: Tensor
    columns: Tensor

    def __init__(self, target: Target, config: SVFT) -> None:
        super().__init__(target)
        rows, columns = config.places(len(self.S), target.generator())
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.M = nn.Parameter(torch.zeros(len(rows)))
        self.reach = int((rows - columns).abs().max())

    def core(self) -> Float[Tensor, "k k"]:
        """M."""
        k = len(self.S)
        return self.M.new_zeros(k, k).index_put((self.rows, self.columns), self.M)

    def coupled(self) -> Float[Tensor, "k d_in"]:
        """M Vᵀ, a band of M's rows at a time: its entries lie `reach` columns at most beyond the band."""
        k, n_bands = len(self.S), -(-len(self.S) // BAND)
        if self.reach + BAND > k // 2:
            return super().coupled()
        columns = self.columns - self.rows // BAND * BAND + self.reach
        bands = self.M.new_zeros(n_bands, BAND, BAND + 2 * self.reach)
        bands = bands.index_put((self.rows // BAND, self.rows % BAND, columns), self.M)
        padded = F.pad(self.Vh, (0, 0, self.reach, n_bands * BAND - k + self.reach))
        return (bands @ padded.unfold(0, BAND + 2 * self.reach, BAND).mT).flatten(0, 1)[:k]
