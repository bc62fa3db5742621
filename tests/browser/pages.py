"""What tests of pages share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerkit.plots import script_json

MALICIOUS = "</script><img src=x onerror=window.hacked=1><!-- \u2028"
DEAD = 60
"""The first of four dead latents of the small dashboard."""

_SHARD = re.compile(r'(?<=window\.__shard\(")([^"]+)",(.*?)(?=\);(?:</script>)?$)', re.MULTILINE)


def rewrite(file: Path, change: Callable[[Any], Any]) -> Any:
    """Change the data in a file of a dashboard: `change` gets them, and gives what to write instead."""
    text = file.read_text(encoding="utf-8")
    found = _SHARD.search(text)
    assert found is not None, f"{file} holds no data"
    data = change(json.loads(found[2]))
    file.write_text(
        text[: found.start()] + f'{found[1]}",{script_json(data)}' + text[found.end() :], encoding="utf-8"
    )
    return data
