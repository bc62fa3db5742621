"""Concept erasure (LEACE): the smallest change of activations after which no line tells the classes apart.

    r(x) = x − W⁺ P W (x − E x)          W = Σxx^(−1/2),  P the orthogonal projection onto the columns of W Σxz

Cov(r(x), z) = 0 for the one-hot labels z, which is the same as: no linear probe does better than the class
frequencies; and E |r(x) − x|² is least among all affine maps with that property, in every norm that an
inner product gives (theorem 4.3).

    fitter = LeaceFitter(width, n_classes)
    for x, codes in batches:
        fitter.update(x, codes)                       # streaming, in float64
    eraser = fitter.eraser()
    eraser(acts)
    with eraser.applied_to(model, site):              # inside the running model
        model.logits(ids)

Belrose et al. 2023, https://arxiv.org/abs/2306.03819. `probes.causal_check` asks what the model does
without the concept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import ActivationHook
from steerkit.value_files import read_values, write_values

FORMAT = "steerkit-eraser-1"
_TOLERANCE = 1e-12
"""Directions with less than this share of the greatest variance have none."""


@dataclass(frozen=True)
class Eraser:
    """x ↦ x − left (right (x − mean)); of rank at most the number of classes less one."""

    left: Float[Tensor, "d rank"] = field(repr=False)
    right: Float[Tensor, "rank d"] = field(repr=False)
    mean: Float[Tensor, " d"] = field(repr=False)
    site: str = ""

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """In the precision of x, at least float32 inside. Raises InputError for another width."""
        if x.shape[-1] != len(self.mean):
            raise InputError(
                f"The eraser is {len(self.mean)} wide, and these activations are {x.shape[-1]} wide."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        left, right, mean = (t.to(x.device, dtype) for t in (self.left, self.right, self.mean))
        return x - (((x.to(dtype) - mean) @ right.T) @ left.T).to(x.dtype)

    def only_at(self, mask: Bool[Tensor, "batch pos"]) -> ActivationHook:
        """A hook function that erases at some positions of one batch."""
        return lambda act: torch.where(mask[..., None].to(act.device), self(act), act)

    @contextmanager
    def applied_to(self, model: HookedModel, site: str | None = None) -> Iterator[None]:
        """Inside, every forward of this thread runs without the concept at the site, at all positions."""
        with model.hooks({site or self.site: self}):
            yield

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("left", "right", "mean")}
        return write_values(path, tensors, {"format": FORMAT, "site": self.site})

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read what `save` wrote. Raises InputError for a missing or foreign file, CheckpointError for a damaged one."""
        tensors, known = read_values(path, "eraser", FORMAT)
        return cls(**tensors, site=known["site"])

    def __repr__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        return f"Eraser(LEACE{where}, {len(self.mean)} wide, rank {self.rank})"


class LeaceFitter:
    """Means and covariances of activations and labels, batch by batch; memory does not grow with the rows."""

    def __init__(self, width: int, n_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.n_classes, self.n = n_classes, 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.mean_x, self.mean_z = torch.zeros(width, **options), torch.zeros(n_classes, **options)
        self._xx = torch.zeros(width, width, **options)
        self._xz = torch.zeros(width, n_classes, **options)

    def update(self, x: Float[Tensor, "n d"], codes: Int[Tensor, " n"]) -> None:
        """Take in rows and their classes (from 0). Raises InputError when they do not match, NumericsError on NaN or inf."""
        if x.ndim != 2 or x.shape[1] != len(self.mean_x) or len(x) != len(codes):
            raise InputError(
                f"Activations {tuple(x.shape)} and {len(codes)} labels do not fit a width of {len(self.mean_x)}."
            )
        if not x.isfinite().all():
            raise NumericsError("NaN or inf in the activations that a concept is to be erased from.")
        if not len(x):
            return
        x = x.to(self.mean_x.device, torch.float64)
        z = torch.nn.functional.one_hot(codes.to(x.device).long(), self.n_classes).double()
        n = self.n + len(x)
        mean_x, mean_z = x.mean(0), z.mean(0)
        gap_x, gap_z = mean_x - self.mean_x, mean_z - self.mean_z
        # Chan et al.'s update: the sums about the batch's means, and what the means are apart.
        between = self.n * len(x) / n
        x, z = x - mean_x, z - mean_z
        self._xx += x.T @ x + between * torch.outer(gap_x, gap_x)
        self._xz += x.T @ z + between * torch.outer(gap_x, gap_z)
        self.mean_x = self.mean_x + gap_x * (len(x) / n)
        self.mean_z = self.mean_z + gap_z * (len(x) / n)
        self.n = n

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        return self._xx / self.n

    @property
    def cross_covariance(self) -> Float[Tensor, "d classes"]:
        return self._xz / self.n

    def eraser(self, site: str = "") -> Eraser:
        """The eraser of the classes. Raises InputError before any rows, or with one class."""
        if self.n < 2 or int((self.mean_z > 0).sum()) < 2:
            raise InputError("There is nothing to erase: give rows of at least two classes.")
        whiten, unwhiten = self._whitening()
        u, s, _ = torch.linalg.svd(whiten @ self.cross_covariance, full_matrices=False)
        # Singular values are canonical correlations times the labels' spread, at most 1; the sum of the columns is 0.
        u = u[:, s > 1e-10]
        return Eraser(unwhiten @ u, u.T @ whiten, self.mean_x.clone(), site)

    def random(self, rank: int, *, seed: int = 0, site: str = "") -> Eraser:
        """An eraser of as many random directions, which takes away as much in the whitened norm: the control."""
        whiten, unwhiten = self._whitening()
        drawn = torch.randn(
            len(self.mean_x), rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        # Directions without variance are no part of the space.
        u = torch.linalg.qr(whiten @ unwhiten @ drawn.to(whiten.device))[0]
        return Eraser(unwhiten @ u, u.T @ whiten, self.mean_x.clone(), site)

    def _whitening(self) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """(Σ^(−1/2), Σ^(1/2)), without the directions that have no variance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > _TOLERANCE * values.max().clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = values[kept], vectors[:, kept]
        return (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T


def fit_eraser(x: Float[Tensor, "n d"], codes: Int[Tensor, " n"], site: str = "") -> Eraser:
    """The eraser of rows that are in memory."""
    fitter = LeaceFitter(x.shape[1], int(codes.max()) + 1 if len(codes) else 0, device=x.device)
    fitter.update(x, codes)
    return fitter.eraser(site)
