"""Matryoshka BatchTopK sparse autoencoder: dictionaries within dictionaries.

    f as in `batch_topk`;  x̂_m = f_1…m W_dec,1…m + b_dec  for prefixes m of the latents
    loss = mean over m of ‖x - x̂_m‖² + AuxK

Bussmann et al. 2025, https://arxiv.org/abs/2503.17547. The first latents must reconstruct alone, so they stay general instead of
being split up by later, more special ones. The paper sums over prefixes; the mean keeps the loss in the units of the other
architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sae.architectures.base import SAE
from sae.architectures.batch_topk import BatchTopK, BatchTopKSAE
from sae.architectures.topk import Entries
from steerkit.errors import InputError


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose prefixes are dictionaries of their own."""

    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Sizes of the inner dictionaries, as shares of d_sae, rising; the whole one is always the last."""

    name: ClassVar[str] = "matryoshka"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # a list, when it comes from a file
        sizes = self.sizes()
        if any(not 0 < share < 1 for share in self.prefixes) or sizes != sorted(set(sizes)) or not sizes[0]:
            raise InputError(
                f"prefixes is {self.prefixes}; they are rising shares of d_sae between 0 and 1, a latent or more apart."
            )

    def sizes(self) -> list[int]:
        """Latents of each dictionary, the whole one last."""
        return [*(round(share * self.d_sae) for share in self.prefixes), self.d_sae]

    def build(self, d_in: int) -> SAE:
        return MatryoshkaSAE(self, d_in)


class MatryoshkaSAE(BatchTopKSAE):
    """See the module."""

    def __init__(self, config: Matryoshka, d_in: int) -> None:
        super().__init__(config, d_in)
        self.sizes = config.sizes()

    def choose(self, parts: Parts) -> list[Entries]:
        [(rows, columns, values)] = super().choose(parts)
        group = torch.bucketize(columns, torch.tensor(self.sizes, device=columns.device), right=True)
        return [tuple(part[group == i] for part in (rows, columns, values)) for i in range(len(self.sizes))]  # type: ignore[misc]
