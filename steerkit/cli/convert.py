"""`steerkit convert sae`: between SAELens's, dictionary_learning's and sparsify's files and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.common import Json, Quiet, emit, say


def convert_sae(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A run, or a directory in any of the formats.")
    ],
    to: Annotated[str, typer.Option("--to", help="saelens, dictionary_learning, sparsify or steerkit.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an SAE in another toolkit's format. The function it computes stays the same."""
    from sae import formats

    found = formats.format_of(source)
    made = formats.convert(source, to, out)
    say(f"{source} ({found}, {made.arch}, {made.d_in} -> {made.d_sae:,}) is now {out} ({to}).", quiet=quiet)
    files = sorted(path.name for path in out.iterdir())
    emit(
        {"source": str(source), "from": found, "to": to, "out": str(out), "arch": made.arch, "files": files},
        as_json=json,
    )
