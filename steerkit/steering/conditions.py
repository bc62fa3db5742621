"""Conditional steering (CAST): steer only the texts that a condition vector finds.

    condition = fit_condition(model, pairs, sites)          # positive sides: texts to steer; negative ones: to leave alone
    careful = replace(vector, condition=condition)

    c = mean_i(h+_i) - mean_i(h-_i),  h the mean of a prompt's activations;   steer where cos(h, c) is above θ

Lee et al. 2024, https://arxiv.org/abs/2409.05907. Site and θ are those with the best F1 on a part of the pairs that c was not made
of; the paper compares h with its projection on the first principal component.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import collect_pairs
from steerkit.steering.vector import Condition

_HELD_OUT = 0.33


def fit_condition(
    model: HookedModel, pairs: Pairs, sites: Sequence[str] | None = None
) -> tuple[Condition, float]:
    """The condition that tells positive from negative sides best, and its F1 on held-out pairs (0 to 1).

    `sites` None: after every block. Raises InputError for fewer than 6 pairs.
    """
    sites = list(sites or (f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)))
    if len(pairs) < 6:
        raise InputError(
            f"A condition is chosen on a third of the pairs: {len(pairs)} are too few, give 6 or more."
        )
    found = collect_pairs(model, pairs, sites, read="mean")
    best: tuple[Condition, float] | None = None
    for site in sites:
        positive, negative = (side.cpu() for side in found[site])
        cut = len(positive) - max(2, round(_HELD_OUT * len(positive)))
        vector = positive[:cut].mean(0) - negative[:cut].mean(0)
        cosines = torch.cosine_similarity(torch.cat([positive[cut:], negative[cut:]]), vector[None], dim=-1)
        labels = torch.arange(len(cosines)) < len(positive) - cut
        threshold, score = best_threshold(cosines, labels)
        if best is None or score > best[1]:
            best = Condition(site, vector, threshold), score
    assert best is not None
    return best


def best_threshold(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> tuple[float, float]:
    """(θ, F1) of the threshold above which scores say yes with the greatest F1; half-way between two scores."""
    order = torch.argsort(scores, descending=True, stable=True)
    sorted_scores, hits = scores[order], labels[order].cumsum(0).double()
    said = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    f1 = 2 * hits / (said + float(labels.sum()))
    cuttable = torch.cat([sorted_scores[1:] < sorted_scores[:-1], torch.tensor([True])])
    f1[~cuttable] = -1.0
    at = int(f1.argmax())
    below = sorted_scores[at + 1] if at + 1 < len(scores) else sorted_scores[at] - 1e-3
    return float((sorted_scores[at] + below) / 2), float(f1[at])
