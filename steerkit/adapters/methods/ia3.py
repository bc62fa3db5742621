"""IA3: gains on keys, values and what the feed-forward layer writes from.

    k' = g_k ∘ k,   v' = g_v ∘ v,   W_down' = W_down diag(g_ff);   all g = 1 at first

Liu et al. 2022, https://arxiv.org/abs/2205.05638. A gain is on a module's outputs, for `down` on its inputs. Of a fused map some
rows alone can be adapted: the others' gains stay 1. Weight decay would draw gains to 0, not to 1, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.rows import hold_rows
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class IA3(AdapterMethod):
    """Gains on keys, values and what the feed-forward layer writes from."""

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "Liu et al. 2022, https://arxiv.org/abs/2205.05638"
    equation: ClassVar[str] = "W' = diag(g) W (k, v), W diag(g) (down)"
    hypothesis: ClassVar[str] = "Features are there: a task only makes some louder and others quieter."
    family: ClassVar[str] = "magnitude"
    size: ClassVar[str] = ""
    modules: ClassVar[str | tuple[str, ...]] = ("k", "v", "down")
    lr: ClassVar[float] = 1e-2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import IA3Config

        return IA3Config(
            target_modules=[slot.path for slot in slots],
            feedforward_modules=[slot.path for slot in slots if slot.kind == "down"],
        )

    def hold(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        layers: dict[str, Any] = {
            slot.path: model.get_submodule(f"base_model.model.{slot.path}") for slot in slots
        }
        return sum(hold_rows(layers[slot.path].ia3_l.values(), slot) for slot in slots if slot.rows)

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "weight_decay": 0.0}]

    def count_at(self, slot: Slot) -> int:
        return slot.d_in if slot.kind == "down" else slot.n_rows
