"""QLoRA: LoRA on a base in 4 bits.

    W' = dequantise(W_NF4) + (α/r) B A,   B = 0 at first

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. The base is quantised by bitsandbytes when it is loaded:

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = HookedModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, quantization_config=config))

It starts as that quantised base, exactly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import register
from steerkit.adapters.methods.lora import LoRA
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA on a base in 4 bits."""

    name: ClassVar[str] = "qlora"
    paper: ClassVar[str] = "Dettmers et al. 2023, https://arxiv.org/abs/2305.14314"
    equation: ClassVar[str] = "W' = dequantise(W_NF4) + (α/r) B A"
    hypothesis: ClassVar[str] = "A low-rank change in full precision makes good what four bits lose."
    merge: ClassVar[str] = (
        "the sum would be rounded to 4 bits again: merge the adapter into the base in full precision"
    )

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("qlora needs bitsandbytes: pip install bitsandbytes, or take lora.")
        whole = [slot.path for slot in slots if not _is_quantised(model.model.get_submodule(slot.path))]
        if whole:
            raise InputError(
                f"{model.name} is not quantised ({whole[0]} is in full precision): load it with a BitsAndBytesConfig of 4 or "
                "8 bits for qlora, or take lora."
            )
        return super().peft_config(model, slots, seed)


def _is_quantised(module: Any) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")
