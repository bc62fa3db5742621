"""Activation patching: which activations make the difference between two runs?

    m(h_place <- source) - m(target)
    --------------------------------      h_place: a site at a position; a head's slice of hook_z; an SAE latent
          m(source) - m(target)

    contrast = Contrast.of_prompts(model, clean, corrupt, answers="red", wrong="blue")
    found = patch(contrast, sites(model, ("resid_pre", "attn_out", "mlp_out")))
    found.top(5); found.figure()

Vig et al. 2020, https://arxiv.org/abs/2004.12265; Meng et al. 2022, https://arxiv.org/abs/2202.05262; Zhang &
Nanda 2023, https://arxiv.org/abs/2309.16042. `denoising` puts clean activations into the corrupt run and finds
what suffices for the clean answer, `noising` the other way finds what is needed. The effect is the share of the way from the run
that is patched to the run that activations come from: 0 nothing changed, 1 all of it; it may be below 0 and above
1. It is a ratio of means over pairs, and its interval a jackknife over pairs.

Many patches share a forward, each in rows of its own; blocks before the site are computed once
(`steerkit.replay`). An SAE's latent is patched through its decoder row, h + (z_source - z_target) W_dec, so that what
the SAE does not reconstruct stays as it was. A forward of many rows rounds otherwise than one of few:
with one patch a forward (`batch_tokens=1`, or one patch a site), a patch of everything gives the other run's metric bit
for bit, and a patch of nothing the run's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.contrasts import Contrast, Direction, Position, Positions
from sae.architectures import SAE
from sae.evaluation import check_fits
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.replay import Replay
from steerkit.sites import evaluating
from steerkit.stats import Interval, jackknife


@dataclass(frozen=True)
class Place:
    """What is patched: a site; one head of it; or one latent of an SAE that reads it."""

    site: str
    head: int | None = None
    latent: int | None = None
    sae: SAE | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The site's name, with the head's or latent's number."""
        part = f" head {self.head}" if self.head is not None else f" latent {self.latent}" if self.sae else ""
        return self.site + part


def sites(
    model: HookedModel,
    kinds: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    layers: Iterable[int] | None = None,
) -> list[Place]:
    """A place for every kind of site (resid_pre, resid_mid, resid_post, attn_out, mlp_out) and layer.

    Raises SiteError for what the model does not have.
    """
    chosen = range(model.n_layers) if layers is None else layers
    return [Place(model.site(f"blocks.{i}.hook_{kind}").name) for kind in kinds for i in chosen]


def heads(model: HookedModel, layers: Iterable[int] | None = None) -> list[Place]:
    """A place for every attention head. SiteError where the heads' outputs are not to be had."""
    chosen = range(model.n_layers) if layers is None else layers
    names = [model.site(f"blocks.{i}.attn.hook_z").name for i in chosen]
    return [Place(name, head=head) for name in names for head in range(model.n_heads)]


def latents(model: HookedModel, sae: SAE, site: str, indices: Iterable[int] | None = None) -> list[Place]:
    """A place for each latent of an SAE that reconstructs `site`; all of them without `indices`.

    Raises InputError for an SAE that does not fit the site, one that writes elsewhere, and latents it does not have.
    """
    name = model.site(site).name
    check_fits(model, sae, name)
    if (*sae.config.inputs(name), *sae.config.outputs(name)) != (name, name):
        raise InputError(
            f"A {sae.arch} does not reconstruct the site that it reads: its latents are no part of {name}."
        )
    chosen = list(range(sae.d_sae) if indices is None else indices)
    for latent in chosen:
        if not 0 <= latent < sae.d_sae:
            raise InputError(f"There is no latent {latent}: the SAE has latents 0–{sae.d_sae - 1}.")
    return [Place(name, latent=latent, sae=sae) for latent in chosen]


@dataclass(frozen=True)
class Patching:
    """The metric of every patch, pair by pair."""

    places: tuple[Place, ...]
    positions: tuple[str, ...]
    patched: Float[np.ndarray, "places positions n"] = field(repr=False)
    """The metric with the patch, or the estimate of it."""
    clean: Float[np.ndarray, " n"] = field(repr=False)
    corrupt: Float[np.ndarray, " n"] = field(repr=False)
    direction: Direction
    how: str = "activation patching"

    @property
    def source(self) -> Float[np.ndarray, " n"]:
        """The metric of the run that activations come from."""
        return self.clean if self.direction == "denoising" else self.corrupt

    @property
    def target(self) -> Float[np.ndarray, " n"]:
        """The metric of the run that is patched."""
        return self.corrupt if self.direction == "denoising" else self.clean

    @property
    def effect(self) -> Float[np.ndarray, "places positions"]:
        """Share of the way from the target's mean metric to the source's."""
        return (self.patched - self.target).mean(-1) / (self.source - self.target).mean()

    def interval(self, place: int, position: int = 0) -> Interval:
        """An effect with its interval over pairs, of which it takes at least two."""
        moved = self.patched[place, position] - self.target
        return jackknife(
            np.stack([moved, self.source - self.target], 1), lambda sums: sums[..., 0] / sums[..., 1]
        )

    def top(self, k: int = 10) -> list[tuple[Place, str, float]]:
        """The patches of the greatest absolute effect: (place, position, effect)."""
        effect = self.effect
        order = np.argsort(-np.abs(effect), axis=None, kind="stable")[:k]
        found = zip(*np.unravel_index(order, effect.shape))
        return [(self.places[i], self.positions[j], float(effect[i, j])) for i, j in found]

    def to_dict(self) -> dict[str, Any]:
        return {
            "how": self.how,
            "direction": self.direction,
            "pairs": len(self.clean),
            "clean": float(self.clean.mean()),
            "corrupt": float(self.corrupt.mean()),
            "places": [place.name for place in self.places],
            "positions": list(self.positions),
            "effect": self.effect.tolist(),
        }

    def __repr__(self) -> str:
        lines = [
            f"{self.how}, {self.direction}: metric {self.clean.mean():.4g} clean, {self.corrupt.mean():.4g} corrupt "
            f"({len(self.clean)} pairs, {len(self.places)} places, {len(self.positions)} positions)"
        ]
        lines += [f"  {effect:+.3f}  {place.name} at {position}" for place, position, effect in self.top(5)]
        return "\n".join(lines)

    def figure(self) -> Any:
        """A heat map of effects: places by positions; layers by heads where all places are heads and there is one
        position."""
        from plotly import graph_objects as go

        z, x, y = self.effect, list(self.positions), [place.name for place in self.places]
        axes = ("position", "")
        if len(x) == 1 and all(place.head is not None for place in self.places):
            rows = list(dict.fromkeys(place.site for place in self.places))
            columns = sorted({place.head for place in self.places if place.head is not None})
            known = {(place.site, place.head): value for place, value in zip(self.places, z[:, 0])}
            z = np.array([[known.get((row, column), np.nan) for column in columns] for row in rows])
            x, y, axes = [str(column) for column in columns], rows, ("head", "")
        bound = float(np.nanmax(np.abs(z))) or 1.0
        figure = go.Figure(
            go.Heatmap(
                z=z,
                x=x,
                y=y,
                colorscale="RdBu",
                zmin=-bound,
                zmax=bound,
                colorbar={"title": {"text": "effect"}},
                hovertemplate="%{y} at %{x}: %{z:.3f}<extra></extra>",
            )
        )
        figure.update_layout(
            xaxis={"title": {"text": axes[0]}, "type": "category"},
            yaxis={"title": {"text": axes[1]}, "type": "category", "autorange": "reversed"},
            height=max(320, 22 * len(y) + 120),
        )
        return figure


@torch.no_grad()
def patch(
    contrast: Contrast,
    places: Sequence[Place],
    positions: Positions = "each",
    *,
    direction: Direction = "denoising",
    batch_tokens: int = 2048,
) -> Patching:
    """The metric with each place patched at each position, one at a time.

    `batch_tokens` bounds the tokens of a forward that carries several patches.

    Raises InputError where the two runs have the same metric,
    for places that the model lacks and positions out of range; NumericsError on NaN.
    """
    where = contrast.positions(positions)
    check_contrast(contrast, places)
    source, target = contrast.runs(direction)
    patched = np.empty((len(places), len(where), len(contrast)))
    with evaluating(source.model.model), evaluating(target.model.model):
        for site, numbers in grouped(places, lambda place: place.site).items():
            replay = Replay(target.model, site)
            patches = list(itertools.product(numbers, range(len(where))))
            for pairs, copies in contrast.batches(batch_tokens):
                ids, mask = source.ids[pairs], source.mask[pairs]
                given = source.model.run(ids, mask, sites=[site])[site]
                own, _ = replay.run(target.ids[pairs], target.mask[pairs])
                edit = _Edit(given.to(own.device), own, target.model.n_heads)
                for start in range(0, len(patches), copies):
                    chunk = patches[start : start + copies]
                    changes = [(places[i], *where[j].indices(direction, pairs)) for i, j in chunk]
                    final = replay.again(lambda act: edit(act, changes), copies=len(chunk))  # noqa: B023
                    values = contrast.measure(target, final, pairs).double().cpu().numpy()
                    for (i, j), row in zip(chunk, values):
                        patched[i, j, pairs] = row
    return result(contrast, places, where, patched, direction, "activation patching")


class _Edit:
    """Writes patches into copies of a batch at one site."""

    def __init__(self, given: Float[Tensor, "n pos w"], own: Float[Tensor, "n pos w"], n_heads: int) -> None:
        self.given, self.own, self.n_heads = given, own, n_heads
        self.pair = torch.arange(len(own), device=own.device)[:, None]
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, act: Float[Tensor, "rows pos w"], changes: Sequence[tuple[Place, Tensor, Tensor]]
    ) -> Float[Tensor, "rows pos w"]:
        new = act.clone().view(len(changes), *self.own.shape)
        for rows, (place, there, here) in zip(new, changes):
            if place.sae is not None:
                rows[self.pair, here] += self._difference(place.sae, place.latent, there, here)
            else:
                columns = head_columns(place, act.shape[-1], self.n_heads)
                rows[self.pair, here, columns] = self.given[self.pair, there, columns]
        return new.view(act.shape)

    def _difference(
        self, sae: SAE, latent: int | None, there: Tensor, here: Tensor
    ) -> Float[Tensor, "n k w"]:
        if id(sae) not in self.latents:
            self.latents[id(sae)] = (encoded(sae, self.given), encoded(sae, self.own))
        given, own = self.latents[id(sae)]
        difference = given[self.pair, there, latent] - own[self.pair, here, latent]
        return (difference[..., None] * sae.W_dec[latent].to(difference)).to(self.own.dtype)


def encoded(sae: SAE, act: Float[Tensor, "n pos w"]) -> Float[Tensor, "n pos d_sae"]:
    """Latents, on the activations' device."""
    return sae.encode(act.to(sae.device, sae.dtype)).to(act.device)


def head_columns(place: Place, width: int, n_heads: int) -> slice:
    """The columns of a site that a place is: one head's, or all."""
    if place.head is None:
        return slice(0, width)
    size = width // n_heads
    return slice(place.head * size, (place.head + 1) * size)


def grouped(places: Sequence[Place], key: Callable[[Place], Any]) -> dict[Any, list[int]]:
    """Indices of places that have the same key, in the order of their first."""
    groups: dict[Any, list[int]] = {}
    for number, place in enumerate(places):
        groups.setdefault(key(place), []).append(number)
    return groups


def check_contrast(contrast: Contrast, places: Sequence[Place]) -> None:
    """Raise InputError where there is nothing to explain, or nothing to explain it with."""
    if not places:
        raise InputError(
            "There are no places to patch: give sites(model), heads(model) or latents(model, …)."
        )
    for place in places:
        for model in (contrast.clean.model, contrast.corrupt.model):
            model.site(place.site)
            if place.head is not None and not 0 <= place.head < model.n_heads:
                raise InputError(
                    f"There is no head {place.head}: {model.name} has heads 0–{model.n_heads - 1}."
                )
    clean, corrupt = contrast.clean_values, contrast.corrupt_values
    apart = abs(float((clean - corrupt).mean()))
    if apart <= 1e-6 * max(1.0, float(clean.abs().max())):
        raise InputError(
            f"Both runs have the same metric ({float(clean.mean()):.4g}): there is no difference to explain."
        )


def result(
    contrast: Contrast,
    places: Sequence[Place],
    positions: Sequence[Position],
    patched: Float[np.ndarray, "places positions n"],
    direction: Direction,
    how: str,
) -> Patching:
    clean, corrupt = (v.double().numpy() for v in (contrast.clean_values, contrast.corrupt_values))
    return Patching(tuple(places), tuple(p.label for p in positions), patched, clean, corrupt, direction, how)
