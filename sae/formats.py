"""Reading and writing SAEs: SAELens's layout, which is ours too, dictionary_learning's and sparsify's.

    save(sae, "runs/g")                                   # cfg.json and sae_weights.safetensors
    sae = load("runs/g")                                  # ours, or any that sae-lens >= 6 saved
    convert("ae_dir", "saelens", "out")                   # from any of the formats to any other

All of them describe the same functions, so converting changes nothing but names, transposes and folded constants. What cannot be
folded (normalisation per token, skip connections) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import REGISTRY, SAE, Config, get
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.l1 import L1
from sae.architectures.topk import TopK
from sae.saelens import CONFIG_FILE, WEIGHTS_FILE, write_safetensors
from steerkit.errors import CheckpointError, InputError, did_you_mean
from steerkit.runs import atomic_path, read_json, write_json


def save(sae: SAE, path: str | Path) -> None:
    """The same as `sae.save(path)`: SAELens's layout, an SAE with thresholds as `jumprelu`."""
    sae.save(path)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE: a run directory of ours, a directory that sae-lens >= 6 saved, or one of dictionary_learning or sparsify.

    Weights become float32. Raises InputError when there is none or its architecture is not supported, CheckpointError when it is
    damaged.
    """
    path = Path(path)
    return _LOADERS[format_of(path)](path).to(device).eval().requires_grad_(False)


def convert(source: str | Path, to: str, out: str | Path) -> SAE:
    """Write the SAE at `source`, in whichever format it is, to the directory `out` in the format `to`; returns it."""
    if to not in WRITERS:
        raise InputError(f"Unknown format {to!r}; there are {', '.join(WRITERS)}.{did_you_mean(to, WRITERS)}")
    sae = load(source)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give --out another directory.")
    WRITERS[to](sae, out)
    return sae


def format_of(path: str | Path) -> str:
    """'saelens', 'dictionary_learning' or 'sparsify', by the files in the directory. InputError when it is none of them."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is no directory of an SAE: it {'is a file' if path.exists() else 'does not exist'}."
        )
    for name, file in (
        ("saelens", WEIGHTS_FILE),
        ("dictionary_learning", "ae.pt"),
        ("sparsify", "sae.safetensors"),
    ):
        if (path / file).exists():
            return name
    if (path / "run.yaml").exists():
        raise InputError(f"{path} is an unfinished run without an SAE; continue it with --resume.")
    raise InputError(f"{path} holds no SAE: there is no {WEIGHTS_FILE}, ae.pt or sae.safetensors in it.")


def as_jumprelu(sae: SAE) -> SAE:
    """The same SAE as ReLU latents that are cut off at thresholds. Of a TopK SAE the limit to k latents is given up."""
    made = JumpReLU(d_sae=sae.d_sae).build(sae.d_in)
    made.load_state_dict(sae.jumprelu_weights())
    made.metadata = dict(sae.metadata) | (
        {} if isinstance(sae.config, JumpReLU) else {"trained_as": sae.config.to_dict()}
    )
    return made.to(sae.device).eval().requires_grad_(False)


# SAELens


def _load_saelens(path: Path) -> SAE:
    config = read_json(path / CONFIG_FILE)
    tensors = _read_safetensors(path / WEIGHTS_FILE)
    where = path / CONFIG_FILE
    try:
        architecture, d_in = config["architecture"], int(config["d_in"])
        metadata = config.get("metadata") or {}
        normalisation = config.get("normalize_activations", "none")
        arch = _arch_of(config, metadata.get("steerkit") or {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__} {error}.") from None
    if normalisation not in ("none", "expected_average_only_in"):
        raise InputError(
            f"{where}: activations are normalised by {normalisation!r}; that cannot be folded into weights."
        )
    if not config.get("apply_b_dec_to_input", True):
        _subtract_b_dec_in_biases(tensors)
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    sae = _build(arch, d_in, tensors, path / WEIGHTS_FILE)
    own = metadata.get("steerkit")
    sae.metadata = (
        {k: v for k, v in own.items() if k != "arch"} if own else _foreign_metadata(metadata, architecture)
    )
    return sae


def _arch_of(config: Mapping[str, Any], own: Mapping[str, Any]) -> Config:
    architecture, d_sae = config["architecture"], int(config["d_sae"])
    settings = dict(own.get("arch") or {})
    known = settings.pop("name", None)
    if architecture == "topk":
        settings = {**settings, "k": int(config["k"])} if known == "topk" else {"k": int(config["k"])}
        return TopK(**{**settings, "d_sae": d_sae})
    if known in REGISTRY and get(known).saelens_architecture == architecture:
        return get(known)(**{**settings, "d_sae": d_sae})
    if architecture == "standard":
        return L1(d_sae, target_l0=None, l1=0.0)
    if architecture == "gated":
        return Gated(d_sae, target_l0=None, l1=0.0)
    if architecture == "jumprelu":
        return JumpReLU(d_sae)
    raise InputError(
        f"SAEs of the architecture {architecture!r} cannot be read; standard, gated, topk and jumprelu can."
    )


def _foreign_metadata(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    found = {
        "model": metadata.get("model_name"),
        "site": metadata.get("hook_name"),
        "source": f"sae-lens, {architecture}",
    }
    return {**found, "sae_lens": dict(metadata)}


def _subtract_b_dec_in_biases(tensors: dict[str, Tensor]) -> None:
    """From an encoder that acts on x to one that acts on x - b_dec."""
    shift = tensors["b_dec"] @ tensors["W_enc"]
    for name, factor in (
        ("b_enc", 1.0),
        ("b_gate", 1.0),
        ("b_mag", tensors["r_mag"].exp() if "r_mag" in tensors else 1.0),
    ):
        if name in tensors:
            tensors[name] = tensors[name] + factor * shift


# dictionary_learning: ae.pt and config.json

_DICTIONARY_KEYS = {
    "AutoEncoder": {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "decoder.weight": "W_dec",
        "bias": "b_dec",
    },
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    },
    "AutoEncoderTopK": {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "decoder.weight": "W_dec",
        "b_dec": "b_dec",
    },
    "JumpReluAutoEncoder": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
}
_DICTIONARY_CLASS = {
    "standard": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


def _load_dictionary(path: Path) -> SAE:
    file = path / "ae.pt"
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as tensors alone ({str(error).splitlines()[0]})."
        ) from None
    settings = read_json(path / "config.json").get("trainer", {}) if (path / "config.json").exists() else {}
    found = next((name for name, keys in _DICTIONARY_KEYS.items() if keys.keys() <= stored.keys()), None)
    if found is None:
        raise InputError(
            f"{file} holds a dictionary of a kind that cannot be read ({', '.join(sorted(stored))})."
        )
    tensors = {own: stored[key].float() for key, own in _DICTIONARY_KEYS[found].items()}
    if found == "JumpReluAutoEncoder":
        if not settings.get("apply_b_dec_to_input", False):
            _subtract_b_dec_in_biases(tensors)
    else:
        tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"].T.contiguous(), tensors["W_dec"].T.contiguous()
    d_in, d_sae = tensors["W_enc"].shape
    arch: Config
    if found == "AutoEncoderTopK":
        arch = TopK(d_sae, k=int(stored["k"]) if "k" in stored else int(settings["k"]))
    elif found == "JumpReluAutoEncoder":
        arch = JumpReLU(d_sae)
    else:
        arch = (Gated if found == "GatedAutoEncoder" else L1)(d_sae, target_l0=None, l1=0.0)
    sae = _build(arch, d_in, tensors, file)
    site = settings.get("submodule_name")
    sae.metadata = {"model": settings.get("lm_name"), "site": site, "source": f"dictionary_learning, {found}"}
    return sae


def _save_dictionary(sae: SAE, out: Path) -> None:
    sae = as_jumprelu(sae) if sae.threshold is not None else sae
    name = _DICTIONARY_CLASS[sae.saelens_architecture]
    weights = dict(sae.state_dict())
    if name == "JumpReluAutoEncoder":
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    else:
        weights["W_enc"], weights["W_dec"] = weights["W_enc"].T, weights["W_dec"].T
    stored = {key: weights[own].contiguous().cpu() for key, own in _DICTIONARY_KEYS[name].items()}
    settings = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if isinstance(sae.config, TopK):
        stored |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        settings["k"] = sae.config.k
    settings |= {"lm_name": sae.metadata.get("model"), "submodule_name": sae.metadata.get("site")}
    with atomic_path(out / "ae.pt") as temporary:
        torch.save(stored, temporary)
    write_json(out / "config.json", {"trainer": settings, "buffer": {}})


# sparsify: sae.safetensors and cfg.json


def _load_sparsify(path: Path) -> SAE:
    config = read_json(path / "cfg.json")
    tensors = _read_safetensors(path / "sae.safetensors")
    unsupported = [key for key in ("transcode", "skip_connection") if config.get(key)]
    if config.get("activation", "topk") != "topk":
        unsupported.append(f"activation {config['activation']}")
    if unsupported:
        raise InputError(f"{path}: sparsify SAEs with {', '.join(unsupported)} cannot be read.")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"{path / 'sae.safetensors'} has no tensor {missing[0]!r}.")
    tensors = {own: tensors[name] for name, own in names.items()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    d_in, d_sae = tensors["W_enc"].shape
    sae = _build(TopK(d_sae, k=int(config["k"])), d_in, tensors, path / "sae.safetensors")
    sae.metadata = {"model": None, "site": path.name, "source": "sparsify"}
    return sae


def _save_sparsify(sae: SAE, out: Path) -> None:
    if not isinstance(sae.config, TopK) or sae.threshold is not None:
        raise InputError(f"sparsify's format holds TopK SAEs only; this one is {sae.arch}.")
    weights = sae.state_dict()
    stored = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    write_safetensors(out / "sae.safetensors", stored)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
    }
    config |= {
        "num_latents": sae.d_sae,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }
    write_json(out / "cfg.json", {**config, "d_in": sae.d_in})


# files


def _build(arch: Config, d_in: int, tensors: Mapping[str, Tensor], file: Path) -> SAE:
    """An SAE with these tensors. CheckpointError when one is missing, of another shape, or not finite."""
    sae = arch.build(d_in)
    wanted = sae.state_dict()
    for name, empty in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{file} is damaged: it has no tensor {name!r}.")
        if tensors[name].shape != empty.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(empty.shape)}"
            raise CheckpointError(f"{file} is damaged: the tensor {name!r} is {shapes}.")
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{file} is damaged: the tensor {name!r} holds NaN or inf.")
    sae.load_state_dict({name: tensors[name] for name in wanted})
    return sae


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be read ({str(error).splitlines()[0]})."
        ) from None
    return {name: tensor.float() for name, tensor in tensors.items()}


_LOADERS: dict[str, Callable[[Path], SAE]] = {
    "saelens": _load_saelens,
    "dictionary_learning": _load_dictionary,
    "sparsify": _load_sparsify,
}
WRITERS: dict[str, Callable[[SAE, Path], None]] = {
    "saelens": save,
    "dictionary_learning": _save_dictionary,
    "sparsify": _save_sparsify,
    "steerkit": save,
}
"""What SAEs can be written as."""
