"""Prompt tuning: trained embeddings before the text.

    f'(x) = f([p_1 … p_l, x]),   p (l, d_model)

Lester et al. 2021, https://arxiv.org/abs/2104.08691. p starts as the embeddings of tokens drawn from the vocabulary, as the paper
found better than random numbers. Saved directories are read by `adapters.load`; core refuses them, for their positions are not
the text's.
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
class PromptTuning(PromptMethod):
    """Trained embeddings before the text."""

    name: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "Lester et al. 2021, https://arxiv.org/abs/2104.08691"
    equation: ClassVar[str] = "f'(x) = f([p_1 … p_l, x])"
    hypothesis: ClassVar[str] = (
        "The model can do the task: it only has to be asked, in words that are no words."
    )
    identity: ClassVar[str] = "the text is read behind words drawn at random"
    lr: ClassVar[float] = 3e-2

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.length, prompt_tuning_init="SAMPLE_VOCAB"
        )

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        return self.length * model.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
