"""Prefix tuning: trained keys and values before the text, in every layer.

    attention(q, [K_p, K], [V_p, V]),   K_p, V_p (l, n_kv_heads · d_head) of each layer

Li and Liang 2021, https://arxiv.org/abs/2101.00190, without their reparametrisation by an MLP. They start at random. The text's
positions begin behind the prefix. Saved directories are read by `adapters.load`; core refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from steerkit.adapters.base import PromptMethod, register
from steerkit.adapters.slots import Slot
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class PrefixTuning(PromptMethod):
    """Trained keys and values before the text, in every layer."""

    name: ClassVar[str] = "prefix_tuning"
    paper: ClassVar[str] = "Li and Liang 2021, https://arxiv.org/abs/2101.00190"
    equation: ClassVar[str] = "attention(q, [K_p, K], [V_p, V])"
    hypothesis: ClassVar[str] = "What each layer attends to is enough to steer what it computes."
    identity: ClassVar[str] = "the prefix takes a share of the attention, also one of zeros"
    lr: ClassVar[float] = 1e-2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.length)

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        config: Any = model.model.config
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        d_head = config.hidden_size // config.num_attention_heads
        return self.length * config.num_hidden_layers * 2 * heads * d_head
