"""What every command shares: its options, how it ends, and how it prints."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit.errors import InputError, SteerkitError
from steerkit.runs import interruptible, jsonable, read_json

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="`storyworld` (the default), a Hugging Face id, or a local directory."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="`storyworld` (the default), a data set id, a cache, or a text or table file."
    ),
]
Context = Annotated[int | None, typer.Option("--context", help="Tokens a row, special ones included.")]
Packing = Annotated[bool | None, typer.Option("--packing/--rows", help="Documents end to end, or one a row.")]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="Column of the text.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the best there is by default.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Force = Annotated[bool, typer.Option("--force", help="With --resume: go on although settings have changed.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object in the last line of stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="A settings file, for instance another run's run.yaml.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting by its name; may be repeated.")
]


def items(text: str | None) -> list[str] | None:
    """The values of an option that takes several, with commas between."""
    return None if text is None else [item.strip() for item in text.split(",") if item.strip()]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `function` end as the command line promises: 0 done, 2 bad usage or input, 1 failure, 130 interrupted."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _quieten_libraries()
        try:
            with interruptible(), launched():
                function(*args, **kwargs)
        except SteerkitError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("Interrupted; what was saved so far is intact.", 130)
        except MemoryError:
            fail("Out of memory. A smaller --set training.batch_size or tokenization.context needs less.", 1)
        except RuntimeError as error:
            if (
                "out of memory" not in str(error).lower()
                and "can't allocate memory" not in str(error).lower()
            ):
                raise
            fail(f"Out of memory: {str(error).splitlines()[0]}", 1)

    return wrapped


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Join the other processes, where `torchrun` or `accelerate launch` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    from steerkit import distributed

    with distributed.launched():
        yield


def is_first() -> bool:
    """Whether this is the process that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def fail(message: str, code: int) -> None:
    """Print one line on stderr and exit with `code`; of several processes the first speaks, if it lives."""
    if not is_first() and not message.startswith("Stopped"):
        raise SystemExit(code)
    prefix = "" if code == 130 else "Error: "
    print(prefix + " ".join(message.split()), file=sys.stderr)
    raise typer.Exit(code)


def emit(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print `result` as the last line of stdout when --json was given."""
    if as_json and is_first():
        sys.stdout.flush()
        print(json.dumps(jsonable(result), allow_nan=False))


def say(text: str, *, quiet: bool) -> None:
    """Print `text` for a person, unless --quiet."""
    if not quiet and is_first():
        print(text, flush=True)


def is_finished(out: Path, resume: bool, *, as_json: bool, quiet: bool, key: str | None = None) -> bool:
    """Whether --resume was given for a finished run: that is said, with its summary, and nothing is left to do.

    With `key`, a summary without it is of a run that is not done.
    """
    if not resume or not (out / "summary.json").exists():
        return False
    summary = read_json(out / "summary.json")
    if key is not None and key not in summary:
        return False
    say(f"{out} is a finished run: there is nothing to resume.", quiet=quiet)
    emit(summary, as_json=as_json)
    return True


def summary_line(summary: Mapping[str, Any]) -> str:
    """The figures of an SAE that people look at first, in a line."""
    names = ("l0", "fvu", "delta_ce", "ce_recovered", "final_cosine", "dead_fraction", "seconds")
    shown = [f"{name} {summary[name]:.4g}" for name in names if summary.get(name) is not None]
    return f"{summary['arch']}: " + "   ".join(shown)


def choose_device(device: str | None) -> str:
    """The device asked for, or the best there is. Raises InputError for one that this machine lacks."""
    import torch

    if device is None:
        if torch.cuda.is_available():
            several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
            return f"cuda:{os.environ['LOCAL_RANK']}" if several else "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]} `steerkit doctor` lists the devices."
        ) from None
    return device


def choose_dtype(dtype: str | None) -> Any:
    """The torch dtype of a name; float32 by default. Raises InputError for another name."""
    import torch

    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if dtype is None:
        return torch.float32
    if dtype not in names:
        raise InputError(f"--dtype {dtype!r} is unknown; it is one of {', '.join(names)}.")
    return names[dtype]


def load_model(source: str, device: str | None, dtype: str | None) -> Any:
    """The HookedModel that `--model`, `--device` and `--dtype` name."""
    from steerkit.models import HookedModel

    return HookedModel.from_pretrained(source, device=choose_device(device), dtype=choose_dtype(dtype))


def _quieten_libraries() -> None:
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
