"""What the formats share: their registry entry, what the reader is told besides the file, and what a format cannot say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.steering.edits import Add, Edit
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Constant, Where


class ConversionWarning(UserWarning):
    """Something of a vector that the other format does not say."""


@dataclass(frozen=True)
class Hints:
    """What a file may leave unsaid."""

    site: str | None = None
    """Hook site of a bare tensor."""
    index: int | None = None
    """Row of a matrix of vectors."""
    positions: str | None = None
    """pyreft's tokens, such as f7+l7."""


@dataclass(frozen=True)
class Format:
    """A layout of steering vectors on disk. Reading raises InputError for what it cannot express, CheckpointError for damage."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Hints], SteeringVector]
    write: Callable[[SteeringVector, Path], Any]
    takes: frozenset[str] = field(default_factory=frozenset)
    """The hints that it has use for."""
    directory: bool = False
    """Whether it is a directory rather than a file."""


def begins(path: Path, bytes_: bytes, at: int = 0) -> bool:
    """Whether a file has these bytes there."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(at + len(bytes_))[at:] == bytes_


def lose(what: str) -> None:
    """Warn of something that is lost."""
    warnings.warn(what, ConversionWarning, stacklevel=3)


def only(kind: type[Edit], vector: SteeringVector, name: str) -> list[Any]:
    """The edits of a vector that has edits of one kind and no condition. Raises InputError for others."""
    for edit in vector.edits:
        if not isinstance(edit, kind):
            raise InputError(
                f"{name} holds {kind.name} edits only; this vector has a {edit.name} edit at {edit.site}."
            )
    if vector.condition is not None:
        raise InputError(
            f"{name} cannot say when to steer: without its condition this vector would do so always."
        )
    return list(vector.edits)


def directions(vector: SteeringVector, name: str) -> dict[str, Tensor]:
    """Site -> what is added there, in float32 on the CPU. Raises InputError for a vector that does more than add."""
    only(Add, vector, name)
    return {site: tensor.detach().float().cpu().contiguous() for site, tensor in vector.directions.items()}


def warn_of_tokens(vector: SteeringVector, reader: str) -> None:
    """Warn where a vector does not steer every token, for a format that cannot say so."""
    where = vector.where
    limits = [
        text
        for text, limited in (
            ("leaves BOS alone", not where.bos),
            ("steers the prompt only", not where.generation),
            ("steers generated tokens only", not where.prompt),
            ("steers some positions only", bool(where.ranges)),
            ("steers only what follows a marker", where.marker is not None),
            ("changes its strength over the steps", not isinstance(where.schedule, Constant)),
        )
        if limited
    ]
    if limits:
        lose(f"The vector {' and '.join(limits)}; {reader} steers every token alike, BOS included.")


def block_of(site: str, kind: str, name: str) -> int:
    """The block of `blocks.<n>.<kind>`. Raises InputError for another site."""
    found = re.fullmatch(rf"blocks\.(\d+)\.{kind}", site)
    if found is None:
        raise InputError(f"{name} can only say blocks.<n>.{kind}; this vector acts at {site}.")
    return int(found[1])


def built(path: Path, edits: Sequence[Edit], where: Where, **provenance: Any) -> SteeringVector:
    """The vector of a file that was read."""
    return SteeringVector(tuple(edits), {"file": path.name, **provenance}, where)


def read_pt(path: Path) -> Any:
    """What `torch.save` wrote, as far as it is tensors, arrays, numbers and names. CheckpointError for anything else.

    Nothing in the file is run.
    """
    import numpy as np

    rebuild = np.empty(0).__reduce__()[0]
    arrays: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8"))]
    arrays += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(arrays):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except Exception as error:  # a damaged archive can raise almost anything
        if found := re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error)):
            kind = found[1]
            raise CheckpointError(
                f"{path} holds an object of {kind}, which cannot be read without running code. {_way_out(kind)}"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(f"{path} is damaged or no file of torch.save ({reason}).") from None


def _way_out(kind: str) -> str:
    package = kind.split(".")[0]
    if package == "steering_vectors":
        return "Save its numbers alone: torch.save(vector.layer_activations, path)."
    if package == "repeng":
        return "Save its numbers alone: torch.save(vector.directions, path), or vector.export_gguf(path)."
    return "Save its tensors alone."


def as_vector(value: Any, what: str, path: Path | str) -> Tensor:
    """A finite float32 vector from a tensor or array of shape (width) or (1, …, width). Raises CheckpointError for others."""
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.numel() != tensor.shape[-1]:
        raise CheckpointError(f"{path}: {what} is {tensor.dtype} of shape {tuple(tensor.shape)}, no vector.")
    return finite(tensor.detach().float().cpu().reshape(-1), what, path)


def finite(tensor: Tensor, what: str, path: Path | str) -> Tensor:
    """The tensor itself. Raises CheckpointError where it has NaN or inf."""
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path} is damaged: {what} has NaN or inf.")
    return tensor


def guarded(read: Callable[[Path, Hints], SteeringVector], path: Path, hints: Hints) -> SteeringVector:
    """Read; what a damaged file makes go wrong becomes a CheckpointError."""
    try:
        return read(path, hints)
    except (NumericsError, MemoryError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(f"{path} is damaged, or not what it seems: {reason}.") from None
