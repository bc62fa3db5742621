"""Singular value decompositions of weights, made once: kept on disk by the weight's hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.runs import atomic_path

KEEP_FROM = 256 * 256
"""Entries from which a decomposition goes to the disk: smaller ones are made faster than they are read."""


def cache_folder() -> Path:
    """$STEERKIT_CACHE, or ~/.cache/steerkit."""
    return Path(os.environ.get("STEERKIT_CACHE") or Path.home() / ".cache" / "steerkit") / "svd"


@torch.no_grad()
def svd(
    weight: Float[Tensor, "*n d_out d_in"],
) -> tuple[Float[Tensor, "*n d_out k"], Float[Tensor, "*n k"], Float[Tensor, "*n k d_in"]]:
    """(U, S, Vh), k the smaller side, singular values falling. The greatest entry of each column of U is positive, so that the same
    weight gives the same signs everywhere."""
    if weight.numel() < KEEP_FROM:
        return _svd(weight)
    from safetensors.torch import load_file, save_file

    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(
        f"{data.dtype}{tuple(data.shape)}".encode() + data.view(torch.uint8).numpy().tobytes()
    )
    path = cache_folder() / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        found = load_file(path)
        return tuple(found[name].to(weight) for name in ("U", "S", "Vh"))  # type: ignore[return-value]
    U, S, Vh = _svd(weight)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as new:
            save_file({"U": U.cpu().contiguous(), "S": S.cpu(), "Vh": Vh.cpu().contiguous()}, new)
    except OSError:  # a cache that cannot be written is only slower
        pass
    return U, S, Vh


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    signs = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()
    return U * signs, S, Vh * signs.mT
