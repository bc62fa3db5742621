"""sparsify: `sae.safetensors` and `cfg.json`, TopK SAEs alone. https://github.com/EleutherAI/sparsify.

f = TopK(ReLU(W_e (x - b_dec) + b_e)); the directory is named after the module whose output it was trained on, `layers.5`.
"""

from __future__ import annotations

from pathlib import Path

from sae.architectures import SAE
from sae.architectures.topk import TopK
from sae.formats.base import (
    Format,
    build,
    consistent,
    read_config,
    read_safetensors,
    refuse,
    renamed,
    site_name,
)
from sae.saelens import write_safetensors
from steerkit.errors import InputError
from steerkit.runs import write_json

WEIGHTS, SETTINGS = "sae.safetensors", "cfg.json"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(path: Path) -> SAE:
    file, config = path / WEIGHTS, read_config(path / SETTINGS)
    unsupported = [key for key in ("transcode", "skip_connection", "signed") if config.get(key)]
    if config.get("activation", "topk") != "topk":
        unsupported.append(f"activation {config['activation']}")
    if unsupported:
        raise refuse(path, f"sparsify SAEs with {', '.join(unsupported)} cannot be read.")
    tensors = renamed(read_safetensors(file), _NAMES, file)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    consistent(tensors, file)
    sae = build(TopK(tensors["W_enc"].shape[1], k=int(config["k"])), tensors, file)
    whole = path.parent / "config.json"  # of the whole training, beside the SAEs of its modules
    model = read_config(whole).get("model") if whole.is_file() else None
    sae.metadata = {"model": model, "site": site_name(path.name), "source": "sparsify"}
    return sae


def write(sae: SAE, out: Path) -> None:
    if sae.saelens_architecture != "topk" or not isinstance(sae.config, TopK):
        raise InputError(f"sparsify's format holds TopK SAEs only; this one is {sae.arch}.")
    weights = sae.state_dict()
    stored = {name: weights[own] for name, own in _NAMES.items()}
    stored["encoder.weight"] = weights["W_enc"].T.contiguous()
    write_safetensors(out / WEIGHTS, stored)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    write_json(out / SETTINGS, config)


FORMAT = Format("sparsify", (WEIGHTS,), (SETTINGS,), read, write)
