"""Trainable tokens: some rows of the embedding.

    E'[t] = e_t for the chosen tokens t,   e_t = E[t] at first

As in peft, https://huggingface.co/docs/peft/package_reference/trainable_tokens. Where the head is tied to the embedding, its rows
change too.
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
class TrainableTokens(AdapterMethod):
    """Some rows of the embedding."""

    tokens: tuple[int, ...] = ()
    """Token ids; they must be given."""

    name: ClassVar[str] = "trainable_tokens"
    paper: ClassVar[str] = "https://huggingface.co/docs/peft/package_reference/trainable_tokens"
    equation: ClassVar[str] = "E'[t] = e_t"
    hypothesis: ClassVar[str] = "The model can do it: only some words do not mean yet what they should."
    family: ClassVar[str] = "sparse"
    linear: ClassVar[bool] = False
    size: ClassVar[str] = ""
    modules: ClassVar[str | tuple[str, ...]] = "embedding"
    lr: ClassVar[float] = 1e-2

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if modules not in (None, "embedding") or layers is not None:
            raise InputError("trainable_tokens goes into the embedding: leave modules and layers away.")
        table: Any = model.trunk.get_input_embeddings()  # type: ignore[operator]
        path = next(path for path, module in model.model.named_modules() if module is table)
        return [Slot(path, -1, "embedding", *table.weight.shape)]

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import TrainableTokensConfig

        outside = [token for token in self.tokens if not 0 <= token < model.d_vocab]
        if not self.tokens or outside:
            raise InputError(
                f"tokens must be ids from 0 to {model.d_vocab - 1}"
                + (f"; {outside[0]} is not." if outside else ", at least one.")
            )
        return TrainableTokensConfig(token_indices=sorted(set(self.tokens)), target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return len(set(self.tokens)) * slot.d_in
