"""Guided sparse autoencoder (G-SAE): the first latents are taught what they stand for.

    f and x̂ as in `topk`;  p_c = σ(π_c),  π the pre-activations, c = 1 … n_labels
    loss = ‖x - x̂‖² + AuxK + γ d_in Σ_c BCE_s(p_c, y_c),    BCE_s(p, y) = -s y log p - (1 - y) log(1 - p)

Härle et al. 2025, https://arxiv.org/abs/2506.19382. y_c in [0, 1] is the token's label, NaN where it is unknown, which is left
out. A guided latent's pre-activation is taught before TopK chooses, also on tokens on which it is not chosen. The paper sets the
error, as a share of ‖x‖², beside an unweighted BCE: with mean ‖x‖² = d_in that is γ = `guidance` = 1, the default.

Here latents are ReLU ones, as everywhere in this package, and activations are scaled by one number; the paper puts a sigmoid on the
latents that are kept, and normalises token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.architectures.base import SAE, Step, Terms, gradient
from sae.architectures.topk import TopK, TopKSAE
from steerkit.errors import InputError


@dataclass(frozen=True)
class Guided(TopK):
    """TopK whose first latents are guided by labels, one each."""

    labels: tuple[str, ...] = ()  # type: ignore[misc]
    """What the first latents are taught, such as `("mood=happy", "weather=rainy")`: column (or attribute of StoryWorld) = value."""
    guidance: float = 1.0
    """γ, the weight of the labels' cross-entropy beside the squared error as a share of ‖x‖²."""
    cond_loss_scaling: float = 1.0
    """s multiplies the gradient of positive labels (y = 1), which is to weight their cross-entropy by s; that of negative ones
    stays. Above 1 for labels that are rare. (In the authors' code 0 turns guidance off: that is `guidance=0` here.)"""

    name: ClassVar[str] = "guided"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))  # a list, when it comes from a file
        if not 0 < len(self.labels) <= self.d_sae:
            raise InputError(
                f"A guided SAE of {self.d_sae} latents takes 1 to {self.d_sae} labels, not {len(self.labels)}: "
                "name some, such as mood=happy (--labels)."
            )
        if len(set(self.labels)) < len(self.labels):
            raise InputError(f"A label is named twice: {', '.join(self.labels)}.")
        if self.guidance < 0:
            raise InputError(f"guidance is {self.guidance}; it must be 0 or more.")
        if not self.cond_loss_scaling > 0:
            raise InputError(f"cond_loss_scaling is {self.cond_loss_scaling}; it must be positive.")

    def build(self, d_in: int) -> SAE:
        return GuidedSAE(self, d_in)


class GuidedSAE(TopKSAE):
    """See the module."""

    def __init__(self, config: Guided, d_in: int) -> None:
        super().__init__(config, d_in)
        self.labels, self.n_labels = config.labels, len(config.labels)
        self.weight = config.guidance * d_in
        self.positive = config.cond_loss_scaling

    def logits(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_labels"]:
        """Pre-activations of the guided latents: log-odds of their labels."""
        self._check_width(x)
        return self.encoded(x) @ self.W_enc[:, : self.n_labels] + self.b_enc[: self.n_labels]

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        return super().loss(x, terms) + self._guidance(self.logits(x), terms)

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        step = super().gradients(x, terms)
        if terms.labels is None:
            return step
        guided = slice(self.n_labels)
        logits = self.logits(x)
        step.loss += self._guidance(logits, terms)
        labels, known = terms.labels.nan_to_num(), ~terms.labels.isnan()
        wanted = self.positive * labels
        upstream = torch.sigmoid(logits).mul_(1 - labels + wanted).sub_(wanted).mul_(known)
        upstream.mul_(self.weight / len(x))
        total = upstream.sum(0)
        gradient(self.W_enc)[:, guided].addmm_(self.encoded(x).T, upstream)
        gradient(self.b_enc)[guided].add_(total)
        gradient(self.b_dec).sub_(self.W_enc[:, guided] @ total)
        return step

    def _guidance(self, logits: Float[Tensor, "n n_labels"], terms: Terms) -> Tensor:
        if terms.labels is None:
            return logits.new_zeros(())
        losses = F.binary_cross_entropy_with_logits(
            logits,
            terms.labels.nan_to_num(),
            pos_weight=logits.new_full((self.n_labels,), self.positive),
            reduction="none",
        )
        return self.weight * losses.masked_fill(terms.labels.isnan(), 0.0).sum(1).mean()
