"""GGUF control vectors: what llama.cpp (`--control-vector`), repeng and EasySteer read and write.

    general.architecture = "controlvector"      controlvector.model_hint, controlvector.layer_count
    direction.<k>    F32, one dimension: added to the output of block k (from 0) at every position

The layout is that of GGUF version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; this file reads and writes as much
of it as control vectors need. llama.cpp refuses a file with direction.0, so that the first block cannot be steered there.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from steerkit.errors import CheckpointError, InputError
from steerkit.runs import atomic_write
from steerkit.steering.edits import Add
from steerkit.steering.formats.base import (
    Format,
    Hints,
    begins,
    block_of,
    built,
    directions,
    finite,
    lose,
    warn_of_tokens,
)
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
ARCHITECTURE = "controlvector"
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_F32 = 0
_LONGEST_STRING = 1 << 20
_LARGEST_FILE = 1 << 31
"""Control vectors have a few megabytes; anything of this size is a model."""


def write(vector: SteeringVector, out: Path) -> Path:
    """Raises InputError for anything but additions at blocks.<n>.hook_resid_post, n ≥ 1; warns of what the format cannot say."""
    added = {block_of(site, "hook_resid_post", "GGUF"): v for site, v in directions(vector, "GGUF").items()}
    if 0 in added:
        reason = "llama.cpp does not steer the first block, blocks.0.hook_resid_post"
        if len(added) == 1:
            raise InputError(f"{reason}, and this vector does nothing else: fit one for a later block.")
        lose(f"{reason}: that part of the vector is left out.")
        del added[0]
    warn_of_tokens(vector, "llama.cpp")
    hint = vector.provenance.get("model_hint") or vector.provenance.get("model") or ""
    known: dict[str, str | int] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": str(hint),
        f"{ARCHITECTURE}.layer_count": len(added),
    }
    tensors = {f"direction.{block}": added[block] for block in sorted(added)}
    atomic_write(out, encoded(known, tensors))
    return out


def read(path: Path, hints: Hints) -> SteeringVector:
    """Raises CheckpointError for a file that is damaged or holds something else than a control vector."""
    known, tensors = decoded(path)
    if known.get("general.architecture") != ARCHITECTURE:
        raise CheckpointError(
            f"{path} holds a {known.get('general.architecture')!r} model, no control vector."
        )
    edits = []
    for name, tensor in sorted(tensors.items(), key=lambda item: _block(item[0], path)):
        edits.append(
            Add(f"blocks.{_block(name, path)}.hook_resid_post", finite(tensor, f"the tensor {name!r}", path))
        )
    widths = sorted({edit.width for edit in edits})
    if not edits:
        raise CheckpointError(f"{path} has no tensor direction.<n>: it steers nothing.")
    if len(widths) > 1:
        raise CheckpointError(f"{path} is damaged: its directions are {widths[0]} and {widths[-1]} wide.")
    facts = {
        key.removeprefix(f"{ARCHITECTURE}."): value
        for key, value in known.items()
        if key.startswith(f"{ARCHITECTURE}.") and not isinstance(value, list)
    }
    return built(path, edits, Where.every_token(), source="gguf", **facts)


def _block(name: str, path: Path) -> int:
    kind, _, number = name.partition(".")
    if kind != "direction" or not (number.isascii() and number.isdigit() and len(number) < 6):
        raise CheckpointError(
            f"{path} has the tensor {name!r}; a control vector has direction.<n> and nothing else."
        )
    return int(number)


# the layout


def encoded(known: dict[str, str | int], tensors: dict[str, Tensor]) -> bytes:
    """A GGUF file of strings, whole numbers and one-dimensional F32 tensors."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(known)))
    for key, value in known.items():
        out += _string(key)
        if isinstance(value, str):
            out += struct.pack("<I", _STRING) + _string(value)
        else:
            out += struct.pack("<II", _UINT32, value)
    offset = 0
    for name, tensor in tensors.items():
        out += _string(name) + struct.pack("<IQIQ", 1, len(tensor), _F32, offset)
        offset += _padded(4 * len(tensor))
    out += bytes(_padded(len(out)) - len(out))
    for tensor in tensors.values():
        data = tensor.detach().float().cpu().numpy().astype("<f4").tobytes()
        out += data + bytes(_padded(len(data)) - len(data))
    return bytes(out)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(length: int, alignment: int = ALIGNMENT) -> int:
    return -(-length // alignment) * alignment


def decoded(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the one-dimensional F32 tensors of a GGUF file. Raises CheckpointError when it is damaged.

    Nothing is believed that the length of the file does not bear out, so that no count in it can make this run out of memory.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(file, size, path).everything()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path

    def everything(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.size > _LARGEST_FILE:
            raise CheckpointError(f"{self.path} has {self.size / 1e9:.1f} GB: no control vector is so large.")
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file.")
        version = self.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF of version {version}; versions 2 and 3 are read.")
        n_tensors, n_known = self.number("Q"), self.number("Q")
        self.fits(24 * n_tensors + 13 * n_known)
        known: dict[str, Any] = {}
        for _ in range(n_known):
            key = self.string()
            if key in known:
                raise self.damaged(f"it has {key!r} twice")
            known[key] = self.value(self.number("I"))
        if "general.architecture" in known and known["general.architecture"] != ARCHITECTURE:
            return known, {}
        places = self.places(n_tensors)
        alignment = known.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment % 8:
            raise self.damaged(f"its alignment is {alignment!r}")
        start, free = _padded(self.file.tell(), alignment), 0
        for name, (length, offset) in sorted(places.items(), key=lambda item: item[1][1]):
            if offset % alignment or offset < free:
                raise self.damaged(f"the tensor {name!r} begins at {offset}, inside another or unaligned")
            free = offset + 4 * length
            if start + free > self.size:
                raise self.damaged(f"it ends before the tensor {name!r} does")
        tensors = {}
        for name, (length, offset) in places.items():
            self.file.seek(start + offset)
            tensors[name] = torch.frombuffer(bytearray(self.take(4 * length)), dtype=torch.float32)
        return known, tensors

    def places(self, n: int) -> dict[str, tuple[int, int]]:
        """Name -> (length, offset) of each tensor."""
        found: dict[str, tuple[int, int]] = {}
        for _ in range(n):
            name = self.string()
            n_dims = self.number("I")
            if n_dims != 1:
                raise CheckpointError(
                    f"{self.path}: the tensor {name!r} has {n_dims} dimensions; a direction has one."
                )
            length, kind, offset = self.number("Q"), self.number("I"), self.number("Q")
            if kind != _F32:
                raise CheckpointError(
                    f"{self.path}: the tensor {name!r} is of GGML type {kind}; a direction is F32."
                )
            if name in found:
                raise self.damaged(f"it has the tensor {name!r} twice")
            if not 0 < length <= self.size // 4:
                raise self.damaged(f"the tensor {name!r} has {length} numbers")
            found[name] = (length, offset)
        return found

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"it has a value of the unknown type {kind}")
        inner, n = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(f"<{code}"))))
        if inner != _STRING:
            raise self.damaged(f"it has an array of type {inner}")
        self.fits(8 * n)
        return [self.string() for _ in range(n)]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > _LONGEST_STRING:
            raise self.damaged(f"it has a string of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("it has a string that is no UTF-8") from None

    def take(self, n: int) -> bytes:
        self.fits(n)
        return self.file.read(n)

    def fits(self, n: int) -> None:
        if n > self.size - self.file.tell():
            raise self.damaged("it is cut short, or counts more than it holds")

    def damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}.")


def recognises(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".gguf" or begins(path, MAGIC))


FORMAT = Format("gguf", recognises, read, write)
