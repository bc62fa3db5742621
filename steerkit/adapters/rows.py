"""Some rows of a fused map alone: the others' trained numbers stay as they start."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from steerkit.adapters.slots import Slot


def hold_rows(parameters: Iterable[Tensor], slot: Slot) -> int:
    """Let no gradient reach the rows of these parameters, each with one for each output, outside the slot's; how many numbers
    that are. Weight decay would still move what is not 0."""
    held = torch.ones(slot.d_out, dtype=torch.bool)
    for first, end in slot.rows or [(0, slot.d_out)]:
        held[first:end] = False
    count = 0
    for parameter in parameters:
        parameter.register_hook(_without(held))
        count += int(held.sum()) * (parameter.numel() // slot.d_out)
    return count


def _without(held: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        shape = [len(held)] + [1] * (gradient.dim() - 1)
        return gradient.masked_fill(held.to(gradient.device).view(shape), 0)

    return hook
