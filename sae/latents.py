"""What each latent of a sparse autoencoder does, from one pass over text.

    stats = collect_latents(model, sae, documents, "blocks.2.hook_resid_post", tokens=200_000)
    stats.density[17], stats.examples(17)[0]
    stats.save("latents"); LatentStats.load("latents")

Every latent is described at once. Memory does not grow with the activations: statistics are counted, and of
the contexts only the best are kept, each with the latent's activations on a window around its peak. The text
itself is kept as token ids, four bytes a token.

Beside them stand rows in which a latent was nearly active (`sae.near_misses`) and the latents that it is active with
(`sae.cooccurrence`).

Contexts are rows of text. A row stands for a latent with its strongest token, so contexts of one latent are
distinct. Beside the strongest rows there is a random sample of the others, in five equal parts from weak to
strong: the strongest contexts alone make any latent look cleaner than it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures.base import SAE
from sae.architectures.transcoder import TranscoderSAE
from sae.cooccurrence import Cooccurrence
from sae.near_misses import NEAR_TOKENS, Look, near_misses
from steerkit.activations import TokenBatch, Tokenization, is_sink, token_batches
from steerkit.data import Documents, Permutation, load_documents
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.runs import atomic_write, progress, read_json, write_json

N_TOP = 20
"""Strongest contexts a latent."""
N_INTERVALS = 5
"""Parts of equal size, by activation, of a random sample of the rows in which a latent is active."""
N_PER_INTERVAL = 5
"""Contexts shown of each part."""
N_SAMPLED = 60
"""Rows drawn for the sample. Those that are among the strongest are left out of it."""
WINDOW = 15
"""Tokens kept on either side of a context's strongest token."""
N_TOKENS = 10
N_LOGITS = 10
LOGIT_BINS = 30
N_NEIGHBOURS = 10
N_BINS = 64
"""Quarter-octave bins of the histogram of activations, down from the SAE's largest activation."""

_GRID = 256
"""The same bins while counting: 2^-32 to 2^32."""
_DENSE_ELEMENTS = 2**23
_LOGIT_ELEMENTS = 2**23
_RESIDUAL_SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Example:
    """One row of text in which a latent was active."""

    row: int
    """Index into the rows that the statistics keep."""
    document: int
    """Index of the document that the row begins in."""
    position: int
    """The strongest token's index in the row."""
    activation: float
    interval: int
    """0 for the strongest contexts, else its fifth of the sample: 1 the weakest, 5 the strongest."""
    window: Float[np.ndarray, " 31"]
    """Activations of the tokens from 15 before to 15 after the strongest, to 1/255 of it."""


@dataclass(frozen=True)
class LatentStats:
    """What was measured. Arrays are numpy; the first axis is the latent unless said otherwise."""

    info: dict[str, Any]
    """Where it comes from: model, site, documents, their fingerprint, tokens, seed."""
    count: Int[np.ndarray, " d_sae"]
    """Tokens on which the latent was active."""
    maximum: Float[np.ndarray, " d_sae"]
    mean: Float[np.ndarray, " d_sae"]
    """Mean activation where it is active; 0 for a dead latent."""
    edges: Float[np.ndarray, " bins+1"]
    """Edges of the histogram's bins, four an octave; the first bin reaches down to 0."""
    histogram: Int[np.ndarray, "d_sae bins"]
    """Active tokens by activation; they sum to `count`."""
    token_ids: Int[np.ndarray, "d_sae 10"]
    """The tokens with the largest summed activation; -1 where there are fewer."""
    token_share: Float[np.ndarray, "d_sae 10"]
    """Their share of the latent's summed activation."""
    token_mean: Float[np.ndarray, "d_sae 10"]
    """Mean activation of the latent on the token, where it is active there."""
    token_count: Int[np.ndarray, "d_sae 10"]
    """How often the latent was active on the token."""
    example_start: Int[np.ndarray, " d_sae+1"]
    """The examples of latent i are those from `example_start[i]` to `example_start[i + 1]`."""
    example_row: Int[np.ndarray, " n"]
    example_position: Int[np.ndarray, " n"]
    example_activation: Float[np.ndarray, " n"]
    example_interval: Int[np.ndarray, " n"]
    example_window: Int[np.ndarray, "n 31"]
    """Activations around the strongest token, in 255ths of it."""
    row_start: Int[np.ndarray, " rows+1"]
    row_tokens: Int[np.ndarray, " m"]
    """Token ids of row i: from `row_start[i]` to `row_start[i + 1]`."""
    row_document: Int[np.ndarray, " rows"]
    neighbours: Int[np.ndarray, "d_sae 10"]
    """The latents with the nearest decoder directions; -1 where there are fewer."""
    neighbour_cosine: Float[np.ndarray, "d_sae 10"]
    encoder_cosine: Float[np.ndarray, " d_sae"]
    """Cosine of the latent's encoder and decoder directions; NaN where they are not of one space, as in a transcoder."""
    one_document: Bool[np.ndarray, " d_sae"]
    """Whether the latent is active in a single document."""
    miss_row: Int[np.ndarray, "d_sae 5"]
    """Rows in which the latent is silent although it was near (`sae.near_misses`); -1 where there are fewer."""
    miss_position: Int[np.ndarray, "d_sae 5"]
    """Where it was nearest."""
    miss_closeness: Float[np.ndarray, "d_sae 5"]
    """Its pre-activation there minus what it has to exceed, at most 0; NaN where that is not defined."""
    together: Int[np.ndarray, "d_sae 10"]
    """The latents most often active on the same tokens, by Jaccard index (`sae.cooccurrence`); -1 where there are fewer."""
    together_both: Int[np.ndarray, "d_sae 10"]
    """Tokens on which both are active, of those counted."""
    together_jaccard: Float[np.ndarray, "d_sae 10"]
    together_pmi: Float[np.ndarray, "d_sae 10"]
    """Pointwise mutual information, nats."""
    together_count: Int[np.ndarray, " d_sae"]
    """Counted tokens on which the latent is active."""
    together_tokens: Int[np.ndarray, ""]
    """Tokens on which that was counted."""
    logit_ids: Int[np.ndarray, "d_sae 20"] | None = None
    """Ten tokens that the decoder direction speaks for, the strongest first, then ten it speaks against, the
    strongest last. None where there is no unembedding or the site does not write to the residual stream."""
    logit_values: Float[np.ndarray, "d_sae 20"] | None = None
    logit_range: Float[np.ndarray, "d_sae 2"] | None = None
    """The smallest and the largest effect on any token's logit."""
    logit_histogram: Int[np.ndarray, "d_sae 30"] | None = None
    """Tokens of the vocabulary by that effect, in bins of equal width over the range."""

    @property
    def d_sae(self) -> int:
        return len(self.count)

    @property
    def n_tokens(self) -> int:
        """Tokens looked at."""
        return int(self.info["tokens"])

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of tokens on which each latent is active."""
        return self.count / self.n_tokens

    def examples(self, latent: int) -> list[Example]:
        """A latent's contexts: the strongest, strongest first, then those of the intervals from high to low."""
        if not 0 <= latent < self.d_sae:
            raise InputError(f"There is no latent {latent}: the SAE has latents 0–{self.d_sae - 1}.")
        return [
            Example(
                int(self.example_row[i]),
                int(self.row_document[self.example_row[i]]),
                int(self.example_position[i]),
                float(self.example_activation[i]),
                int(self.example_interval[i]),
                self.example_window[i] * (self.example_activation[i] / 255),
            )
            for i in range(self.example_start[latent], self.example_start[latent + 1])
        ]

    def row(self, index: int) -> Int[np.ndarray, " n"]:
        """The token ids of a row."""
        return self.row_tokens[self.row_start[index] : self.row_start[index + 1]]

    def __repr__(self) -> str:
        silent = int((self.count == 0).sum())
        return (
            f"LatentStats({self.d_sae:,} latents at {self.info['site']!r} of {self.info['model']!r}, {silent:,} of them silent "
            f"on {self.n_tokens:,} tokens of {self.info['documents']!r})"
        )

    def save(self, path: str | Path) -> None:
        """Write `latents.safetensors` and `latents.json` into the directory `path`."""
        from safetensors.numpy import save

        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        present = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        atomic_write(Path(path) / "latents.safetensors", save(present))
        write_json(Path(path) / "latents.json", self.info)

    @classmethod
    def load(cls, path: str | Path) -> LatentStats:
        """Read what `save` wrote. Raises CheckpointError when it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        info = read_json(Path(path) / "latents.json")
        try:
            return cls(info, **load_file(Path(path) / "latents.safetensors"))
        except (OSError, SafetensorError, TypeError) as error:
            file = Path(path) / "latents.safetensors"
            raise CheckpointError(f"{file} is missing or damaged ({error}): collect it again.") from None


@torch.no_grad()
def collect_latents(
    model: HookedModel,
    sae: SAE,
    documents: Documents | Sequence[str] | str,
    site: str,
    *,
    tokenization: Tokenization | None = None,
    tokens: int = 200_000,
    sink_threshold: float | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> LatentStats:
    """Describe every latent on at most `tokens` tokens of documents drawn by `seed`.

    Tokens whose activation has a norm above `sink_threshold` do not count, nor do those that the tokenization
    leaves out. Raises InputError when the SAE does not fit the site, NumericsError on NaN or inf.
    """
    if tokens < 1:
        raise InputError(f"tokens is {tokens}: give at least 1.")
    if len(sae.config.inputs(site)) > 1:
        raise InputError(
            "A crosscoder reads several sites: its latents are not drawn yet, only those of one site."
        )
    width = model.site(site).width
    if width != sae.d_in:
        raise InputError(
            f"The SAE takes activations of width {sae.d_in}, but {site} of {model.name} has {width}."
        )
    documents = load_documents(documents)
    pass_ = _Pass(sae, seed, tokens)
    looks: list[Look] = []
    between_looks = max(1, round(tokens / NEAR_TOKENS))
    batches = token_batches(
        model, documents, tokenization, max_tokens=tokens, order=Permutation(len(documents), seed, 0)
    )
    with progress(tokens, "Latents", quiet=quiet) as bar:
        for number, batch in enumerate(batches):
            mask = None if model.is_causal else batch.attention_mask
            acts = model.run(batch.input_ids, mask, sites=[site])[site]
            keep = batch.keep.to(acts.device)
            if not bool(acts[keep].isfinite().all()):
                raise NumericsError(f"NaN or inf at {site}: check the model's weights or its dtype.")
            if sink_threshold is not None:
                keep = keep & ~is_sink(acts, sink_threshold)
            if number % between_looks == 0:
                looks.append(Look(batch.input_ids, acts, keep, len(pass_.rows)))
            pass_.add(batch, acts, keep)
            bar.advance(batch.n_kept)
    if not pass_.n_tokens:
        raise InputError(f"{documents.name}: not one token that counts, without special and sink tokens.")
    info = {
        "model": model.name,
        "revision": model.revision,
        "site": site,
        "sae_sha256": _digest(sae),
        "documents": documents.name,
        "fingerprint": documents.fingerprint(),
        "tokenization": asdict(tokenization or Tokenization()),
        "sink_threshold": sink_threshold,
        "tokens": pass_.n_tokens,
        "seed": seed,
    }
    effects: dict[str, Any] = logit_effects(model, sae, sae.config.outputs(site)[0])
    found = pass_.finish()
    found |= near_misses(sae, looks, found["token_ids"])
    return LatentStats(info, **pass_.with_rows(found), **_geometry(sae), **effects)


class _Pass:
    """Counts and contexts, growing batch by batch."""

    def __init__(self, sae: SAE, seed: int, tokens: int = 1) -> None:
        self.sae, self.seed = sae, seed
        self.n_tokens = 0
        self.together = Cooccurrence(sae.d_sae, tokens)
        self.first_document = np.full(sae.d_sae, np.iinfo(np.int64).max)
        self.last_document = np.full(sae.d_sae, -1)
        self.count = np.zeros(sae.d_sae, dtype=np.int64)
        self.total = np.zeros(sae.d_sae)
        self.maximum = np.zeros(sae.d_sae, dtype=np.float32)
        self.grid = np.zeros((sae.d_sae, _GRID), dtype=np.int32)
        self.top = _Best(sae.d_sae, N_TOP)
        self.sample = _Best(sae.d_sae, N_SAMPLED)
        self.by_token = _TokenSums(sae.d_sae)
        self.rows: list[np.ndarray] = []
        self.row_document: list[int] = []

    def add(self, batch: TokenBatch, acts: Float[Tensor, "rows pos d"], keep: Tensor) -> None:
        n_rows, n_pos = keep.shape
        step = max(1, _DENSE_ELEMENTS // (n_pos * self.sae.d_sae))
        ids, lengths = batch.input_ids.cpu().numpy(), batch.attention_mask.sum(1).tolist()
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            latents = self.sae.encode(acts[part].to(self.sae.device, self.sae.dtype)).float()
            latents.masked_fill_(~keep[part, :, None].to(latents.device), 0)
            self._count(latents, ids[part], keep[part], batch.token_document[part])
            self._keep_contexts(latents, len(self.rows))
            self.rows += [row[:n].astype(np.int32) for row, n in zip(ids[part], lengths[part])]
        self.row_document += batch.document.tolist()
        self.n_tokens += int(keep.sum())

    def _count(
        self, latents: Float[Tensor, "rows pos d_sae"], ids: np.ndarray, keep: Tensor, document: Tensor
    ) -> None:
        token, latent = latents.flatten(0, 1).nonzero(as_tuple=True)
        values = latents.flatten(0, 1)[token, latent].cpu().numpy()
        which, place = latent.cpu().numpy(), token.cpu().numpy()
        n = self.sae.d_sae
        self.together.add(place, which, keep.flatten().cpu().numpy())
        documents = document.flatten().cpu().numpy()[place]
        np.minimum.at(self.first_document, which, documents)
        np.maximum.at(self.last_document, which, documents)
        self.count += np.bincount(which, minlength=n)
        self.total += np.bincount(which, weights=values, minlength=n)
        self.maximum = np.maximum(self.maximum, latents.amax((0, 1)).cpu().numpy())
        cells = np.bincount(which * _GRID + _grid_bin(values), minlength=n * _GRID)
        self.grid += cells.reshape(n, _GRID).astype(np.int32)
        self.by_token.add(which, ids.reshape(-1)[place], values)

    def _keep_contexts(self, latents: Float[Tensor, "rows pos d_sae"], first_row: int) -> None:
        peak, where = latents.max(dim=1)
        row_t, latent_t = peak.nonzero(as_tuple=True)
        activation = peak[row_t, latent_t].cpu().numpy()
        position_t = where[row_t, latent_t]
        row, latent = row_t.cpu().numpy() + first_row, latent_t.cpu().numpy()
        lottery = _uniform(latent, row, self.seed)
        for best, score in ((self.top, activation), (self.sample, lottery)):
            chosen = np.flatnonzero(score > best.bar[latent])
            index = torch.from_numpy(chosen).to(latents.device)
            found = _windows(latents, row_t[index], position_t[index], latent_t[index])
            best.offer(
                latent[chosen],
                score[chosen],
                row=row[chosen].astype(np.int32),
                position=position_t[index].cpu().numpy().astype(np.int32),
                activation=activation[chosen],
                window=found.cpu().numpy(),
            )

    def finish(self) -> dict[str, np.ndarray]:
        """What was found; rows by their number among all rows."""
        active = np.maximum(self.count, 1)
        edges, histogram = _shared_histogram(self.grid)
        return {
            "count": self.count,
            "maximum": self.maximum,
            "mean": (self.total / active).astype(np.float32),
            "edges": edges,
            "histogram": histogram,
            "one_document": self.first_document == self.last_document,
            **self.by_token.finish(self.total),
            **self.together.finish(),
            **self._examples(),
        }

    def with_rows(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What was found, with the rows that something is shown in, and rows by their number among those."""
        named = [found["example_row"], found["miss_row"]]
        used = np.unique(np.concatenate([numbers.ravel() for numbers in named]))
        used = used[used >= 0]
        example, miss = (
            np.where(numbers < 0, -1, np.searchsorted(used, numbers)).astype(np.int32) for numbers in named
        )
        rows = [self.rows[i] for i in used]
        return {
            **found,
            "example_row": example,
            "miss_row": miss,
            "row_start": np.cumsum([0, *map(len, rows)]),
            "row_tokens": np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32),
            "row_document": np.array([self.row_document[i] for i in used], dtype=np.int64),
        }

    def _examples(self) -> dict[str, np.ndarray]:
        top, sampled = self.top.result(), self.sample.result()
        chosen, interval = self._intervals(top, sampled)
        data = {name: np.concatenate([top[name], sampled[name][chosen]]) for name in top}
        latents = data["key"]
        intervals = np.concatenate([np.zeros(len(top["key"]), dtype=np.int64), interval])
        rank = np.where(intervals == 0, 0, N_INTERVALS + 1 - intervals)
        order = np.lexsort((data["row"], -data["activation"], rank, latents))
        return {
            "example_start": np.searchsorted(latents[order], np.arange(self.sae.d_sae + 1)),
            "example_row": data["row"][order],
            "example_position": data["position"][order],
            "example_activation": data["activation"][order],
            "example_interval": intervals[order].astype(np.int8),
            "example_window": data["window"][order],
        }

    def _intervals(
        self, top: dict[str, np.ndarray], sampled: dict[str, np.ndarray]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Indices of the samples to show, and the fifth of its latent's sample that each lies in."""
        n_rows = len(self.rows)
        strongest = np.isin(sampled["key"] * n_rows + sampled["row"], top["key"] * n_rows + top["row"])
        free = np.flatnonzero(~strongest)
        weak_to_strong = free[np.lexsort([sampled[name][free] for name in ("row", "activation", "key")])]
        latent = sampled["key"][weak_to_strong]
        size = np.bincount(latent, minlength=self.sae.d_sae)[latent]
        interval = N_INTERVALS * _rank_in_group(latent) // size + 1
        group = latent * (N_INTERVALS + 1) + interval
        by_lot = np.lexsort((-sampled["score"][weak_to_strong], group))
        shown = by_lot[_rank_in_group(group[by_lot]) < N_PER_INTERVAL]
        return weak_to_strong[shown], interval[shown]


class _Best:
    """The `n` entries of highest score for each key, with what belongs to them."""

    def __init__(self, n_keys: int, n: int, merge_at: int = 500_000) -> None:
        self.n, self.merge_at = n, merge_at
        self.bar = np.full(n_keys, -np.inf, dtype=np.float32)
        """The score that an entry must exceed to be among the best of its key."""
        self.parts: list[dict[str, np.ndarray]] = []
        self.waiting = 0

    def offer(self, key: np.ndarray, score: np.ndarray, **columns: np.ndarray) -> None:
        self.parts.append({"key": key, "score": score, **columns})
        self.waiting += len(key)
        if self.waiting > self.merge_at:
            self._merge()

    def _merge(self) -> None:
        table = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        order = np.lexsort((table["row"], -table["score"], table["key"]))
        rank = _rank_in_group(table["key"][order])
        order = order[rank < self.n]
        table = {name: column[order] for name, column in table.items()}
        last = rank[rank < self.n] == self.n - 1
        self.bar[table["key"][last]] = table["score"][last]
        self.parts, self.waiting = [table], 0

    def result(self) -> dict[str, np.ndarray]:
        """The columns, sorted by key and falling score."""
        self._merge()
        return self.parts[0]


class _TokenSums:
    """Summed activation of each latent on each token id.

    Pairs beyond `limit` a latent on average are dropped, the smallest sums first, so memory stays bounded; the
    ten tokens reported are the heaviest and stay.
    """

    def __init__(self, d_sae: int, limit: int = 256) -> None:
        self.d_sae, self.limit = d_sae, limit
        self.key = np.zeros(0, dtype=np.int64)
        self.total = np.zeros(0)
        self.count = np.zeros(0, dtype=np.int64)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.waiting = 0

    def add(self, latent: np.ndarray, token: np.ndarray, value: np.ndarray) -> None:
        self._append(*_sum_by_key((latent << 32) + token, value.astype(np.float64), np.ones_like(latent)))

    def _append(self, key: np.ndarray, total: np.ndarray, count: np.ndarray) -> None:
        self.parts.append((key, total, count))
        self.waiting += len(key)
        if self.waiting > 2_000_000:
            self._merge()

    def _merge(self) -> None:
        parts = [(self.key, self.total, self.count), *self.parts]
        self.key, self.total, self.count = _sum_by_key(*(np.concatenate(column) for column in zip(*parts)))
        self.parts, self.waiting = [], 0
        if len(self.key) > self.limit * self.d_sae:
            self._take(self._ranked(self.limit // 2))

    def _ranked(self, n: int) -> np.ndarray:
        """Indices of the `n` largest sums of each latent, by latent and falling sum."""
        latent = self.key >> 32
        order = np.lexsort((self.key, -self.total, latent))
        return order[_rank_in_group(latent[order]) < n]

    def _take(self, index: np.ndarray) -> None:
        self.key, self.total, self.count = self.key[index], self.total[index], self.count[index]

    def finish(self, totals: Float[np.ndarray, " d_sae"]) -> dict[str, np.ndarray]:
        self._merge()
        self._take(self._ranked(N_TOKENS))
        latent, token = self.key >> 32, self.key & 0xFFFFFFFF
        place = latent, _rank_in_group(latent)
        shape = (self.d_sae, N_TOKENS)
        ids, count = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        share, mean = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        ids[place], count[place] = token, self.count
        share[place], mean[place] = self.total / totals[latent], self.total / self.count
        return {"token_ids": ids, "token_share": share, "token_mean": mean, "token_count": count}


def _sum_by_key(
    key: np.ndarray, total: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each key once, with the sums of what belongs to it."""
    if not len(key):
        return key, total, count
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    return key[first], np.add.reduceat(total[order], first), np.add.reduceat(count[order], first)


def _rank_in_group(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For sorted groups, each element's place in its own: 0, 1, 2, 0, 1 …"""
    index = np.arange(len(group))
    if not len(group):
        return index
    first = np.concatenate([[True], group[1:] != group[:-1]])
    return index - np.maximum.accumulate(np.where(first, index, 0))


def _grid_bin(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The quarter-octave that a positive value lies in."""
    with np.errstate(divide="ignore"):
        return np.clip(np.floor(4 * np.log2(values)) + _GRID // 2, 0, _GRID - 1).astype(np.int64)


def _shared_histogram(grid: Int[np.ndarray, "d_sae grid"]) -> tuple[np.ndarray, np.ndarray]:
    """The bins in use, at most `N_BINS`, the lowest taking in what lies below: (edges, counts)."""
    used = np.flatnonzero(grid.any(0))
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (_GRID // 2, _GRID // 2 + 1)
    first = max(first, end - N_BINS)
    counts = grid[:, first:end].copy()
    counts[:, 0] += grid[:, :first].sum(1)
    edges = 2.0 ** ((np.arange(first, end + 1) - _GRID // 2) / 4)
    edges[0] = 0
    return edges.astype(np.float32), counts


def _uniform(latent: np.ndarray, row: np.ndarray, seed: int) -> Float[np.ndarray, " n"]:
    """Numbers in (0, 1) that look random and follow from latent, row and seed (splitmix64)."""
    with np.errstate(over="ignore"):
        x = latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + row.astype(np.uint64)
        x += np.uint64((seed * 0xD1B54A32D192ED03) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float32) + 0.5) / 2**24


def _windows(
    latents: Float[Tensor, "rows pos d_sae"], row: Tensor, position: Tensor, latent: Tensor
) -> Int[Tensor, "n 31"]:
    """Activations around each position, in 255ths of the one there; 0 beyond the row's ends."""
    n_pos = latents.shape[1]
    around = position[:, None] + torch.arange(-WINDOW, WINDOW + 1, device=latents.device)
    inside = (around >= 0) & (around < n_pos)
    found = latents[row[:, None], around.clamp(0, n_pos - 1), latent[:, None]] * inside
    peak = found[:, WINDOW : WINDOW + 1]
    scaled = (found / peak * 255).round().clamp(max=255)
    return torch.where(found > 0, scaled.clamp(min=1), scaled).to(torch.uint8)


def _digest(sae: SAE) -> str:
    """A sha256 (hex) of the SAE's parameters and thresholds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _geometry(sae: SAE) -> dict[str, np.ndarray]:
    """Nearest decoder directions, and how far encoder and decoder agree."""
    decoder = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)
    encoder = torch.nn.functional.normalize(sae.W_enc.detach().float(), dim=0)
    one_space = not isinstance(sae, TranscoderSAE)
    n = min(N_NEIGHBOURS, sae.d_sae - 1)
    ids = np.full((sae.d_sae, N_NEIGHBOURS), -1, dtype=np.int64)
    cosines = np.zeros((sae.d_sae, N_NEIGHBOURS), dtype=np.float32)
    for part in sae.latent_chunks(1024):
        cosine = decoder[part] @ decoder.T
        own = torch.arange(part.start, part.stop, device=cosine.device)
        cosine[torch.arange(len(own), device=cosine.device), own] = -torch.inf
        values, nearest = cosine.topk(n, dim=1)
        ids[part, :n], cosines[part, :n] = nearest.cpu().numpy(), values.cpu().numpy()
    return {
        "neighbours": ids,
        "neighbour_cosine": cosines,
        "encoder_cosine": (encoder.T * decoder).sum(1).cpu().numpy()
        if one_space
        else np.full(sae.d_sae, np.nan, dtype=np.float32),
    }


@torch.no_grad()
def logit_effects(model: HookedModel, sae: SAE, site: str) -> dict[str, np.ndarray | None]:
    """What each decoder direction adds to the logits, up to the final norm's scale: `logit_ids` and `logit_values`, the tokens it
    changes most, and `logit_range` and `logit_histogram` of all.

    The direction goes straight to the unembedding, as though no later layer changed it, through the final
    norm's centring and gain. None for a model without LM head, or with one that is more than a matrix (BERT's), and
    for sites outside the residual stream.
    """
    name = model.site(site).name
    direct = name.rsplit(".", 1)[-1] in _RESIDUAL_SITES or name in ("hook_embed", "ln_final")
    if not (direct and sae.W_dec.shape[1] == model.d_model and has_linear_head(model)):
        return dict.fromkeys(("logit_ids", "logit_values", "logit_range", "logit_histogram"))
    W_U = model.W_U.detach().float()
    directions = sae.W_dec.detach().float().to(W_U.device)
    if name != "ln_final":
        directions = through_final_norm(model, directions)
    n = min(N_LOGITS, W_U.shape[1] // 2)
    ids, values, ranges, histograms = [], [], [], []
    for part in sae.latent_chunks(max(1, _LOGIT_ELEMENTS // W_U.shape[1])):
        logits = directions[part] @ W_U
        limits, counts = _histograms(logits)
        ranges.append(limits.cpu())
        histograms.append(counts.cpu())
        high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        ids.append(torch.cat([high.indices, low.indices.flip(1)], dim=1).cpu())
        values.append(torch.cat([high.values, low.values.flip(1)], dim=1).cpu())
    return {
        "logit_ids": torch.cat(ids).numpy(),
        "logit_values": torch.cat(values).numpy(),
        "logit_range": torch.cat(ranges).numpy(),
        "logit_histogram": torch.cat(histograms).numpy(),
    }


def _histograms(values: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n 2"], Int[Tensor, "n 30"]]:
    """(smallest and largest value, counts in bins of equal width between them) of each row."""
    low, high = values.aminmax(dim=1, keepdim=True)
    width = torch.where(high > low, high - low, 1)
    cell = ((values - low) * (LOGIT_BINS / width)).int().clamp_(max=LOGIT_BINS - 1)
    cell += LOGIT_BINS * torch.arange(len(values), device=values.device, dtype=torch.int32)[:, None]
    counts = torch.bincount(cell.flatten(), minlength=LOGIT_BINS * len(values))
    return torch.cat([low, high], 1), counts.view(-1, LOGIT_BINS).int()


def has_linear_head(model: HookedModel) -> bool:
    """Whether logits are a matrix times the final state, up to a bias and a soft cap: u(x) + u(-x) = 2 u(0)."""
    if not model.has_lm_head:
        return False
    x = torch.ones(model.d_model, device=model.W_U.device, dtype=model.W_U.dtype)
    x[::3] = -0.5
    try:
        there, back, zero = model.unembed(torch.stack([x, -x, 0 * x])).float()
    except InputError:
        return False
    return torch.allclose(there + back, 2 * zero, atol=2e-2 * float((there - zero).abs().max()))


def through_final_norm(model: HookedModel, directions: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Directions as the final norm passes them on, but for its division by the stream's size.

    The gain is read off the module's answer to a vector of mean 0 and variance 1, so it is right for every
    kind: LayerNorm, RMSNorm, Gemma's, or one whose gain was folded away.
    """
    site = model.sites.get("ln_final")
    if site is None or not site.verified:
        return directions
    norm = model.model.get_submodule(site.path)
    parameter = next(norm.parameters(), None)
    like = model.W_U if parameter is None else parameter
    x = torch.ones(directions.shape[1], device=like.device, dtype=like.dtype)
    x[1::2] = -1
    x = (x - x.mean()) / x.std(unbiased=False)

    def answer(v: Tensor) -> Tensor:
        return norm(v[None, None])[0, 0].float()

    gain = ((answer(x) - answer(-x)) / 2 / x.float()).to(directions.device)
    if torch.allclose(answer(x + 1), answer(x), atol=1e-2 * float(answer(x).abs().max())):
        directions = directions - directions.mean(1, keepdim=True)
    return directions * gain
