"""`steerkit convert sae`: from any SAE that can be read to the files of SAELens, dictionary_learning and sparsify, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerkit.cli.common import Json, Quiet, emit, say


def convert_sae(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A run, a directory in any format, hf://user/repo/folder, or saelens:release/id.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="saelens, dictionary_learning, sparsify, steerkit, or jumprelu: SAELens's files, a gated SAE as JumpReLU.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an SAE in another toolkit's format. What was written is read back: it computes the same function."""
    from sae import formats

    found = formats.format_of(source)
    made = formats.convert(source, to, out)
    say(f"{source} ({found}, {made.arch}, {made.d_in} -> {made.d_sae:,}) is now {out} ({to}).", quiet=quiet)
    files = sorted(path.name for path in out.iterdir())
    emit(
        {"source": source, "from": found, "to": to, "out": str(out), "arch": made.arch, "files": files},
        as_json=json,
    )
