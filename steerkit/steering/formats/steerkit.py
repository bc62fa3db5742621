"""Our own file, as a format among the others: safetensors that hold all of a vector."""

from __future__ import annotations

from pathlib import Path

from steerkit.steering.formats.base import Format, Hints, begins
from steerkit.steering.vector import SteeringVector


def read(path: Path, hints: Hints) -> SteeringVector:
    return SteeringVector.load(path)


def recognises(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".safetensors" or begins(path, b"{", at=8))


FORMAT = Format("steerkit", recognises, read, SteeringVector.save)
