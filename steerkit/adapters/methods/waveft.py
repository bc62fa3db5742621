"""WaveFT: a change with few wavelet coefficients.

    W' = W + s DWT⁻¹(C),   C with `entries` trained places drawn from the seed;   C = 0 at first

Bilican et al. 2025, https://arxiv.org/abs/2505.12532. Haar wavelets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steerkit.adapters.base import register
from steerkit.adapters.methods.fourierft import FourierFT


@register
@dataclass(frozen=True)
class WaveFT(FourierFT):
    """A change with few wavelet coefficients."""

    entries: int = 2592
    """Trained coefficients in each module."""
    scale: float = 25.0

    name: ClassVar[str] = "waveft"
    paper: ClassVar[str] = "Bilican et al. 2025, https://arxiv.org/abs/2505.12532"
    equation: ClassVar[str] = "W' = W + s DWT⁻¹(C), C sparse"
    hypothesis: ClassVar[str] = "The change of a weight is sparse in scale and place at once."
    config: ClassVar[str] = "WaveFTConfig"
