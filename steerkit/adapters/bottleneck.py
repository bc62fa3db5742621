"""The bottleneck that adapters of activations are made of.

    δ(h) = U f(D h + b_D) + b_U,    D (m, d), U (d, m),  m < d as a rule

U and b_U start at 0, so δ does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.errors import InputError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class Bottleneck(nn.Module):
    """δ, of the width d_in to the width d_out, through m = `rank`."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, activation: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.D = nn.Parameter(torch.randn(rank, d_in, generator=generator) * d_in**-0.5)
        self.b_D = nn.Parameter(torch.zeros(rank))
        self.U = nn.Parameter(torch.zeros(d_out, rank))
        self.b_U = nn.Parameter(torch.zeros(d_out))

    def forward(self, h: Float[Tensor, "*any d_in"]) -> Float[Tensor, "*any d_out"]:
        inner = self.activation(nn.functional.linear(h.to(self.D.dtype), self.D, self.b_D))
        return nn.functional.linear(inner, self.U, self.b_U)


def check_bottleneck(rank: int, activation: str) -> None:
    """Raise InputError for what no bottleneck can have."""
    if rank < 1:
        raise InputError(f"rank is {rank}; a bottleneck is at least 1 wide.")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}; it is one of {', '.join(ACTIVATIONS)}.")
