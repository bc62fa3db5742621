"""BatchTopK sparse autoencoder.

    f = the k · n largest of ReLU((x - b_dec) W_enc + b_enc) over a batch of n tokens;  x̂ and loss as in `topk`
    inference: f · 1[f > θ],  one θ for all latents

Bussmann et al. 2024, https://arxiv.org/abs/2412.06410. Easy tokens may have few latents and hard ones many. θ is the mean, over the
last steps of training, of the smallest activation that a batch kept; with it the SAE is a JumpReLU one, and saved as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures.base import SAE
from sae.architectures.topk import Entries, Parts, TopK, TopKSAE
from steerkit import distributed

_MEMORY = 0.98
"""Share of the smallest kept activation's running mean that a step keeps: some fifty steps."""


@dataclass(frozen=True)
class BatchTopK(TopK):
    """The k largest pre-activations a token, counted over the batch, are its latents."""

    name: ClassVar[str] = "batch_topk"

    def build(self, d_in: int) -> SAE:
        return BatchTopKSAE(self, d_in)


class BatchTopKSAE(TopKSAE):
    """See the module. Until `finish` it encodes as in training: what a token's latents are depends on its batch."""

    smallest: Tensor
    """Running mean of the smallest activation kept, (2,): weighted sum and weight."""

    def __init__(self, config: TopK, d_in: int) -> None:
        super().__init__(config, d_in)
        self.register_buffer("smallest", torch.zeros(2))
        self._usual = 0.0
        """About what is kept starts at: where to look first, which changes nothing of what is found."""

    @property
    def needs_whole_batch(self) -> bool:
        return True

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre.relu_()
        flat = pre.flatten(0, -2)
        rows, columns, values = self._largest([(0, flat)])
        return torch.zeros_like(flat).index_put_((rows, columns), values.relu()).view_as(pre)

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"] | None:
        return None if self.threshold is None else super().margins(x)

    def choose(self, parts: Parts) -> list[Entries]:
        ranks = distributed.world_size()
        rows, columns, values = self._largest(parts, ranks)
        with torch.no_grad():
            least = distributed.smallest(
                values.detach().amin() if len(values) else values.new_tensor(torch.inf)
            )
            if least.isfinite():
                self._usual = float(least)
                self.smallest.mul_(_MEMORY).add_(
                    torch.stack([least, torch.ones_like(least)]).to(self.smallest)
                )
        return [(rows, columns, values)]

    def _largest(self, parts: Parts, ranks: int = 1) -> Entries:
        """The k · n largest positive entries, and what equals the last of them, in the order of rows; of all processes' batches
        together, if there are several `ranks`.

        Equal tokens (the first of a text, often) so have equal latents. Entries not far below the usual limit are looked at first.
        """
        for floor in (0.8 * self._usual, 0.0):
            n, found = 0, []
            for first, pre in parts:
                where = (pre.detach().reshape(-1) > floor).nonzero().squeeze(1)
                found.append((where + first * self.d_sae, pre.reshape(-1)[where]))
                n += len(pre)
            places, values = (torch.cat(sides) for sides in zip(*found))
            wanted, n_found = self.k * n * ranks, len(places)
            if ranks > 1:
                n_found = int(distributed.add_up(torch.tensor(n_found, device=places.device)))
            if n_found >= wanted:
                break
        if n_found > wanted:
            highest = values.detach()
            if ranks > 1:
                highest = distributed.gather(highest.topk(min(wanted, len(highest)), sorted=False).values)
            kept = (values.detach() >= highest.topk(wanted, sorted=False).values.amin()).nonzero().squeeze(1)
            places, values = places[kept], values[kept]
        rows = torch.div(places, self.d_sae, rounding_mode="floor")
        return rows, places - rows * self.d_sae, values

    @torch.no_grad()
    def finish(self) -> None:
        self.threshold = (
            (self.smallest[0] / self.smallest[1].clamp_min(1e-12)).expand(self.d_sae).clone().to(self.W_dec)
        )
