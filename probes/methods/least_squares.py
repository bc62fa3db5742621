"""Least squares onto ±1: the linear probe in closed form.

    minimise  Σᵢ wᵢ |W x + b − t|² / Σᵢ wᵢ + α |W|² / n           t_k = +1 for the row's class, −1 for the others

with x standardised on the rows to train on; two classes have one output. That is scikit-learn's
RidgeClassifier(alpha, class_weight) after StandardScaler. Its probability is the share (1 + output) / 2,
kept between 0.001 and 0.999: a linear probability model, not a calibrated one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.methods.base import LinearFit, Method, Problems, Rows, warn_of_few_rows


@dataclass(frozen=True)
class LeastSquares(Method):
    """Ridge regression onto ±1."""

    alpha: float = 1.0
    """Strength of the penalty, as one of a sum over rows."""
    balanced: bool = False
    standardize: bool = True

    name: ClassVar[str] = "least_squares"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> LinearFit:
        warn_of_few_rows(x, problems.train, "the penalty")
        rows = Rows.of(x, problems.train, standardize=self.standardize, dtype=torch.float64)
        weights = problems.weights(self.balanced)
        one_hot = torch.nn.functional.one_hot(problems.codes, problems.n_classes).double() * 2 - 1
        targets = one_hot[..., 1:] if problems.n_classes == 2 else one_hot  # (n, m, k)
        target_means = torch.einsum("nm,nmk->mk", weights, targets)
        found, biases = [], []
        for j in range(problems.size):
            seen = (rows.x - rows.shift[:, j, None]) * rows.inverse_scale[:, j, None]
            w = weights[:, j, None]
            mean = (w * seen).sum(1)
            centred = seen - mean[:, None]
            gram = centred.mT @ (w * centred)
            gram.diagonal(dim1=-2, dim2=-1).add_(self.alpha / int(problems.train[:, j].sum()) + 1e-12)
            right = centred.mT @ (w * (targets[:, j] - target_means[j]))
            weight = torch.linalg.solve(gram, right).mT  # (S, k, d)
            found.append(weight)
            biases.append(target_means[j] - torch.einsum("skd,sd->sk", weight, mean))
        return rows.linear_fit(torch.stack(found, 1), torch.stack(biases, 1), "identity")
