"""ReFT-r1: one direction a site that detects a concept and writes it, trained on texts that have it.

    h ← h + ā v,   ā = mean of the k largest ReLU(h_t·v) of the text,   |v| = 1
    loss = cross-entropy of the positive sides + ramp · λ · mean of the other ReLU(h_t·v)

Wu et al. 2025, https://arxiv.org/abs/2501.17148 (AxBench: k 8, λ 0.005, lr 0.01, 3 epochs, batches of 6, linear decay). The
gradient along v is taken out and v renormalised after every step. What is made adds s · (greatest activation on the positive
sides) · v at every token: strength 1 is the largest amount that the data has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerkit import finetune
from steerkit.errors import InputError
from steerkit.finetune import Example, frozen, optimise
from steerkit.models import HookedModel
from steerkit.steering.methods.base import register
from steerkit.steering.methods.learning import Trained
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector


@register
@dataclass(frozen=True)
class ReFTr1(Trained):
    """A trained direction a site."""

    k: int = 8
    """Tokens whose activations are averaged to what is written."""
    sparsity: float = 0.005
    """λ."""
    lr: float = 0.01
    epochs: float = 3
    batch_size: int = 6
    name: ClassVar[str] = "reft_r1"

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        if self.k < 1:
            raise InputError(f"k is {self.k}; it must be at least 1.")
        examples = [e.positive for e in self.examples(model, pairs)]
        reduction = self.weigh() or finetune.mean
        generator = torch.Generator().manual_seed(self.seed)
        directions = {
            site: torch.nn.functional.normalize(
                torch.randn(model.site(site).width, generator=generator), dim=0
            )
            .to(model.device)
            .requires_grad_()
            for site in sites
        }
        n_steps, step = self.steps(len(examples)), 0
        penalties: list[Tensor] = []
        counted = torch.empty(0)

        def write(v: Tensor) -> Any:
            def fn(h: Tensor) -> Tensor:
                latents = torch.relu(h.float() @ v) * counted
                k = min(self.k, latents.shape[1])
                top, where = latents.topk(k, dim=1)
                others = latents.scatter(1, where, 0.0)
                penalties.append(others.sum() / counted.sum().clamp_min(1))
                return h + (top.mean(1)[:, None, None] * v).to(h.dtype)

            return fn

        def loss(batch: list[Example]) -> Tensor:
            nonlocal step, counted
            penalties.clear()
            ids, mask = finetune.padded(model, batch)
            special = torch.tensor(sorted(model.special_ids), device=ids.device)
            counted = (mask.bool() & ~torch.isin(ids, special)).float()
            with model.hooks({site: write(v) for site, v in directions.items()}):
                found = finetune.cross_entropy(model, batch, reduction)
            step += 1
            return found + self.sparsity * min(1.0, step / n_steps) * torch.stack(penalties).sum()

        def renormalise() -> None:
            for v in directions.values():
                v.div_(v.norm())

        with frozen(model):
            optimise(
                directions.values(),
                examples,
                loss,
                self,
                before_step=lambda: _across(directions.values()),
                after_step=renormalise,
                title=self.name,
                quiet=self.quiet,
            )
        units = {site: v.detach().cpu() for site, v in directions.items()}
        largest = _largest(model, examples, units)
        for site, value in largest.items():
            if not value > 0:
                raise InputError(
                    f"The direction found at {site} is never active on the positive sides: train longer, or raise lr."
                )
        provenance = {**self.provenance(model, pairs, sites), "max_activation": largest}
        return SteeringVector.add({site: largest[site] * v for site, v in units.items()}, **provenance)


def _across(directions: Any) -> None:
    """Take from each gradient what would only change its direction's length."""
    for v in directions:
        if v.grad is not None:
            v.grad.sub_((v.grad @ v.detach()) * v.detach())


def _largest(model: HookedModel, examples: Sequence[Example], units: dict[str, Tensor]) -> dict[str, float]:
    """Site -> the greatest activation on the examples' own tokens."""
    found = dict.fromkeys(units, 0.0)
    special = torch.tensor(sorted(model.special_ids))
    with torch.inference_mode():
        for first in range(0, len(examples), 32):
            ids, mask = finetune.padded(model, examples[first : first + 32])
            own = mask.bool() & ~torch.isin(ids, special.to(ids.device))
            for site, h in model.run(ids, mask, sites=list(units)).items():
                value = (h.float() @ units[site].to(h.device))[own].max()
                found[site] = max(found[site], float(value))
    return found
