"""How far each layer moved between a base and a tuned model: the same neurons, no map between them.

    cosine             mean over tokens of cos(x, y)                               x: base, y: tuned
    centred_cosine     Σ <x - m_x, y - m_y> / (|Xc|_F |Yc|_F), which a mean that both share does not fill up
    norm_ratio         Σ|y| / Σ|x|
    relative_change    sqrt(Σ|y - x|² / Σ|x|²)
    subspace_overlap   mean squared cosine of the principal angles between the leading principal subspaces of rank k; k / d by
                       chance

Björck & Golub 1973 for principal angles. What Procrustes or CKA add to `centred_cosine` was a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from probes.similarity.base import Documents, Settings, Side, Stream
from probes.similarity.moments import Moments, PairSums
from steerkit.errors import InputError
from steerkit.stats import Interval


@dataclass(frozen=True)
class Drift:
    """How far one site moved."""

    site: str
    cosine: Interval
    centred_cosine: Interval
    norm_ratio: Interval
    relative_change: Interval
    subspace_overlap: Interval
    chance_overlap: float
    """Of two random subspaces of that rank."""
    angles: tuple[float, ...]
    """Principal angles between the leading subspaces in degrees, from the smallest."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def drift(
    base: Side,
    tuned: Side,
    *,
    documents: Documents | None = None,
    mask: Bool[Tensor, "*rows"] | None = None,
    rank: int = 10,
    **settings: Any,
) -> dict[str, Drift]:
    """The drift of every site that both sides have, at the same tokens; see `DriftFitter` for what may be set, and for
    errors."""
    fitter = DriftFitter(rank=rank, **settings)
    fitter.update(base, tuned, documents, mask)
    return fitter.result()


class DriftFitter(Stream):
    """Streams rows of both models.

    Cosines and norms have exact delete-one-document intervals, from six sums a document; the centred cosine and the
    overlap leave out blocks of documents. `settings` are `blocks`, `level`, `dtype` of `Settings`.
    """

    def __init__(self, *, rank: int = 10, **settings: Any) -> None:
        super().__init__(Settings(pairs="matched", **settings))
        self.rank = rank
        self._moments: Moments | None = None
        self._of_document: dict[str, dict[int, Float[np.ndarray, " 6"]]] = {}

    def result(self) -> dict[str, Drift]:
        """The drift of each site. Raises InputError with too few rows, or for a constant site."""
        self.require_rows()
        assert self._moments is not None
        self._moments.refuse_constants()
        return {site: self._of_site(site) for site, _ in self.pairs}

    def _add(self, a: dict[str, Tensor], b: dict[str, Tensor], documents: Int[Tensor, " n"]) -> None:
        for site, _ in self.pairs:
            if a[site].shape != b[site].shape:
                raise InputError(
                    f"{site} is {a[site].shape[1]} wide in one model and {b[site].shape[1]} in the other: drift compares the same "
                    "neurons; take a similarity, such as LinearCKA, instead."
                )
        if self._moments is None:
            self._moments = Moments(a, b, self.pairs, self.settings.blocks, self.settings.dtype)
        self._moments.add(a, b, documents % self.settings.blocks)
        names, index = documents.unique(return_inverse=True)
        for site, _ in self.pairs:
            sums = torch.zeros(len(names), 6, dtype=torch.float64)
            sums.index_add_(0, index, _token_values(a[site].double(), b[site].double()).cpu())
            kept = self._of_document.setdefault(site, {})
            for name, row in zip(names.tolist(), sums.numpy()):
                kept[name] = kept[name] + row if name in kept else row

    def _of_site(self, site: str) -> Drift:
        sums = np.stack(list(self._of_document[site].values()))
        width = self.widths_a[site]
        rank = min(self.rank, width)
        cosines = _principal_cosines(*self._sums(site)[:2], rank)
        return Drift(
            site,
            self._over_documents(sums, lambda s: s[..., 1] / s[..., 0]),
            self._over_blocks(site, _centred_cosine),
            self._over_documents(sums, lambda s: s[..., 3] / s[..., 2]),
            self._over_documents(sums, lambda s: np.sqrt(s[..., 5] / s[..., 4])),
            self._over_blocks(
                site, lambda x, y, joint: _principal_cosines(x, y, rank).square().mean()
            ).clipped(0, 1),
            rank / width,
            tuple(cosines.clamp(max=1).acos().rad2deg().tolist()),
        )

    def _sums(self, site: str, without: Sequence[int] = ()) -> tuple[PairSums, PairSums, PairSums]:
        """Of the base with itself, the tuned with itself, and both."""
        assert self._moments is not None
        x, y = ("a", site), ("b", site)
        found = [self._moments.pair(*keys, without=without) for keys in ((x, x), (y, y), (x, y))]
        return found[0], found[1], found[2]

    def _over_blocks(self, site: str, value: Callable[[PairSums, PairSums, PairSums], Tensor]) -> Interval:
        assert self._moments is not None
        blocks = self._moments.blocks
        left_out = [float(value(*self._sums(site, [block]))) for block in blocks] if len(blocks) > 1 else []
        return self.interval(float(value(*self._sums(site))), np.array(left_out))

    def _over_documents(self, sums: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Interval:
        left_out = sums.sum(0) - sums if len(sums) > 1 else sums[:0]
        return self.interval(float(value(sums.sum(0))), value(left_out))


def _token_values(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "n 6"]:
    """1, cos, |x|, |y|, |x|², |y - x|² of each row; a zero row has the cosine 0."""
    norm_x, norm_y = x.norm(dim=1), y.norm(dim=1)
    return torch.stack(
        [
            torch.ones_like(norm_x),
            F.cosine_similarity(x, y, dim=1),
            norm_x,
            norm_y,
            norm_x.square(),
            (y - x).square().sum(1),
        ],
        dim=1,
    )


def _centred_cosine(x: PairSums, y: PairSums, joint: PairSums) -> Tensor:
    return joint.scatter.trace() / (joint.trace_x * joint.trace_y).sqrt()


def _principal_cosines(x: PairSums, y: PairSums, rank: int) -> Float[Tensor, " rank"]:
    """Cosines of the principal angles between the sides' `rank` leading principal subspaces, from the largest."""
    leading = [torch.linalg.eigh(own.scatter.double()).eigenvectors[:, -rank:] for own in (x, y)]
    return torch.linalg.svdvals(leading[0].T @ leading[1])
