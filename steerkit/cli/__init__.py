"""The command line: one file for each group of commands. `steerkit --help` lists them."""

import sys


def start() -> None:
    """Entry point of the console script. Where a library that the commands need will not import, `doctor` still runs."""
    try:
        from steerkit.cli.main import app
    except Exception as error:  # a broken library may raise anything
        if sys.argv[1:2] != ["doctor"]:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SystemExit(
                f"Error: steerkit cannot start ({what}): `steerkit doctor` says what is amiss."
            ) from None
        from steerkit.cli.doctor import alone

        sys.argv.pop(1)
        alone()
    else:
        app()
