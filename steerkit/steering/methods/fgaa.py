"""Feature-guided activation addition (FGAA): the latents that tell the sides apart, filtered, and what brings them about.

    d = mean_i mean_t f(h+) - mean_i mean_t f(h-)                     f: latents of a sparse autoencoder, (d_sae,)
    d ← 0 for latents that are too dense, or active on the first tokens of texts;  then only the n largest d stay
    t = d / |d|_1
    v = M t / |M t| - M b / |M b|      with an effect approximator y ≈ x M + b from vectors to changes of latents
    v = t W_dec                        without

Soo et al. 2025, https://arxiv.org/abs/2501.09929 (density filter 0.01, n from 1 to some tens, negative latents left out); the
approximator is Chalnev et al. 2024 (SAE-TS), https://arxiv.org/abs/2411.02193. A fixed density filter deletes the latents of a
frequent concept where dictionaries are small: here it is the share of the dictionary's densest latents that are left out. v has
the norm of the plain mean difference of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE
from steerkit.errors import InputError
from steerkit.finetune import Example, padded
from steerkit.models import HookedModel
from steerkit.steering.methods.base import Method, register
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import encode_side
from steerkit.steering.sampling import encode_prompts, sample
from steerkit.steering.vector import SteeringVector

_BATCH = 32


@dataclass(frozen=True)
class Effects:
    """A linear approximation of what adding a vector does to an SAE's latents: y ≈ x M + b. `fit_effects` makes one."""

    M: Float[Tensor, "width d_sae"]
    b: Float[Tensor, " d_sae"]
    r2: float
    """Share of the variance of held-out effects that it explains, over all latents."""


@register
@dataclass(frozen=True)
class FGAA(Method):
    """One vector at the SAE's site."""

    sae: Any = None
    """A `sae.SAE`, or the directory of one."""
    n: int = 16
    """Latents that are kept."""
    n_negative: int = 0
    """Latents of the negative sides that are kept, with a minus."""
    densest: float = 0.02
    """Share of the dictionary, its densest latents on these texts, that is left out."""
    first_tokens: int = 1
    """Tokens at the beginning of texts; latents that are active there on most texts are left out."""
    effects: Effects | None = None
    """What of the model's own to use instead of the plain decoder."""
    name: ClassVar[str] = "fgaa"
    needs: ClassVar[tuple[str, ...]] = ("sae",)
    of_sites: ClassVar[bool] = False

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str] = ()) -> SteeringVector:
        sae, site = sae_and_site(self.sae, model, sites)
        positive, negative, density, opening, shift = _read(model, sae, site, pairs, self.first_tokens)
        difference = positive - negative
        kept = torch.ones(sae.d_sae, dtype=torch.bool)
        cut = round(self.densest * sae.d_sae)
        if cut:
            kept[density.topk(cut).indices] = False
        kept &= opening <= 0.5
        target = torch.zeros(sae.d_sae)
        for sign, n in ((1.0, self.n), (-1.0, self.n_negative)):
            scores = torch.where(kept, sign * difference, torch.zeros(()))
            chosen = scores.topk(min(n, sae.d_sae)).indices if n else torch.empty(0, dtype=torch.int64)
            chosen = chosen[scores[chosen] > 0]
            target[chosen] = difference[chosen]
        if not target.any():
            raise InputError(
                f"No latent of the SAE tells the sides of {pairs.name} apart after the filters: keep more (densest, first_tokens)."
            )
        target /= target.abs().sum()
        if self.effects is None:
            vector = target @ sae.W_dec.detach().float().cpu()
        else:
            toward, always = self.effects.M @ target, self.effects.M @ self.effects.b
            vector = toward / toward.norm() - always / always.norm().clamp_min(1e-12)
        vector = vector * (shift / vector.norm().clamp_min(1e-12))
        latents = {int(i): round(float(target[i]), 4) for i in target.nonzero().flatten()}
        provenance = {
            **self.provenance(model, pairs, [site]),
            "settings": {
                "n": self.n,
                "n_negative": self.n_negative,
                "densest": self.densest,
                "first_tokens": self.first_tokens,
                "effects": None if self.effects is None else f"approximator, R² {self.effects.r2:.2f}",
            },
            "latents": latents,
        }
        return SteeringVector.add({site: vector}, **provenance)


def sae_and_site(given: Any, model: HookedModel, sites: Sequence[str] = ()) -> tuple[SAE, str]:
    """The SAE that is given, or whose directory is, and where it reads. Raises InputError for one of another width."""
    from sae import load

    found = load(given) if not isinstance(given, SAE) and given is not None else given
    if found is None:
        raise InputError(
            "This needs the latents of a sparse autoencoder: give sae=…, an SAE or its directory."
        )
    site = found.metadata.get("site") or (sites[0] if sites else None)
    if site is None:
        raise InputError("The SAE does not say which site it is of: give it.")
    if model.site(site).width != found.d_in:
        raise InputError(
            f"The SAE is of width {found.d_in}, and {site} of {model.name} is {model.site(site).width} wide."
        )
    return found, site


def _read(
    model: HookedModel, sae: SAE, site: str, pairs: Pairs, first_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Mean latents of the positive and the negative sides (d_sae,), density on both, share of the texts in whose first tokens a
    latent is active, and the norm of the mean difference of the activations."""
    sums = torch.zeros(2, sae.d_sae)
    means = torch.zeros(2, sae.d_in)
    active, opening = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae)
    n_tokens = n_texts = 0
    for side in (0, 1):
        encoded = [encode_side(model, p.prompt, (p.positive, p.negative)[side]) for p in pairs]
        for first in range(0, len(encoded), _BATCH):
            batch = [Example(tuple(ids), start) for ids, start in encoded[first : first + _BATCH]]
            ids, mask = padded(model, batch)
            with torch.inference_mode():
                acts = model.run(ids, mask, sites=[site])[site].float().cpu()
                latents = sae.encode(acts.to(sae.device)).cpu()
            for row, example in enumerate(batch):
                own = [
                    i for i in range(example.start, len(example)) if example.ids[i] not in model.special_ids
                ]
                if not own:
                    continue
                sums[side] += latents[row, own].mean(0)
                means[side] += acts[row, own].mean(0)
                active += (latents[row, own] > 0).sum(0)
                head = first_tokens + (example.ids[0] in model.special_ids) if first_tokens else 0
                opening += (latents[row, :head] > 0).any(0)
                n_tokens += len(own)
                n_texts += 1
    n = len(pairs)
    shift = float((means[0] - means[1]).norm()) / n
    return sums[0] / n, sums[1] / n, active / max(1, n_tokens), opening / max(1, n_texts), shift


def fit_effects(
    model: HookedModel,
    sae: SAE,
    prompts: Sequence[str],
    *,
    site: str | None = None,
    n_vectors: int = 256,
    max_new_tokens: int = 32,
    strength: float | None = None,
    ridge: float = 1e-2,
    seed: int = 0,
) -> Effects:
    """Measure what adding vectors does to an SAE's latents in the model's own continuations, and fit it linearly.

    Vectors are decoder rows drawn at random, of norm `strength` (default: half the mean norm of the site's activations); the effect
    of one is the mean of the latents over the tokens generated with it, less that without. A fifth of them is held out for R².
    Raises InputError without prompts.
    """
    if not prompts:
        raise InputError("Effects are measured on continuations of prompts: give some.")
    site = site or sae.metadata["site"]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(sae.d_sae, generator=generator)[:n_vectors]
    units = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu()[rows], dim=1)
    texts = [prompts[i % len(prompts)] for i in range(len(units))]
    plain, norm = _latents_of_continuations(model, sae, site, texts, None, max_new_tokens, seed)
    size = strength if strength is not None else 0.5 * norm
    steered, _ = _latents_of_continuations(model, sae, site, texts, size * units, max_new_tokens, seed)
    effects = steered - plain
    cut = max(1, len(units) * 4 // 5)
    x = torch.cat([units, torch.ones(len(units), 1)], dim=1).double()
    gram = x[:cut].T @ x[:cut] + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, x[:cut].T @ effects[:cut].double())
    left = (effects[cut:].double() - x[cut:] @ solution).square().sum()
    total = (effects[cut:] - effects[:cut].mean(0)).double().square().sum().clamp_min(1e-30)
    return Effects(solution[:-1].float(), solution[-1].float(), float(1 - left / total))


def _latents_of_continuations(
    model: HookedModel,
    sae: SAE,
    site: str,
    prompts: Sequence[str],
    vectors: Tensor | None,
    max_new_tokens: int,
    seed: int,
) -> tuple[Float[Tensor, "n d_sae"], float]:
    """(mean latents of the tokens generated after each prompt with its vector added, read without it; mean norm there)."""
    encoded = encode_prompts(model, prompts)
    order = sorted(
        range(len(encoded)), key=lambda i: len(encoded[i])
    )  # the order in which `sample` takes them
    begun = iter(range(0, len(order), _BATCH))

    def changed(lengths: Sequence[int]) -> AbstractContextManager[None]:
        if vectors is None:
            return nullcontext()
        start = next(begun)
        added = vectors[[order[i] for i in range(start, start + len(lengths))]][:, None]
        return model.hooks({site: lambda h: h + added.to(h)})

    drawn = sample(
        model,
        [encoded[i] for i in order],
        changed,
        samples=1,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=_BATCH,
    )
    found = torch.zeros(len(prompts), sae.d_sae)
    norms = []
    rows = [
        (i, Example((*before, *new), len(before)))
        for i, before, new in zip(order, drawn.prompts, drawn.new)
        if new
    ]
    for first in range(0, len(rows), _BATCH):
        batch = rows[first : first + _BATCH]
        with torch.inference_mode():
            acts = model.run(*padded(model, [e for _, e in batch]), sites=[site])[site].float()
        for (i, example), act in zip(batch, acts):
            own = act[example.start : len(example)]
            found[i] = sae.encode(own.to(sae.device)).detach().mean(0).cpu()
            norms.append(float(own.norm(dim=1).mean()))
    return found, sum(norms) / max(1, len(norms))
