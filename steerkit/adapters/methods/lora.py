"""LoRA: a low-rank change.

    W' = W + (α/r) B A,   B (d_out, r) = 0 and A (r, d_in) uniform at first

Hu et al. 2021, https://arxiv.org/abs/2106.09685. α = 2 r by default. Of a fused map some rows alone can be adapted: the others'
rows of B stay 0. `ranks` gives some modules another rank. Variants that differ by a word are here too:

    rslora            scale α/√r, so that a great r learns too: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    lora_plus         B learns 16 times as fast as A: Hayou et al. 2024, https://arxiv.org/abs/2402.12354
    lora_orthogonal   A and B at random with B A = 0, even ranks: https://datta0.github.io/posts/rethink-lora-init

peft's starts from data (EVA, CorDA, LoRA-GA) need texts before there is an adapter, and are left to peft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.rows import hold_rows
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class LoRA(AdapterMethod):
    """A low-rank change."""

    rank: int = 8
    alpha: int | None = None
    """Numerator of the scale; 2 r by default."""
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Kind (`q`, `down`), path or end of a path -> the rank there; the first that fits counts."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2106.09685"
    equation: ClassVar[str] = "W' = W + (α/r) B A"
    hypothesis: ClassVar[str] = "What fine-tuning changes has low rank."
    family: ClassVar[str] = "low-rank"
    lr: ClassVar[float] = 2e-3
    options: ClassVar[Mapping[str, Any]] = {}
    """What a variant tells peft."""

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import LoraConfig

        for name in self.ranks:
            if not any(_is(slot, name) for slot in slots):
                raise InputError(
                    f"ranks names {name!r}, which is none of the modules that {self.name} goes to."
                )
        for slot in slots:
            check_rank(self.name, self.rank_at(slot), [slot])
        return LoraConfig(
            r=self.rank,
            lora_alpha=self._alpha(self.rank),
            lora_dropout=self.dropout,
            rank_pattern={slot.path: self.rank_at(slot) for slot in slots if self.ranks},
            alpha_pattern={slot.path: self._alpha(self.rank_at(slot)) for slot in slots if self.ranks},
            target_modules=self.paths(slots),
            **self.options,
        )

    def rank_at(self, slot: Slot) -> int:
        """The rank there."""
        return next((rank for name, rank in self.ranks.items() if _is(slot, name)), self.rank)

    def _alpha(self, rank: int) -> int:
        return self.alpha if self.alpha is not None else 2 * rank

    def paths(self, slots: Sequence[Slot]) -> list[str]:
        return [slot.path for slot in slots]

    def hold(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        return sum(hold_rows(_with_rows(model, slot), slot) for slot in slots if slot.rows)

    def count_at(self, slot: Slot) -> int:
        return self.rank_at(slot) * (slot.d_in + slot.n_rows)


def _is(slot: Slot, name: str) -> bool:
    return slot.kind == name or f".{slot.path}".endswith(f".{name}")


def _with_rows(model: nn.Module, slot: Slot) -> list[Tensor]:
    """The trained tensors of a layer that have a row for each output."""
    layer: Any = model.get_submodule(f"base_model.model.{slot.path}")
    return [part.weight for kind in (layer.lora_B, layer.lora_magnitude_vector) for part in kind.values()]


@register
@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA at a scale that does not fade with the rank."""

    name: ClassVar[str] = "rslora"
    paper: ClassVar[str] = "Kalajdzievski 2023, https://arxiv.org/abs/2312.03732"
    equation: ClassVar[str] = "W' = W + (α/√r) B A"
    hypothesis: ClassVar[str] = "More rank helps once its scale does not shrink with it."
    lr: ClassVar[float] = 1e-3
    options: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


@register
@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA whose B learns faster than its A."""

    ratio: float = 16.0
    """Of B's learning rate to A's."""

    name: ClassVar[str] = "lora_plus"
    paper: ClassVar[str] = "Hayou et al. 2024, https://arxiv.org/abs/2402.12354"
    equation: ClassVar[str] = "W' = W + (α/r) B A, lr_B = ratio · lr_A"
    hypothesis: ClassVar[str] = "In a wide model B must move faster than A for features to be learned."
    lr: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise InputError(f"ratio is {self.ratio}; it must be positive.")

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        slow = [p for name, p in trained if "lora_B" not in name]
        fast = [p for name, p in trained if "lora_B" in name]
        return [
            {"params": slow, "lr": lr, "weight_decay": weight_decay},
            {"params": fast, "lr": self.ratio * lr, "weight_decay": weight_decay},
        ]


@register
@dataclass(frozen=True)
class OrthogonalLoRA(LoRA):
    """LoRA from random factors whose product is zero."""

    name: ClassVar[str] = "lora_orthogonal"
    paper: ClassVar[str] = "Datta 2024, https://datta0.github.io/posts/rethink-lora-init"
    equation: ClassVar[str] = "W' = W + (α/r) B A, rows of A orthogonal to columns of B inside the rank"
    hypothesis: ClassVar[str] = "Both factors should learn from the first step on."
    identity: ClassVar[str] = "rounding"
    options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "orthogonal"}

    def __post_init__(self) -> None:
        odd = [rank for rank in (self.rank, *self.ranks.values()) if rank % 2]
        if odd:
            raise InputError(f"rank is {odd[0]}; lora_orthogonal takes even ones.")

    def paths(self, slots: Sequence[Slot]) -> list[str]:
        return AdapterMethod.paths(self, slots)
