"""Low-rank adaptation (LoRA) as a steering vector: a fine-tune on the positive sides, weakened or exaggerated in the weights.

    θ ← θ + s (α/r) B A,   A, B trained on the positive sides; s = 0 is the model as it is, s = 1 the fine-tune

Hu et al. 2021, https://arxiv.org/abs/2106.09685; between and beyond the two: Wortsman et al. 2022, https://arxiv.org/abs/2109.01903.
It is the positive half of weight arithmetic, with the same settings: what is subtracted there, of the texts that both sides have in
common, stays in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steerkit.steering.methods.base import register
from steerkit.steering.methods.weight_arithmetic import WeightArithmetic


@register
@dataclass(frozen=True)
class LoRA(WeightArithmetic):
    """A low-rank change of every linear module of every block; sites are not used."""

    contrast: bool = False
    name: ClassVar[str] = "lora"
