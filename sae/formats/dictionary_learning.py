"""dictionary_learning: `ae.pt`, a pickle of tensors that is read with `weights_only`, and `config.json` of the trainer.

    AutoEncoder              ReLU(W_e (x - b) + b_e)              AutoEncoderNew, JumpReluAutoEncoder: without the - b
    GatedAutoEncoder         our gated                            AutoEncoderTopK: our TopK
    BatchTopKSAE             ReLU latents above one threshold     MatryoshkaBatchTopKSAE: the same, other names

https://github.com/saprmarks/dictionary_learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import SAE, Config, jumprelu
from sae.architectures.gated import Gated
from sae.architectures.l1 import L1
from sae.architectures.topk import TopK
from sae.formats.base import (
    Format,
    as_jumprelu,
    build,
    consistent,
    read_config,
    read_pt,
    refuse,
    renamed,
    site_name,
    subtract_b_dec_in_biases,
)
from steerkit.runs import atomic_path, write_json

WEIGHTS, SETTINGS = "ae.pt", "config.json"

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_KEYS = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    },
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": _DIRECT,
    "JumpReluAutoEncoder": _DIRECT,
}
_BY_TENSORS = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder")
"""Classes that are tried when config.json names none."""
_CLASS = {
    "standard": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


def read(path: Path) -> SAE:
    file = path / WEIGHTS
    stored = read_pt(file)
    settings = read_config(path / SETTINGS).get("trainer", {}) if (path / SETTINGS).exists() else {}
    name = _class_of(settings, stored, file)
    tensors = renamed(stored, _KEYS[name], file)
    if _KEYS[name] is not _DIRECT:
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"].T.contiguous(), tensors["W_dec"].T.contiguous()
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(tensors["W_enc"].shape[1]).clone()
    consistent(tensors, file)
    if name == "AutoEncoderNew" or (
        name == "JumpReluAutoEncoder" and not settings.get("apply_b_dec_to_input", False)
    ):
        subtract_b_dec_in_biases(tensors)
    sae = build(_arch_of(name, tensors["W_enc"].shape[1], stored, settings), tensors, file)
    sae.metadata = {
        "model": settings.get("lm_name"),
        "site": _site(settings),
        "source": f"dictionary_learning, {name}",
    }
    return sae


def write(sae: SAE, out: Path) -> None:
    """ae.pt and config.json; what has thresholds as a JumpReluAutoEncoder."""
    sae = as_jumprelu(sae) if sae.threshold is not None else sae
    if sae.saelens_architecture not in _CLASS:
        raise refuse(out, f"dictionary_learning has nothing that computes what {sae.arch} does.")
    name = _CLASS[sae.saelens_architecture]
    weights = dict(sae.state_dict())
    if name == "JumpReluAutoEncoder":
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    else:
        weights["W_enc"], weights["W_dec"] = weights["W_enc"].T, weights["W_dec"].T
    stored = {key: weights[own].contiguous().cpu() for key, own in _KEYS[name].items()}
    settings: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if isinstance(sae.config, TopK):
        stored |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        settings["k"] = sae.config.k
    settings |= {"lm_name": sae.metadata.get("model"), "submodule_name": sae.metadata.get("site")}
    with atomic_path(out / WEIGHTS) as temporary:
        torch.save(stored, temporary)
    write_json(out / SETTINGS, {"trainer": settings, "buffer": {}})


def _class_of(settings: Mapping[str, Any], stored: Mapping[str, Tensor], file: Path) -> str:
    named = settings.get("dict_class")
    if named in _KEYS:
        return str(named)
    found = next((name for name in _BY_TENSORS if _KEYS[name].keys() <= stored.keys()), None)
    if named is not None or found is None:
        kind = named or ", ".join(sorted(stored))
        raise refuse(
            file, f"dictionaries of this kind cannot be read ({kind}); there are {', '.join(_KEYS)}."
        )
    return found


def _arch_of(name: str, d_sae: int, stored: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Config:
    if name == "AutoEncoderTopK":
        return TopK(d_sae, k=int(stored["k"]) if "k" in stored else int(settings["k"]))
    if "threshold" in _KEYS[name]:
        return jumprelu.fixed(d_sae)
    return (Gated if name == "GatedAutoEncoder" else L1)(d_sae, target_l0=None, l1=0.0)


def _site(settings: Mapping[str, Any]) -> str | None:
    name, layer = settings.get("submodule_name"), settings.get("layer")
    return site_name(name) if name or layer is None else f"blocks.{layer}.hook_resid_post"


FORMAT = Format("dictionary_learning", (WEIGHTS,), (SETTINGS,), read, write)
