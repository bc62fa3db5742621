"""WaveFT: a change with few wavelet coefficients.

    W' = W + s DWT⁻¹(C),   C with `entries` trained places drawn from the seed;   C = 0 at first

Bilican et al. 2025, https://arxiv.org/abs/2505.12532. Haar wavelets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class WaveFT(AdapterMethod):
    """A change with few wavelet coefficients."""

    entries: int = 2592
    """Trained coefficients in each module."""
    scale: float = 25.0

    name: ClassVar[str] = "waveft"
    paper: ClassVar[str] = "Bilican et al. 2025, https://arxiv.org/abs/2505.12532"
    equation: ClassVar[str] = "W' = W + s DWT⁻¹(C), C sparse"
    hypothesis: ClassVar[str] = "The change of a weight is sparse in scale and place at once."
    family: ClassVar[str] = "fixed-basis"
    size: ClassVar[str] = "entries"
    lr: ClassVar[float] = 0.03

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import WaveFTConfig

        for slot in slots:
            if not 1 <= self.entries <= slot.d_out * slot.d_in:
                raise InputError(
                    f"entries is {self.entries}; {slot.path} has {slot.d_out * slot.d_in}: take 1 or more, not above."
                )
        return WaveFTConfig(
            n_frequency=self.entries,
            scaling=self.scale,
            random_loc_seed=seed,
            init_weights=True,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.entries
