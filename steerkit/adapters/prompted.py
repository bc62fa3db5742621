"""Forwards of a model with virtual tokens before the text (peft's prompt and prefix tuning)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.backends import HuggingFaceBackend
from steerkit.errors import InputError


class PromptedBackend(HuggingFaceBackend):
    """The base's backend, each forward going through peft; what is given back is of the text alone."""

    def __init__(self, backend: Any, peft: Any) -> None:
        self.__dict__.update(vars(backend))
        self.peft = peft

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Float[Tensor, "batch pos d_model"]]:
        states: list[Tensor] = []
        handle = self.trunk.register_forward_hook(lambda module, args, output: states.append(output[0]))
        try:
            self._run(input_ids, attention_mask)
        finally:
            handle.remove()
        return (states[0][:, -input_ids.shape[1] :],)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch pos d_vocab"]:
        return self._run(input_ids, attention_mask).logits[:, -input_ids.shape[1] :]

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Row by row: peft takes no positions, so that pads would move a text away from its virtual tokens."""
        longest, pad = input_ids.shape[1], options.get("pad_token_id", 0)
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            kept = ids[mask.bool()][None]
            found = self.peft.generate(
                input_ids=kept, attention_mask=torch.ones_like(kept), max_new_tokens=max_new_tokens, **options
            )
            rows.append(torch.cat([ids[: longest - kept.shape[1]], found[0]]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def _run(self, input_ids: Tensor, mask: Tensor | None) -> Any:
        mask = torch.ones_like(input_ids) if mask is None else mask
        if not bool(mask[:, 0].all()):
            raise InputError("Virtual tokens stand before the text: pad it on the right.")
        return self.peft(input_ids=input_ids, attention_mask=mask)
