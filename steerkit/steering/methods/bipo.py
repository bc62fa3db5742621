"""Bidirectional preference optimisation (BiPO): a vector trained to make one side likelier, and its opposite the other.

    h ← h + s v at every token,  s = ±1 at random for each pair
    loss = -log σ(β s Δ) - (λ/|y|) log π_v(y|x),   Δ = [log π_v(y+|x) - log π_v(y-|x)] - [log π_0(y+|x) - log π_0(y-|x)]

Cao et al. 2024, https://arxiv.org/abs/2406.00045 (β 0.1, AdamW with lr 5e-4 and weight decay 0.05, cosine, batches of 4). The log-
probabilities of π_0, the model as it is, are computed once; the paper draws one s for a batch. The defaults here are for a small
model and few pairs; large ones want the paper's.

y is the side that s asks for. λ is 0 in the paper: the preference alone is as content when both sides become unlikely, one more
than the other, and so spends the fluency of texts. The cross-entropy beside it is Pang et al. 2024's,
https://arxiv.org/abs/2404.19733, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerkit.errors import InputError
from steerkit.finetune import frozen, optimise
from steerkit.models import HookedModel
from steerkit.steering.edits import Add
from steerkit.steering.methods.base import register
from steerkit.steering.methods.below import Below
from steerkit.steering.methods.learning import (
    PairExample,
    Trained,
    detached,
    preference,
    sides_of,
)
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector


@register
@dataclass(frozen=True)
class BiPO(Trained):
    """One vector a site, trained on preferences in both directions."""

    beta: float = 0.5
    """β: the smaller, the further the model may move from itself."""
    likelihood: float = 0.0
    """λ, of a cross-entropy in nats a token; 20 keeps the built-in model's texts fluent."""
    lr: float = 0.05
    epochs: float = 4
    schedule: str = "cosine"
    weight_decay: float = 0.01
    name: ClassVar[str] = "bipo"

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        if not self.beta > 0:
            raise InputError(f"beta is {self.beta}; it must be positive.")
        examples = self.examples(model, pairs, preferences=True)
        weigh = self.weigh()
        vectors = {
            site: torch.zeros(model.site(site).width, device=model.device, requires_grad=True)
            for site in sites
        }
        below = Below.of(model, sides_of(examples), sites)
        generator = torch.Generator().manual_seed(self.seed)
        provenance = self.provenance(model, pairs, sites)

        def make() -> SteeringVector:
            return SteeringVector(tuple(Add(site, v) for site, v in vectors.items()), provenance)

        def loss(batch: list[PairExample]) -> torch.Tensor:
            signs = 2.0 * torch.randint(0, 2, (len(batch),), generator=generator) - 1
            return preference(
                model,
                make,
                batch,
                beta=self.beta,
                signs=signs,
                below=below,
                weigh=weigh,
                likelihood=self.likelihood,
            )

        with frozen(model):
            optimise(vectors.values(), examples, loss, self, title=self.name, quiet=self.quiet)
        return detached(make())
