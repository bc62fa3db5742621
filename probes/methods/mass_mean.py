"""Mass-mean: the difference of the class means, fitted by nothing but averaging.

    δ = μ₊ − μ₋           p(+ | x) = σ(δ · (x − (μ₊ + μ₋) / 2))

Marks & Tegmark 2023, https://arxiv.org/abs/2310.06824; of more than two classes the nearest mean,
softmax(μ_k · x − |μ_k|² / 2). Its probabilities are only as good as the scale of the activations is unit
variance within classes: look at accuracy and AUROC. The paper's variant for rows that are independent and
alike, Σ⁻¹δ, is linear discriminant analysis (`Lda`). For two Gaussian classes N(±δ/2, Σ) the accuracy is
Φ(|δ|² / (2 √(δᵀΣδ))).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.methods.base import LinearFit, Method, Problems, require_all_classes


@dataclass(frozen=True)
class MassMean(Method):
    """The class means."""

    name: ClassVar[str] = "mass_mean"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> LinearFit:
        require_all_classes(problems)
        center = x.mean(1, dtype=torch.float64)
        means = class_means(x.double() - center[:, None], problems)
        return discriminant(means, means, torch.zeros_like(means[..., 0]), center)


def class_means(x: Float[Tensor, "S n d"], problems: Problems) -> Float[Tensor, "S m classes d"]:
    """Means of the rows to train on, of each class and problem."""
    member = torch.nn.functional.one_hot(problems.codes, problems.n_classes).to(x.dtype)
    member = member * problems.train[..., None]
    share = (member / member.sum(0)).flatten(1)  # (n, m classes)
    return (share.mT @ x).unflatten(1, (problems.size, problems.n_classes))


def discriminant(
    weight: Float[Tensor, "S m classes d"],
    means: Float[Tensor, "S m classes d"],
    log_prior: Float[Tensor, "S m classes"],
    center: Float[Tensor, "S d"],
) -> LinearFit:
    """logit_k = weight_k · x − weight_k · mean_k / 2 + log prior_k; less the classes' mean; of two the difference."""
    bias = log_prior - (weight * means).sum(-1) / 2
    if weight.shape[2] == 2:
        weight, bias = weight[:, :, 1:] - weight[:, :, :1], bias[..., 1:] - bias[..., :1]
    else:
        weight, bias = weight - weight.mean(2, keepdim=True), bias - bias.mean(2, keepdim=True)
    return LinearFit(weight, bias, center)
