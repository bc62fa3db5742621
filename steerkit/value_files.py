"""Files of fitted values – vectors, probes, erasers, lenses –: tensors in safetensors, and plain data beside them as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerkit.errors import CheckpointError, InputError
from steerkit.runs import atomic_write, jsonable


def write_values(path: str | Path, tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> Path:
    """Write a file, whole or not at all. Missing directories are made."""
    from safetensors.torch import save

    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(plain, metadata={"steerkit": json.dumps(jsonable(known))}))
    return path


def read_values(
    path: str | Path, what: str, format_: str, mend: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain data) of a file of `what`; `mend` is told with the refusal of another file.

    Raises InputError for a file that is missing or of another kind or format, CheckpointError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}.") from error
    try:
        known = json.loads(metadata["steerkit"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is no {what} of steerkit{mend}.") from error
    if known.get("format") != format_:
        raise InputError(f"{path} is of format {known.get('format')!r}; {what}s here are {format_!r}.")
    return tensors, known
