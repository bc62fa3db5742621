"""Gemma Scope: `params.npz` (Gemma 2), and `params.safetensors` with `config.json` (Gemma Scope 2, for Gemma 3).

    z = ReLU(x W_enc + b_enc),  f = z · 1[z > threshold],  x̂ = f W_dec + b_dec         W_enc (d_in, d_sae), W_dec (d_sae, d_in)

JumpReLU that does not subtract b_dec from its input: b_enc + b_dec W_enc is the bias here. Lieberum et al. 2024,
https://arxiv.org/abs/2408.05147. Model and site are told by the path alone: google/gemma-scope-2b-pt-res/layer_20/width_16k/….
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.architectures import SAE, jumprelu
from sae.formats.base import (
    Format,
    build,
    consistent,
    read_config,
    read_npz,
    read_safetensors,
    refuse,
    renamed,
    site_name,
    subtract_b_dec_in_biases,
)

FIRST, SECOND, SETTINGS = "params.npz", "params.safetensors", "config.json"
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SITES = {
    "res": "hook_resid_post",
    "resid_post": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "mlp_out": "hook_mlp_out",
    "att": "attn.hook_z",
    "attn_out": "attn.hook_z",
}
"""Attention SAEs are of the heads' outputs before they are projected."""


def read(path: Path) -> SAE:
    if (path / FIRST).is_file():
        file = path / FIRST
        return _build(read_npz(file), file, _metadata(path))
    file = path / SECOND
    config = read_config(path / SETTINGS) if (path / SETTINGS).exists() else {}
    into, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if config.get("affine_connection") or out not in (None, into):
        raise refuse(
            path, f"this is a transcoder ({into} to {out}), not an SAE; those of Gemma Scope cannot be read."
        )
    return _build(read_safetensors(file), file, _metadata(path, config))


def _build(stored: dict[str, Tensor], file: Path, metadata: dict[str, Any]) -> SAE:
    if "affine_skip_connection" in stored:
        raise refuse(file, "this is a transcoder with a skip connection, not an SAE.")
    capitals = {"W_" + name[2:] if name.startswith("w_") else name: tensor for name, tensor in stored.items()}
    tensors = consistent(renamed(capitals, dict(zip(_NAMES, _NAMES)), file), file)
    subtract_b_dec_in_biases(tensors)
    sae = build(jumprelu.fixed(tensors["W_enc"].shape[1]), tensors, file)
    sae.metadata = metadata
    return sae


def _metadata(path: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    place = path.absolute().as_posix()
    if "/embedding/" in place + "/":
        raise refuse(
            path, "SAEs of embeddings cannot be read: whether those are scaled, the file does not say."
        )
    layer = re.search(r"layer_(\d+)", place)
    model = kind = None
    if found := re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)", place):
        model = f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")
        kind = found[3]
    elif found := re.search(r"/(resid_post|mlp_out|attn_out)(?:_all)?/", place):
        kind = found[1]
    if config and config.get("model_name"):
        name = str(config["model_name"]).replace("-v3", "-3")
        model = name if "/" in name else f"google/{name}"
    site = f"blocks.{layer[1]}.{_SITES[kind]}" if layer and kind else None
    if site is None and config:
        site = site_name(str(config.get("hf_hook_point_in", "")).removesuffix(".output")) or None
    return {"model": model, "site": site, "source": "Gemma Scope", "bos": True}


FORMAT = Format("gemma_scope", (FIRST, SECOND), (SETTINGS,), read)
