"""Activations: collected from a few texts, or streamed in shuffled batches from a large corpus.

    acts = collect(model, ["The fox sleeps."], ["blocks.2.hook_resid_post"])       # {site: (n_tokens, width)}
    stream = ActivationStream(model, documents, ["blocks.2.hook_resid_post"], batch_size=4096, seed=0)
    batch = next(stream)                                                           # {site: (4096, width)}, without end

How the stream shuffles. Documents are permuted anew for each pass. Their rows are read into a *block* of about `block_tokens`
tokens, in forwards of rows of like length; a block's tokens are permuted, and batches are cut from one block after another. All
of it follows from (seed, pass, block), so the state of a stream is a few integers, and a resumed stream computes its block
again, to the last bit. The next block can be computed in a thread while the present one is consumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.data import Documents, Permutation, load_documents
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.tokens import (
    BATCH_TOKENS,
    Cursor,
    Layout,
    Model,
    Row,
    RowReader,
    TokenBatch,
    Tokenization,
    length_sorted,
    token_batches,
)

__all__ = [
    "ActivationStream",
    "Activations",
    "Block",
    "Layout",
    "Statistics",
    "TokenBatch",
    "Tokenization",
    "collect",
    "is_sink",
    "read_block",
    "sink_threshold",
    "token_batches",
]

SINK_FACTOR = 10.0
"""A token is a sink where its norm is more than this many times the median."""


def sink_threshold(norms: Float[Tensor, " n"]) -> float:
    """The norm above which a token is an attention sink at a site: ten times the median norm of a first lot of tokens.

    Sinks (often a row's first token, some delimiters) have norms tens to hundreds of times those of other tokens and would
    dominate every mean square; the norms of ordinary tokens lie within a factor of a few. The rule asks for no position, and
    where there are no sinks it finds none.
    """
    return SINK_FACTOR * float(norms.median())


def is_sink(acts: Float[Tensor, "*batch width"], threshold: float | None) -> Bool[Tensor, "*batch"]:
    """Which tokens are sinks; none if `threshold` is None."""
    if threshold is None:
        return torch.zeros(acts.shape[:-1], dtype=torch.bool, device=acts.device)
    return _norms(acts) > threshold


@dataclass(frozen=True)
class Statistics:
    """What is measured once at a site, on the tokens of a first block that count."""

    mean: Float[Tensor, " width"]
    scale: float
    """The factor that brings the mean squared L2 norm of activations to `width` (unit mean square per coordinate)."""
    sink_threshold: float | None
    """Tokens of a greater norm are sinks; None if sinks are kept."""
    tokens: int
    """How many tokens were measured."""

    @classmethod
    def of(cls, acts: Float[Tensor, "n width"], site: str, threshold: float | None) -> Statistics:
        """Measure activations that hold no sinks. Raises NumericsError if they are all zero."""
        total = torch.zeros(acts.shape[1], dtype=torch.float64, device=acts.device)
        squares = 0.0
        for chunk in acts.split(8192):
            total += chunk.double().sum(0)
            squares += float(chunk.double().square().sum())
        if squares == 0.0:
            raise NumericsError(f"All activations at {site} are zero: there is nothing to learn from them.")
        scale = (acts.shape[1] * len(acts) / squares) ** 0.5
        return cls((total / len(acts)).float().cpu(), scale, threshold, len(acts))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        return cls(**{**values, "mean": torch.tensor(values["mean"])})


class Activations(Mapping[str, Tensor]):
    """Activations of some texts: `acts[site]` is (n_tokens, width), tokens in the order of the text."""

    def __init__(self, block: Block, statistics: dict[str, Statistics]) -> None:
        self._acts = block.acts
        self.token_ids: Int[Tensor, " n"] = torch.from_numpy(block.token_ids)
        self.document: Int[Tensor, " n"] = torch.from_numpy(block.document)
        """Index of each token's text."""
        self.position: Int[Tensor, " n"] = torch.from_numpy(block.position)
        """Where in its text's tokens each token stands; −1 for BOS and the like, if they are kept."""
        self.statistics = statistics

    def __getitem__(self, site: str) -> Float[Tensor, "n width"]:
        return self._acts[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._acts)

    def __len__(self) -> int:
        return len(self._acts)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site}: {tuple(acts.shape)}" for site, acts in self._acts.items())
        texts = len(self.document.unique())
        return f"Activations({len(self.token_ids):,} tokens of {texts:,} texts; {sites})"


def collect(
    model: Model,
    documents: Documents | Sequence[str],
    sites: Sequence[str] | str,
    *,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype = torch.float32,
) -> Activations:
    """All activations of some texts at `sites`, in memory, tokens in the order of the text.

    Pads are left out, special and sink tokens as `tokenization` says (sinks by the norms of these very tokens). Raises InputError
    when not one token is left, NumericsError on NaN or inf.
    """
    sites = _site_names(sites)
    reader = RowReader(model, load_documents(documents), tokenization or Tokenization())
    rows = list(reader.up_to(reader.rows(), max_tokens))
    block = read_block(reader, rows, sites, batch_tokens=batch_tokens)
    thresholds = block.sink_thresholds(reader.layout)
    block = block.without_sinks(thresholds).in_text_order()
    if not len(block):
        raise InputError(
            f"{reader.documents.name}: not one token that counts, without special and sink tokens."
        )
    statistics = {site: Statistics.of(block.acts[site], site, thresholds[site]) for site in sites}
    block.acts = {site: acts.to(dtype) for site, acts in block.acts.items()}
    return Activations(block, statistics)


@dataclass
class Block:
    """Activations of whole rows, token by token, in the order in which they were computed."""

    acts: dict[str, Float[Tensor, "n width"]]
    norms: dict[str, Float[Tensor, " n"]]
    token_ids: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    """Which of the block's rows each token belongs to."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def sink_thresholds(self, layout: Layout) -> dict[str, float | None]:
        """The thresholds per site that this block's norms give; None each if sinks are kept."""
        if not layout.drop_sinks or not len(self):
            return dict.fromkeys(self.acts)
        return {site: sink_threshold(norms) for site, norms in self.norms.items()}

    def without_sinks(self, thresholds: Mapping[str, float | None]) -> Block:
        """The block without the tokens that are sinks at any of its sites."""
        sink = np.zeros(len(self), dtype=bool)
        for site, threshold in thresholds.items():
            if threshold is not None:
                sink |= (self.norms[site] > threshold).cpu().numpy()
        return self._take(np.flatnonzero(~sink)) if sink.any() else self

    def in_text_order(self) -> Block:
        """The block's tokens row by row, as the text has them."""
        return self._take(np.argsort(self.row, kind="stable"))

    def _take(self, index: np.ndarray) -> Block:
        chosen = torch.from_numpy(index)
        return Block(
            {site: acts[chosen.to(acts.device)] for site, acts in self.acts.items()},
            {site: norms[chosen.to(norms.device)] for site, norms in self.norms.items()},
            *(array[index] for array in (self.token_ids, self.document, self.position, self.row)),
        )


class _Cancelled(Exception):
    pass


def read_block(
    reader: RowReader,
    rows: Sequence[Row],
    sites: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    place: str = "",
    cancelled: Callable[[], bool] = lambda: False,
) -> Block:
    """Run the model over `rows` in batches of like length and keep the tokens that count.

    Raises NumericsError, naming site, `place` and documents, on NaN or inf.
    """
    n = sum(row.n_kept for row in rows)
    acts: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    index = np.empty((4, n), dtype=np.int64)
    at = 0
    number = {id(row): i for i, row in enumerate(rows)}
    for group in length_sorted(rows, batch_tokens):
        if cancelled():
            raise _Cancelled
        batch = reader.batch(group)
        found = _forward(reader.model, batch, sites)
        keep = batch.keep.cpu().numpy().ravel()
        kept = np.flatnonzero(keep)
        here = slice(at, at + len(kept))
        at = here.stop
        width = batch.input_ids.shape[1]
        index[0, here] = batch.input_ids.cpu().numpy().ravel()[kept]
        index[1, here] = batch.token_document.numpy().ravel()[kept]
        index[2, here] = batch.token_position.numpy().ravel()[kept]
        index[3, here] = np.array([number[id(row)] for row in group])[kept // width]
        for site in sites:
            flat = found[site].flatten(0, 1)
            if site not in acts:
                acts[site] = flat.new_empty((n, flat.shape[1]))
                norms[site] = flat.new_empty(n, dtype=torch.float32)
            torch.index_select(flat, 0, torch.from_numpy(kept).to(flat.device), out=acts[site][here])
            norms[site][here] = _norms(acts[site][here])
            if not norms[site][here].isfinite().all():
                raise _not_finite(site, place, acts[site][here], index[1, here])
    return Block(acts, norms, *index)


@torch.no_grad()
def _forward(model: Model, batch: TokenBatch, sites: Sequence[str]) -> dict[str, Tensor]:
    """Pads on the right of a causal model change nothing before them, so it needs no mask (and attention is faster)."""
    return model.run(batch.input_ids, None if model.is_causal else batch.attention_mask, sites=sites)


def _norms(acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)


def _not_finite(site: str, place: str, acts: Tensor, document: np.ndarray) -> NumericsError:
    wrong = (~acts.isfinite().all(-1)).nonzero().flatten().cpu().numpy()
    documents = sorted({int(d) for d in document[wrong]})[:5]
    return NumericsError(
        f"NaN or inf at {site} in {len(wrong)} tokens{place} (documents {', '.join(map(str, documents))}). "
        "Check the model's weights, or load it in float32 or bfloat16."
    )


@dataclass(frozen=True)
class _Place:
    """Where a block begins."""

    passes: int = 0
    document: int = 0
    token: int = 0
    block: int = 0


class ActivationStream:
    """Endless shuffled batches `{site: (batch_size, width)}` of a model's activations, pass after pass over the documents.

    Passes over the text are shuffled anew each time. `state_dict()` is small, plain (JSON) data; after `load_state_dict` a stream
    made with the same arguments goes on with bit-identical batches.
    """

    def __init__(
        self,
        model: Model,
        documents: Documents | Sequence[str],
        sites: Sequence[str] | str,
        *,
        tokenization: Tokenization | None = None,
        batch_size: int = 4096,
        block_tokens: int = 65_536,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        prefetch: bool | Literal["auto"] = "auto",
    ) -> None:
        self.sites = _site_names(sites)
        self.documents = load_documents(documents)
        self.batch_size, self.block_tokens, self.batch_tokens = batch_size, block_tokens, batch_tokens
        self.seed, self.dtype = seed, dtype
        self.prefetch = model.device.type == "cuda" if prefetch == "auto" else prefetch
        self.tokens = 0
        """Tokens given out."""
        self.seconds_model = 0.0
        """Time spent on text and model, in whichever thread."""
        self._reader = RowReader(model, self.documents, tokenization or Tokenization())
        self._statistics: dict[str, Statistics] = {}
        self._place = _Place()
        self._offset = 0
        self._block: _ShuffledBlock | None = None
        self._ahead: _Ahead | None = None
        self._rows: tuple[_Place, Iterator[Row]] | None = None

    @property
    def layout(self) -> Layout:
        """The resolved tokenization."""
        return self._reader.layout

    @property
    def passes(self) -> int:
        """Passes over the documents that have been completed."""
        return self._place.passes

    def statistics(self, site: str) -> Statistics:
        """Mean, scale and sink threshold of a site, measured on the stream's first block."""
        if not self._statistics:
            self._current()
        return self._statistics[site]

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch width"]]:
        pieces: list[dict[str, Tensor]] = []
        missing = self.batch_size
        while missing:
            block = self._current()
            end = min(self._offset + missing, len(block))
            pieces.append({site: acts.to(self.dtype) for site, acts in block.cut(self._offset, end).items()})
            missing -= end - self._offset
            self._offset = end
        self.tokens += self.batch_size
        if len(pieces) == 1:
            return pieces[0]
        return {site: torch.cat([piece[site] for piece in pieces]) for site in self.sites}

    def state_dict(self) -> dict[str, Any]:
        """The stream's place, and what it was made with, as plain data."""
        return {
            "made_with": self._made_with(),
            "place": asdict(self._place),
            "offset": self._offset,
            "tokens": self.tokens,
            "statistics": {site: statistics.to_dict() for site, statistics in self._statistics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if the stream was made with other arguments."""
        mine, theirs = self._made_with(), state["made_with"]
        for key in mine:
            if mine[key] != theirs.get(key):
                raise CheckpointError(
                    f"The checkpoint's stream was made with another {key} ({theirs.get(key)!r}, here {mine[key]!r}): "
                    "resume with the same settings."
                )
        self.close()
        self._block = None
        self._place = _Place(**state["place"])
        self._offset = state["offset"]
        self.tokens = state["tokens"]
        self._statistics = {site: Statistics.from_dict(s) for site, s in state["statistics"].items()}

    def close(self) -> None:
        """Stop the thread, if one is at work. The stream can still be used: it computes what is missing again.

        Call it before the model is used for something else between two batches; hooks would be seen by the thread too.
        """
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None
        self._rows = None

    def _made_with(self) -> dict[str, Any]:
        return {
            "documents": self.documents.fingerprint(),
            "sites": list(self.sites),
            "layout": self.layout.to_dict(),
            "batch_size": self.batch_size,
            "block_tokens": self.block_tokens,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
            "dtype": str(self.dtype),
        }

    def _current(self) -> _ShuffledBlock:
        """The block that the next token is in."""
        if self._block is not None and self._offset < len(self._block):
            return self._block
        while self._block is None or self._offset >= len(self._block):
            if self._block is not None:
                self._place, self._offset = self._block.next, 0
                self._block = None
            self._block = self._take(self._place)
        if self.prefetch:
            self._ahead = _Ahead(partial(self._compute, self._block.next))
        return self._block

    def _take(self, place: _Place) -> _ShuffledBlock:
        block, seconds = self._ahead.result() if self._ahead is not None else self._compute(place)
        self._ahead = None
        self.seconds_model += seconds
        return block

    def _compute(
        self, place: _Place, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[_ShuffledBlock, float]:
        started = time.perf_counter()
        rows, after = self._read_rows(place)
        where = f" of block {place.block}"
        block = read_block(
            self._reader, rows, self.sites, batch_tokens=self.batch_tokens, place=where, cancelled=cancelled
        )
        if not self._statistics:
            thresholds = block.sink_thresholds(self.layout)
            block = block.without_sinks(thresholds)
            if len(block):
                self._statistics = {
                    site: Statistics.of(block.acts[site], site, thresholds[site]) for site in self.sites
                }
        else:
            block = block.without_sinks({site: s.sink_threshold for site, s in self._statistics.items()})
        if not len(block) and (place.document, place.token) == (0, 0) and after.passes > place.passes:
            raise InputError(
                f"{self.documents.name}: not one token that counts, without special and sink tokens."
            )
        return _ShuffledBlock(
            block.acts, self._permutation(place.block, len(block)), after
        ), time.perf_counter() - started

    def _read_rows(self, place: _Place) -> tuple[list[Row], _Place]:
        """The rows of the block that begins at `place`, and where the next one begins."""
        known, self._rows = self._rows, None
        if known is not None and known[0] == place:
            source = known[1]
        else:
            order = Permutation(len(self.documents), self.seed, place.passes)
            source = self._reader.rows(Cursor(place.document, place.token), order)
        rows: list[Row] = []
        n = 0
        for row in source:
            rows.append(row)
            n += row.n_kept
            if n >= self.block_tokens:
                break
        end = rows[-1].end if n >= self.block_tokens else Cursor(len(self.documents))
        if end.document >= len(self.documents):
            return rows, _Place(place.passes + 1, 0, 0, place.block + 1)
        after = _Place(place.passes, end.document, end.token, place.block + 1)
        self._rows = after, source
        return rows, after

    def _permutation(self, block: int, n: int) -> Int[Tensor, " n"]:
        state = np.random.SeedSequence([self.seed, block]).generate_state(1, np.uint64)
        return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0]) >> 1))


@dataclass
class _ShuffledBlock:
    acts: dict[str, Tensor]
    order: Tensor
    next: _Place

    def __len__(self) -> int:
        return len(self.order)

    def cut(self, start: int, stop: int) -> dict[str, Tensor]:
        chosen = self.order[start:stop]
        return {site: acts[chosen.to(acts.device)] for site, acts in self.acts.items()}


class _Ahead(threading.Thread):
    """One piece of work in a thread. It stops at the next forward when it is cancelled or the main thread has ended."""

    def __init__(self, work: Callable[[Callable[[], bool]], Any]) -> None:
        super().__init__(name="steerkit-activations")
        self._work = work
        self._stop_asked = threading.Event()
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self.start()

    def run(self) -> None:
        main = threading.main_thread()
        try:
            self._outcome = self._work(lambda: self._stop_asked.is_set() or not main.is_alive()), None
        except BaseException as error:
            self._outcome = None, error

    def result(self) -> Any:
        """What the work returned; raises what it raised."""
        self.join()
        value, error = self._outcome
        if error is not None:
            raise error
        return value

    def cancel(self) -> None:
        self._stop_asked.set()
        self.join()


def _site_names(sites: Sequence[str] | str) -> tuple[str, ...]:
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names:
        raise InputError("No site is named: give at least one, such as 'blocks.2.hook_resid_post'.")
    return names
