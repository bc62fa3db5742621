"""Contrastive pairs: two texts that differ in what is to be steered, after a prompt that they share, or none.

    pairs = load_pairs("storyworld:mood=happy")            # a file, a list, StoryWorld's minimal pairs
    train, validation, test = pairs.split(0.6, 0.2)

Columns of a file: `positive` and `negative`, with or without `prompt`; `question`, `matching`, `not_matching`; or CAA's `question`,
`answer_matching_behavior`, `answer_not_matching_behavior`.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from steerkit.data import load_documents
from steerkit.errors import ColumnError, InputError, did_you_mean

LAYOUTS = (
    ("prompt", "positive", "negative"),
    ("question", "positive", "negative"),
    ("question", "matching", "not_matching"),
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    (None, "positive", "negative"),
)
"""Columns of prompt and sides that are looked for, in this order."""
N_STORYWORLD = 1024
_SEED = 5_000_000


@dataclass(frozen=True)
class Pair:
    """One prompt and its two continuations."""

    positive: str
    negative: str
    prompt: str = ""

    def texts(self) -> tuple[str, str]:
        """(positive, negative), each after the prompt."""
        return join(self.prompt, self.positive), join(self.prompt, self.negative)


def join(prompt: str, side: str) -> str:
    """A side after its prompt: a space between, unless one of them brings white space or there is no prompt."""
    if not prompt or not side or prompt[-1].isspace() or side[0].isspace():
        return prompt + side
    return f"{prompt} {side}"


class Pairs(Sequence[Pair]):
    """Pairs with a name and a fingerprint."""

    def __init__(self, pairs: Iterable[Pair], name: str) -> None:
        self._pairs = tuple(pairs)
        self.name = name
        if not self._pairs:
            raise InputError(f"{name} has no pairs.")
        for i, pair in enumerate(self._pairs):
            for side, text in (("positive", pair.positive), ("negative", pair.negative)):
                if not text.strip():
                    raise InputError(f"The {side} side of pair {i} of {name} is blank.")
            if pair.positive == pair.negative:
                raise InputError(f"Both sides of pair {i} of {name} are the same: {pair.positive[:60]!r}.")

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        return Pairs(self._pairs[index], self.name) if isinstance(index, slice) else self._pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}, {len(self)} pairs)"

    def fingerprint(self) -> str:
        """A sha256 (hex) of the texts."""
        digest = hashlib.sha256()
        for pair in self._pairs:
            for text in (pair.prompt, pair.positive, pair.negative):
                digest.update(text.encode() + b"\0")
        return digest.hexdigest()

    def swapped(self) -> Pairs:
        """Positive and negative exchanged."""
        return Pairs((Pair(p.negative, p.positive, p.prompt) for p in self), f"{self.name}, swapped")

    def shuffled_sides(self, seed: int = 0) -> Pairs:
        """The sides of half of the pairs, drawn at random, exchanged: what is found in them is found by chance.

        Just half (rounded down), so that what all pairs have in common cancels, rather than stay with either sign.
        """
        exchanged = set(random.Random(seed).sample(range(len(self)), len(self) // 2))
        sides = (Pair(p.negative, p.positive, p.prompt) if i in exchanged else p for i, p in enumerate(self))
        return Pairs(sides, f"{self.name}, sides shuffled")

    def split(self, *shares: float, seed: int = 0) -> tuple[Pairs, ...]:
        """Parts of these shares and one of the rest, drawn at random; equal prompts stay together.

        Raises InputError when a part would be empty.
        """
        if not shares or any(share <= 0 for share in shares) or sum(shares) >= 1:
            raise InputError(f"The shares are {shares}; they are positive and add up to less than 1.")
        groups: dict[str, list[Pair]] = {}
        for i, pair in enumerate(self._pairs):
            groups.setdefault(pair.prompt or f"\0{i}", []).append(pair)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        bounds = [0, *(round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))), len(order)]
        parts = [[p for group in order[a:b] for p in group] for a, b in itertools.pairwise(bounds)]
        if not all(parts):
            raise InputError(
                f"{self.name} has {len(order)} different prompts: too few for {len(parts)} parts."
            )
        return tuple(Pairs(part, self.name) for part in parts)


def load_pairs(spec: Any, *, n: int | None = None) -> Pairs:
    """Pairs from `storyworld:mood=happy` (`storyworld:mood`: its first value), a .jsonl, .csv, .tsv or .parquet file, a data
    set's id, or a list of Pair, (positive, negative) or dictionaries; the first `n` of them.

    Raises InputError when there is no such thing, columns are missing, or a pair has a blank side or two equal ones.
    """
    if isinstance(spec, Pairs):
        return spec if n is None else spec[:n]
    if not isinstance(spec, (str, Path)):
        pairs = [_pair(value, i) for i, value in enumerate(spec)]
        return Pairs(pairs if n is None else pairs[:n], "pairs")
    if str(spec).partition(":")[0] == "storyworld":
        return _storyworld(str(spec), N_STORYWORLD if n is None else n)
    columns = None
    for layout in LAYOUTS:
        try:
            columns = [load_documents(spec, text_column=name) for name in layout if name is not None]
            break
        except ColumnError:
            continue
    if columns is None:
        shown = "; ".join(", ".join(name for name in layout if name) for layout in LAYOUTS)
        raise InputError(f"{spec} has no pairs: it needs the columns of one of these layouts: {shown}.")
    rows = zip(*columns) if n is None else zip(*(column[:n] for column in columns))
    made = (Pair(row[-2], row[-1], row[0] if len(row) == 3 else "") for row in rows)
    return Pairs(made, Path(str(spec)).name)


def _pair(value: Any, index: int) -> Pair:
    if isinstance(value, Pair):
        return value
    if isinstance(value, Mapping):
        for prompt, positive, negative in LAYOUTS:
            if positive in value and negative in value and (prompt is None or prompt in value):
                return Pair(value[positive], value[negative], "" if prompt is None else value[prompt])
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return Pair(*value)
    raise InputError(
        f"Pair {index} is {value!r:.80}; give (positive, negative), a Pair, or a dictionary with positive and negative."
    )


def _storyworld(spec: str, n: int) -> Pairs:
    from steerkit import storyworld

    attribute, _, value = spec.partition(":")[2].partition("=")
    if attribute not in storyworld.ATTRIBUTES:
        known = storyworld.ATTRIBUTES
        raise InputError(
            f"{spec!r} names no attribute of StoryWorld.{did_you_mean(attribute, known)} "
            f"There are {', '.join(f'storyworld:{name}' for name in known)}."
        )
    values = storyworld.ATTRIBUTES[attribute]
    value = value or values[0]
    if value not in values:
        raise InputError(f"{attribute} has no value {value!r}: it has {', '.join(values)}.")
    try:
        found = storyworld.pairs(attribute, value, n, _SEED)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Pairs((Pair(**pair) for pair in found), f"storyworld:{attribute}={value}")
