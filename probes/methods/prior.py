"""No features: the class frequencies, by Laplace's rule of succession.

    p(k) = (n_k + 1) / (n + K)

The majority baseline, with honest probabilities. As an online code of n labels, k of them of one of two classes, read one by one,
it takes log₂((n + 1) C(n, k)) bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from probes.methods.base import LinearFit, Method, Problems


@dataclass(frozen=True)
class Prior(Method):
    """The class frequencies of the rows to train on."""

    name: ClassVar[str] = "prior"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> LinearFit:
        logits = (problems.counts() + 1).log().T  # (m, classes)
        if problems.n_classes == 2:
            logits = logits[:, 1:] - logits[:, :1]
        bias = logits.expand(len(x), *logits.shape)
        center = x.new_zeros(len(x), x.shape[-1], dtype=torch.float64)
        return LinearFit(bias.new_zeros(*bias.shape, x.shape[-1]), bias, center)
