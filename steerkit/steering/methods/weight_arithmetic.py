"""Contrastive weight arithmetic: the difference of two fine-tunes, as a low-rank change of the weights.

    θ+ = θ + (α/r) B+ A+  trained on the positive sides,  θ- likewise on the negative ones
    w = θ+ - θ- = (α/r) [B+  -B-] [A+; A-],      θ ← θ + s w,  s from -2 to 2 and beyond

Fierro & Roger 2025, https://arxiv.org/abs/2511.05408 (LoRA of all modules, r 32, α 16; task vectors: Ilharco et al. 2023,
https://arxiv.org/abs/2212.04089). w is kept as a change of rank 2r and never made dense; `contrast=False` is the positive fine-tune
alone, a task vector. Cosines between such vectors (`vector.cosine`) say whether one fine-tune contains another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit import finetune
from steerkit.errors import InputError
from steerkit.finetune import Example, frozen, optimise
from steerkit.models import HookedModel
from steerkit.sites import weight_of
from steerkit.steering.edits import WeightDelta
from steerkit.steering.methods.base import register
from steerkit.steering.methods.learning import Trained, detached
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where


@register
@dataclass(frozen=True)
class WeightArithmetic(Trained):
    """Low-rank changes of every linear module of every block; sites are not used."""

    rank: int = 8
    """r of each fine-tune; w has 2r."""
    alpha: float = 16.0
    """α: the change is scaled by α/r."""
    contrast: bool = True
    """Whether the negative fine-tune is subtracted."""
    lr: float = 2e-3
    epochs: float = 2
    name: ClassVar[str] = "weight_arithmetic"
    of_sites: ClassVar[bool] = False

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str] = ()) -> SteeringVector:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it must be at least 1.")
        modules = list(model.linear_modules())
        if not modules:
            raise InputError(
                f"{model.name} has no linear modules in its blocks to change: weights are tensors of its own."
            )
        examples = self.examples(model, pairs)
        sides = [[e.positive for e in examples]]
        if self.contrast:
            sides.append([e.negative for e in examples])
        tuned = [self._tune(model, modules, side) for side in sides]
        edits = []
        for path in modules:
            A = torch.cat([one[path][0] for one in tuned])
            B = torch.cat([sign * one[path][1] for sign, one in zip((1, -1), tuned)], dim=1)
            edits.append(WeightDelta(path, A, B * (self.alpha / self.rank)))
        vector = SteeringVector(tuple(edits), self.provenance(model, pairs, []), Where.every_token())
        return detached(vector)

    def _tune(
        self, model: HookedModel, modules: Sequence[str], examples: Sequence[Example]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Path -> (A, B) of the fine-tune on one side."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for path in modules:
            d_out, d_in = weight_of(model.model.get_submodule(path)).shape
            bound = 1 / math.sqrt(d_in)
            A = torch.empty(self.rank, d_in).uniform_(-bound, bound, generator=generator)
            B = torch.zeros(d_out, self.rank)
            tensors[path] = tuple(t.to(model.device).requires_grad_() for t in (A, B))
        scale = self.alpha / self.rank
        everywhere, reduction = Where.every_token(), self.weigh() or finetune.mean

        def loss(batch: list[Example]) -> Tensor:
            edits = tuple(WeightDelta(path, A, B, scale=scale) for path, (A, B) in tensors.items())
            with model.steer(SteeringVector(edits), where=everywhere):
                return finetune.cross_entropy(model, batch, reduction)

        with frozen(model):
            flat = [t for pair in tensors.values() for t in pair]
            optimise(flat, examples, loss, self, title=self.name, quiet=self.quiet)
        return tensors  # type: ignore[return-value]
