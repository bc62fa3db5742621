"""Activations: collected from a few texts, or streamed in shuffled batches from a large corpus.

    acts = collect(model, ["The fox sleeps."], "blocks.2.hook_resid_post")    # {site: (n_tokens, width)}
    stream = ActivationStream(model, documents, "blocks.2.hook_resid_post", batch_size=4096, seed=0)
    batch = next(stream)                                                      # {site: (4096, width)}, endless

How the stream shuffles. Documents are permuted anew for each pass. Their rows are read into a *block* of
about `block_tokens` tokens, in forwards of rows of like length; a block's tokens are permuted, and batches
are cut from one block after another. All of it follows from (seed, pass, block), so the state of a stream is
a few integers, and a resumed stream computes its block again, to the last bit. The next block can be computed
in a thread while the present one is consumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit import distributed
from steerkit.blocks import Block, Statistics, is_sink, read_block, sink_threshold, site_names
from steerkit.data import Documents, Permutation, load_documents
from steerkit.errors import CheckpointError, InputError
from steerkit.tokens import (
    BATCH_TOKENS,
    Cursor,
    Layout,
    Model,
    Row,
    RowReader,
    TokenBatch,
    Tokenization,
    take_rows,
    token_batches,
)

__all__ = [
    "ActivationStream",
    "Activations",
    "Columns",
    "Layout",
    "Statistics",
    "TokenBatch",
    "Tokenization",
    "collect",
    "is_sink",
    "sink_threshold",
    "token_batches",
]


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
    **options: Any,
) -> Activations:
    """All activations of some texts at `sites`, in memory, tokens in the order of the text.

    `options` are fields of `Tokenization`, such as `packing=True`; they go before those of `tokenization`.
    Pads are left out, special and sink tokens as the tokenization says, sinks by the norms of these very
    tokens. Raises InputError when not one token is left, NumericsError on NaN or inf.
    """
    sites = site_names(sites)
    tokenization = replace(tokenization or Tokenization(), **options)
    reader = RowReader(model, load_documents(documents), tokenization)
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


@dataclass(frozen=True)
class _Place:
    """Where a block begins."""

    passes: int = 0
    document: int = 0
    token: int = 0
    block: int = 0


class Columns(Protocol):
    """What stands beside activations, token by token; `steerkit.labels.TokenLabels` does."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def __call__(
        self, document: Int[np.ndarray, " n"], position: Int[np.ndarray, " n"]
    ) -> dict[str, Float[Tensor, " n"]]: ...


class ActivationStream:
    """Endless shuffled batches `{site: (batch_size, width)}` of a model's activations, pass after pass over
    the documents.

    With `shared` the processes of a distributed run make each block together, and each gets its share of
    every batch, the first rank the first rows: end to end they are what one process gets.

    `columns` are handed out beside the activations, row by row, under their names. Passes over the text are
    shuffled anew each time. `state_dict()` is small, plain (JSON) data; after `load_state_dict` a stream made
    with the same arguments goes on with bit-identical batches.
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
        columns: Columns | None = None,
        shared: bool = False,
    ) -> None:
        self.sites = site_names(sites)
        self.columns = columns
        self.documents = load_documents(documents)
        self.batch_size, self.block_tokens, self.batch_tokens = batch_size, block_tokens, batch_tokens
        self.seed, self.dtype = seed, dtype
        self.prefetch = model.device.type == "cuda" if prefetch == "auto" else prefetch
        self.shared = shared
        if shared and distributed.world_size() > 1:
            self.prefetch = False  # ranks must not speak to each other from two threads at once
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
        self._spare_buffers: list[dict[str, Tensor]] = []
        self._cuda_stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

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
        whole = pieces[0]
        if len(pieces) > 1:
            whole = {name: torch.cat([piece[name] for piece in pieces]) for name in whole}
        if not self.shared:
            return whole
        mine = distributed.share(self.batch_size)
        return {name: values[mine] for name, values in whole.items()}

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
        """Go on where `state` was taken. Raises CheckpointError if the stream was made with other
        arguments."""
        require_same(self._made_with(), state["made_with"])
        self.close()
        self._block = None
        self._place = _Place(**state["place"])
        self._offset = state["offset"]
        self.tokens = state["tokens"]
        self._statistics = {site: Statistics.from_dict(s) for site, s in state["statistics"].items()}

    def close(self) -> None:
        """Stop the thread, if one is at work. The stream can still be used: it computes again what is
        missing."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None
        self._rows = None

    def _made_with(self) -> dict[str, Any]:
        columns = {} if self.columns is None else {"columns": list(self.columns.names)}
        return {
            **columns,
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
                self._release(self._block)
                self._block = None
            self._block = self._take(self._place)
        if self.prefetch:
            self._ahead = _Ahead(partial(self._compute_beside, self._block.next))
        return self._block

    def _release(self, block: _ShuffledBlock) -> None:
        """Keep a block's memory for a later one. On CUDA the allocator does so, which knows what is still
        being read."""
        if self._cuda_stream is None:
            self._spare_buffers.append(block.buffers)

    def _take(self, place: _Place) -> _ShuffledBlock:
        block, seconds = self._ahead.result() if self._ahead is not None else self._compute(place)
        self._ahead = None
        self.seconds_model += seconds
        for acts in block.acts.values():
            if acts.is_cuda:
                acts.record_stream(torch.cuda.current_stream(acts.device))
        return block

    def _compute_beside(self, place: _Place, cancelled: Callable[[], bool]) -> tuple[_ShuffledBlock, float]:
        """`_compute` for the thread: on a CUDA stream of its own, whose work is done when this returns."""
        if self._cuda_stream is None:
            return self._compute(place, cancelled)
        self._cuda_stream.wait_stream(torch.cuda.default_stream(self._cuda_stream.device))
        with torch.cuda.stream(self._cuda_stream):
            block, seconds = self._compute(place, cancelled)
        self._cuda_stream.synchronize()
        return block, seconds

    def _compute(
        self, place: _Place, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[_ShuffledBlock, float]:
        started = time.perf_counter()
        rows, after = self._read_rows(place)
        buffers = self._spare_buffers.pop() if self._spare_buffers else {}
        whole = read_block(
            self._reader,
            rows,
            self.sites,
            batch_tokens=self.batch_tokens,
            buffers=buffers,
            place=f" of block {place.block}",
            cancelled=cancelled,
            shared=self.shared,
        )
        known = {site: s.sink_threshold for site, s in self._statistics.items()}
        thresholds = known or whole.sink_thresholds(self.layout)
        block = whole.without_sinks(thresholds)
        if not known and len(block):
            self._statistics = {
                site: Statistics.of(block.acts[site], site, thresholds[site]) for site in self.sites
            }
        if not len(block) and (place.document, place.token) == (0, 0) and after.passes > place.passes:
            raise InputError(
                f"{self.documents.name}: not one token that counts, without special and sink tokens."
            )
        columns = {} if self.columns is None else self.columns(block.document, block.position)
        order = self._permutation(place.block, len(block))
        shuffled = _ShuffledBlock({**block.acts, **columns}, order, after, buffers)
        return shuffled, time.perf_counter() - started

    def _read_rows(self, place: _Place) -> tuple[list[Row], _Place]:
        """The rows of the block that begins at `place`, and where the next one begins."""
        known, self._rows = self._rows, None
        if known is not None and known[0] == place:
            source = known[1]
        else:
            order = Permutation(len(self.documents), self.seed, place.passes)
            source = self._reader.rows(Cursor(place.document, place.token), order)
        rows, complete = take_rows(source, self.block_tokens)
        end = rows[-1].end if complete else Cursor(len(self.documents))
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
    buffers: dict[str, Tensor]
    """The memory that `acts` lie in."""

    def __len__(self) -> int:
        return len(self.order)

    def cut(self, start: int, stop: int) -> dict[str, Tensor]:
        chosen = self.order[start:stop]
        return {site: acts[chosen.to(acts.device)] for site, acts in self.acts.items()}


class _Ahead(threading.Thread):
    """One piece of work in a thread. It stops at the next forward when it is cancelled or the main thread has
    ended."""

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


def require_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a stream is resumed with other settings than it was made with."""
    for key, value in here.items():
        if there.get(key) != value:
            raise CheckpointError(
                f"The checkpoint's stream was made with another {key} ({there.get(key)!r}, here {value!r}): "
                "resume with the same settings."
            )
