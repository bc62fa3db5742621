"""Text: documents from files, Hugging Face data sets and the built-in language.

    documents = load_documents("corpus.jsonl")     # a lazy sequence of texts with a name and a fingerprint
    train, held_out = split_held_out(documents)    # the last 5 % are never trained on

Nothing is held in memory that need not be: text files are indexed by line and read through a memory map,
Parquet and Hugging Face data sets through Arrow, StoryWorld's stories are told when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from steerkit.errors import ColumnError, InputError, did_you_mean

TEXT_COLUMNS = ("text", "sentence", "statement", "question")
"""Where the text of a table stands, if no column is named: the first of these that the table has."""

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")

N_STORIES = 50_000
"""Documents of `storyworld`."""

HELD_OUT_SHARE = 0.05
MIN_HELD_OUT = 20

_STORY_SEED = 7_000_000_000


class Documents(Sequence[str]):
    """Texts read lazily by index; slices are `Documents` too. A document may be blank: it has no tokens and
    is passed over."""

    def __init__(
        self,
        texts: Sequence[str],
        name: str,
        fingerprint: Callable[[], str],
        indices: range | None = None,
        columns: Callable[[str], Sequence[Any]] | None = None,
    ) -> None:
        self.name = name
        self._texts = texts
        self._source_fingerprint = fingerprint
        self._columns = columns
        self._indices = range(len(texts)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> str | Documents:
        if isinstance(index, slice):
            indices = self._indices[index]
            return Documents(self._texts, self.name, self._source_fingerprint, indices, self._columns)
        return self._texts[self._indices[index]]

    def __repr__(self) -> str:
        return f"Documents({self.name!r}, {len(self):,} documents)"

    def column(self, name: str) -> Callable[[int], str | list[str]]:
        """Index of a document -> its value in another column of the table, or (StoryWorld) of an attribute; a
        list where each token has its own, "" where there is none.

        Raises InputError when there is no such column.
        """
        if self._columns is None:
            raise InputError(f"{self.name} has text alone: there is no column {name!r} beside it.")
        values = self._columns(name)
        return lambda index: values[self._indices[index]]

    def fingerprint(self) -> str:
        """A sha256 (hex) of the source's content and of which of its documents these are."""
        indices = self._indices
        if indices == range(len(self._texts)):
            return self._source_fingerprint()
        return _sha256(f"{self._source_fingerprint()}:{indices.start}:{indices.stop}:{indices.step}".encode())


def load_documents(spec: str | Path | Sequence[str], *, text_column: str | None = None) -> Documents:
    """Documents from a list of texts, a file, `storyworld` (or `storyworld:liars` …), or a Hugging Face data
    set id.

    Files: .txt (one document a line, blank lines dropped), .jsonl, .csv, .tsv, .parquet, of which one column
    is read: `text_column`, else the first of `TEXT_COLUMNS`. A data set id may name a configuration after a
    colon. Raises InputError when there is no such thing, no such column, or no text in it.
    """
    if isinstance(spec, Documents):
        return spec
    if not isinstance(spec, (str, Path)):
        documents = _from_list(spec)
    elif str(spec).split(":")[0] == "storyworld":
        return _storyworld(str(spec))
    elif Path(spec).suffix.lower() in SUFFIXES or Path(spec).exists():
        documents = _from_file(Path(spec).expanduser(), text_column)
    else:
        documents = _from_hub(str(spec), text_column)
    if not any(text.strip() for text in documents):
        raise InputError(f"{documents.name} holds no text: give at least one document that is not blank.")
    return documents


def split_held_out(documents: Documents) -> tuple[Documents, Documents]:
    """(train, held out): the held-out documents are the last 5 %, at least 20. Raises InputError below 40
    documents."""
    n = len(documents)
    if n < 2 * MIN_HELD_OUT:
        raise InputError(
            f"{documents.name} has {n} document{'s' * (n != 1)}: at least {2 * MIN_HELD_OUT} are needed "
            f"to hold out {MIN_HELD_OUT} of them. Give more text, or cut it into more documents (lines)."
        )
    n_held_out = max(MIN_HELD_OUT, round(HELD_OUT_SHARE * n))
    return documents[: n - n_held_out], documents[n - n_held_out :]


class Permutation(Sequence[int]):
    """A pseudo-random permutation of range(n) in (almost) no memory.

    permutation[i] and permutation[np.array([…])] give where i goes; the same (n, seed…) is the same
    permutation anywhere. A table up to 65,536; beyond that an 8-round Feistel network on the next power of
    two, walked until it is inside.
    """

    _ROUNDS = 8
    _TABLE = 1 << 16

    def __init__(self, n: int, *seed: int) -> None:
        self.n = n
        bits = (n - 1).bit_length()
        self._low = np.uint64(bits // 2)
        self._high = np.uint64(bits - bits // 2)
        self._keys = np.random.SeedSequence([n, *seed]).generate_state(self._ROUNDS, np.uint64)
        self._table: np.ndarray | None = None
        if n <= self._TABLE:
            self._table = np.argsort(_mix(np.arange(n, dtype=np.uint64), self._keys[0]), kind="stable")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if self._table is not None:
            found = self._table[index]
            return int(found) if np.ndim(index) == 0 else found
        values = np.atleast_1d(np.asarray(index)).astype(np.uint64)
        if values.size and int(values.max()) >= self.n:
            raise IndexError(f"index {int(values.max())} is outside a permutation of {self.n}")
        values = self._encrypt(values)
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.n]
        return int(values[0]) if np.ndim(index) == 0 else values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        low, high = self._low, self._high
        left, right = values >> high, values & ((np.uint64(1) << high) - np.uint64(1))
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & ((np.uint64(1) << low) - np.uint64(1)))
            low, high = high, low
        return (left << high) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of `values`."""
    values = values * np.uint64(0x9E3779B97F4A7C15) + key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _from_list(texts: Sequence[str]) -> Documents:
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(
            f"Document {wrong} is of type {type(texts[wrong]).__name__}: every document must be a string."
        )
    kept = tuple(texts)

    def fingerprint() -> str:
        return _sha256(*(f"{len(text)}:{text}".encode() for text in kept))

    return Documents(kept, f"{len(kept)} texts", fingerprint)


def _storyworld(spec: str) -> Documents:
    from steerkit import storyworld

    variant = spec.partition(":")[2] or None
    if variant is not None and variant not in storyworld.VARIANTS:
        raise InputError(
            f"StoryWorld has no variant {variant!r}.{did_you_mean(variant, storyworld.VARIANTS)} "
            f"There are: {', '.join(f'storyworld:{v}' for v in storyworld.VARIANTS)}."
        )
    stories = _Stories(variant)

    def fingerprint() -> str:
        sample = "\n".join(stories[i] for i in range(0, N_STORIES, N_STORIES // 100))
        return _sha256(f"{spec}:{N_STORIES}:{sample}".encode())

    def attribute(name: str) -> Sequence[Any]:
        if name not in storyworld.ATTRIBUTES:
            known = storyworld.ATTRIBUTES
            raise InputError(
                f"No story has an attribute {name!r}.{did_you_mean(name, known)} There are {', '.join(known)}."
            )
        return _Stories(variant, name)

    return Documents(stories, spec, fingerprint, columns=attribute)


class _Stories(Sequence[Any]):
    """StoryWorld's stories: each is the first of its own seed's stream, so that any one can be told alone.

    Their texts, or an attribute; of `voice`, which changes within a story, the values of all tokens."""

    def __init__(self, variant: str | None, attribute: str | None = None) -> None:
        self.variant, self.attribute = variant, attribute

    def __len__(self) -> int:
        return N_STORIES

    def __getitem__(self, index: Any) -> Any:
        from steerkit import storyworld

        story = next(storyworld.stream(_STORY_SEED + range(N_STORIES)[index], self.variant))
        if self.attribute is None:
            return story.text
        if self.attribute == "voice":
            return story.token_labels("voice")
        return story.attributes[self.attribute]


def _from_file(path: Path, text_column: str | None) -> Documents:
    if path.suffix.lower() not in SUFFIXES:
        if (path / "cache.json").exists():
            raise InputError(
                f"{path} is an activation cache, not text: train on it, or open it with ActivationCache.open."
            )
        kind = "a directory" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise InputError(f"{path} is {kind}; text is read from {', '.join(SUFFIXES)} files.")
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".parquet": _parquet}
    try:
        read = readers.get(path.suffix.lower(), _separated)
        texts = read(path, text_column)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    return Documents(
        texts, path.name, lambda: file_sha256(path), columns=lambda name: read(path, name, _as_value)
    )


class _Lines(Sequence[str]):
    """The lines of a file that are not blank, by index, through a memory map: 8 bytes of memory a line."""

    def __init__(self, path: Path, read: Callable[[str, int], str] | None = None) -> None:
        self.path = path
        self._read = read
        starts = [0]
        with open(path, "rb") as file:
            offset = 0
            blank = []
            for number, line in enumerate(file):
                offset += len(line)
                starts.append(offset)
                if not line.strip():
                    blank.append(number)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if offset else b""
        self._bounds = np.array(starts, dtype=np.int64)
        self._numbers = np.delete(np.arange(len(starts) - 1), blank)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        number = int(self._numbers[index])
        raw = self._map[self._bounds[number] : self._bounds[number + 1]]
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}, line {number + 1}: not UTF-8 text ({error.reason}). Convert the file to UTF-8."
            ) from None
        return line if self._read is None else self._read(line, number + 1)


def _text_lines(path: Path, text_column: str | None, read: Any = None) -> Sequence[str]:
    if text_column is not None:
        raise ColumnError(f"{path} is plain text and has no columns: leave out the column {text_column!r}.")
    return _Lines(path)


def _json_lines(
    path: Path, text_column: str | None, read: Callable[[Any, str], str] | None = None
) -> Sequence[str]:
    def record(line: str, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}).") from None
        if not isinstance(value, dict):
            raise InputError(
                f"{path}, line {number}: a {type(value).__name__}, not an object with a text column."
            )
        return value

    lines = _Lines(path, record)  # type: ignore[arg-type]
    if not len(lines):
        return lines
    column = _column(str(path), list(lines[0]), text_column)

    def text(line: str, number: int) -> str:
        value = record(line, number)
        if column not in value:
            raise ColumnError(f"{path}, line {number} has no column {column!r}; it has {', '.join(value)}.")
        return (read or _as_text)(value[column], f"{path}, line {number}, column {column!r}")

    lines._read = text
    return lines


def _separated(path: Path, text_column: str | None, read: Any = None) -> Sequence[str]:
    """A .csv (quoted fields) or .tsv file (no quoting: tabs and newlines cannot stand in a field)."""
    import csv

    import pandas

    tabs = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        columns = list(pandas.read_csv(path, nrows=0, **options).columns)
        column = _column(str(path), columns, text_column)
        table = pandas.read_csv(path, usecols=[column], dtype=str, keep_default_na=False, **options)
    except pandas.errors.EmptyDataError:
        return ()
    except (pandas.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable {path.suffix} file: {str(error).strip()}.") from None
    return table[column].tolist()


def _parquet(
    path: Path, text_column: str | None, read: Callable[[Any, str], str] | None = None
) -> Sequence[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        column = _column(str(path), file.schema_arrow.names, text_column)
        values = file.read(columns=[column]).column(column)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is no readable Parquet file: {error}.") from None
    return _Column(str(path), column, lambda index: values[index].as_py(), len(values), read)


def _from_hub(spec: str, text_column: str | None) -> Documents:
    name, _, configuration = spec.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{spec!r} does not exist: it is neither a file nor the id of a data set.")
    import datasets

    try:
        splits = datasets.load_dataset(name, configuration or None)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{spec!r} is no file, and no Hugging Face data set of that name could be loaded ({first_line})."
            f"{did_you_mean(spec, ['storyworld'])} Give a file ({', '.join(SUFFIXES)}), 'storyworld', or the "
            "id of a data set that is cached or can be reached."
        ) from None
    split = "train" if "train" in splits else next(iter(splits))
    table = splits[split]
    column = _column(f"{spec} ({split})", table.column_names, text_column)
    source = f"{spec} ({split})"

    def values(name: str, read: Callable[[Any, str], str] | None = None) -> Sequence[str]:
        return _Column(spec, name, lambda index: table[index][name], len(table), read)

    def fingerprint() -> str:
        return _sha256(f"{spec}:{split}:{column}:{table._fingerprint}".encode())

    return Documents(
        values(column),
        spec,
        fingerprint,
        columns=lambda name: values(_column(source, table.column_names, name), _as_value),
    )


class _Column(Sequence[str]):
    """One column of a table that is read by index."""

    def __init__(
        self,
        source: str,
        column: str,
        read: Callable[[int], Any],
        n: int,
        convert: Callable[[Any, str], str] | None = None,
    ) -> None:
        self._source, self._column, self._read, self._n = source, column, read, n
        self._convert = convert or _as_text

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        row = range(self._n)[index]
        return self._convert(self._read(row), f"{self._source}, row {row}, column {self._column!r}")


def _column(source: str, columns: Sequence[str], wanted: str | None) -> str:
    found = wanted if wanted in columns else None
    if wanted is None:
        found = next((column for column in TEXT_COLUMNS if column in columns), None)
    if found is None:
        missing = f"no column {wanted!r}" if wanted else f"none of the text columns {', '.join(TEXT_COLUMNS)}"
        hint = did_you_mean(wanted, columns) if wanted else " Name one with --text-column."
        raise ColumnError(f"{source} has {missing}; its columns are {', '.join(map(str, columns))}.{hint}")
    return found


def _as_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{where} holds a {type(value).__name__}, not text: name the text column with --text-column."
        )
    return value


def _as_value(value: Any, where: str) -> str:
    return "" if value is None else str(value)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
