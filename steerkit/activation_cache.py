"""Activations on disk: written once, read in a global shuffle as often as wanted.

    cache(model, documents, "blocks.2.hook_resid_post", "acts/", tokens=10_000_000, dtype="bfloat16")
    stream = ActivationCache.open("acts/").stream("blocks.2.hook_resid_post", batch_size=4096, seed=0)
    batch = next(stream)                                  # {site: (4096, width)}, as from an ActivationStream

A directory holds `cache.json`, shards `shard-00000.safetensors`, …, and two files of text. A shard has one
tensor a site and the index of its rows: `token_ids`, `document`, `position`. `train.jsonl` holds the
documents of the rows, by the number that the index gives; `held_out.jsonl` the documents that were kept for
evaluation, none of whose tokens are cached.

A killed run is resumed at the first shard that is not there; the files are then the same, bit by bit, as
without the kill.

int8: with z = (x − mean) / spread per channel (mean and mean absolute deviation of the shard), x is stored as
round(z / step), step = max|z| / 127 per row, so that neither outlying channels nor outlying rows cost the
others precision. The error of a coordinate is at most step · spread / 2: on residual streams an FVU below
1e-4.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit import distributed
from steerkit.activations import Activations, Columns, require_same
from steerkit.blocks import Block, Statistics, read_block, site_names
from steerkit.data import Documents, Permutation, file_sha256, load_documents, split_held_out
from steerkit.errors import CheckpointError, InputError, NumericsError, SteerkitError
from steerkit.runs import atomic_path, atomic_write, jsonable, progress, read_json, write_json
from steerkit.tokens import BATCH_TOKENS, Cursor, Model, RowReader, Tokenization, take_rows

FORMAT = "steerkit activation cache 1"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
HELD_OUT_CHARACTERS = 32_000_000
"""Of held-out text, no more than this is copied into the cache."""

_MAPPED_BYTES = 256 * 2**20
"""Shards are unmapped when more than about this much of them is resident."""
_FAULT_BYTES = 64 * 1024
"""What the kernel maps around a row that is read."""


def cache(
    model: Model,
    documents: Documents | Sequence[str],
    sites: Sequence[str] | str,
    out: str | Path,
    *,
    tokens: int,
    tokenization: Tokenization | None = None,
    dtype: str = "float32",
    shard_tokens: int = 65_536,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = True,
) -> ActivationCache:
    """Write the activations of `tokens` tokens at `sites` to the directory `out`.

    The documents, less those that are held out, are taken in a random order (by `seed`), once: if they have
    fewer tokens, the cache has fewer. With `resume` an unfinished cache of the same settings is continued,
    and a finished one opened. Raises InputError if `out` holds something else, SteerkitError if the disk is
    full; whole shards are never lost. Processes that `torchrun` or `accelerate launch` started share the
    forwards, and rank 0 writes the same files as one process would.
    """
    if dtype not in DTYPES:
        raise InputError(f"A cache cannot be of dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    train, held_out = split_held_out(load_documents(documents))
    shuffled = Documents(_Reordered(train, Permutation(len(train), seed)), train.name, train.fingerprint)
    reader = RowReader(model, shuffled, tokenization or Tokenization())
    path = Path(out)
    made_with = {
        "model": model.name,
        "sites": list(site_names(sites)),
        "documents": train.name,
        "fingerprint": train.fingerprint(),
        "layout": reader.layout.to_dict(),
        "tokens": tokens,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        "batch_tokens": batch_tokens,
        "seed": seed,
    }
    with distributed.launched():
        of_first = distributed.first(lambda: _Writer(path, made_with, resume))
        writer = of_first or _Writer(path, made_with, resume=True)
        if not writer.complete:
            distributed.first(lambda: _write_texts(path / "held_out.jsonl", held_out, HELD_OUT_CHARACTERS))
            silent = quiet or not distributed.is_first()
            with progress(tokens, "caching", quiet=silent, done=writer.tokens) as bar:
                for n in writer.write_shards(reader, batch_tokens):
                    bar.advance(n)
            seen = shuffled[: writer.cursor.document + 1]
            distributed.first(lambda: _write_texts(path / "train.jsonl", seen))
            distributed.first(writer.finish)
        return ActivationCache.open(path, verify=False)


def is_cache(path: Any) -> bool:
    """Whether `path` is the directory of an activation cache."""
    return isinstance(path, (str, Path)) and (Path(path) / "cache.json").is_file()


class ActivationCache:
    """A finished cache. Use `ActivationCache.open`."""

    def __init__(self, path: Path, index: Mapping[str, Any], train: Documents, held_out: Documents) -> None:
        self.path = path
        self.made_with: dict[str, Any] = index["made_with"]
        """Model, sites, documents, layout, dtype and the other settings."""
        self.sites: tuple[str, ...] = tuple(self.made_with["sites"])
        self.tokens: int = index["tokens"]
        self.statistics = {site: Statistics.from_dict(s) for site, s in index["statistics"].items()}
        self.train = train
        """The documents of the cached tokens; `document` of a token is an index into them."""
        self.held_out = held_out
        """Documents of which no token is cached."""
        self._shards = [_Shard(path / shard["file"], shard["tokens"]) for shard in index["shards"]]
        self._ends = np.cumsum([shard["tokens"] for shard in index["shards"]])
        self._resident = 0

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> ActivationCache:
        """Open a finished cache. `verify` compares every byte with its checksum; without it only sizes and
        headers are looked at. Raises InputError (CheckpointError) if it is no cache, unfinished, truncated or
        edited."""
        path = Path(path)
        if not (path / "cache.json").is_file():
            raise InputError(f"{path} is no activation cache: it has no cache.json.")
        index = _read_index(path)
        if not index["complete"]:
            wanted = index["made_with"]["tokens"]
            raise CheckpointError(
                f"{path} is an unfinished cache ({index['tokens']:,} of {wanted:,} tokens): "
                "finish it with resume (steerkit cache … --resume)."
            )
        for entry in [*index["shards"], *index["texts"]]:
            _check_file(path / entry["file"], entry, verify)
        return cls(path, index, *(load_documents(path / entry["file"]) for entry in index["texts"]))

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        made = self.made_with
        sites = ", ".join(self.sites)
        return f"ActivationCache({str(self.path)!r}, {self.tokens:,} tokens of {made['model']}, {sites})"

    @property
    def tokenization(self) -> dict[str, Any]:
        """The resolved tokenization, as recorded."""
        return self.made_with["layout"]

    def shards(self) -> Iterator[Activations]:
        """The cache, shard by shard, tokens in the order of the text."""
        for shard in self._shards:
            index = np.arange(shard.tokens)
            acts = {site: shard.rows(site, index) for site in self.sites}
            ids, document, position = (
                shard.tensor(name).numpy().astype(np.int64) for name in ("token_ids", "document", "position")
            )
            yield Activations(Block(acts, {}, ids, document, position, index), self.statistics)

    def rows(self, site: str, index: np.ndarray) -> Float[Tensor, "n width"]:
        """The activations of the tokens of these numbers, in float32 (or as stored, for bfloat16 and
        float16)."""
        return self._gather(index, lambda shard, rows: shard.rows(site, rows))

    def column(self, name: str, index: np.ndarray) -> Int[np.ndarray, " n"]:
        """`token_ids`, `document` or `position` of the tokens of these numbers."""
        found = self._gather(index, lambda shard, rows: shard.tensor(name)[torch.from_numpy(rows)])
        return found.numpy().astype(np.int64)

    def _gather(self, index: np.ndarray, read: Callable[[_Shard, np.ndarray], Tensor]) -> Tensor:
        shard_of = np.searchsorted(self._ends, index, side="right")
        by_place = np.argsort(index)
        out: Tensor | None = None
        for number, group in _groups(shard_of[by_place], by_place):
            shard = self._shards[number]
            found = read(shard, index[group] - (self._ends[number] - shard.tokens))
            if out is None:
                out = found.new_empty((len(index), *found.shape[1:]))
            out[torch.from_numpy(group)] = found
            self._resident += min(shard.bytes, len(group) * _FAULT_BYTES)
            if self._resident > _MAPPED_BYTES:
                self.close()
        assert out is not None
        return out

    def close(self) -> None:
        """Unmap the shards; they are mapped again when they are read."""
        for shard in self._shards:
            shard.close()
        self._resident = 0

    def stream(
        self,
        sites: Sequence[str] | str | None = None,
        batch_size: int = 4096,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        columns: Columns | None = None,
        shared: bool = False,
    ) -> CachedStream:
        """Endless batches in a global shuffle, new for each pass; by default of all sites. With `shared` each process of a
        distributed run gets its share of every batch."""
        names = site_names(self.sites if sites is None else sites)
        return CachedStream(self, names, batch_size, seed, dtype, device, columns, shared)


class CachedStream:
    """Endless shuffled batches from a cache: every pass gives each cached token once, in an order of its own.

    The interface of `steerkit.activations.ActivationStream`.
    """

    def __init__(
        self,
        source: ActivationCache,
        sites: tuple[str, ...],
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
        device: str | torch.device,
        columns: Columns | None,
        shared: bool = False,
    ) -> None:
        missing = [site for site in sites if site not in source.sites]
        if missing:
            raise InputError(
                f"{source.path} has no activations at {missing[0]!r}; it has {', '.join(source.sites)}."
            )
        self.cache, self.sites, self.batch_size = source, sites, batch_size
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.documents, self.columns, self.shared = source.train, columns, shared
        self.tokens = 0
        """Tokens given out."""
        self.seconds_model = 0.0
        """Time spent reading."""

    @property
    def passes(self) -> int:
        """Passes over the cache that have been completed."""
        return self.tokens // len(self.cache)

    def statistics(self, site: str) -> Statistics:
        """Mean, scale and sink threshold of a site, measured on the cache's first shard."""
        return self.cache.statistics[site]

    def __iter__(self) -> CachedStream:
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch width"]]:
        started = time.perf_counter()
        n = len(self.cache)
        numbers = np.arange(self.tokens, self.tokens + self.batch_size)
        index = np.concatenate(
            [
                Permutation(n, self.seed, p)[numbers[numbers // n == p] % n]
                for p in np.unique(numbers // n).tolist()
            ]
        )
        if self.shared:
            index = index[distributed.share(self.batch_size)]
        batch = {site: self.cache.rows(site, index).to(self.device, self.dtype) for site in self.sites}
        if self.columns is not None:
            where = (self.cache.column(name, index) for name in ("document", "position"))
            batch |= {name: values.to(self.device) for name, values in self.columns(*where).items()}
        self.tokens += self.batch_size
        self.seconds_model += time.perf_counter() - started
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The stream's place, and what it was made with, as plain data."""
        return {"made_with": self._made_with(), "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if the stream was made with other
        arguments."""
        require_same(self._made_with(), state["made_with"])
        self.tokens = state["tokens"]

    def close(self) -> None:
        """Unmap the cache's files; the stream can still be used."""
        self.cache.close()

    def _made_with(self) -> dict[str, Any]:
        columns = {} if self.columns is None else {"columns": list(self.columns.names)}
        return {
            **columns,
            "cache": self.cache.made_with,
            "sites": list(self.sites),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "dtype": str(self.dtype),
        }


class _Shard:
    """One shard, memory-mapped when it is first read. No file stays open, so that there may be any number of
    them."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.tokens = path, tokens
        self.bytes = path.stat().st_size
        self._tensors: dict[str, Tensor] | None = None

    def tensor(self, name: str) -> Tensor:
        if self._tensors is None:
            header, start = _header(self.path)
            storage = torch.UntypedStorage.from_file(str(self.path), False, self.bytes)
            assert isinstance(storage, torch.UntypedStorage)
            self._tensors = {key: _view(storage, start, entry) for key, entry in header.items()}
        return self._tensors[name]

    def rows(self, site: str, index: np.ndarray) -> Float[Tensor, "n width"]:
        chosen = torch.from_numpy(index)
        stored = self.tensor(site)[chosen]
        if stored.dtype != torch.int8:
            return stored
        mean, spread, step = (self.tensor(f"{site}.{part}") for part in ("mean", "spread", "step"))
        return torch.addcmul(mean, stored.float() * step[chosen][:, None], spread)

    def close(self) -> None:
        self._tensors = None


class _Writer:
    """Writes shards one after another, keeping `cache.json` in step with the shards that are there.

    In a distributed run every process has one, and rank 0's writes.
    """

    def __init__(self, path: Path, made_with: dict[str, Any], resume: bool) -> None:
        self.path, self.made_with = path, jsonable(made_with)
        self.complete = False
        self.cursor = Cursor()
        self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self.statistics: dict[str, Statistics] = {}
        if (path / "cache.json").exists():
            self._continue(_read_index(path), resume)
        elif path.exists() and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
            raise InputError(f"{path} is not empty and holds no cache: choose another directory.")
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._save()

    def _continue(self, index: dict[str, Any], resume: bool) -> None:
        if not resume:
            kind = "a finished" if index["complete"] else "an unfinished"
            raise InputError(
                f"{self.path} holds {kind} cache: continue it with resume, or choose another directory."
            )
        for key, here in self.made_with.items():
            if index["made_with"].get(key) != here:
                there = index["made_with"].get(key)
                raise InputError(
                    f"{self.path} holds another cache: its {key} is {there!r}, here it is {here!r}. "
                    "Choose another directory."
                )
        self.complete, self.tokens, self.shards = index["complete"], index["tokens"], index["shards"]
        self.cursor = Cursor(**index["cursor"])
        self.statistics = {site: Statistics.from_dict(s) for site, s in index["statistics"].items()}
        for entry in self.shards:
            _check_file(self.path / entry["file"], entry, verify=True)

    def write_shards(self, reader: RowReader, batch_tokens: int) -> Iterator[int]:
        """Write the shards that are missing; gives the number of tokens of each."""
        made, sites = self.made_with, self.made_with["sites"]
        rows = reader.rows(self.cursor)
        buffers: dict[str, Tensor] = {}
        number, more = len(self.shards), True
        while more and self.tokens < made["tokens"]:
            wanted = min(made["shard_tokens"], made["tokens"] - self.tokens)
            taken, more = take_rows(rows, wanted)
            if not taken:
                break
            block = read_block(
                reader,
                taken,
                sites,
                batch_tokens=batch_tokens,
                buffers=buffers,
                place=f" of shard {number}",
                shared=True,
            )
            thresholds = (
                {site: s.sink_threshold for site, s in self.statistics.items()}
                if self.statistics
                else block.sink_thresholds(reader.layout)
            )
            block = block.without_sinks(thresholds).in_text_order().first(made["tokens"] - self.tokens)
            if not len(block):
                continue
            if not self.statistics:
                self.statistics = {
                    site: Statistics.of(block.acts[site], site, thresholds[site]) for site in sites
                }
            distributed.first(partial(self._add_shard, number, block))
            number, self.cursor, self.tokens = number + 1, taken[-1].end, self.tokens + len(block)
            distributed.first(self._save)
            yield len(block)

    def _add_shard(self, number: int, block: Block) -> None:
        file = self.path / f"shard-{number:05d}.safetensors"
        self._require_space(block)
        _save_tensors(file, _encode(block, self.made_with["dtype"]))
        self.shards.append({**_entry(file), "tokens": len(block)})

    def finish(self) -> None:
        if not self.tokens:
            raise InputError(
                f"{self.made_with['documents']}: not one token that counts, without special and sink tokens."
            )
        self.complete = True
        self._save()

    def _save(self) -> None:
        texts = ("train.jsonl", "held_out.jsonl") if self.complete else ()
        index = {
            "format": FORMAT,
            "made_with": self.made_with,
            "complete": self.complete,
            "tokens": self.tokens,
            "cursor": asdict(self.cursor),
            "shards": self.shards,
            "texts": [_entry(self.path / name) for name in texts],
            "statistics": {site: statistics.to_dict() for site, statistics in self.statistics.items()},
        }
        write_json(self.path / "cache.json", {**index, "digest": _digest(index)})

    def _require_space(self, block: Block) -> None:
        """Ask for what is still to be written before the first shard is, rather than fill the disk for
        nothing."""
        if self.shards:
            return
        width = sum(acts.shape[1] for acts in block.acts.values())
        needed = (self.made_with["tokens"] - self.tokens) * (
            width * DTYPES[self.made_with["dtype"]].itemsize + 12
        )
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise SteerkitError(
                f"The cache needs about {needed / 1e9:.2f} GB, and {self.path} has {free / 1e9:.2f} GB free: "
                "take fewer tokens, a smaller dtype (int8), or another disk."
            )


class _Reordered(Sequence[str]):
    """Documents in another order."""

    def __init__(self, documents: Documents, order: Sequence[int]) -> None:
        self._documents, self._order = documents, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[self._order[index]]


def _encode(block: Block, dtype: str) -> dict[str, Tensor]:
    """A shard's tensors. Raises NumericsError where a value does not fit the dtype."""
    tensors = {
        name: torch.from_numpy(column.astype(np.int32))
        for name, column in (
            ("token_ids", block.token_ids),
            ("document", block.document),
            ("position", block.position),
        )
    }
    for site, acts in block.acts.items():
        if dtype == "int8":
            tensors.update(_quantized(site, acts.float().cpu()))
            continue
        tensors[site] = acts.to("cpu", DTYPES[dtype]).contiguous()
        if not tensors[site].isfinite().all():
            raise NumericsError(
                f"Activations at {site} do not fit {dtype}: cache them as bfloat16 or float32."
            )
    return tensors


def _quantized(site: str, acts: Float[Tensor, "n width"]) -> dict[str, Tensor]:
    mean = acts.mean(0)
    spread = (acts - mean).abs().mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    z = (acts - mean) / spread
    step = (z.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (z / step[:, None]).round().to(torch.int8)
    return {site: codes, f"{site}.mean": mean, f"{site}.spread": spread, f"{site}.step": step}


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary)
            shutil.copymode(path.parent / "cache.json", temporary)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), f"{path} was not written: {error}") from error


def _write_texts(path: Path, documents: Documents, max_characters: float = float("inf")) -> None:
    """One JSON object a line, {"text": …}, blank documents too, until `max_characters`."""
    lines: list[str] = []
    n = 0
    for text in documents:
        n += len(text)
        if lines and n > max_characters:
            break
        lines.append(json.dumps({"text": text}))
    atomic_write(path, "\n".join(lines) + "\n")


def _entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    how = "make the cache again, or copy it again from where it is whole"
    if not path.is_file():
        raise CheckpointError(f"The cache lacks {path}: {how}.")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(
            f"{path} is truncated or was edited ({path.stat().st_size} of {entry['bytes']} bytes): {how}."
        )
    if verify and file_sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} was edited or is damaged (its checksum is another): {how}.")


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path / "cache.json")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'cache.json'} is not of the format {FORMAT!r}: it was made by something else."
        )
    if index.pop("digest", None) != _digest(index):
        raise CheckpointError(f"{path / 'cache.json'} was edited or is damaged (its checksum is another).")
    return index


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(jsonable(index), sort_keys=True).encode()).hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors, and where its data begin."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size


def _view(storage: torch.UntypedStorage, start: int, entry: Mapping[str, Any]) -> Tensor:
    names = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "I8": torch.int8,
        "I32": torch.int32,
    }
    dtype = names[entry["dtype"]]
    shape = entry["shape"]
    offset = (start + entry["data_offsets"][0]) // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(
        storage, offset, shape, torch.empty(shape, device="meta").stride()
    )


def _groups(keys: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """`values` by runs of equal `keys`."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    for group in np.split(np.arange(len(keys)), starts[1:]):
        yield int(keys[group[0]]), values[group]
