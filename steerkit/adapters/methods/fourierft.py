"""FourierFT: a change with a sparse spectrum.

    W' = W + s Re F⁻¹(C),   C (d_out, d_in) with `entries` trained places drawn from the seed;   C = 0 at first

Gao et al. 2024, https://arxiv.org/abs/2405.03003. peft's own default starts at random, not as the base.
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
class FourierFT(AdapterMethod):
    """A change with a sparse spectrum."""

    entries: int = 1000
    """Trained coefficients in each module."""
    scale: float = 150.0

    name: ClassVar[str] = "fourierft"
    paper: ClassVar[str] = "Gao et al. 2024, https://arxiv.org/abs/2405.03003"
    equation: ClassVar[str] = "W' = W + s Re F⁻¹(C), C sparse"
    hypothesis: ClassVar[str] = "The change of a weight is compressible in the Fourier basis."
    family: ClassVar[str] = "fixed-basis"
    size: ClassVar[str] = "entries"
    lr: ClassVar[float] = 0.03
    config: ClassVar[str] = "FourierFTConfig"
    """peft's class of settings."""

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        import peft

        for slot in slots:
            if not 1 <= self.entries <= slot.d_out * slot.d_in:
                raise InputError(
                    f"entries is {self.entries}; {slot.path} has {slot.d_out * slot.d_in}: take 1 or more, not above."
                )
        return getattr(peft, self.config)(
            n_frequency=self.entries,
            scaling=self.scale,
            random_loc_seed=seed,
            init_weights=True,
            target_modules=self.paths(slots),
        )

    def count_at(self, slot: Slot) -> int:
        return self.entries
