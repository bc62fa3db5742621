"""Reading and writing SAEs: SAELens's layout, which is ours too, and those of other toolkits, one file each.

    sae.save("runs/g")                                    # cfg.json and sae_weights.safetensors
    sae = load("runs/g")                                  # a directory in any of the formats
    sae = load("hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    sae = load("saelens:gpt2-small-res-jb/blocks.7.hook_resid_pre")          # SAELens's releases
    convert("ae_dir", "saelens", "out")                   # from any to any that can be written
    push_to_hub(sae, "me/my-saes", "gated")

All of them describe the same functions, so converting changes nothing but names, transposes and folded constants, and what was
written is read back and compared. What cannot be folded (normalisation per token, skip connections) is refused, and so is a file
that holds anything but numbers: no pickled code is ever run.

| format | files | read | written |
|---|---|---|---|
| `saelens`, `steerkit` | cfg.json, sae_weights.safetensors | yes, and transcoders, crosscoders | the same |
| `dictionary_learning` | ae.pt, config.json | yes | yes |
| `sparsify` | cfg.json, sae.safetensors | TopK | TopK |
| `gemma_scope` | params.npz, or params.safetensors and config.json | SAEs | – |
| `llama_scope` | hyperparams.json, checkpoints/final.safetensors | SAEs | – |
| `jumprelu` | SAELens's, as ReLU latents with thresholds | – | SAEs but TopK |

A format is a file here and a line in `FORMATS`. What sae-lens lacks is registered with it when it is imported (`registration`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sae.architectures import SAE
from sae.formats import (
    dictionary_learning,
    gemma_scope,
    hub,
    jumprelu,
    llama_scope,
    registration,
    saelens,
    sparsify,
)
from sae.formats.base import Format, as_jumprelu
from sae.formats.hub import push_to_hub
from steerkit.errors import CheckpointError, InputError, SteerkitError, did_you_mean

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        saelens.FORMAT,
        dictionary_learning.FORMAT,
        sparsify.FORMAT,
        gemma_scope.FORMAT,
        llama_scope.FORMAT,
        jumprelu.FORMAT,
        Format("steerkit", write=SAE.save),
    )
}
"""Every format; a directory is in the first that recognises it."""

WRITERS: dict[str, Callable[[SAE, Path], None]] = {
    name: format.write for name, format in FORMATS.items() if format.write is not None
}
"""What SAEs can be written as."""


def load(source: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE: a run directory of ours, a directory or its weights file in any of the formats, a folder of a Hugging Face
    repository (`hf://user/repo/folder` or `user/repo:folder`), or a release of SAELens (`saelens:release/id`).

    Weights become float32. `metadata` says which model and site it is for, as far as that is known. Raises InputError when
    there is none, it cannot be fetched, or its architecture is not supported; CheckpointError when it is damaged.
    """
    if str(source).startswith("saelens:"):
        sae = saelens.load_release(str(source).removeprefix("saelens:"))
    else:
        path = locate(source)
        sae = _read(FORMATS[format_of(path)], path)
    if is_remote(source):
        sae.metadata["loaded_from"] = str(source)
    return sae.to(device).eval().requires_grad_(False)


def convert(source: str | Path, to: str, out: str | Path) -> SAE:
    """Write the SAE at `source`, whatever `load` takes, to the directory `out` in the format `to`; returns it.

    What was written is read again and must compute the same. Raises InputError for a format that cannot hold it.
    """
    if to not in WRITERS:
        raise InputError(f"Unknown format {to!r}; there are {', '.join(WRITERS)}.{did_you_mean(to, WRITERS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give --out another directory.")
    sae = load(source)
    WRITERS[to](sae, out)
    difference = greatest_difference(sae, load(out))
    if difference > 1e-3:
        raise SteerkitError(
            f"{out} does not compute what {source} does (a difference of {difference:.2g}): a bug."
        )
    return sae


def format_of(source: str | Path) -> str:
    """The name of the format of a directory, by its files. InputError when it is none of them."""
    if str(source).startswith("saelens:"):
        return "saelens"
    path = locate(source)
    if not path.is_dir():
        raise InputError(
            f"{path} is no directory of an SAE: it {'is a file' if path.exists() else 'does not exist'}."
        )
    for format in FORMATS.values():
        if format.recognises(path):
            return format.name
    if (path / "run.yaml").exists():
        raise InputError(f"{path} is an unfinished run without an SAE; continue it with --resume.")
    files = [file for format in FORMATS.values() for file in format.weights]
    raise InputError(
        f"{path} is not a run directory and holds no SAE: there is no {', '.join(files[:-1])} or {files[-1]} in it."
    )


def is_remote(source: str | Path) -> bool:
    """Whether `source` is a repository's folder or a release, rather than a path."""
    return str(source).startswith("saelens:") or hub.is_remote(str(source))


def locate(source: str | Path) -> Path:
    """The directory that holds the SAE: `source`, that of the weights file `source`, or what is fetched from a repository."""
    if hub.is_remote(str(source)):
        files = [file for format in FORMATS.values() for file in (*format.weights, *format.config)]
        return hub.fetch(str(source), dict.fromkeys(files))
    path = Path(source)
    for format in FORMATS.values():
        for file in format.weights:
            depth = len(Path(file).parts)
            if path.is_file() and path.parts[-depth:] == Path(file).parts:
                return path.parents[depth - 1]
    return path


@torch.no_grad()
def greatest_difference(a: SAE, b: SAE, n: int = 64) -> float:
    """How far the outputs of two SAEs are apart on activations like those they are for, as a share of their size.

    The median over `n` activations: a latent right at its threshold may fall on either side of it.
    """
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(a.d_sae, (n, min(16, a.d_sae)), generator=generator)
    weights = torch.rand(which.shape, generator=generator)
    reads_what_it_gives = a.W_dec.shape[1] == a.d_in
    directions = a.W_dec if reads_what_it_gives else a.W_enc.T
    x = torch.stack([w @ directions[i] for w, i in zip(weights, which)])
    x = x + 0.1 * x.std() * torch.randn(x.shape, generator=generator)
    x = x + a.b_dec if reads_what_it_gives else x
    ours, theirs = a(x), b(x)
    apart = (ours - theirs).norm(dim=1) / (x.norm(dim=1) + ours.norm(dim=1)).clamp_min(1e-12)
    return float(apart.median())


def _read(format: Format, path: Path) -> SAE:
    assert format.read is not None
    try:
        return format.read(path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__} {error}"
        raise CheckpointError(f"{path} is damaged, or not what {format.name} writes: {reason}.") from None


registration.register_when_imported()

__all__ = [
    "FORMATS",
    "WRITERS",
    "Format",
    "as_jumprelu",
    "convert",
    "format_of",
    "is_remote",
    "load",
    "locate",
    "push_to_hub",
]
