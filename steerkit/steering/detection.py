"""Concept detection: how well a direction tells texts with a concept from texts without it.

    detect(model, vector, texts, labels, site="blocks.2.hook_resid_post").auroc                        # 0.93 [0.89, 0.96]
    detect(model, {"mean_diff": v, "random": r}, texts, labels, site, groups=categories)               # all in one pass

The score of a text is max over its tokens (special ones left out) of u·h, AxBench's (Wu et al. 2025,
https://arxiv.org/abs/2501.17148). AUROCs need no threshold and no judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from steerkit.data import load_documents
from steerkit.errors import InputError, NumericsError, did_you_mean
from steerkit.models import HookedModel
from steerkit.stats import Interval, auroc_interval
from steerkit.steering.vector import SteeringVector
from steerkit.tokens import token_batches

POOLS = ("max", "mean", "last")


@dataclass(frozen=True)
class Detection:
    """How well one direction's scores tell positives from negatives."""

    auroc: Interval
    """Of all positives against all negatives."""
    by_group: dict[str, Interval]
    """Of all positives against the negatives of each group."""
    n_positive: int
    n_negative: int
    scores: Float[np.ndarray, " n"] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the scores."""
        return {
            "auroc": self.auroc.to_dict(),
            "by_group": {name: found.to_dict() for name, found in self.by_group.items()},
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
        }


Direction = SteeringVector | Tensor


@overload
def detect(
    model: HookedModel,
    directions: Direction,
    texts: Sequence[str],
    labels: Any,
    site: str,
    groups: Any = ...,
    **options: Any,
) -> Detection: ...
@overload
def detect(
    model: HookedModel,
    directions: Mapping[str, Direction],
    texts: Sequence[str],
    labels: Any,
    site: str,
    groups: Any = ...,
    **options: Any,
) -> dict[str, Detection]: ...
def detect(
    model: HookedModel,
    directions: Direction | Mapping[str, Direction],
    texts: Sequence[str],
    labels: Bool[np.ndarray, " n"] | Sequence[bool],
    site: str,
    groups: Shaped[np.ndarray, " n"] | Sequence[str] | None = None,
    **options: Any,
) -> Detection | dict[str, Detection]:
    """AUROC of one direction, or of each of several, with intervals over texts.

    `groups` names the kind of each text, such as `negative` and `hard negative`: each kind of negatives is compared with the
    positives apart, too. `options` are those of `score_texts`. Raises InputError for labels that are not 0 or 1, do not match the
    texts, or are all the same.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(texts),) or not np.isin(labels, (0, 1)).all():
        raise InputError(
            f"{len(texts)} texts need as many labels, 1 for those with the concept and 0 for the others."
        )
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise InputError(
            f"All {len(labels)} labels are {bool(labels.any()):d}: detection needs texts with the concept and without it."
        )
    kinds = np.full(len(labels), "") if groups is None else np.asarray(groups)
    if kinds.shape != labels.shape:
        raise InputError(f"{len(texts)} texts need as many groups, not {kinds.shape}.")
    model.site(site)
    several = directions if isinstance(directions, Mapping) else {"": directions}
    if not several:
        raise InputError("There are no directions to detect with: give at least one.")
    matrix = torch.stack([_at(direction, site) for direction in several.values()])
    scores = score_texts(model, texts, matrix, site, **options)
    found = {
        name: _detection(column, labels, kinds, groups is not None) for name, column in zip(several, scores.T)
    }
    return found if isinstance(directions, Mapping) else found[""]


def score_texts(
    model: HookedModel,
    texts: Sequence[str],
    directions: Float[Tensor, "k width"],
    site: str,
    *,
    pool: str = "max",
    relu: bool = False,
    batch_tokens: int = 4096,
) -> Float[np.ndarray, "n k"]:
    """u·h over the tokens of each text that are not special: the `max`, the `mean` or the `last`; with `relu` of max(0, u·h).

    A text longer than the context is read in parts. Raises InputError for a width that does not fit or a text without a token,
    NumericsError on NaN.
    """
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}.{did_you_mean(pool, POOLS)} It is one of {', '.join(POOLS)}.")
    width = model.site(site).width
    if directions.dim() != 2 or directions.shape[1] != width:
        raise InputError(
            f"The directions are {tuple(directions.shape)}; {model.name} is {width} wide at {site}: (k, {width}) is needed."
        )
    best = np.full((len(texts), len(directions)), -np.inf)
    total, count = np.zeros_like(best), np.zeros(len(texts))
    last, position = np.zeros_like(best), np.full(len(texts), -1)
    for batch in token_batches(model, load_documents(list(texts)), batch_tokens=batch_tokens):
        with torch.inference_mode():
            acts = model.run(batch.input_ids, batch.attention_mask, sites=[site])[site]
            found = acts[batch.keep.to(acts.device)].float() @ directions.T.to(acts.device, torch.float32)
        scores = found.double().cpu().numpy()
        if not np.isfinite(scores).all():
            raise NumericsError(f"{model.name} has NaN or inf at {site}, or a direction has.")
        scores = np.maximum(scores, 0.0) if relu else scores
        document = batch.token_document[batch.keep].cpu().numpy()
        place = batch.token_position[batch.keep].cpu().numpy()
        np.maximum.at(best, document, scores)
        np.add.at(total, document, scores)
        np.add.at(count, document, 1)
        later = place == _last_places(document, place)
        ends = later & (place > position[document])
        last[document[ends]], position[document[ends]] = scores[ends], place[ends]
    if not count.all():
        raise InputError(f"Text {int(np.argmin(count))} has no token to score: leave blank texts out.")
    return {"max": best, "mean": total / count[:, None], "last": last}[pool]


def _last_places(document: np.ndarray, place: np.ndarray) -> np.ndarray:
    """For each token, the last place of its document among these."""
    last = np.full(int(document.max(initial=-1)) + 1, -1)
    np.maximum.at(last, document, place)
    return last[document]


def _at(direction: Direction, site: str) -> Float[Tensor, " width"]:
    if isinstance(direction, Tensor):
        if direction.dim() != 1:
            raise InputError(f"A direction is {tuple(direction.shape)}; it must be one vector, (width,).")
        return direction.detach().float().cpu()
    at_sites = direction.directions
    if site not in at_sites:
        raise InputError(f"The vector has no direction at {site}: it has at {', '.join(at_sites)}.")
    return at_sites[site].float().cpu()


def _detection(scores: np.ndarray, labels: np.ndarray, kinds: np.ndarray, grouped: bool) -> Detection:
    def against(negatives: np.ndarray) -> Interval:
        chosen = labels | negatives
        return auroc_interval(scores[chosen], labels[chosen], np.flatnonzero(chosen))

    names = dict.fromkeys(kinds[~labels].tolist()) if grouped else {}
    return Detection(
        auroc=against(~labels),
        by_group={str(name): against(~labels & (kinds == name)) for name in names},
        n_positive=int(labels.sum()),
        n_negative=int((~labels).sum()),
        scores=scores,
    )
