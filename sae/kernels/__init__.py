"""Products with sparse latents: what a training step does after the encoder's product.

    pattern = make_pattern(rows, columns, (n, d_sae), x.dtype)      # where latents are active
    pattern.times(values, W_dec)                                    # decode
    pattern.sample(errors, W_dec)                                   # what the error asks of each active latent
    pattern.transposed_times(values, errors)                        # gradient of the decoder

`Pattern` does it densely, on any device and in any dtype: the reference, and the fallback. `CSRPattern` is for CPUs, through
compressed sparse rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sae.kernels.csr import CSRPattern
from sae.kernels.pattern import Pattern


def make_pattern(
    rows: Int[Tensor, " entries"],
    columns: Int[Tensor, " entries"],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Pattern:
    """The fastest `Pattern` for entries on their device in `dtype`. Entries are ordered by row, then as they come."""
    if is_fast(rows.device, dtype):
        return CSRPattern(rows, columns, shape)
    return Pattern(rows, columns, shape)


def is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are sparse products for such tensors, not only the dense fallback."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


__all__ = ["CSRPattern", "Pattern", "is_fast", "make_pattern"]
