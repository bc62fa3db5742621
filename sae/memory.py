"""How much of a batch fits: the micro-batches that `micro_batch="auto"` stands for.

choose_micro_batch([(sae.Gated(65_536), 4096)], 4096, torch.float32, torch.device("cuda"))      # 1024, say, or None: all of it
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sae.architectures import Config

_ARRAYS_OF_LATENTS = 6
"""Arrays (tokens, d_sae) that a step has at once at most."""
_ARRAYS_OF_ACTIVATIONS = 8
"""Arrays (tokens, d_in) that a step has at once at most."""
_COPIES = 5
"""Of the weights: themselves, gradients, two moments, and the sum over micro-batches."""
_SHARE = 0.8
"""Of the free memory, what may be planned with."""
_SMALLEST = 64


def choose_micro_batch(
    jobs: Sequence[tuple[Config, int]],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    reserved: int = 0,
    free: int | None = None,
) -> int | None:
    """The largest batch_size / 2^i whose step fits into the memory that is free; None where all of it does.

    `jobs` are the SAEs that are trained side by side, (architecture, d_in) each; `reserved` bytes are needed by others; `free` is
    measured if it is not given. An estimate from shapes: nothing is tried out. None also for an architecture whose latents are
    chosen over the batch, which cannot be cut.
    """
    with torch.device("meta"):
        built = [(arch.build(d_in), d_in) for arch, d_in in jobs]
    if any(sae.needs_whole_batch for sae, _ in built):
        return None
    left = _SHARE * (free_bytes(device) if free is None else free) - reserved
    left -= sum(_COPIES * 4 * parameter.numel() for sae, _ in built for parameter in sae.parameters())
    a_token = max(
        _ARRAYS_OF_LATENTS * sae.d_sae * dtype.itemsize + _ARRAYS_OF_ACTIVATIONS * d_in * 4
        for sae, d_in in built
    )
    size = batch_size
    while size % 2 == 0 and size > _SMALLEST and size * a_token > left:
        size //= 2
    return None if size == batch_size else size


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, this process's caches counted as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found)
