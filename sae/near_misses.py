"""Rows of text in which a latent is silent although it was near.

What a latent is for shows in where it stops. Two kinds of rows are kept for each: those that have one of its strongest tokens
and leave it silent, and those in which its pre-activation came nearest to what it has to exceed (`SAE.margins`). They are looked
for among the activations of some batches, kept until the pass over all of them has said which tokens are whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures.base import SAE

NEAR_TOKENS = 32_768
"""About how many tokens are kept to be looked at again."""
N_MISSES = 5
N_WITH_TOKEN = 3
"""How many of them may be rows with a strong token of the latent; the rest are the nearest."""
_STRONG_TOKENS = 4
_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Look:
    """A batch to look at again."""

    input_ids: Int[Tensor, "rows pos"]
    acts: Float[Tensor, "rows pos d_in"]
    keep: Bool[Tensor, "rows pos"]
    """The tokens that count, sinks left out."""
    first_row: int
    """Number of its first row among all rows."""


@torch.no_grad()
def near_misses(
    sae: SAE, looks: Sequence[Look], token_ids: Int[np.ndarray, "d_sae n"]
) -> dict[str, np.ndarray]:
    """`miss_row` and `miss_position` (d_sae, 5), -1 where there are fewer, and `miss_closeness`: the pre-activation minus what it
    has to exceed, at most 0; NaN where the architecture defines none. Rows with a strong token go first, the nearest first.
    `token_ids`: each latent's tokens, the strongest first, -1 where there are fewer."""
    tokens = _TokensOf(token_ids[:, :_STRONG_TOKENS], sae.device)
    by_token, nearest = _Nearest(sae, N_WITH_TOKEN), _Nearest(sae, N_MISSES)
    known = True
    for look in looks:
        ids = look.input_ids.to(sae.device)
        step = max(1, _ELEMENTS // (ids.shape[1] * sae.d_sae))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            x, keep = look.acts[part].to(sae.device, sae.dtype), look.keep[part].to(sae.device)
            margins = sae.margins(x)
            known = margins is not None
            if margins is None:
                active = sae.encode(x) > 0
                margins = torch.zeros_like(active, dtype=torch.float32)
            else:
                margins, active = margins.float(), margins > 0
            active &= keep[..., None]
            margins.masked_fill_(~keep[..., None], -torch.inf)
            silent = ~active.any(1)
            by_token.offer(*tokens.best(ids[part], margins), silent, look.first_row + start)
            if known:
                nearest.offer(*margins.max(1), silent, look.first_row + start)
    row, position, closeness = _joined(by_token, nearest)
    if not known:
        closeness = np.full_like(closeness, np.nan)
    return {"miss_row": row, "miss_position": position, "miss_closeness": closeness}


class _TokensOf:
    """Latents by the tokens that are theirs."""

    def __init__(self, token_ids: Int[np.ndarray, "d_sae n"], device: torch.device) -> None:
        latent, rank = np.nonzero(token_ids >= 0)
        token = token_ids[latent, rank]
        order = np.argsort(token, kind="stable")
        self.latent = torch.from_numpy(latent[order]).to(device)
        self.token = torch.from_numpy(token[order].astype(np.int64)).to(device)

    def best(
        self, ids: Int[Tensor, "rows pos"], margins: Float[Tensor, "rows pos d_sae"]
    ) -> tuple[Float[Tensor, "rows d_sae"], Int[Tensor, "rows d_sae"]]:
        """The largest margin of each row and latent at one of the latent's tokens (-inf if there is none), and where."""
        flat = ids.flatten()
        first = torch.searchsorted(self.token, flat)
        n = torch.searchsorted(self.token, flat, right=True) - first
        place = torch.arange(len(flat), device=flat.device).repeat_interleave(n)
        offset = torch.arange(len(place), device=flat.device) - (n.cumsum(0) - n).repeat_interleave(n)
        latent = self.latent[first.repeat_interleave(n) + offset]
        n_pos, d_sae = margins.shape[1:]
        row, position = place // n_pos, place % n_pos
        values = margins.flatten(0, 1)[place, latent]
        cell = row * d_sae + latent
        best = margins.new_full((len(ids) * d_sae,), -torch.inf).scatter_reduce_(0, cell, values, "amax")
        where = torch.full_like(best, n_pos, dtype=torch.int64)
        there = values == best[cell]
        where.scatter_reduce_(0, cell[there], position[there], "amin")
        return best.view(len(ids), d_sae), where.view(len(ids), d_sae)


class _Nearest:
    """The `n` silent rows of the largest margin for each latent."""

    def __init__(self, sae: SAE, n: int) -> None:
        self.margin = torch.full((n, sae.d_sae), -torch.inf, device=sae.device)
        self.row = torch.full((n, sae.d_sae), -1, device=sae.device)
        self.position = self.row.clone()

    def offer(
        self,
        margin: Float[Tensor, "rows d_sae"],
        position: Int[Tensor, "rows d_sae"],
        silent: Bool[Tensor, "rows d_sae"],
        first_row: int,
    ) -> None:
        margin = torch.cat([self.margin, margin.masked_fill(~silent, -torch.inf)])
        rows = torch.arange(first_row, first_row + len(position), device=position.device)
        row = torch.cat([self.row, rows[:, None].expand_as(position)])
        order = margin.sort(dim=0, descending=True, stable=True).indices[: len(self.margin)]
        position = torch.cat([self.position, position]).gather(0, order)
        self.margin, self.row = margin.gather(0, order), row.gather(0, order)
        self.position = position.masked_fill(self.margin == -torch.inf, -1)
        self.row.masked_fill_(self.margin == -torch.inf, -1)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, positions, margins), each (d_sae, n)."""
        return tuple(t.T.cpu().numpy() for t in (self.row, self.position, self.margin))  # type: ignore[return-value]


def _joined(by_token: _Nearest, nearest: _Nearest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the first kind, then those of the second that are not among them, `N_MISSES` in all."""
    first, second = by_token.columns(), nearest.columns()
    row, position, closeness = (np.concatenate(pair, axis=1) for pair in zip(first, second))
    again = (row[:, None, :N_WITH_TOKEN] == row[:, N_WITH_TOKEN:, None]).any(2)
    row[:, N_WITH_TOKEN:][again] = -1
    order = np.argsort(row < 0, axis=1, kind="stable")[:, :N_MISSES]
    row, position, closeness = (np.take_along_axis(a, order, axis=1) for a in (row, position, closeness))
    none = row < 0
    position[none], closeness[none] = -1, np.nan
    return row.astype(np.int32), position.astype(np.int32), np.minimum(closeness, 0).astype(np.float32)
