"""A run directory: everything that a command makes, written whole or not at all.

    run = Run.open("runs/g", kind="train sae", config={"arch": "gated", ...}, resume=True)
    run.log({"tokens": 4096, "loss": 0.3})        # one line of metrics.jsonl
    run.finish({"l0": 16.1, ...})                 # summary.json; the run is finished

`run.yaml` holds the resolved configuration, `provenance.json` where and with what it was made.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from steerkit.errors import CheckpointError, InputError, SteerkitError

_PACKAGES = (
    "steerkit",
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "numpy",
    "peft",
    "safetensors",
)


# -- files that appear whole or not at all ---------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is fsynced and renamed to `path`, on any failure removed.

    The body may write a file or make a directory there. A directory replaces an existing directory.
    Raises SteerkitError with one clear line when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            _replace_directory(temporary, path)
        else:
            os.chmod(temporary, 0o666 & ~_UMASK)  # libraries make files that only their owner can read
            _fsync(temporary)
            os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SteerkitError(
                f"The disk is full: {path} was not written ({_free_gb(path.parent):.2f} GB free). "
                "Free some space and run the command again with --resume; what was saved before is intact."
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary file, fsync and rename."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities become null, as JSON has no name for them."""
    atomic_write(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises CheckpointError when it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read ({error}).") from None


def jsonable(value: Any) -> Any:
    """`value` with paths, tuples and tensors turned into what JSON knows; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        os.replace(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.replace(path, old / path.name)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _free_gb(path: Path) -> float:
    return shutil.disk_usage(path).free / 1e9


# -- the run directory -----------------------------------------------------------------------------------------------


class Run:
    """One run directory. Use `Run.open`."""

    def __init__(self, path: Path, kind: str, config: dict[str, Any]) -> None:
        self.path = path
        self.kind = kind
        self.config = config

    @classmethod
    def open(
        cls,
        out: str | Path,
        kind: str,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> Run:
        """Open `out` for a run of `kind` with the resolved `config`.

        A new or empty directory is set up; with `resume`, a directory of the same kind and configuration is continued. With
        `force`, too, other settings take the place of those that are there, and provenance.json says what was changed.
        `provenance["sources"]`, what settings alone do not tell (the data's hash), has to be the same as well.
        Raises InputError when the directory holds something else.
        """
        import yaml

        path = Path(out)
        wanted = {"kind": kind, **jsonable(config)}
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; give --out a directory that does not exist yet.")
        present = path / "run.yaml"
        if present.exists():
            found = cls._read_config(present)
            if not resume:
                state = "a finished" if (path / "summary.json").exists() else "an unfinished"
                raise InputError(
                    f"{path} holds {state} run ({found.get('kind', 'unknown')}). "
                    "Continue it with --resume, or give another --out."
                )
            changed = _changes(found, wanted)
            if provenance is not None and "sources" in provenance:
                there = read_json(path / "provenance.json").get("sources", {})
                changed += _changes(there, jsonable(provenance["sources"]))
            if changed and not (force and found.get("kind") == kind):
                named = "; ".join(
                    f"{key} is {there!r} there and {here!r} here" for key, there, here in changed[:5]
                )
                more = f"; {len(changed) - 5} more differ" if len(changed) > 5 else ""
                raise InputError(
                    f"{path} holds another run: {named}{more}. "
                    "Give another --out, the same settings to resume it, or --force to go on with these."
                )
            if changed:
                origin = read_json(path / "provenance.json")
                origin["changed"] = [*origin.get("changed", []), {"settings": changed, "at": _now()}]
                write_json(path / "provenance.json", origin)
                atomic_write(present, yaml.safe_dump(wanted, sort_keys=False))
        else:
            if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise InputError(f"{path} is not empty and holds no run; give --out another directory.")
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "provenance.json", provenance if provenance is not None else make_provenance())
            atomic_write(present, yaml.safe_dump(wanted, sort_keys=False))
        return cls(path, kind, {k: v for k, v in wanted.items() if k != "kind"})

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read an existing run directory. Raises InputError when `path` is none."""
        path = Path(path)
        if not (path / "run.yaml").exists():
            reason = "does not exist" if not path.exists() else "holds no run.yaml"
            raise InputError(f"{path} is not a run directory: it {reason}.")
        config = cls._read_config(path / "run.yaml")
        return cls(path, config.pop("kind", ""), config)

    @staticmethod
    def _read_config(path: Path) -> dict[str, Any]:
        import yaml

        try:
            config = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is damaged and cannot be read ({error}).") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is damaged: it holds no settings.")
        return config

    @property
    def finished(self) -> bool:
        """Whether `finish` has been reached."""
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises InputError while the run is unfinished."""
        if not self.finished:
            raise InputError(f"{self.path} is an unfinished run; continue it with --resume.")
        return read_json(self.path / "summary.json")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, key: str, upto: float) -> None:
        """Drop the lines of metrics.jsonl whose `key` is beyond `upto`: they are logged again after a resume."""
        kept = [record for record in self.metrics() if record.get(key, 0) <= upto]
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which makes the run a finished one."""
        write_json(self.path / "summary.json", summary)


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, value there, value here) of each setting that differs."""
    there, here = _flat(found), _flat(wanted)
    names = [*here, *(name for name in there if name not in here)]
    return [(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def make_provenance(**extra: Any) -> dict[str, Any]:
    """Versions, command line, hardware and time, for provenance.json; `extra` adds model, data hash, seed and so on."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **extra,
        "command": sys.argv,
        "versions": versions,
        "hardware": hardware,
        "started": _now(),
    }


def reset_peak_memory() -> None:
    """Let `peak_memory_mb` begin anew: on GPUs, and on Linux for the process's resident memory too."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB, or of the GPU's allocator where CUDA has been used."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


# -- progress --------------------------------------------------------------------------------------------------------


class _PlainProgress:
    """Lines with rate and ETA, at most one every `seconds`; for logs and pipes."""

    def __init__(
        self, total: float, description: str, unit: str, quiet: bool, done: float, seconds: float = 10
    ) -> None:
        self.total, self.description, self.unit, self.quiet, self.seconds = (
            total,
            description,
            unit,
            quiet,
            seconds,
        )
        self.done = self.first = done
        self.started = self.shown = time.monotonic()

    def advance(self, n: float, **fields: Any) -> None:
        self.done += n
        now = time.monotonic()
        if self.quiet or now - self.shown < self.seconds:
            return
        self.shown = now
        print(f"{self.description}: {self.line(**fields)}", file=sys.stderr, flush=True)

    def line(self, **fields: Any) -> str:
        rate = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
        share = 100 * self.done / max(self.total, 1)
        eta = f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
        return f"{share:.0f} %  {self.done:,.0f}/{self.total:,.0f} {self.unit}  {rate:,.0f}/s  {eta}  {shown}".rstrip()


class _RichProgress(_PlainProgress):
    """A rich progress bar; for terminals."""

    def __init__(self, bar: Any, total: float, description: str, unit: str, done: float) -> None:
        super().__init__(total, description, unit, quiet=True, done=done)
        self.bar, self.task = bar, bar.add_task(description, total=total, completed=done, line="")

    def advance(self, n: float, **fields: Any) -> None:
        self.done += n
        self.bar.update(self.task, completed=self.done, line=self.line(**fields))


@contextlib.contextmanager
def progress(
    total: float, description: str, unit: str = "tokens", *, quiet: bool = False, done: float = 0
) -> Iterator[_PlainProgress]:
    """Show the progress of long work on stderr: a bar on a terminal, plain lines elsewhere, nothing when `quiet`.

    `total` and `done` are in `unit`; call `.advance(n, **fields)` as work is done, `fields` being figures to show.
    """
    if quiet or not sys.stderr.isatty():
        yield _PlainProgress(total, description, unit, quiet, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _RichProgress(bar, total, description, unit, done)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM becomes KeyboardInterrupt inside the block, so that schedulers' kills save what there is, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
