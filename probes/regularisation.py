"""Penalties that are to make fine-tuning more stable: classes kept apart, and weights kept from stretching.

    margin:    R = mean over pairs of classes of 1 / (1 + ‖μ_a − μ_b‖)     μ_c: mean of what the head reads of a batch's class c
    spectral:  R = ½ Σ_W σ₁(W)²                                            over the trained matrices

The first is the maximal-margin regulariser of Fu et al. 2023, https://arxiv.org/abs/2301.09820, whose bound on instability shrinks
with the distance between the classes' features; for two classes it is theirs, for more the mean over pairs. The same bound grows
with the Lipschitz constant, which the spectral norms bound from above: their penalty is Yoshida and Miyato's (2017,
https://arxiv.org/abs/1705.10941), with one step of power iteration a training step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from steerkit.models import HookedModel
from steerkit.objectives import Classification, Labelled


def margin_penalty(
    states: Float[Tensor, "batch d_model"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """From 0 for classes that are far apart to 1 for classes with one mean; 0 where the batch has one class only."""
    means = [states[labels == label].mean(0) for label in labels.unique()]
    apart = [1 / (1 + (a - b).norm()) for a, b in itertools.combinations(means, 2)]
    return torch.stack(apart).mean() if apart else states.new_zeros(())


class WithMargin:
    """A classification whose training loss has `weight` times the margin's penalty in it; in all else it is the one given.

    The penalty is of each part of a batch by itself, so accumulation and the number of processes change it.
    """

    def __init__(self, objective: Classification, weight: float) -> None:
        self._objective, self._weight = objective, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def outcomes(self, model: HookedModel, batch: Sequence[Labelled]) -> dict[str, Float[Tensor, " batch"]]:
        states = self._objective.pooled(model, batch)
        labels = torch.tensor([example.label for example in batch], device=states.device)
        found = self._objective.judged(states, batch)
        penalty = self._weight * margin_penalty(states, labels)
        return found | {"loss": found["loss"] + penalty.to(found["loss"].device)}

    def settings(self) -> dict[str, Any]:
        return {**self._objective.settings(), "margin": self._weight}


class SpectralPenalty:
    """`finetune(…, regulariser=SpectralPenalty(weight))`. The power iteration's vectors begin at random, from a fixed seed."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._left: dict[str, Float[Tensor, " rows"]] = {}

    def __call__(self, model: HookedModel) -> Float[Tensor, ""]:
        matrices = {n: p for n, p in model.model.named_parameters() if p.requires_grad and p.ndim == 2}
        norms = [self._largest(name, matrix) for name, matrix in matrices.items()]
        total = torch.stack([norm.square() for norm in norms]).sum() if norms else torch.zeros(())
        return 0.5 * self._weight * total

    def _largest(self, name: str, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            if name not in self._left:
                start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(len(self._left)))
                self._left[name] = F.normalize(start.to(matrix), dim=0)
            right = F.normalize(matrix.T @ self._left[name], dim=0)
            self._left[name] = F.normalize(matrix @ right, dim=0)
        return self._left[name] @ matrix @ right
