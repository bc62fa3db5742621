"""Hierarchical TopK sparse autoencoder: one for many budgets.

    f as in `topk`;  x̂_j = the j largest latents, decoded, + b_dec  for each budget j
    loss = mean over j of ‖x - x̂_j‖² + AuxK

Balagansky et al. 2025, https://arxiv.org/abs/2505.24473. Whatever number of latents is kept, up to k, they were trained to do
alone: `with_k(j)` is the SAE for another budget. The paper has every j up to k; a few, doubling, cost a fraction and say nearly
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sae.architectures.base import SAE
from sae.architectures.topk import Entries, Parts, TopK, TopKSAE, flat
from steerkit.errors import InputError


@dataclass(frozen=True)
class HierarchicalTopK(TopK):
    """TopK whose strongest latents reconstruct alone, too."""

    budgets: tuple[int, ...] | None = None
    """Numbers of latents that must do, rising, the last one k; by default k, k/2, k/4 … 1."""

    name: ClassVar[str] = "hierarchical_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        budgets = self.budgets or tuple(sorted({max(1, self.k >> i) for i in range(self.k.bit_length())}))
        object.__setattr__(self, "budgets", tuple(budgets))
        if list(budgets) != sorted(set(budgets)) or budgets[0] < 1 or budgets[-1] != self.k:
            raise InputError(f"budgets is {budgets}; they rise from 1 or more to k = {self.k}.")

    def build(self, d_in: int) -> SAE:
        return HierarchicalTopKSAE(self, d_in)

    def to_dict(self) -> dict[str, Any]:
        assert self.budgets is not None
        return {**super().to_dict(), "budgets": list(self.budgets)}


class HierarchicalTopKSAE(TopKSAE):
    """See the module."""

    def __init__(self, config: HierarchicalTopK, d_in: int) -> None:
        super().__init__(config, d_in)
        assert config.budgets is not None
        self.budgets = config.budgets

    def choose(self, parts: Parts) -> list[Entries]:
        indices, values = self._strongest(parts, sorted=True)
        starts = (0, *self.budgets[:-1])
        return [flat(indices[:, i:j], values[:, i:j]) for i, j in zip(starts, self.budgets)]

    def with_k(self, k: int) -> TopKSAE:
        """The SAE that keeps k latents, as a TopK one. InputError for more than it was trained for."""
        if not 0 < k <= self.k:
            raise InputError(f"k is {k}; this SAE was trained for 1 to {self.k} latents.")
        other = TopKSAE(TopK(self.d_sae, k), self.d_in).to(self.W_dec)
        other.load_state_dict(self.state_dict())
        other.metadata = dict(self.metadata)
        return other.eval().requires_grad_(False)
