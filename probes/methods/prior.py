"""No features: the class frequencies of the rows to train on, p(k) = n_k / n. The majority baseline, with probabilities."""

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
        logits = problems.counts().log().T  # (m, classes)
        if problems.n_classes == 2:
            logits = logits[:, 1:] - logits[:, :1]
        bias = logits.expand(len(x), *logits.shape)
        center = x.new_zeros(len(x), x.shape[-1], dtype=torch.float64)
        return LinearFit(bias.new_zeros(*bias.shape, x.shape[-1]), bias, center)
