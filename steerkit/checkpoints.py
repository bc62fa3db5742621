"""Checkpoints of a training run: one file each, whole or not at all, checked when read.

    checkpoints = Checkpoints(run.path / "checkpoint")
    checkpoints.save(step, tensors, state)            # tensors: {name: Tensor}; state: plain data (JSON)
    step, tensors, state = checkpoints.load()         # the newest that is whole; None if there is none

A checkpoint is a safetensors file whose header holds `state` and a sha256 over names, shapes, values and state. The newest two are
kept, so that one that was damaged on disk does not end a run. `deferred_interrupts` leaves time to write one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit import distributed
from steerkit.errors import CheckpointError
from steerkit.runs import atomic_path, jsonable

KEPT = 2
_SAME_PRESS = 1.0
"""Seconds within which signals are one request: launchers pass on what the terminal has sent already."""


class Checkpoints:
    """The checkpoints in one directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def files(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        return sorted(self.path.glob("step-*.safetensors"))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, then drop all but the newest two. SteerkitError if the disk is full."""
        path = self.path / f"step-{step:010d}.safetensors"
        write_tensors(path, tensors, state)
        for old in self.files()[:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of the newest checkpoint that is whole, or None where there never was one.

        Raises CheckpointError when there are checkpoints and every one is damaged.
        """
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        damaged: CheckpointError | None = None
        for path in reversed(self.files()):
            try:
                found = read_tensors(path)
            except CheckpointError as error:
                print(f"warning: {error}", file=sys.stderr)
                damaged = damaged or error
                continue
            if damaged is not None:
                print(f"warning: going on from the checkpoint before it, {path.name}.", file=sys.stderr)
            return found
        if damaged is not None:
            raise damaged
        return None

    def remove(self) -> None:
        """Delete all checkpoints; a finished run needs none."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors, plain data and their checksum to one safetensors file, atomically."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(jsonable(state))
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"state": text, "sha256": _checksum(plain, text)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises CheckpointError when the file is missing, truncated or was edited."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – no mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be read ({str(error).splitlines()[0]})."
        ) from None
    text = metadata.get("state", "")
    if metadata.get("sha256") != _checksum(tensors, text):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum.")
    return tensors, json.loads(text)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never cut in two; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    when = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        nonlocal when
        if asked.is_set():
            if time.monotonic() - when < _SAME_PRESS:
                return
            raise KeyboardInterrupt
        asked.set()
        when = time.monotonic()
        if distributed.is_first():
            print(
                "Stopping after this step and saving a checkpoint (Ctrl-C again: at once).",
                file=sys.stderr,
                flush=True,
            )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
