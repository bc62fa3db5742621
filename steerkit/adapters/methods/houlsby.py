"""Bottleneck adapters (Houlsby): a small network behind attention and behind the FFN.

    y' = y + U f(D y + b_D) + b_U,    y the output of attention's and of the FFN's output projection, before the residual sum

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751: width 8 to 256 (64 on average), f = GELU, learning rates 3e-5
to 3e-3. They start near the identity; here U = 0 makes it exact. With `modules="down"` there is one behind the FFN
alone, as in Pfeiffer et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.bottleneck import Bottleneck, check_bottleneck
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target


@register
@dataclass(frozen=True)
class Houlsby(EditMethod):
    """A small network behind attention and behind the FFN."""

    rank: int = 16
    """Width of the bottleneck."""
    activation: str = "gelu"
    """relu, gelu or silu."""

    name: ClassVar[str] = "houlsby"
    paper: ClassVar[str] = "Houlsby et al. 2019, https://arxiv.org/abs/1902.00751"
    equation: ClassVar[str] = "y' = y + U f(D y + b_D) + b_U"
    hypothesis: ClassVar[str] = (
        "A task needs few new features, computed nonlinearly from what each sublayer writes."
    )
    family: ClassVar[str] = "activation"
    merge: ClassVar[str] = "it is a nonlinear function of activations, no change of weights"
    linear: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ("o", "down")
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        check_bottleneck(self.rank, self.activation)

    def edit(self, target: Target) -> Edit:
        return _Houlsby(target, self)

    def count_at(self, slot: Slot) -> int:
        return 2 * slot.d_out * self.rank + self.rank + slot.d_out


class _Houlsby(Edit):
    alpha = 1.0

    def __init__(self, target: Target, config: Houlsby) -> None:
        super().__init__()
        d = target.d_out
        self.adapter = Bottleneck(d, d, config.rank, config.activation, target.generator())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + self.alpha * self.adapter(y).to(y.dtype)
