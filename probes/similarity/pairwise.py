"""Compare two sets of activations in memory: every pair of layers, with intervals, nulls, and without the rows of
outstanding norm.

    acts_base, acts_tuned = collect(base, texts, sites), collect(tuned, texts, sites)
    found = similarity(acts_base, acts_tuned, "linear_cka", pairs="matched", permutations=100)
    found["blocks.2.hook_resid_post", "blocks.2.hook_resid_post"].interval           # 0.97 [0.96, 0.98]
    found.changed_by_sinks()                                                         # pairs that a few tokens decide

Two of a hundred tokens whose norm is 30 times that of the others, in the same dimension on both sides, bring the CKA of
otherwise unrelated sides to 1: so whenever there are such rows, everything is computed without them as well.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.similarity.base import (
    Documents,
    Fitter,
    Measure,
    Null,
    Pair,
    Settings,
    Side,
    Similarity,
    SimilarityWarning,
    SitePair,
    as_groups,
    common_length,
    rows_of,
)
from probes.similarity.cca import CCA, PWCCA, SVCCA
from probes.similarity.cka import LinearCKA
from probes.similarity.minibatch_cka import MinibatchCKA
from probes.similarity.procrustes import Procrustes
from probes.similarity.rbf_cka import RBFCKA
from probes.similarity.rsa import RSA
from steerkit.activations import Activations
from steerkit.blocks import SINK_FACTOR
from steerkit.errors import InputError, did_you_mean

MEASURES: dict[str, type[Measure]] = {
    measure.name: measure for measure in (LinearCKA, MinibatchCKA, RBFCKA, CCA, SVCCA, PWCCA, Procrustes, RSA)
}

_ROWS_AT_ONCE = 8192
_MOMENT_BYTES = 2**32
"""Where moments need more memory than this, up to ten times the work is done to avoid them."""


@dataclass(frozen=True)
class TopRows:
    """Which rows stand out by their norm, at any site of either side."""

    factor: float = SINK_FACTOR
    """Norm above this many times the site's median."""
    share: float | None = None
    """Instead, this share of rows with the greatest norms at each site; from 0 to 1."""

    def __call__(self, rows: _Rows) -> Bool[Tensor, " n"]:
        found = [self._of_site(acts).cpu() for side in (rows.a, rows.b) for acts in side.values()]
        return torch.stack(found).any(0)

    def _of_site(self, acts: Tensor) -> Bool[Tensor, " n"]:
        norms = acts.float().norm(dim=1)
        if self.share is None:
            return norms > self.factor * norms.median()
        top = torch.zeros(len(acts), dtype=torch.bool, device=acts.device)
        top[norms.topk(round(self.share * len(acts))).indices] = True
        return top


def get(measure: Measure | str) -> Measure:
    """A measure by name, with its defaults. Raises InputError for an unknown name."""
    if isinstance(measure, Measure):
        return measure
    if measure not in MEASURES:
        raise InputError(
            f"Unknown measure {measure!r}; there are {', '.join(MEASURES)}.{did_you_mean(measure, MEASURES)}"
        )
    return MEASURES[measure]()


def similarity(
    acts_a: Side,
    acts_b: Side,
    measure: Measure | str = "linear_cka",
    *,
    documents: Documents | np.ndarray | None = None,
    mask: Bool[Tensor, "*rows"] | None = None,
    permutations: int = 0,
    permute: Literal["document", "token"] = "document",
    top_rows: TopRows | None = TopRows(),
    seed: int = 0,
    **settings: Any,
) -> Similarity:
    """The similarity of sites of a with sites of b at the same rows, (..., d) each.

    `documents` names each row's document (those of `collect` know theirs); `mask` is true for rows that count. With
    `permutations`, each pair has the null of one side's rows in another order: whole documents, or tokens. `top_rows`
    are left out in `.without_sinks`, where there are any; None: not looked for. `settings` are those of `Settings`:
    `pairs`, `interval`, `blocks`, `level`, `dtype`.

    Raises InputError for sides that do not match, too few rows, or a constant site; NumericsError on NaN or inf.
    """
    measure = get(measure)
    rows = _Rows.of(acts_a, acts_b, documents, mask)
    if isinstance(measure, LinearCKA) and measure.route == "auto":
        measure = replace(measure, route=_route(rows, Settings(**settings)))
    found = _fed(rows, measure, settings, seed).result()
    if permutations:
        grouped = rows.documents if permute == "document" else None
        found = replace(found, pairs=_with_nulls(found, rows, settings, grouped, permutations, seed))
    top = top_rows(rows) if top_rows else torch.zeros(len(rows), dtype=torch.bool)
    if not top.any():
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimilarityWarning)  # said of all rows already
        without = _fed(rows.take((~top).nonzero().flatten()), measure, settings, seed).result()
    return _told(replace(found, n_sinks=int(top.sum()), without_sinks=without))


@dataclass(frozen=True)
class _Rows:
    """The rows that count."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    documents: Int[Tensor, " n"] | None

    @classmethod
    def of(cls, acts_a: Side, acts_b: Side, documents: Any, mask: Tensor | None) -> _Rows:
        if isinstance(acts_a, Activations) and isinstance(acts_b, Activations):
            _same_tokens(acts_a, acts_b)
        if documents is None and isinstance(acts_a, Activations):
            documents = acts_a.document
        a, b = rows_of(acts_a, mask), rows_of(acts_b, mask)
        common_length(a, b)
        if documents is not None:
            names = documents.cpu().numpy() if isinstance(documents, Tensor) else np.asarray(documents)
            documents = as_groups(names.ravel() if mask is None else names[mask.cpu().numpy()])
        return cls(a, b, documents)

    def __len__(self) -> int:
        return len(next(iter(self.a.values())))

    def take(self, index: Int[Tensor, " m"]) -> _Rows:
        a, b = (
            {site: acts[index.to(acts.device)] for site, acts in side.items()} for side in (self.a, self.b)
        )
        return _Rows(a, b, None if self.documents is None else self.documents[index])

    def with_b(self, order: Int[Tensor, " n"]) -> _Rows:
        """Side b's rows in another order."""
        return replace(self, b=self.take(order).b)


def _fed(rows: _Rows, measure: Measure, settings: dict[str, Any], seed: int) -> Fitter:
    """The measure's fitter, with all rows taken in."""
    fitter = measure.fitter(**settings)
    if isinstance(measure, MinibatchCKA):
        rows = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        fitter.update(
            {site: acts[here] for site, acts in rows.a.items()},
            {site: acts[here] for site, acts in rows.b.items()},
            None if rows.documents is None else rows.documents[here],
        )
    return fitter


def _with_nulls(
    found: Similarity,
    rows: _Rows,
    settings: dict[str, Any],
    groups: Tensor | None,
    permutations: int,
    seed: int,
) -> dict[SitePair, Pair]:
    """The pairs, each with the null of permuted rows."""
    generator = torch.Generator().manual_seed(seed)
    settings = {**settings, "interval": False}
    drawn: dict[SitePair, list[float]] = {sites: [] for sites in found.pairs}
    for _ in range(permutations):
        permuted = rows.with_b(shuffled(len(rows), groups, generator))
        for sites, estimate in _fed(permuted, found.measure, settings, seed).estimates().items():
            drawn[sites].append(estimate.interval.estimate)
    return {
        sites: replace(pair, null=_null(pair.value, np.array(drawn[sites])))
        for sites, pair in found.pairs.items()
    }


def _null(value: float, drawn: Float[np.ndarray, " permutations"]) -> Null:
    reached = int((drawn >= value).sum())
    return Null(
        float(drawn.mean()), len(drawn), float(np.quantile(drawn, 0.95)), (1 + reached) / (1 + len(drawn))
    )


def shuffled(n: int, groups: Int[Tensor, " n"] | None, generator: torch.Generator) -> Int[Tensor, " n"]:
    """An order of rows: at random, or whole documents at random, set end to end over the documents as they stand.

    Documents of one length take each other's places row by row, so that what depends on the position alone stays in the null.
    """
    if groups is None:
        return torch.randperm(n, generator=generator)
    places = torch.randperm(int(groups.max()) + 1, generator=generator)
    order = torch.empty(n, dtype=torch.long)
    order[groups.argsort(stable=True)] = places[groups].argsort(stable=True)
    return order


def _route(rows: _Rows, settings: Settings) -> Literal["moments", "gram"]:
    """The cheaper way to the linear CKA."""
    pairs = settings.chosen(list(rows.a), list(rows.b))
    a, b = (
        {site: side[site].shape[1] for site in sites} for side, sites in zip((rows.a, rows.b), zip(*pairs))
    )
    products = sum(a[one] * b[other] for one, other in pairs) + sum(d * d for d in (*a.values(), *b.values()))
    kept = (settings.blocks if settings.interval else 1) * products * settings.dtype.itemsize
    widths = sum(a.values()) + sum(b.values())
    work = len(rows) * widths / products
    return "gram" if work < 1 or (kept > _MOMENT_BYTES and work < 10) else "moments"


def _same_tokens(a: Activations, b: Activations) -> None:
    """Raise InputError if rows are not the same tokens of the same texts."""
    if not all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("token_ids", "document", "position")
    ):
        raise InputError(
            "The two sides are not of the same tokens: collect both from the same texts with drop_sinks=False (each model "
            "has its own sinks; they are looked at here), or, if the tokenizers differ, compare one row per sentence."
        )


def _told(found: Similarity) -> Similarity:
    """With a note if the outstanding rows decide the result."""
    changed = found.changed_by_sinks()
    if not changed or found.without_sinks is None:
        return found
    a, b = changed[0]
    note = (
        f"{found.n_sinks:,} of {found.n_rows:,} rows stand out by their norm, and {len(changed)} of {len(found.pairs)} "
        f"pairs depend on them: {a} – {b} is {found[a, b].value:.3f} with and {found.without_sinks[a, b].value:.3f} without"
    )
    warnings.warn(note, SimilarityWarning, stacklevel=3)
    return replace(found, notes=(*found.notes, note))
