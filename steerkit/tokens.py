"""From documents to rows of tokens and padded batches.

    tokenization = Tokenization(context=128, packing=True)
    for batch in token_batches(model, documents, tokenization):
        model.logits(batch.input_ids, batch.attention_mask)[batch.keep]

A row is `prefix + text + suffix`: BOS before the text, or CLS before and SEP after it, as the tokenizer has
it. Without packing a row holds text of one document, and a document that is too long for one row is cut into
several. With packing, documents are laid end to end – with the tokenizer's EOS between them, for causal
models that have one – and cut into full rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steerkit.data import Documents, load_documents
from steerkit.errors import InputError

DEFAULT_CONTEXT = 512
BATCH_TOKENS = 8192
_WINDOW = 32
"""Rows are sorted by length among this many batches' worth of tokens."""
_TOKENIZER_DOCUMENTS = 256
_TOKENIZER_CHARACTERS = 1_000_000


class Model(Protocol):
    """What activations need of a model; `steerkit.models.HookedModel` is one."""

    name: str
    tokenizer: Any
    special_ids: frozenset[int]

    @property
    def device(self) -> torch.device: ...
    @property
    def context(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...
    @property
    def is_causal(self) -> bool: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sites: Sequence[str],
        stop: bool = True,
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Tokenization:
    """How text becomes rows of tokens, and which tokens count."""

    context: int | None = None
    """Tokens a row, special ones included; by default what the model has, at most 512."""
    packing: bool = False
    """Lay documents end to end and cut them into full rows, rather than one document a row."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Special tokens around each row. `auto`: as the tokenizer does for a single text (BOS, CLS … SEP, or
    nothing); `always`: a BOS even if the tokenizer adds none; `never`: none."""
    chat_template: bool = False
    """Each document is a user's message, put into the tokenizer's chat template."""
    drop_special: bool = True
    """Special tokens (BOS, EOS, CLS, SEP …; unknown words are text) do not count."""
    drop_sinks: bool = True
    """Tokens of extreme norm (attention sinks) do not count; see `steerkit.activations.sink_threshold`."""

    def resolve(self, model: Model) -> Layout:
        """The layout of rows for a model. Raises InputError when the model or its tokenizer cannot do what is
        asked."""
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer: load the model with tokenizer=….")
        if self.bos not in ("auto", "always", "never"):
            raise InputError(f"bos is {self.bos!r}: choose auto, always or never.")
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"The tokenizer of {model.name} has no chat template: leave out chat_template.")
        context = self.context if self.context is not None else min(model.context, DEFAULT_CONTEXT)
        if context > model.context:
            raise InputError(
                f"A context of {context} is longer than {model.name}'s {model.context}: give at most that."
            )
        prefix, suffix = _affixes(tokenizer)
        if self.bos == "never":
            prefix, suffix = (), ()
        elif self.bos == "always" and not prefix:
            if model.bos_id is None:
                raise InputError(
                    f"The tokenizer of {model.name} has no BOS token: use bos='auto' or 'never'."
                )
            prefix = (model.bos_id,)
        if context <= len(prefix) + len(suffix):
            needed = len(prefix) + len(suffix) + 1
            raise InputError(
                f"A context of {context} leaves no room for text: {model.name} needs at least {needed}."
            )
        eos = getattr(tokenizer, "eos_token_id", None)
        separator = eos if self.packing and model.is_causal else None
        return Layout(
            context,
            self.packing,
            prefix,
            suffix,
            separator,
            self.chat_template,
            self.drop_special,
            self.drop_sinks,
        )


@dataclass(frozen=True)
class Layout:
    """A `Tokenization` resolved for one model: exact token ids, as recorded with everything made from it."""

    context: int
    packing: bool
    prefix: tuple[int, ...]
    """Token ids before the text of each row."""
    suffix: tuple[int, ...]
    """Token ids after the text of each row."""
    separator: int | None
    """Token id between packed documents."""
    chat_template: bool
    drop_special: bool
    drop_sinks: bool

    @property
    def capacity(self) -> int:
        """Text tokens that fit a row."""
        return self.context - len(self.prefix) - len(self.suffix)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prefix": list(self.prefix), "suffix": list(self.suffix)}


@dataclass(frozen=True)
class Cursor:
    """A place in a sequence of documents: token `token` of the `document`-th."""

    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Row:
    """The text tokens of one row, where they come from, and where the next row begins."""

    ids: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    n_kept: int
    end: Cursor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class TokenBatch:
    """Right-padded rows of tokens."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    """The tokens that count: no pads, and no special tokens if those are dropped. (Sinks are known only after
    the forward.)"""
    document: Int[Tensor, " batch"]
    """Index of the document of each row's first text token."""
    offset: Int[Tensor, " batch"]
    """Where in its document that token stands."""
    token_document: Int[Tensor, "batch pos"]
    """Index of each token's document; for tokens around the text that of the row's first; −1 for pads."""
    token_position: Int[Tensor, "batch pos"]
    """Where in its document each token stands; −1 for pads and tokens around the text."""

    @property
    def n_kept(self) -> int:
        return int(self.keep.sum())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def token_batches(
    model: Model,
    documents: Documents | Sequence[str],
    tokenization: Tokenization | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[TokenBatch]:
    """Batches of at most `batch_tokens` tokens (pads included; one row at least), rows of like length
    together.

    Takes the documents in `order` (default: as they stand) until `max_tokens` tokens that count; the last row
    is cut so that it is never more. Deterministic. Raises InputError if there is not one token that counts.
    """
    reader = RowReader(model, load_documents(documents), tokenization or Tokenization())
    n_kept = 0
    rows = reader.up_to(reader.rows(order=order), max_tokens)
    more = True
    while more:
        window, more = take_rows(rows, _WINDOW * batch_tokens)
        for group in length_sorted(window, batch_tokens):
            n_kept += sum(row.n_kept for row in group)
            yield reader.batch(group).to(model.device)
    if not n_kept:
        raise InputError(
            f"{reader.documents.name}: not one token that counts, when special tokens are left out."
        )


class RowReader:
    """Turns documents into rows of tokens, and rows into batches."""

    def __init__(self, model: Model, documents: Documents, tokenization: Tokenization) -> None:
        self.model = model
        self.documents = documents
        self.layout = tokenization.resolve(model)

    def rows(self, start: Cursor = Cursor(), order: Sequence[int] | None = None) -> Iterator[Row]:
        """The rows from `start` on, in the order in which `order` gives the documents' indices."""
        order = range(len(self.documents)) if order is None else order
        cut = self._packed if self.layout.packing else self._one_a_row
        return cut(start, order)

    def up_to(self, rows: Iterator[Row], max_tokens: int | None) -> Iterator[Row]:
        """`rows` until `max_tokens` tokens that count, the last row cut."""
        left = max_tokens
        for row in rows:
            if left is not None and row.n_kept >= left:
                yield self._shortened(row, left)
                return
            if left is not None:
                left -= row.n_kept
            yield row

    def batch(self, rows: Sequence[Row]) -> TokenBatch:
        layout = self.layout
        first, width = len(layout.prefix), len(layout.prefix) + max(map(len, rows)) + len(layout.suffix)
        ids = np.full((len(rows), width), self.model.pad_id, dtype=np.int64)
        real = np.zeros(ids.shape, dtype=bool)
        document = np.full(ids.shape, -1, dtype=np.int64)
        position = document.copy()
        for i, row in enumerate(rows):
            text = slice(first, first + len(row))
            end = text.stop + len(layout.suffix)
            ids[i, :first] = layout.prefix
            ids[i, text] = row.ids
            ids[i, text.stop : end] = layout.suffix
            real[i, :end] = True
            document[i, :end] = row.document[0]
            document[i, text] = row.document
            position[i, text] = row.position
        keep = real & ~self._is_special[ids] if layout.drop_special else real
        row_starts = (document[:, first].copy(), position[:, first].copy())
        arrays = (ids, real.astype(np.int64), keep, *row_starts, document, position)
        return TokenBatch(*map(torch.from_numpy, arrays))

    def _one_a_row(self, start: Cursor, order: Sequence[int]) -> Iterator[Row]:
        capacity = self.layout.capacity
        for rank, index, ids in self._token_ids(start.document, order):
            first = start.token if rank == start.document else 0
            for begin in range(first, len(ids), capacity):
                end = begin + capacity
                text = ids[begin:end]
                cursor = Cursor(rank, end) if end < len(ids) else Cursor(rank + 1)
                position = np.arange(begin, begin + len(text))
                yield self._row(text, np.full(len(text), index), position, cursor)

    def _packed(self, start: Cursor, order: Sequence[int]) -> Iterator[Row]:
        capacity, separator = self.layout.capacity, self.layout.separator
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        n = 0
        for rank, index, ids in self._token_ids(start.document, order):
            if separator is not None and len(ids):
                ids = np.append(ids, separator)
            begin = start.token if rank == start.document else 0
            while begin < len(ids):
                text = ids[begin : begin + capacity - n]
                parts.append((text, np.full(len(text), index), np.arange(begin, begin + len(text))))
                begin, n = begin + len(text), n + len(text)
                if n == capacity:
                    cursor = Cursor(rank, begin) if begin < len(ids) else Cursor(rank + 1)
                    yield self._joined(parts, cursor)
                    parts, n = [], 0
        if parts:
            yield self._joined(parts, Cursor(len(order)))

    def _joined(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], end: Cursor) -> Row:
        ids, document, position = (np.concatenate(part) for part in zip(*parts))
        return self._row(ids, document, position, end)

    def _row(self, ids: np.ndarray, document: np.ndarray, position: np.ndarray, end: Cursor) -> Row:
        layout = self.layout
        n_kept = len(ids) - int(self._is_special[ids].sum()) if layout.drop_special else len(ids)
        if not layout.drop_special:
            n_kept += len(layout.prefix) + len(layout.suffix)
        return Row(ids, document, position, n_kept, end)

    def _shortened(self, row: Row, n_kept: int) -> Row:
        """`row` cut after as much text as leaves at most `n_kept` tokens that count (one text token at
        least)."""
        layout = self.layout
        if row.n_kept <= n_kept:
            return row
        counts = ~self._is_special[row.ids] if layout.drop_special else np.ones(len(row), dtype=bool)
        around = 0 if layout.drop_special else len(layout.prefix) + len(layout.suffix)
        end = max(1, int(np.searchsorted(np.cumsum(counts), n_kept - around, side="right")))
        return self._row(row.ids[:end], row.document[:end], row.position[:end], row.end)

    def _token_ids(self, first: int, order: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """(rank in `order`, document, its tokens without special ones around), tokenised a few hundred
        documents at a time."""
        ranks = iter(range(first, len(order)))
        while True:
            chunk: list[tuple[int, int, str]] = []
            characters = 0
            for rank in itertools.islice(ranks, _TOKENIZER_DOCUMENTS):
                index = int(order[rank])
                chunk.append((rank, index, self.documents[index]))
                characters += len(chunk[-1][2])
                if characters > _TOKENIZER_CHARACTERS:
                    break
            if not chunk:
                return
            for (rank, index, _), ids in zip(chunk, self._encode([text for _, _, text in chunk])):
                yield rank, index, ids

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        tokenizer, prefix = self.model.tokenizer, list(self.layout.prefix)
        if self.layout.chat_template:
            messages = [[{"role": "user", "content": text}] for text in texts]
            texts = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if self.layout.chat_template and prefix:
            encoded = [ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids for ids in encoded]
        arrays = [np.array(ids, dtype=np.int64) for ids in encoded]
        highest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
        if highest >= self.model.d_vocab:
            raise InputError(
                f"The tokenizer makes token {highest}, but {self.model.name} knows only "
                f"{self.model.d_vocab}: they do not belong together."
            )
        return arrays

    @cached_property
    def _is_special(self) -> Bool[np.ndarray, " d_vocab"]:
        special = self.model.special_ids | {*self.layout.prefix, *self.layout.suffix}
        if self.layout.separator is not None:
            special |= {self.layout.separator}
        lookup = np.zeros(
            max(self.model.d_vocab, self.model.pad_id + 1, *(i + 1 for i in special), 1), dtype=bool
        )
        lookup[list(special)] = True
        return lookup


def take_rows(rows: Iterator[Row], n_tokens: int) -> tuple[list[Row], bool]:
    """Rows with at least `n_tokens` tokens that count, and whether there were as many."""
    taken: list[Row] = []
    n = 0
    while n < n_tokens:
        row = next(rows, None)
        if row is None:
            return taken, False
        taken.append(row)
        n += row.n_kept
    return taken, True


def length_sorted(rows: Collection[Row], batch_tokens: int) -> list[list[Row]]:
    """`rows` in groups of like length, each at most `batch_tokens` text tokens when padded (one row at
    least)."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=len):
        if groups and (len(groups[-1]) + 1) * len(row) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _affixes(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a single text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()
