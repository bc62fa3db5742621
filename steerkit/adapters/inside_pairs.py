"""Two changes of one map beside each other: of two seeds, of two methods, of an adapter and full fine-tuning.

    similarity(first, second, rank=8)            # cosine of the changes, overlap of their top singular subspaces
    truncated_svd_match(lora, full, rank=8)      # does LoRA find the truncated SVD of full fine-tuning's change?

Only dW is compared. Every share stands beside what random subspaces of the same rank have of it. Hu et al. 2021,
https://arxiv.org/abs/2106.09685, section 7, compare seeds and ranks of LoRA by such overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.adapters.inside import Change, Energy, Share, energy_in, null_share, spectrum
from steerkit.errors import InputError


@dataclass(frozen=True)
class Overlap:
    """How two subspaces of one rank lie to each other."""

    angles: tuple[float, ...]
    """Principal angles in radians, ascending, from 0 to π/2."""
    share: Share
    """Mean squared cosine of the angles: how much of one lies in the other. The null's mean is rank / d."""


def subspace_overlap(a: Float[Tensor, "d r"], b: Float[Tensor, "d r"]) -> Overlap:
    """Principal angles of two subspaces, given by orthonormal columns. Raises InputError for different shapes."""
    if a.shape != b.shape:
        raise InputError(
            f"Subspaces of {tuple(a.shape)} and {tuple(b.shape)} have no common dimension and rank."
        )
    d, rank = a.shape
    cosines = torch.linalg.svdvals(a.double().T @ b.double()).clamp(max=1)
    null = null_share(torch.ones(rank), (d, rank), rank, rank)
    return Overlap(tuple(cosines.acos().tolist()), Share(float(cosines.square().mean()), *null))


@dataclass(frozen=True)
class Similarity:
    """How alike two changes are."""

    cosine: float
    """⟨dW_a, dW_b⟩ / (‖dW_a‖ ‖dW_b‖)."""
    cosine_null_sd: float
    """Standard deviation of the cosine of two random changes with these singular values; its mean is 0."""
    left: Overlap
    """Of the top left singular vectors: what the changes write."""
    right: Overlap
    """Of the top right ones: what they read."""


def similarity(a: Change, b: Change, rank: int) -> Similarity:
    """Cosine of two changes and the overlap of their top `rank` singular subspaces.

    Raises InputError for different shapes, and for a rank above that of either change: the rest would be rounding.
    """
    _require_comparable(a, b, rank)
    (U_a, _, Vh_a), (U_b, _, Vh_b) = a.delta_svd, b.delta_svd
    return Similarity(
        cosine=_cosine(a.delta, b.delta),
        cosine_null_sd=1 / math.sqrt(a.delta.numel()),
        left=subspace_overlap(U_a[:, :rank], U_b[:, :rank]),
        right=subspace_overlap(Vh_a[:rank].T, Vh_b[:rank].T),
    )


@dataclass(frozen=True)
class TruncatedSVDMatch:
    """An adapter's change beside the best approximation of full fine-tuning's of the same rank."""

    rank: int
    cosine: float
    """Between dW of the adapter and [dW_full]_rank."""
    inside: Energy
    """Shares of the adapter's dW in full fine-tuning's top `rank` singular directions."""
    captured: Share
    """Energy of dW_full in the adapter's top `rank` directions of both sides, as a share of what the truncated SVD captures."""
    left: Overlap
    right: Overlap


def truncated_svd_match(adapter: Change, full: Change, rank: int) -> TruncatedSVDMatch:
    """Whether a low-rank adapter found the truncated SVD of full fine-tuning's change. Errors as in `similarity`."""
    found = similarity(adapter, full, rank)
    (U, _, Vh), (U_full, values, Vh_full) = adapter.delta_svd, full.delta_svd
    best = (U_full[:, :rank] * values[:rank]) @ Vh_full[:rank]
    both = energy_in(full, U[:, :rank], Vh[:rank].T).both
    most = spectrum(full).energy(rank)
    return TruncatedSVDMatch(
        rank=rank,
        cosine=_cosine(adapter.delta, best),
        inside=energy_in(adapter, U_full[:, :rank], Vh_full[:rank].T),
        captured=Share(both.value / most, both.null / most, both.null_sd / most),
        left=found.left,
        right=found.right,
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _require_comparable(a: Change, b: Change, rank: int) -> None:
    if a.delta.shape != b.delta.shape:
        raise InputError(f"Changes of {tuple(a.delta.shape)} and {tuple(b.delta.shape)} are not of one map.")
    for change in (a, b):
        values = change.delta_svd[1]
        noise = max(change.delta.shape) * torch.finfo(values.dtype).eps * float(values[0])
        most = int((values > noise).sum())
        if not 1 <= rank <= most:
            raise InputError(f"Rank {rank} is out of range: dW has rank {most}, so 1 to {most}.")
