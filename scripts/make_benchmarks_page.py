"""Keep what the benchmarks print, with date and hardware, and write docs/benchmarks.md from it.

    python scripts/make_benchmarks_page.py                                  # the page, from docs/benchmarks/*.json
    python scripts/make_benchmarks_page.py bench_probes --repeats 5         # run it with these options, keep it, then the page

A benchmark prints a table and, in its last line, one JSON object. Both go into docs/benchmarks/NAME.json, in place of what was
there. The load of the machine stands beside: where it was above the number of cores, only ratios taken in turns mean something.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "benchmarks"
HEAD = """# Benchmarks

Made by `python scripts/make_benchmarks_page.py`, which runs a benchmark and keeps what it prints, in `docs/benchmarks/` also as
JSON. A load above the number of cores means that other work went on: then trust the ratios, which are taken in turns, and not the
seconds.
"""
TAIL = """## Measured before

The speed of training, collecting, steering, comparing and adapting, beside other packages, stands with its date and conditions
under [Figures](figures.md#speed), and here:

--8<-- "docs/figures.md:speed"
"""


def run(name: str, options: list[str]) -> dict[str, Any]:
    """Run a benchmark and give its record. Raises CalledProcessError when it fails, ValueError without a last line of JSON."""
    script = ROOT / "scripts" / f"{name}.py"
    started, load = time.perf_counter(), os.getloadavg()[0]
    done = subprocess.run([sys.executable, script, *options], check=True, stdout=subprocess.PIPE, text=True)
    *printed, last = done.stdout.rstrip().splitlines()
    return {
        "name": name,
        "command": shlex.join(["python", f"scripts/{name}.py", *options]),
        "date": str(datetime.date.today()),
        "hardware": hardware(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(time.perf_counter() - started),
        "printed": "\n".join(printed).strip(),
        "json": json.loads(last),
    }


def hardware() -> str:
    """The machine, in words."""
    import torch

    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}{device}, torch {torch.__version__}"


def section(record: dict[str, Any]) -> str:
    """What the page says of a record."""
    script = ROOT / "scripts" / f"{record['name']}.py"
    title = (ast.get_docstring(ast.parse(script.read_text())) or record["name"]).splitlines()[0]
    load = " to ".join(f"{value:g}" for value in record["load"])
    conditions = f"{record['date']}; {record['hardware']}; load {load}; {record['seconds']} s"
    return f"## {title.rstrip('.')}\n\n`{record['command']}`, {conditions}:\n\n```text\n{record['printed']}\n```\n"


def page() -> str:
    """docs/benchmarks.md."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return "\n".join([HEAD, *map(section, records), TAIL])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a benchmark in scripts/, without .py; its options follow")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    if chosen.name:
        record = run(chosen.name, chosen.options)
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"{chosen.name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(section(record))
    (ROOT / "docs" / "benchmarks.md").write_text(page())


if __name__ == "__main__":
    main()
