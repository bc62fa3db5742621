"""The k largest of each row, sooner than `torch.topk`, which looks at every number of a row with care."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(x: Float[Tensor, "*batch m"], k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """`x.topk(k, dim=-1, sorted=False)`: values, which gradients go through, and indices. Of equals any may be chosen.

    The k largest are all in the k groups of the largest maxima: were one of them in another group, those k maxima would not be
    smaller, and would do as well. So the maxima of groups of s numbers are looked at, and then the k · s numbers of k groups.
    """
    m = x.shape[-1]
    s = _group_size(m, k)
    if s == 1:
        values, indices = x.topk(k, dim=-1, sorted=False)
        return values, indices
    groups = x.detach().reshape(
        -1, s, m // s
    )  # a group's numbers are m / s apart: maxima go along the memory
    best = groups.amax(1).topk(k, sorted=False).indices
    candidates = groups.gather(2, best.unsqueeze(1).expand(-1, s, -1)).flatten(1)
    among = candidates.topk(k, sorted=False).indices
    indices = best.gather(1, among % k) + torch.div(among, k, rounding_mode="floor") * (m // s)
    indices = indices.view(*x.shape[:-1], k)
    return x.gather(-1, indices), indices


def _group_size(m: int, k: int) -> int:
    """The power of two near √(m / k), at which both looks are equally long; 1 if it does not divide m or would save little."""
    s = 2 ** round(math.log2(m / k) / 2)
    return s if s >= 4 and m % s == 0 else 1


__all__ = ["top_k"]
