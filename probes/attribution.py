"""Attribution patching: what activation patching would find, to first order, for all places at once.

    effect(place) ≈ (h_source - h_target) · ∂m/∂h            two forwards and one backward
    effect(place) = (h_source - h_target) · ∫₀¹ ∂m/∂h dα      along h_target + α (h_source - h_target)

    found = attribute(contrast, sites(model) + heads(model) + latents(model, sae, site))
    found = attribute(contrast, sites(model, ("resid_pre",)), steps=8)

Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al. 2023,
https://arxiv.org/abs/2310.10348. With `steps`, integrated gradients (Sundararajan et al. 2017,
https://arxiv.org/abs/1703.01365) by Gauss–Legendre's rule: the path moves all places of one site at all positions
given together, and their effects add up to that of patching them together. That takes `steps` forwards and
backwards a site, and is better where the metric bends (softmax, norms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.contrasts import Contrast, Direction, Positions, Run
from probes.patching import (
    Patching,
    Place,
    check_contrast,
    encoded,
    grouped,
    head_columns,
    result,
)
from sae.architectures import SAE
from steerkit.errors import InputError
from steerkit.sites import ActivationHook, evaluating


def attribute(
    contrast: Contrast,
    places: Sequence[Place],
    positions: Positions = "each",
    *,
    direction: Direction = "denoising",
    steps: int | None = None,
) -> Patching:
    """Estimates in the place of `patch`'s measurements; `patched` is the target's metric plus the estimate.

    `steps` None is the gradient at the target alone. Raises what `patch` does.
    """
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}: give at least 1.")
    where = contrast.positions(positions)
    check_contrast(contrast, places)
    source, target = contrast.runs(direction)
    at_target = (contrast.corrupt_values if direction == "denoising" else contrast.clean_values).double()
    names = list(dict.fromkeys(place.site for place in places))
    patched = np.empty((len(places), len(where), len(contrast)))
    with evaluating(source.model.model), evaluating(target.model.model):
        for pairs, _ in contrast.batches():
            with torch.no_grad():
                given = source.model.run(source.ids[pairs], source.mask[pairs], sites=names)
            own, slopes = _gradients(contrast, target, pairs, dict.fromkeys(names, _stay))
            for (site, _), numbers in grouped(places, lambda place: (place.site, id(place.sae))).items():
                group = _Group(
                    [places[i] for i in numbers],
                    given[site].to(own[site].device),
                    own[site],
                    [position.indices(direction, pairs) for position in where],
                    target.model.n_heads,
                )
                slope = slopes[site]
                if steps is not None:
                    slope = _mean_gradient(contrast, target, pairs, site, group.path(), steps)
                estimates = group.estimates(slope).double().cpu().numpy()
                patched[numbers, :, pairs] = estimates + at_target[pairs].numpy()
    how = "attribution patching" if steps is None else f"integrated gradients ({steps} steps)"
    return result(contrast, places, where, patched, direction, how)


def _stay(act: Tensor) -> Tensor:
    return act


def _gradients(
    contrast: Contrast, run: Run, pairs: slice, changes: dict[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(activations, gradients of the metric) at sites, with changes there; parameters get no gradient."""
    acts: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    def probe(site: str) -> ActivationHook:
        def hook(act: Tensor) -> Tensor:
            acts[site] = act.detach().clone()
            added[site] = torch.zeros_like(act, requires_grad=True)
            return changes[site](act) + added[site]

        return hook

    with torch.enable_grad(), run.model.hooks({site: probe(site) for site in changes}):
        final = run.model.final(run.ids[pairs], run.mask[pairs])
        total = contrast.measure(run, final, pairs).sum()
        slopes = torch.autograd.grad(total, list(added.values()), allow_unused=True)
    return acts, {
        site: torch.zeros_like(zeros) if slope is None else slope
        for (site, zeros), slope in zip(added.items(), slopes)
    }


def _mean_gradient(
    contrast: Contrast, run: Run, pairs: slice, site: str, path: Float[Tensor, "n pos w"], steps: int
) -> Float[Tensor, "n pos w"]:
    """The gradient averaged along the straight path from the run's own activations to those moved by `path`."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(path)
    for alpha, weight in zip((nodes + 1) / 2, weights / 2):
        moved = float(alpha) * path
        total += float(weight) * _gradients(contrast, run, pairs, {site: moved.add})[1][site]
    return total


class _Group:
    """Places of one site (and of one SAE), and how the two runs differ there at each position."""

    def __init__(
        self,
        places: Sequence[Place],
        given: Float[Tensor, "n pos w"],
        own: Float[Tensor, "n pos w"],
        indices: Sequence[tuple[Tensor, Tensor]],
        n_heads: int,
    ) -> None:
        self.places, self.own, self.n_heads = places, own, n_heads
        self.sae: SAE | None = places[0].sae
        self.here = [here for _, here in indices]
        self.pair = torch.arange(len(own), device=own.device)[:, None]
        if self.sae is not None:
            self.chosen = [place.latent for place in places]
            with torch.no_grad():
                given, own = (encoded(self.sae, act)[..., self.chosen] for act in (given, own))
            self.rows = self.sae.W_dec.detach()[self.chosen].to(own)
        self.differences = [given[self.pair, there] - own[self.pair, here] for there, here in indices]

    def path(self) -> Float[Tensor, "n pos w"]:
        """What moves all places at all positions from the target to the source."""
        path = torch.zeros_like(self.own)
        for here, difference in zip(self.here, self.differences):
            if self.sae is not None:
                path[self.pair, here] = (difference @ self.rows).to(path.dtype)
                continue
            for place in self.places:
                columns = head_columns(place, path.shape[-1], self.n_heads)
                path[self.pair, here, columns] = difference[..., columns]
        return path

    def estimates(self, slope: Float[Tensor, "n pos w"]) -> Float[Tensor, "places positions n"]:
        """Difference times slope, summed over each place."""
        found = []
        for here, difference in zip(self.here, self.differences):
            along = slope[self.pair, here]
            if self.sae is not None:
                found.append(((along.to(self.rows) @ self.rows.T) * difference).sum(1).T)
                continue
            product = (along * difference).sum(1)
            parts = [head_columns(place, product.shape[-1], self.n_heads) for place in self.places]
            found.append(torch.stack([product[:, columns].sum(1) for columns in parts]))
        return torch.stack(found, 1)
