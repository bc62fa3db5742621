"""Which latents are active together, counted over all pairs.

    pairs = Cooccurrence(d_sae, tokens=200_000)
    pairs.add(token, latent, keep)          # for each batch: where latents are active
    pairs.finish()["together"][17]          # the latents most often active with latent 17

The active latents of the tokens are kept as they come, four bytes each, as a sparse matrix A (tokens × d_sae) of ones; at the end
AᵀA is formed for a block of latents at a time and the best partners of each are taken. So every count reported is exact, and
memory is that of A and of one block, never d_sae². Where tokens × L0² would be too much, every n-th token is counted instead
of all: `together_tokens` says how many were.

    jaccard = n_both / (n_i + n_j - n_both),      pmi = log(n_both · tokens / (n_i · n_j))  in nats
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int

N_TOGETHER = 10
PAIRS = 1 << 29
"""About how many pairs of active latents are counted, one token at a time: some seconds."""
ENTRIES = 1 << 24
"""About how many active latents are kept: 64 MB, and five times that while they are counted."""
_BLOCK = 1 << 22
"""Largest block of AᵀA, in entries."""


class Cooccurrence:
    """Counts that grow batch by batch."""

    def __init__(self, d_sae: int, tokens: int) -> None:
        self.d_sae, self.tokens = d_sae, tokens
        self.every: int | None = None
        """Each so-manieth token is counted; chosen by the first batch."""
        self.n_seen = self.n_tokens = 0
        self.latents: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []

    def add(
        self, token: Int[np.ndarray, " n"], latent: Int[np.ndarray, " n"], keep: Bool[np.ndarray, " m"]
    ) -> None:
        """Latent `latent[i]` is active on token `token[i]` of the batch, in rising order; `keep` says which tokens count."""
        active = np.bincount(token, minlength=len(keep))
        if self.every is None and keep.any():
            self.every = self._interval(active[keep])
        counted = np.zeros(len(keep), dtype=bool)
        place = np.flatnonzero(keep)
        counted[place[(self.n_seen + np.arange(len(place))) % (self.every or 1) == 0]] = True
        self.n_seen += len(place)
        self.n_tokens += int(counted.sum())
        self.latents.append(latent[counted[token]].astype(np.int32))
        self.sizes.append(active[counted].astype(np.int32))

    def _interval(self, active: Int[np.ndarray, " n"]) -> int:
        """So that about `PAIRS` pairs and `ENTRIES` entries come of all the tokens."""
        pairs, entries = float(np.square(active.astype(np.int64)).mean()), float(active.mean())
        return max(1, math.ceil(self.tokens * pairs / PAIRS), math.ceil(self.tokens * entries / ENTRIES))

    def finish(self, block: int = _BLOCK) -> dict[str, np.ndarray]:
        """`together` (d_sae, 10): the latents with the largest Jaccard index, -1 where there are fewer; `together_both`,
        `together_jaccard` and `together_pmi` of the same; `together_count` (d_sae,): counted tokens of each latent."""
        from scipy.sparse import csr_array

        latents = np.concatenate(self.latents) if self.latents else np.zeros(0, np.int32)
        ends = np.cumsum(np.concatenate([[0], *self.sizes])).astype(np.int32)
        ones = np.ones(len(latents), dtype=np.int32)
        active = csr_array((ones, latents, ends), shape=(len(ends) - 1, self.d_sae))
        by_latent = active.tocsc()
        count = np.bincount(latents, minlength=self.d_sae)
        shape = (self.d_sae, N_TOGETHER)
        ids, both = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        jaccard, pmi = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        step = max(1, block // self.d_sae)
        for start in range(0, self.d_sae, step):
            counts = by_latent[:, start : start + step].T.tocsr() @ active
            for row in range(counts.shape[0]):
                i, part = start + row, slice(counts.indptr[row], counts.indptr[row + 1])
                other, n = counts.indices[part], counts.data[part]
                other, n = other[other != i], n[other != i]
                best, share = _best(other, n, n / (count[i] + count[other] - n))
                place = i, slice(len(best))
                ids[place], both[place], jaccard[place] = other[best], n[best], share
                pmi[place] = np.log(n[best] / count[i] * (self.n_tokens / count[other[best]]))
        return {
            "together": ids,
            "together_both": both,
            "together_jaccard": jaccard,
            "together_pmi": pmi,
            "together_count": count,
            "together_tokens": np.array(self.n_tokens),
        }


def _best(other: np.ndarray, n: np.ndarray, jaccard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the largest Jaccard indices, and those; of equal ones the larger count, then the lower latent, goes first."""
    index = np.arange(len(jaccard))
    if len(index) > N_TOGETHER:
        bar = np.partition(jaccard, len(jaccard) - N_TOGETHER)[-N_TOGETHER]
        index = np.flatnonzero(jaccard >= bar)
    best = index[np.lexsort((other[index], -n[index], -jaccard[index]))[:N_TOGETHER]]
    return best, jaccard[best]
