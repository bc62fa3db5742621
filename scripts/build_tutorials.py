"""Run the tutorials and write the pages that show what they printed.

    python scripts/build_tutorials.py                               # all of docs/tutorials/*.py
    python scripts/build_tutorials.py compare_adapters many_gpus    # some
    python scripts/build_tutorials.py --fast --out /tmp/pages       # as the tests run them: small, elsewhere

A tutorial is a script in the percent format, which Jupyter (with jupytext) and VS Code open as a notebook: cells begin with `# %%`,
those of text with `# %% [markdown]`. A cell may say what is smaller in fast mode: `# %% fast={"TOKENS": 4096}` sets these names
after the cell has run. Each tutorial runs in an empty directory; after a cell stands what it printed and the `repr` of its last
expression, if that is not None. The page ends with date, time and hardware.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import io
import json
import os
import platform
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
MARK = re.compile(r"^# %%(?P<text> \[markdown\])?(?: fast=(?P<fast>\{.*\}))?$")


@dataclass(frozen=True)
class Cell:
    """A piece of a tutorial."""

    source: str
    line: int
    """Of its first line in the file."""
    is_text: bool
    fast: dict[str, Any]
    """Names that fast mode sets after the cell."""


def read(path: Path) -> list[Cell]:
    """The cells of a tutorial. Raises ValueError for a line before the first cell."""
    found: list[Cell] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        mark = MARK.match(line)
        if mark is not None:
            found.append(Cell("", number + 1, bool(mark["text"]), json.loads(mark["fast"] or "{}")))
        elif not found:
            raise ValueError(f"{path.name}:{number}: a tutorial begins with a line of `# %%`.")
        else:
            last = found[-1]
            found[-1] = Cell(f"{last.source}{line}\n", last.line, last.is_text, last.fast)
    return found


def text_of(cell: Cell) -> str:
    """The Markdown of a cell of text."""
    return "\n".join(re.sub(r"^# ?", "", line) for line in cell.source.strip().splitlines())


def execute(path: Path, *, fast: bool = False) -> Iterator[tuple[Cell, str]]:
    """(cell, what it said) for each cell in turn, in the current directory. A cell of text says nothing."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in read(path):
        said = io.StringIO()
        if not cell.is_text:
            with contextlib.redirect_stdout(said):
                value = _run(cell, path, names)
                if value is not None:
                    print(value)
            if fast:
                names.update(cell.fast)
        yield cell, said.getvalue().rstrip()


def _run(cell: Cell, path: Path, names: dict[str, Any]) -> Any:
    """Execute a cell and give the value of its last expression."""
    tree = ast.parse("\n" * (cell.line - 1) + cell.source, str(path))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(path), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(path), "eval"), names)


@contextlib.contextmanager
def inside(folder: str | Path) -> Iterator[None]:
    """The current directory is `folder` within the context."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def page(path: Path, executed: Sequence[tuple[Cell, str]], note: str) -> str:
    """The Markdown page of a tutorial that ran."""
    parts = []
    for cell, said in executed:
        if cell.is_text:
            parts.append(text_of(cell))
        elif cell.source.strip():
            parts.append(f"```python\n{cell.source.strip()}\n```")
            parts += [f"```text\n{said}\n```"] if said else []
    return "\n\n".join([*parts, f"*{note} The script: [{path.name}]({path.name}).*"]) + "\n"


def hardware() -> str:
    """What this runs on, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{threads} of a {os.cpu_count()}-core {platform.machine()} CPU, torch {torch.__version__}"


def build(path: Path, out: Path, *, fast: bool) -> float:
    """Run one tutorial in an empty directory and write its page; gives the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        executed = list(execute(path, fast=fast))
    seconds = time.perf_counter() - started
    date = datetime.date.today()
    note = f"Output of {date.day} {date:%B %Y}, {seconds:.0f} s on {hardware()}."
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{path.stem}.md").write_text(page(path, executed, note))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="tutorials; all by default")
    parser.add_argument("--fast", action="store_true", help="the small settings of the tests")
    parser.add_argument("--out", type=Path, default=TUTORIALS, help="directory of the pages")
    options = parser.parse_args()
    out = options.out.resolve()
    paths = [TUTORIALS / f"{name}.py" for name in options.names] or sorted(TUTORIALS.glob("*.py"))
    failed = False
    for path in paths:
        try:
            print(f"{path.stem}: {build(path, out, fast=options.fast):.0f} s", flush=True)
        except Exception:
            failed = True
            traceback.print_exc()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
