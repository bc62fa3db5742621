"""Dashboards of any directions of the activations: steering vectors, probes, what an adapter reads and writes.

    build_directions(model, vectors, ["happy", "past tense"], documents, "blocks.2.hook_resid_post", "dash/")

A direction w has two ends, and each has the page that a latent would have:

    f₊ = ReLU(x·ŵ − t),  f₋ = ReLU(t − x·ŵ),  ŵ = w / ‖w‖

so that an activation is the distance from the threshold t, in the activations' units: a probe's boundary where it is given, else
the mean of the data. The decoder row is ±w, as long as it came: what a steering vector adds at strength 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import L1, SAE
from sae.dashboard.pages import build
from steerkit.activations import Tokenization, collect
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel

_MEASURED_TOKENS = 8192
"""Tokens that tell the mean, and the norm of attention sinks."""


def build_directions(
    model: HookedModel,
    directions: Float[Tensor, "n width"],
    names: Sequence[str | tuple[str, str]],
    documents: Documents | Sequence[str] | str,
    site: str,
    out: str | Path,
    *,
    thresholds: Float[Tensor, " n"] | None = None,
    tokenization: Tokenization | None = None,
    tokens: int = 200_000,
    seed: int = 0,
    single_file: bool = False,
    title: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Write a dashboard of directions at a site into `out`, and return the path of its page: direction i is the "latents" 2i (+)
    and 2i + 1 (−).

    `names` are those of the directions, or of their two ends. `thresholds` are values of x·ŵ; without them, or where one is NaN,
    the mean over 8,192 tokens. Everything else is as in `sae.dashboard.build`, also what it raises; besides, InputError for names
    or widths that do not match, or a direction of zeros.
    """
    if len(names) != len(directions):
        raise InputError(f"{len(names)} names were given for {len(directions)} directions: each needs one.")
    ends = [(f"+ {name}", f"− {name}") if isinstance(name, str) else name for name in names]
    sae = fitted_latents(model, directions, documents, site, thresholds=thresholds, tokenization=tokenization)
    return build(
        model,
        sae,
        documents,
        site,
        out,
        tokenization=tokenization,
        tokens=tokens,
        sink_threshold=sae.metadata["sink_threshold"],
        seed=seed,
        single_file=single_file,
        title=title or (" / ".join(ends[0]) if len(ends) == 1 else f"{len(ends)} directions"),
        provenance=provenance,
        names=[name for pair in ends for name in pair],
        quiet=quiet,
    )


def fitted_latents(
    model: HookedModel,
    directions: Float[Tensor, "n width"],
    documents: Documents | Sequence[str] | str,
    site: str,
    *,
    thresholds: Float[Tensor, " n"] | None = None,
    tokenization: Tokenization | None = None,
) -> SAE:
    """`as_latents` with the mean of the documents' first 8,192 tokens, on the model's device; `metadata["sink_threshold"]` too."""
    documents = load_documents(documents)
    first = collect(model, documents, site, tokenization=tokenization, max_tokens=_MEASURED_TOKENS)
    sae = as_latents(directions, first.statistics[site].mean, thresholds).to(model.device)
    sae.metadata |= {"site": site, "sink_threshold": first.statistics[site].sink_threshold}
    return sae


def as_latents(
    directions: Float[Tensor, "n width"],
    mean: Float[Tensor, " width"],
    thresholds: Float[Tensor, " n"] | None = None,
) -> SAE:
    """ReLU latents 2i and 2i + 1 for the ends of direction i. Raises InputError or NumericsError for what is no direction."""
    w = directions.detach().float().cpu()
    if w.ndim != 2 or w.shape[1] != len(mean) or not len(w):
        raise InputError(f"The directions are {tuple(w.shape)}, and the site is {len(mean)} wide.")
    if not w.isfinite().all():
        raise NumericsError("A direction has NaN or inf.")
    norms = w.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise InputError("A direction is zero: it points nowhere.")
    unit = w / norms
    cut = unit @ mean.float().cpu()
    if thresholds is not None:
        given = thresholds.detach().float().cpu()
        if given.shape != cut.shape:
            raise InputError(f"{len(given)} thresholds were given for {len(cut)} directions.")
        cut = torch.where(given.isnan(), cut, given)
    sae = L1(d_sae=2 * len(w), target_l0=None, l1=0.0).build(w.shape[1]).requires_grad_(False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.stack([unit, -unit], 1).flatten(0, 1).T)
        sae.W_dec.copy_(torch.stack([w, -w], 1).flatten(0, 1))
        sae.get_parameter("b_enc").copy_(torch.stack([-cut, cut], 1).flatten())
    return sae
