"""Diff pruning: a change of every weight, most of which training switches off.

    W' = W + z ∘ w,   z = clamp(s (ζ - γ) + γ, 0, 1),   s = σ(log u - log(1 - u) + a),   u uniform in training, 1/2 after it
    loss + λ Σ P(z ≠ 0),   P(z ≠ 0) = σ(a - log(-γ/ζ))                                  (hard concrete gates, Louizos et al. 2018)

Guo, Rush and Kim 2021, https://arxiv.org/abs/2012.07463; the gates: https://arxiv.org/abs/1712.01312. γ = -1.5, ζ = 1.5,
λ = 1.25e-7. w and a are each as large as W. When a share `prune_at` of the steps is done, `project` keeps the greatest |z w| of all
modules together, the share `kept` of them, and closes the other gates for good; what is left is trained on. It is done again at the
end, lest the weights that were best on validation be older. Who trains without steerkit's trainer calls `method.project(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError

LOW, HIGH = -1.5, 1.5
"""γ and ζ."""
SHUT = 100.0
"""|a| at which no u opens or closes a gate, and no gradient comes through."""


@register
@dataclass(frozen=True)
class DiffPruning(EditMethod):
    """A sparse change."""

    kept: float = 0.005
    """Share of all weights that is changed in the end."""
    prune_at: float = 0.8
    """Share of the steps after which the others are dropped."""
    l0: float = 1.25e-7
    """λ."""
    gate: float = 5.0
    """a at the start: nearly all gates open."""
    gate_lr: float = 0.1
    """Learning rate of a."""

    name: ClassVar[str] = "diff_pruning"
    paper: ClassVar[str] = "Guo, Rush and Kim 2021, https://arxiv.org/abs/2012.07463"
    equation: ClassVar[str] = "W' = W + z ∘ w, z a hard concrete gate for every weight"
    hypothesis: ClassVar[str] = (
        "Few single weights have to change, anywhere: the change is sparse, not low-rank."
    )
    family: ClassVar[str] = "sparse"
    size: ClassVar[str] = ""
    lr: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        for name in ("kept", "prune_at"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, above 0 and up to 1.")

    def edit(self, target: Target) -> Edit:
        return _DiffPruning(target, self)

    def count_at(self, slot: Slot) -> int:
        return 2 * slot.d_out * slot.d_in

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        edits = _edits(model)
        return [
            {"params": [edit.w for edit in edits], "lr": lr, "weight_decay": weight_decay},
            {"params": [edit.a for edit in edits], "lr": self.gate_lr, "weight_decay": 0.0},
        ]

    def after_step(self, model: nn.Module, step: int, n_steps: int) -> None:
        if step + 1 == max(1, round(self.prune_at * n_steps)):
            self.project(model)

    def finish(self, model: nn.Module) -> None:
        self.project(model)

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Keep the greatest changes, the share `kept` of all, and no others."""
        edits = _edits(model)
        sizes = torch.cat([edit.change().abs().flatten().cpu() for edit in edits])
        greatest = torch.zeros(len(sizes), dtype=torch.bool)
        greatest[sizes.topk(max(1, int(self.kept * len(sizes)))).indices] = True
        for edit, kept in zip(edits, greatest.split([edit.w.numel() for edit in edits])):
            edit.keep(kept.view_as(edit.w).to(edit.w.device))


def _edits(model: nn.Module) -> Sequence[_DiffPruning]:
    return [module for module in model.modules() if isinstance(module, _DiffPruning)]


class _DiffPruning(Edit):
    def __init__(self, target: Target, config: DiffPruning) -> None:
        super().__init__()
        self.l0 = config.l0
        self.w = nn.Parameter(torch.zeros(target.d_out, target.d_in))
        self.a = nn.Parameter(torch.full((target.d_out, target.d_in), config.gate))

    def gates(self, drawn: bool = False) -> Float[Tensor, "d_out d_in"]:
        """z: with u drawn, or of u = 1/2."""
        u = torch.empty_like(self.a).uniform_(1e-6, 1 - 1e-6) if drawn else None
        return _Gates.apply(self.a, u)

    def change(self, drawn: bool = False) -> Float[Tensor, "d_out d_in"]:
        """z ∘ w."""
        return self.gates(drawn) * self.w

    def keep(self, kept: Bool[Tensor, "d_out d_in"]) -> None:
        """These changes as they are, their gates open for good; the others shut."""
        self.w.copy_(self.change() * kept)
        self.a.copy_(torch.where(kept, SHUT, -SHUT))

    def penalty(self) -> Tensor:
        return self.l0 * (self.a - math.log(-LOW / HIGH)).sigmoid().sum()

    def folded(self, weight: Float[Tensor, "d_out d_in"], n_tokens: int) -> Tensor:
        return weight + self.change(self.training)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + F.linear(x.to(self.w.dtype), self.change(self.training)).to(y.dtype)

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return self.change()


class _Gates(torch.autograd.Function):
    """z of a and u, with few arrays as large as the weight: s = u / (u + (1 - u) e⁻ᵃ)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor | None) -> Tensor:
        s = a.sigmoid() if u is None else u / a.neg().exp_().mul_(1 - u).add_(u)
        z = s.mul(HIGH - LOW).add_(LOW).clamp_(0, 1)
        slope = s.addcmul_(s, s, value=-1).mul_(HIGH - LOW).mul_((z > 0).logical_and_(z < 1))
        ctx.save_for_backward(slope)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None
