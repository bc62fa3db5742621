"""What every kind of probe has: many problems on the same rows, at all sites of one width, are fitted at once.

    fit = Logistic().fit(x, problems)          # x (sites, n, d)
    fit.probabilities(x)                       # (sites, n, problems, classes)

A problem is a labelling of the rows and the rows to train on: the folds of a cross-validation, the blocks
of a code, shuffled labels and control labels are problems side by side, so that the rows are read once for
all.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.errors import InputError

Link = Literal["logit", "identity"]
FLOOR = 1e-3
"""Least probability that a regression onto ±1 gives a class."""


class ProbeWarning(UserWarning):
    """A probe that says less than it seems to."""


@dataclass(frozen=True)
class Problems:
    """m labellings of the same n rows, each with its rows to train on."""

    codes: Int[Tensor, "n m"]
    """The class of each row, from 0."""
    train: Bool[Tensor, "n m"]
    n_classes: int
    inner: Bool[Tensor, "q n m"] | None = None
    """Rows of `train` to choose settings on, q times; None: methods take their default settings."""
    seed: int = 0

    @classmethod
    def single(cls, codes: Int[Tensor, " n"], n_classes: int, seed: int = 0) -> Problems:
        """One labelling, all rows of which are trained on."""
        return cls(codes[:, None], torch.ones(len(codes), 1, dtype=torch.bool), n_classes, seed=seed)

    @property
    def size(self) -> int:
        return self.codes.shape[1]

    def to(self, device: torch.device) -> Problems:
        inner = None if self.inner is None else self.inner.to(device)
        return replace(self, codes=self.codes.to(device), train=self.train.to(device), inner=inner)

    def weights(self, balanced: bool) -> Float[Tensor, "n m"]:
        """Weights of the rows to train on, summing to 1 a problem; `balanced`: each class that occurs has the same sum."""
        weights = self.train.double()
        if balanced:
            counts = self.counts()
            occurring = (counts > 0).sum(0)
            weights = weights / (counts * occurring).gather(0, self.codes).clamp_min(1.0)
        return weights / weights.sum(0)

    def counts(self) -> Float[Tensor, "classes m"]:
        """Rows of each class to train on."""
        found = torch.zeros(self.n_classes, self.size, dtype=torch.float64, device=self.codes.device)
        return found.scatter_add_(0, self.codes, self.train.double())


class Fit(ABC):
    """Fitted probes of m problems at S sites of one width."""

    @abstractmethod
    def probabilities(self, x: Float[Tensor, "S r d"]) -> Float[Tensor, "S r m classes"]:
        """Of any rows, for every problem."""


@dataclass(frozen=True)
class LinearFit(Fit):
    """logits = (x − center) · weight + bias; two classes have one logit, that of the second."""

    weight: Float[Tensor, "S m k d"]
    bias: Float[Tensor, "S m k"]
    center: Float[Tensor, "S d"]
    link: Link = "logit"
    settings: dict[str, Float[Tensor, "S m"]] = field(default_factory=dict)
    """Settings that were chosen."""

    def logits(self, x: Float[Tensor, "S r d"]) -> Float[Tensor, "S r m k"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(dtype) - self.center[:, None].to(dtype)
        flat = centred @ self.weight.flatten(1, 2).to(dtype).mT
        return flat.unflatten(-1, self.bias.shape[1:]) + self.bias[:, None].to(dtype)

    def probabilities(self, x: Float[Tensor, "S r d"]) -> Float[Tensor, "S r m classes"]:
        return to_probabilities(self.logits(x), self.link)


def to_probabilities(logits: Float[Tensor, "... k"], link: Link) -> Float[Tensor, "... classes"]:
    """Softmax, or the logistic function of a single logit; of regressions onto ±1 the share, kept off 0 and 1."""
    if link == "identity":
        share = ((1 + logits) / 2).clamp(FLOOR, 1 - FLOOR)
        if share.shape[-1] == 1:
            return torch.cat([1 - share, share], dim=-1)
        return share / share.sum(-1, keepdim=True)
    if logits.shape[-1] == 1:
        return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=-1)
    return logits.softmax(-1)


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one kind of probe; its file opens with paper, equation and defaults."""

    name: ClassVar[str] = ""

    @abstractmethod
    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> Fit:
        """Fit every problem at every site; x is finite."""


@dataclass(frozen=True)
class Rows:
    """Rows in units that arithmetic likes, with the fold-wise standardisation as an affine map after them.

    x̂ = (x − mean) / std over all rows, which is undone exactly; what a problem sees is (x̂ − shift) / scale, of its own rows to
    train on, so that nothing of the held-out rows enters.
    """

    x: Float[Tensor, "S n d"]
    mean: Float[Tensor, "S d"]
    std: Float[Tensor, "S d"]
    shift: Float[Tensor, "S m d"]
    inverse_scale: Float[Tensor, "S m d"]
    """0 where a coordinate is constant."""

    @classmethod
    def of(
        cls, x: Float[Tensor, "S n d"], train: Bool[Tensor, "n m"], *, standardize: bool, dtype: torch.dtype
    ) -> Rows:
        x = x.to(dtype, copy=True)
        mean = x.mean(1)
        x -= mean[:, None]
        std = torch.linalg.vector_norm(x, dim=1) / math.sqrt(x.shape[1])
        # What rounding leaves of a constant is no information.
        varies = std > 16 * torch.finfo(torch.float32).eps * (mean.abs() + std)
        std = torch.where(varies, std, 1.0)
        x *= (varies / std)[:, None]
        share = train.to(dtype) / train.sum(0)
        shift = share.mT @ x
        if standardize:
            variance = share.mT @ x.square() - shift.square()
            inverse = torch.where(variance > 1e-6, variance.clamp_min(1e-6).rsqrt(), 0.0)
        else:
            inverse = (std * varies)[:, None].expand_as(shift)
        return cls(x, mean, std, shift, inverse)

    def linear_fit(
        self,
        weight: Float[Tensor, "S m k d"],
        bias: Float[Tensor, "S m k"],
        link: Link = "logit",
        **settings: Tensor,
    ) -> LinearFit:
        """A fit from coefficients of what the problems see."""
        scaled = weight * self.inverse_scale[:, :, None]
        bias = bias - (scaled * self.shift[:, :, None]).sum(-1)
        return LinearFit(
            (scaled / self.std[:, None, None]).double(), bias.double(), self.mean.double(), link, settings
        )


def warn_of_few_rows(x: Float[Tensor, "S n d"], train: Bool[Tensor, "n m"], what: str) -> None:
    """Say that there are fewer rows than coordinates, where there are, and what decides then."""
    fewest = int(train.sum(0).min())
    if fewest < x.shape[-1]:
        warnings.warn(
            f"{fewest} rows to train on for {x.shape[-1]} coordinates: chance can tell the classes "
            f"apart, and {what} decides.",
            ProbeWarning,
            stacklevel=4,
        )


def require_all_classes(problems: Problems) -> None:
    """Raise InputError where a class has no row to train on."""
    missing = (problems.counts() == 0).nonzero()
    if len(missing):
        code, problem = missing[0].tolist()
        raise InputError(
            f"Class {code} (from 0) has no row to train on in problem {problem}: leave the class out, or give more texts of it."
        )
