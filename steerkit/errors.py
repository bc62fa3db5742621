"""The few exceptions users meet. The command line prints their text as one line and exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteerkitError(Exception):
    """Something failed while running (exit status 1)."""

    exit_code = 1


class InputError(SteerkitError):
    """Bad usage or input (exit status 2). The text says what is wrong, where, and how to mend it."""

    exit_code = 2


class SiteError(InputError):
    """A hook site that the model does not have, or that could not be verified."""


class ColumnError(InputError):
    """A column that a table does not have."""


class CheckpointError(InputError):
    """A checkpoint or saved artefact that is missing, truncated or was edited."""


class NumericsError(SteerkitError):
    """NaN or inf where finite numbers are needed; names the site and the batch."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `options`, or the empty string when nothing is near."""
    nearest = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
