"""What a model does without a concept: erased at a site inside the running model, beside an erasure of as many random directions.

    effect = causal_check(model, data, rows, "blocks.2.hook_resid_post", sites=later)
    effect.kl, effect.random_kl              # nats a token that the predictions move
    effect.delta_ce                          # nats a token that the text becomes less likely
    effect.probes["blocks.3.hook_resid_post"].after     # what a new probe still finds downstream

A probe shows that a concept can be read; this shows whether the model reads it. The eraser is fitted on
half of the groups, everything is measured on the others, and probes are fitted anew (Elazar et al. 2021,
“Amnesic probing”, https://arxiv.org/abs/2006.00995, with the eraser of Belrose et al. 2023). Tokens around
the text keep their activations. A concept that is written again by a later block, or was elsewhere all the
time, is found downstream all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from probes.crossval import cross_validate
from probes.data import LabelledData, ProbeRows, Reading, by_text, read_mask, read_rows
from probes.erasure import Eraser, LeaceFitter
from probes.methods import Method
from probes.scores import difference
from probes.splits import encode_labels, grouped_folds
from steerkit.models import HookedModel
from steerkit.stats import Comparison, Interval, group_sums, jackknife
from steerkit.tokens import Tokenization, token_batches

_ALL = 1 << 40
"""The eraser is fitted on all tokens."""


@dataclass(frozen=True)
class BeforeAfter:
    """Held-out accuracy of probes fitted without and with the erasure."""

    before: Interval
    after: Interval
    change: Comparison

    def to_dict(self) -> dict[str, Any]:
        return {name: value.to_dict() for name, value in vars(self).items()}


@dataclass(frozen=True)
class CausalCheck:
    """What erasing did. Nats a token, with intervals over groups."""

    site: str
    eraser: Eraser = field(repr=False)
    kl: Interval | None
    """KL(without erasure ‖ with it) of the predictions at the tokens read; None without an LM head."""
    random_kl: Interval | None
    delta_ce: Interval | None
    """Loss with erasure less that without; None for models that do not predict the next token."""
    random_delta_ce: Interval | None
    probes: dict[str, BeforeAfter]
    texts: int
    """Texts that were measured on."""

    def to_dict(self) -> dict[str, Any]:
        figures = ("kl", "random_kl", "delta_ce", "random_delta_ce")
        return {
            "site": self.site,
            "rank": self.eraser.rank,
            "texts": self.texts,
            **{name: None if (value := getattr(self, name)) is None else value.to_dict() for name in figures},
            "probes": {site: found.to_dict() for site, found in self.probes.items()},
        }

    def __repr__(self) -> str:
        lines = [f"{self.eraser!r}, measured on {self.texts} texts"]
        if self.kl is not None:
            lines.append(
                f"  predictions move by {self.kl!r} nats a token ({self.random_kl!r} for random directions)"
            )
        if self.delta_ce is not None:
            lines.append(f"  loss rises by {self.delta_ce!r} nats a token ({self.random_delta_ce!r})")
        lines += [f"  probe at {site}: {p.before!r} -> {p.after!r}" for site, p in self.probes.items()]
        return "\n".join(lines)


def causal_check(
    model: HookedModel,
    data: LabelledData,
    rows: ProbeRows,
    site: str,
    *,
    sites: Sequence[str] = (),
    method: str | Method = "logistic",
    per_text: int = 16,
    n_folds: int = 5,
    tokenization: Tokenization | None = None,
    seed: int = 0,
) -> CausalCheck:
    """Erase the labels of `rows` at `site`, and probe the site and `sites` anew.

    Raises InputError where half of the groups are too few for the folds.
    """
    fitted = grouped_folds(encode_labels(rows.labels)[0], rows.groups, 2, seed=seed) == 0
    halves = [data.subset(np.unique(rows.text[part]).tolist()) for part in (fitted, ~fitted)]
    read = partial(read_rows, model, reading=rows.reading, tokenization=tokenization, seed=seed)
    fitter = _fitter(read(halves[0], [site], per_text=_ALL), site)
    eraser = fitter.eraser(site)
    looked_at = list(dict.fromkeys([site, *sites]))
    clean, erased = (read(halves[1], looked_at, per_text=per_text, erased=e) for e in (None, eraser))
    found = [
        cross_validate(
            r.acts, r.labels, r.groups, method=method, shuffled=False, n_folds=n_folds, seed=seed
        ).held_out
        for r in (clean, erased)
    ]
    probes = {
        name: BeforeAfter(
            found[0][name].scores().accuracy,
            found[1][name].scores().accuracy,
            difference(found[1][name], found[0][name]),
        )
        for name in looked_at
    }
    random = fitter.random(eraser.rank, seed=seed, site=site)
    kl, random_kl, delta_ce, random_delta_ce = _outputs(
        model, halves[1], [eraser, random], rows.reading, tokenization
    )
    return CausalCheck(site, eraser, kl, random_kl, delta_ce, random_delta_ce, probes, len(halves[1]))


def _fitter(rows: ProbeRows, site: str) -> LeaceFitter:
    codes, classes = encode_labels(rows.labels)
    fitter = LeaceFitter(rows.acts[site].shape[1], len(classes))
    fitter.update(rows.acts[site], torch.from_numpy(codes))
    return fitter


@torch.inference_mode()
def _outputs(
    model: HookedModel,
    data: LabelledData,
    erasers: Sequence[Eraser],
    reading: Reading,
    tokenization: Tokenization | None,
) -> tuple[Interval | None, Interval | None, Interval | None, Interval | None]:
    """(KL, KL of random directions, ΔCE, ΔCE of random directions)."""
    if not model.has_lm_head:
        return None, None, None, None
    sums: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    for batch in token_batches(model, data.texts, by_text(tokenization), batch_tokens=2048):
        mask = read_mask(batch, reading)
        clean = model.logits(batch.input_ids, batch.attention_mask).log_softmax(-1)
        columns = [mask.to(clean)]
        followed = _followed(batch.keep) & mask
        columns.append(followed.to(clean))
        for eraser in erasers:
            with model.hooks({eraser.site: eraser.only_at(mask)}):
                changed = model.logits(batch.input_ids, batch.attention_mask).log_softmax(-1)
            kl = F.kl_div(changed, clean, reduction="none", log_target=True).sum(-1)
            delta = _next_loss(changed, batch.input_ids) - _next_loss(clean, batch.input_ids)
            columns += [kl * mask, delta * followed]
        sums.append(torch.stack(columns, -1).flatten(0, 1).double().cpu().numpy())
        documents.append(batch.token_document.flatten().cpu().numpy())
    values, document = np.concatenate(sums), np.concatenate(documents)
    by_group = group_sums(values[document >= 0], data.groups[document[document >= 0]])
    moved, random_moved = _ratio(by_group, 2, 0), _ratio(by_group, 4, 0)
    if not model.is_causal or not by_group[:, 1].sum():
        return moved, random_moved, None, None
    return moved, random_moved, _ratio(by_group, 3, 1), _ratio(by_group, 5, 1)


def _ratio(sums: Float[np.ndarray, "g k"], top: int, bottom: int) -> Interval:
    return jackknife(sums, lambda s: s[..., top] / s[..., bottom])


def _followed(keep: Tensor) -> Tensor:
    """Positions whose next token is text."""
    return torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)


def _next_loss(log_probabilities: Tensor, ids: Tensor) -> Float[Tensor, "batch pos"]:
    """−log p of the next token; 0 at the end."""
    picked = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(-picked, (0, 1))
