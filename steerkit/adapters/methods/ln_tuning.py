"""LN tuning: the gains and biases of the norms.

    norm'(x) = γ' · x̂ + β',   from γ, β

Zhao et al. 2023, https://arxiv.org/abs/2312.11420. All norms inside the blocks, or of some layers; the norm after the last block
too where no layers are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.slots import Slot, choose, is_norm, layer_of
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class LNTuning(AdapterMethod):
    """The gains and biases of the norms."""

    name: ClassVar[str] = "ln_tuning"
    paper: ClassVar[str] = "Zhao et al. 2023, https://arxiv.org/abs/2312.11420"
    equation: ClassVar[str] = "norm'(x) = γ' x̂ + β'"
    hypothesis: ClassVar[str] = "What a task needs is there: each feature only has to be louder or quieter."
    family: ClassVar[str] = "magnitude"
    linear: ClassVar[bool] = False
    size: ClassVar[str] = ""
    modules: ClassVar[str | tuple[str, ...]] = "norms"
    lr: ClassVar[float] = 1e-2

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if modules not in (None, "norms"):
            raise InputError(
                f"ln_tuning goes into norms, not {modules!r}: leave modules away, choose layers."
            )
        kept = {slot.layer for slot in choose(model, "all", layers)}
        found = [
            Slot(path, layer, "norm", sum(p.numel() for p in norm.parameters()), 0)
            for path, norm in model.model.named_modules()
            if is_norm(norm) and ((layer := layer_of(path)) in kept or (layer < 0 and layers is None))
        ]
        if not found:
            raise InputError(f"{model.name} has no norms with gains there: ln_tuning has nothing to train.")
        return found

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import LNTuningConfig

        return LNTuningConfig(target_modules=self.paths(slots))

    def count_at(self, slot: Slot) -> int:
        return slot.d_out
