"""Minibatch CKA: HSIC averaged over small batches, and only then the ratio.

    CKA = Σ_b H(X_b, Y_b) / sqrt(Σ_b H(X_b, X_b) Σ_b H(Y_b, Y_b))            H: unbiased HSIC of a batch's rows

Nguyen et al. 2021, https://arxiv.org/abs/2010.15327, equation 3; batches of 256 as there. Each H is unbiased if the
batch is a random one of the rows (batches sorted by length, or of one document, are not), and spreads more than that of
all rows: `LinearCKA` streams the latter exactly and is to be preferred; this one is here to compare with published
numbers. `similarity` shuffles the rows first. A jackknife takes each block of documents out of every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from probes.similarity.base import Estimate, Fitter, Invariances, Measure, Settings, SitePair, constant
from probes.similarity.cka import KERNEL_INVARIANCES, of_hsic
from probes.similarity.gram import gram_sums, linear_kernel
from steerkit.errors import InputError


@dataclass(frozen=True)
class MinibatchCKA(Measure):
    """Minibatch CKA, linear and debiased."""

    name: ClassVar[str] = "minibatch_cka"
    invariances: ClassVar[Invariances] = KERNEL_INVARIANCES

    batch_size: int = 256
    """About how many rows a batch has: what an update brings is cut into equal parts. At least 4."""

    def __post_init__(self) -> None:
        if self.batch_size < 4:
            raise InputError(f"batch_size is {self.batch_size}: the unbiased HSIC needs at least four rows.")

    def fitter(self, **settings: Any) -> Fitter:
        return _Fitter(self, Settings(**settings))


class _Fitter(Fitter):
    measure: MinibatchCKA

    def __init__(self, measure: MinibatchCKA, settings: Settings) -> None:
        super().__init__(measure, settings)
        self._blocks = settings.blocks if settings.interval else 0
        self._seen: set[int] = set()
        self._hsic: Tensor | None = None
        """(1 + blocks, s, s): sums over batches of all rows, and without each block of documents."""

    def _add(self, a: dict[str, Tensor], b: dict[str, Tensor], documents: Int[Tensor, " n"]) -> None:
        blocks = documents % max(1, self._blocks)
        self._seen.update(blocks.unique().tolist())
        sites = [acts.to(self.settings.dtype) for acts in (*a.values(), *b.values())]
        parts = max(1, round(len(documents) / self.measure.batch_size))
        for rows in torch.arange(len(documents)).tensor_split(parts):
            if len(rows) < 4:  # no unbiased HSIC
                continue
            kernels = [linear_kernel(acts[rows.to(acts.device)]) for acts in sites]
            sums = gram_sums(kernels, blocks[rows], self._blocks, diagonal=False)
            enough = (sums.n >= 4)[:, None, None]
            found = torch.where(
                enough, sums.hsic(debiased=True) / (sums.n * (sums.n - 3))[:, None, None], 0.0
            )
            self._hsic = found if self._hsic is None else self._hsic + found

    def _units(self) -> int:
        return len(self._seen)

    def _estimates(self) -> dict[SitePair, Estimate]:
        if self._hsic is None:
            raise InputError("No batch had four rows: give larger updates.")
        sites_a, sites_b = (
            list(dict.fromkeys(a for a, _ in self.pairs)),
            list(dict.fromkeys(b for _, b in self.pairs)),
        )
        for site, own in zip([*sites_a, *sites_b], self._hsic[0].diagonal()):
            if not own > 0:
                raise constant(site)
        left_out = [1 + block for block in sorted(self._seen)] if self._blocks and len(self._seen) > 1 else []
        values = of_hsic(self._hsic[[0, *left_out]]).cpu().double().numpy()
        return {
            (a, b): Estimate(self.interval(float(values[0, p, q]), values[1:, p, q]), 0.0)
            for a, b in self.pairs
            for p, q in [(sites_a.index(a), len(sites_a) + sites_b.index(b))]
        }
