"""Representation fine-tuning (ReFT): low-rank edits of the prompt's states, trained through the model.

    loreft     h + Rᵀ (W h + b - R h)       rows of R orthonormal
    direft     h + Rᵀ (W h + b)             R free
    noreft     h + Rᵀ (W h + b - R h)       R free
    consreft   h + Rᵀ (b - R h)             rows of R orthonormal
    lobireft   h + Rᵀ b                     rows of R orthonormal

Wu et al. 2024, https://arxiv.org/abs/2404.03592 (rank 4–8, the prompt's first and last 5–7 tokens, lr 9e-4 on billions of weights).
Trained on the positive sides' cross-entropy, or on preferences of the positive over the negative ones. All but ConsReFT start as
the identity: W = R where it is subtracted, W = 0 and b = 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steerkit import finetune
from steerkit.errors import InputError
from steerkit.finetune import frozen, optimise
from steerkit.models import HookedModel
from steerkit.steering.edits import LowRank
from steerkit.steering.methods.base import register
from steerkit.steering.methods.below import Below
from steerkit.steering.methods.learning import (
    PairExample,
    Trained,
    detached,
    preference,
    sides_of,
    steered_cross_entropy,
)
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

KINDS = ("loreft", "direft", "noreft", "consreft", "lobireft")
ORTHONORMAL = ("loreft", "consreft", "lobireft")
OBJECTIVES = ("cross_entropy", "preference")


@register
@dataclass(frozen=True)
class ReFT(Trained):
    """A low-rank edit a site."""

    kind: str = "loreft"
    """Which of the family."""
    rank: int = 4
    """Rows of R."""
    first: int = 7
    """Tokens at the beginning of the prompt that are edited …"""
    last: int = 7
    """… and at its end; `first` and `last` both 0: every token, generated ones included."""
    objective: str = "cross_entropy"
    """`cross_entropy` of the positive sides, or `preference` of the positive over the negative ones."""
    beta: float = 0.1
    """β of the preference loss."""
    lr: float = 0.01
    epochs: float = 4
    name: ClassVar[str] = "reft"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given, known in (
            ("kind", self.kind, KINDS),
            ("objective", self.objective, OBJECTIVES),
        ):
            if given not in known:
                raise InputError(f"{name} is {given!r}; it is one of {', '.join(known)}.")
        if self.rank < 1 or self.first < 0 or self.last < 0:
            raise InputError(
                f"rank is {self.rank}, first {self.first}, last {self.last}: 1 or more, and 0 or more."
            )

    @property
    def where(self) -> Where:
        """The tokens that are edited."""
        spans = [(0, self.first)] * bool(self.first) + [(-self.last, None)] * bool(self.last)
        return Where.spans(*spans, generation=False) if spans else Where.everywhere()

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        preferences = self.objective == "preference"
        examples = self.examples(model, pairs, preferences=preferences)
        weigh = self.weigh()
        below = Below.of(model, sides_of(examples), sites)
        generator = torch.Generator().manual_seed(self.seed)
        parts = {
            site: _Part(self.kind, self.rank, model.site(site).width, generator).to(model.device)
            for site in sites
        }
        provenance = self.provenance(model, pairs, sites)

        def make() -> SteeringVector:
            edits = tuple(LowRank(site, *part()) for site, part in parts.items())
            return SteeringVector(edits, provenance, self.where)

        def loss(batch: list[PairExample]) -> Tensor:
            if preferences:
                return preference(model, make, batch, beta=self.beta, below=below, weigh=weigh)
            sides = [e.positive for e in batch]
            return steered_cross_entropy(model, make(), sides, weigh or finetune.mean, below)

        parameters = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
        with frozen(model):
            optimise(parameters, examples, loss, self, title=self.kind, quiet=self.quiet)
        return detached(make())


class _Part(nn.Module):
    """The tensors of one site's edit."""

    def __init__(self, kind: str, rank: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        if rank > width:
            raise InputError(f"rank is {rank}; it is at most the width of the site, {width}.")
        self.kind = kind
        R = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.T.contiguous()
        self.R = nn.Parameter(R)
        self.W = nn.Parameter(R.clone() if kind in ("loreft", "noreft") else torch.zeros_like(R))
        self.b = nn.Parameter(torch.zeros(rank))
        self.W.requires_grad_(kind not in ("consreft", "lobireft"))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(R, what is read, b) of `LowRank`."""
        R = orthonormal(self.R) if self.kind in ORTHONORMAL else self.R
        read = {"loreft": self.W - R, "noreft": self.W - R, "consreft": -R}.get(self.kind, self.W)
        return R, read, self.b


def orthonormal(R: Tensor) -> Tensor:
    """The orthonormal rows nearest to those of R in their order (QR with positive diagonal), with gradients."""
    Q, upper = torch.linalg.qr(R.T)
    return (Q * upper.diagonal().sign()).T
