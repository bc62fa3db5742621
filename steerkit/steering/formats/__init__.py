"""Reading and writing steering vectors of other toolkits, one file each.

    vector = load_any("happy.gguf")                                   # the format is known by the file
    vector = load_any("vec_layer_13.pt", layer=13)                    # a bare tensor does not say where it acts
    export(vector, "gguf", "happy.gguf", strength=4.0)
    from_steering_vectors(obj);  from_repeng(obj)                     # objects rather than files

| format | what it is | what it holds |
|---|---|---|
| `steerkit` | our own safetensors | everything |
| `gguf` | control vectors of llama.cpp, repeng, EasySteer | additions at the outputs of blocks |
| `pt` | tensors of torch.save: BiPO, CAA, AxBench, steering-vectors, repeng | the same |
| `pyreft` | a directory of pyreft or pyvene | low-rank edits at the outputs of blocks |
| `lora` | a LoRA adapter of peft | weight deltas |

What a format cannot hold is refused; what it can hold but not say – which tokens, mostly – is named in a `ConversionWarning`.
A latent of an SAE needs no format of its own: see `steering.add_latents`. A format is a file here and a line in `FORMATS`.
"""

from __future__ import annotations

import math
from pathlib import Path

from steerkit.errors import InputError, did_you_mean
from steerkit.steering.formats import gguf, lora, pt, pyreft, steerkit
from steerkit.steering.formats.base import ConversionWarning, Format, Hints, guarded
from steerkit.steering.formats.pt import from_repeng, from_steering_vectors
from steerkit.steering.vector import SteeringVector

FORMATS: dict[str, Format] = {
    format.name: format for format in (gguf.FORMAT, pyreft.FORMAT, lora.FORMAT, pt.FORMAT, steerkit.FORMAT)
}
"""Every format; a file is in the first that recognises it."""


def load_any(
    path: str | Path,
    *,
    site: str | None = None,
    layer: int | None = None,
    index: int | None = None,
    positions: str | None = None,
) -> SteeringVector:
    """Read a steering vector in any of the formats.

    `site` (or `layer`, for the output of that block, counted from 0) says where a bare tensor acts, `index` which row of a matrix
    of vectors is meant, `positions` which tokens an intervention of pyreft steers, such as 'f7+l7'. Raises InputError when there is
    no such file, it is in none of the formats, or one of these is missing or of no use; CheckpointError when it is damaged.
    """
    path = Path(path)
    if layer is not None:
        if site is not None:
            raise InputError("Give --site or --layer, not both.")
        if layer < 0:
            raise InputError(f"--layer is {layer}; blocks are counted from 0.")
        site = f"blocks.{layer}.hook_resid_post"
    format = FORMATS[format_of(path)]
    given = {"site": site, "index": index, "positions": positions}
    for name, value in given.items():
        if value is not None and name not in format.takes:
            raise InputError(f"{path} is a file of {format.name}, which needs no --{name}: leave it out.")
    return guarded(format.read, path, Hints(site, index, positions))


def export(
    vector: SteeringVector, to: str, out: str | Path, *, strength: float = 1.0, force: bool = False
) -> Path:
    """Write a vector, times `strength`, in the format `to`; returns `out`.

    Warns (`ConversionWarning`) of what the format does not say. Raises InputError for a format that does not exist or cannot hold
    the vector, and for a directory `out` that is not empty, which `force` replaces if it holds a vector.
    """
    if to not in FORMATS:
        raise InputError(
            f"There is no format {to!r}.{did_you_mean(to, FORMATS)} There are {', '.join(FORMATS)}."
        )
    out = Path(out)
    _require_free(out, FORMATS[to], force)
    if not math.isfinite(strength):
        raise InputError(f"strength is {strength}; it must be finite.")
    if strength != 1.0:
        vector = vector * strength
    FORMATS[to].write(vector, out)
    return out


def _require_free(out: Path, format: Format, force: bool) -> None:
    if out.is_dir() and not format.directory:
        raise InputError(f"{out} is a directory, and {format.name} is a file: give --out another place.")
    if not format.directory or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (force and any(other.directory and other.recognises(out) for other in FORMATS.values())):
        raise InputError(f"{out} is not empty: give --out another directory.")


def format_of(path: str | Path) -> str:
    """The name of the format of a file or directory. Raises InputError when it is none of them, or not there."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    for format in FORMATS.values():
        if format.recognises(path):
            return format.name
    raise InputError(
        f"{path} is no steering vector that can be read: there are .safetensors of steerkit, .gguf, .pt, "
        "and directories of pyreft (intkey_*.bin) and LoRA (adapter_config.json)."
    )


__all__ = [
    "FORMATS",
    "ConversionWarning",
    "Format",
    "export",
    "format_of",
    "from_repeng",
    "from_steering_vectors",
    "load_any",
]
