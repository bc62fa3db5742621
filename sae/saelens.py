"""SAELens's layout on disk, which is ours too: `cfg.json` and `sae_weights.safetensors` in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerkit.runs import atomic_path, write_json

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"

_VERSION = "6.54.12"
"""Whose layout is written; sae-lens rewrites what is older than 6."""


def write(
    path: str | Path,
    architecture: str,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:
    """Write both files, each whole. `settings` are the architecture's in `cfg.json`, `own` is what only steerkit knows."""
    path = Path(path)
    d_in, d_sae = weights["W_enc"].shape
    settings = dict(settings)
    more = settings.pop("metadata", {})
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **settings,
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": own.get("model"),
            "hook_name": own.get("site"),
            **more,
            "steerkit": dict(own),
        },
    }
    write_safetensors(path / WEIGHTS_FILE, weights)
    write_json(path / CONFIG_FILE, config)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file that appears whole."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
