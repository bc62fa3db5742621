"""Products with sparse latents: what a training step does after the encoder's product.

    pattern = make_pattern(rows, columns, (n, d_sae), x.dtype)      # where latents are active
    pattern.times(values, W_dec)                                    # decode
    pattern.sample(errors, W_dec)                                   # what the error asks of each active latent
    pattern.transposed_times(values, errors)                        # gradient of the decoder

`Pattern` does it densely, on any device and in any dtype: the reference, and the fallback. `CSRPattern` is for CPUs, through
compressed sparse rows; `TritonPattern` for GPUs on which Triton runs. `top_k` finds the k largest latents of each row.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from sae.kernels.csr import CSRPattern
from sae.kernels.pattern import Pattern
from sae.kernels.top_k import top_k


def make_pattern(
    rows: Int[Tensor, " entries"],
    columns: Int[Tensor, " entries"],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Pattern:
    """The fastest `Pattern` for entries on their device in `dtype`. Entries are ordered by row, then as they come."""
    if not is_fast(rows.device, dtype):
        return Pattern(rows, columns, shape)
    if rows.device.type == "cpu":
        return CSRPattern(rows, columns, shape)
    from sae.kernels.triton_kernels import TritonPattern

    return TritonPattern(rows, columns, shape)


def is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are sparse products for such tensors, not only the dense fallback."""
    if device.type == "cpu":
        return dtype in (torch.float32, torch.float64)
    halves = (torch.bfloat16, torch.float16)
    return dtype in (torch.float32, torch.float64, *halves) and _triton_runs(device)


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on that GPU. Where it is there and fails, says so once."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):  # older ones are not what Triton is made for
        return False
    try:
        from sae.kernels.triton_kernels import TritonPattern

        zero, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, 1, device=device)
        return float(TritonPattern(zero, zero, (1, 1)).times(one[0], one)) == 1.0
    except Exception as error:  # a missing C compiler or driver, say: whatever it is, dense products work
        warnings.warn(
            f"Triton does not run on {device} ({error}): products with latents are dense.", stacklevel=3
        )
        return False


__all__ = ["CSRPattern", "Pattern", "is_fast", "make_pattern", "top_k"]
