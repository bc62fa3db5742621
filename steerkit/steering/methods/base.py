"""What all ways to make a steering vector have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from jaxtyping import Float
from torch import Tensor

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import read_pairs
from steerkit.steering.vector import SteeringVector


@dataclass(frozen=True)
class Method:
    """Settings of one way to make a steering vector; its file opens with paper, equation and defaults."""

    name: ClassVar[str] = ""
    needs_lm_head: ClassVar[bool] = False
    """Whether it trains or scores with next-token logits."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Settings that have no default."""
    of_sites: ClassVar[bool] = True
    """Whether it acts at the sites it is given, rather than on weights or at a site of its own."""
    of_sides: ClassVar[bool] = True
    """Whether it learns from which side of a pair is which, so that pairs with shuffled sides are a null."""

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        """The vector, with provenance."""
        raise NotImplementedError

    def provenance(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> dict[str, Any]:
        """What a vector's file says of where it came from."""
        return {
            "method": self.name,
            "settings": {field.name: getattr(self, field.name) for field in fields(self)},
            "model": model.name,
            "revision": model.revision,
            "fingerprint": model.fingerprint,
            "sites": list(sites),
            "data": pairs.name,
            "data_sha256": pairs.fingerprint(),
            "n_pairs": len(pairs),
        }


@dataclass(frozen=True)
class Direction(Method):
    """A method that adds one vector a site, made from the activations of the pairs' sides."""

    read: str | int = "mean"
    """Which tokens of a side: their `mean`, the `last`, or the index of one."""
    normalize: bool = False
    """Scale the vector to unit norm, so that strength is in units of the residual stream."""

    def fitter(self, width: int) -> Fitter:
        """What sees the activations of one site, batch by batch."""
        raise NotImplementedError

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        return self.fit_with(
            model, pairs, sites, {site: self.fitter(model.site(site).width) for site in sites}
        )

    def fit_with(
        self, model: HookedModel, pairs: Pairs, sites: Sequence[str], fitters: Mapping[str, Fitter]
    ) -> SteeringVector:
        """Show the pairs to each site's fitter, and add up what they find. Raises InputError when the sides do not differ."""
        for positive, negative in read_pairs(model, pairs, sites, read=self.read):
            for site, fitter in fitters.items():
                fitter.update(positive[site].cpu(), negative[site].cpu())
        vectors = {site: fitter.direction() for site, fitter in fitters.items()}
        for site, vector in vectors.items():
            norm = float(vector.norm())
            if not norm > 0:
                raise InputError(
                    f"The two sides of {pairs.name} do not differ at {site}: there is no direction."
                )
            if self.normalize:
                vectors[site] = vector / norm
        return SteeringVector.add(vectors, **self.provenance(model, pairs, sites))


class Fitter:
    """Gathers what a direction is made from."""

    def update(self, positive: Float[Tensor, "b width"], negative: Float[Tensor, "b width"]) -> None:
        raise NotImplementedError

    def direction(self) -> Float[Tensor, " width"]:
        raise NotImplementedError


METHODS: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a method known by its name."""
    METHODS[method.name] = method
    return method
