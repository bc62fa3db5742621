"""PiSSA: train the greatest singular directions themselves.

    W' = (W - B_0 A_0) + B A,   B = B_0 = U_r √S_r,  A = A_0 = √S_r V_rᵀ at first

Meng et al. 2024, https://arxiv.org/abs/2404.02948; the scale is 1. `olora` takes B_0 A_0 = Q_r R_r of W's QR decomposition
instead (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775). peft subtracts B_0 A_0 from the base's own weights, which are given
back when the adapter is disabled or removed. It is saved as what it is for the base as it was: a LoRA of rank 2 r,

    ΔW = B A - B_0 A_0 = [B, -B_0] [A; A_0]

which any peft loads; `adapters.load` makes the adapter of rank r of it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerkit.adapters.base import AdapterMethod, register
from steerkit.adapters.methods.lora import LoRA
from steerkit.adapters.sizes import check_upright
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel

_WEIGHTS = "adapter_model.safetensors"


@register
@dataclass(frozen=True)
class PiSSA(LoRA):
    """Train the greatest singular directions themselves."""

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = "Meng et al. 2024, https://arxiv.org/abs/2404.02948"
    equation: ClassVar[str] = "W' = W - B_0 A_0 + B A, B_0 A_0 = U_r S_r V_rᵀ"
    hypothesis: ClassVar[str] = "The greatest singular directions are what must change: begin there."
    family: ClassVar[str] = "singular"
    identity: ClassVar[str] = "rounding"
    mutates_base: ClassVar[bool] = True
    lr: ClassVar[float] = 5e-4
    options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "pissa"}

    def _alpha(self, rank: int) -> int:
        return self.alpha if self.alpha is not None else rank

    def paths(self, slots: Sequence[Slot]) -> list[str]:
        return AdapterMethod.paths(self, slots)

    def portable(self, folder: Path, first: Mapping[str, Tensor]) -> None:
        from peft import LoraConfig
        from safetensors.torch import load_file, save_file

        config: Any = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights = True
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        config.rank_pattern = {path: 2 * rank for path, rank in config.rank_pattern.items()}
        config.alpha_pattern = {path: 2 * alpha for path, alpha in config.alpha_pattern.items()}
        state = load_file(folder / _WEIGHTS)
        for name, value in state.items():
            start = first[name].to(value)
            both = [value, start] if "lora_A" in name else [value, -start]
            state[name] = torch.cat(both, dim=0 if "lora_A" in name else 1)
        config.save_pretrained(str(folder))
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})

    def unpacked(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value[: len(value) // 2]
            if "lora_A" in name
            else value[:, : value.shape[1] // 2].contiguous()
            for name, value in state.items()
        }


@register
@dataclass(frozen=True)
class OLoRA(PiSSA):
    """Train an orthonormal basis of the first columns' span."""

    name: ClassVar[str] = "olora"
    paper: ClassVar[str] = "Büyükakyüz 2024, https://arxiv.org/abs/2406.01775"
    equation: ClassVar[str] = "W' = W - Q_r R_r + B A, B A = Q_r R_r at first"
    hypothesis: ClassVar[str] = "Factors that start orthonormal, and from W, learn faster than random ones."
    family: ClassVar[str] = "low-rank"
    options: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "olora"}

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        check_upright(self.name, model, slots)
        return super().peft_config(model, slots, seed)
