"""Mean-centring: what the positive sides have that text in general has not.

    v = mean_i(h+_i) - mean_j(h_j)                       h_j: activations of `baseline`, any text

Jorgensen et al. 2023, https://arxiv.org/abs/2312.03813. The negative sides are not used. Without a baseline both sides of all pairs
stand in for text in general, and v is half the mean difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from steerkit.activations import collect
from steerkit.data import load_documents
from steerkit.models import HookedModel
from steerkit.steering.methods.base import Direction, Fitter, register
from steerkit.steering.methods.moments import Moments
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector


@register
@dataclass(frozen=True)
class MeanCentring(Direction):
    """Positive mean minus the mean of text in general."""

    baseline: Any = None
    """Text in general: whatever `load_documents` takes."""
    tokens: int = 20_000
    """Tokens of the baseline that are read."""
    name: ClassVar[str] = "mean_centring"

    def fitter(self, width: int) -> Fitter:
        return _Fitter(width)

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        if self.baseline is None:
            return super().fit(model, pairs, sites)
        documents = load_documents(self.baseline)
        named = replace(self, baseline=documents.name)
        acts = collect(model, documents, list(sites), max_tokens=self.tokens)
        means = {site: acts[site].float().mean(0).cpu() for site in sites}
        return named.fit_with(
            model, pairs, sites, {site: _Against(model.site(site).width, means[site]) for site in sites}
        )


class _Fitter(Moments, Fitter):
    def direction(self) -> Tensor:
        return (self.mean_difference / 2).float()


class _Against(Moments, Fitter):
    def __init__(self, width: int, mean: Tensor) -> None:
        super().__init__(width)
        self.mean = mean.double()

    def direction(self) -> Tensor:
        return (self.positive / self.n - self.mean).float()
