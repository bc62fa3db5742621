"""Orthogonal Procrustes: how well one side's rows fall on the other's after the best rotation or reflection.

    in sample    |Xc'Yc|_* / (|Xc|_F |Yc|_F) = max over orthogonal R of Σ <R'x_i, y_i> / (|Xc|_F |Yc|_F)
    held out     the same sum over documents that R was not fitted on, R = U V' of the others' scatter U S V'

of rows about the mean (held out: that of the others). Schönemann 1966; Ding et al. 2021,
https://arxiv.org/abs/2108.01661; fitting and scoring on different rows as in Williams et al. 2021,
https://arxiv.org/abs/2110.14739. Where widths differ, R maps onto a subspace.

The distance of Ding et al. on unit-norm sides is sqrt(2 (1 - value)); the arc cosine of the value in sample is a
metric. In sample the value is biased upwards where n is near the width, like CKA; the held-out one falls to about 0
there, so it is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.similarity.base import Estimate, Fitter, Invariances, Settings, SitePair
from probes.similarity.moments import MomentFitter, MomentMeasure, PairSums
from steerkit.errors import InputError


@dataclass(frozen=True)
class Procrustes(MomentMeasure):
    """Cosine of the two sides after the best rotation."""

    name: ClassVar[str] = "procrustes"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=False, translation=True
    )

    held_out: bool = True
    """Score the rotation on documents that it was not fitted on."""
    folds: int = 5
    """How many rotations are fitted, each without one fold of the blocks of documents; 2 and more."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(f"folds is {self.folds}: holding out needs at least two.")

    def fitter(self, **settings: Any) -> Fitter:
        return (_HeldOut if self.held_out else MomentFitter)(self, Settings(**settings))

    def of_site(self, own: PairSums) -> Tensor:
        return own.trace_x

    def of_pair(self, x: Tensor, y: Tensor, joint: PairSums) -> Tensor:
        return torch.linalg.svdvals(joint.scatter).sum() / (x * y).sqrt()

    def note(self, x: Tensor, y: Tensor, joint: PairSums) -> str:
        width = min(joint.cross.shape)
        if joint.n >= 10 * width:
            return ""
        return f"{int(joint.n):,} rows are few for {width} dimensions: a rotation fits them too well; hold documents out"


class _HeldOut(MomentFitter):
    """Its interval leaves out blocks as they were scored; rotations are not fitted again without them."""

    measure: Procrustes

    def __init__(self, measure: Procrustes, settings: Settings) -> None:
        super().__init__(measure, settings)
        self._blocks = settings.blocks

    def _estimates(self) -> dict[SitePair, Estimate]:
        self.moments.refuse_constants()
        blocks = self.moments.blocks
        if len(blocks) < 2:
            raise InputError(
                "A held-out rotation needs at least two documents: number the rows' documents, or take Procrustes(held_out=False)."
            )
        folds = [blocks[start :: self.measure.folds] for start in range(min(self.measure.folds, len(blocks)))]
        found = {}
        for a, b in self.pairs:
            sums = np.concatenate([self._scored(a, b, fold) for fold in folds])
            left_out = sums.sum(0) - sums if self.settings.interval else sums[:0]
            found[a, b] = Estimate(self.interval(float(_cosine(sums.sum(0))), _cosine(left_out)))
        return found

    def _scored(self, a: str, b: str, fold: Sequence[int]) -> Float[np.ndarray, "blocks 3"]:
        """Sums over each of a fold's blocks, about the mean of the other folds: (<R'x, y>, |x|², |y|²)."""
        keys = ("a", a), ("b", b)
        others = self.moments.pair(*keys, without=fold)
        mean_x, mean_y = others.sum_x / others.n, others.sum_y / others.n
        left, _, right = torch.linalg.svd(others.scatter, full_matrices=False)
        rotation = left @ right
        sums = []
        for block in fold:
            own = self.moments.pair(*keys, only=[block])
            aligned = (
                (rotation * own.cross).sum()
                - own.sum_x @ rotation @ mean_y
                - mean_x @ rotation @ own.sum_y
                + own.n * mean_x @ rotation @ mean_y
            )
            squares_x = own.squares_x - 2 * own.sum_x @ mean_x + own.n * mean_x @ mean_x
            squares_y = own.squares_y - 2 * own.sum_y @ mean_y + own.n * mean_y @ mean_y
            sums.append([float(aligned), float(squares_x), float(squares_y)])
        return np.array(sums)


def _cosine(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])
