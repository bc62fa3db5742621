"""SAELens: `cfg.json` and `sae_weights.safetensors`, which is our layout too, and its table of pretrained SAEs.

    load("gpt2_sae/")                                         what sae-lens saved, of any version
    load("saelens:gpt2-small-res-jb/blocks.7.hook_resid_pre") a release and an id; sae-lens is imported and fetches it

The architectures standard, gated, topk, jumprelu and all transcoders are read, and our crosscoders, which sae-lens does not know;
normalisation token by token is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import REGISTRY, SAE, Config, get, jumprelu
from sae.architectures.crosscoder import Crosscoder
from sae.architectures.gated import Gated
from sae.architectures.l1 import L1
from sae.architectures.topk import TopK
from sae.architectures.transcoder import Transcoder
from sae.formats.base import (
    Format,
    build,
    consistent,
    first_line,
    model_name,
    read_config,
    read_safetensors,
    refuse,
    site_name,
    subtract_b_dec_in_biases,
    why_unfetched,
)
from sae.saelens import CONFIG_FILE, WEIGHTS_FILE
from steerkit.errors import CheckpointError, InputError, did_you_mean


def read(path: Path) -> SAE:
    return from_parts(
        read_config(path / CONFIG_FILE),
        read_safetensors(path / WEIGHTS_FILE),
        path / CONFIG_FILE,
        path / WEIGHTS_FILE,
    )


def from_parts(config: Mapping[str, Any], tensors: dict[str, Tensor], where: Path, file: Path) -> SAE:
    """An SAE of sae-lens's config and tensors; `where` and `file` name them in errors."""
    try:
        config = _modern(config)
        architecture = config["architecture"]
        metadata = config.get("metadata") or {}
        own = metadata.get("steerkit")
        arch = _arch_of(config, own or {}, where)
        for key in ("d_in", "d_sae"):
            int(config[key])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__} {error}.") from None
    normalisation = config.get("normalize_activations", "none")
    if normalisation not in ("none", None, "expected_average_only_in"):
        raise refuse(
            where, f"activations are normalised by {normalisation!r}; that cannot be folded into weights."
        )
    if config["architecture"] in ("transcoder", "skip_transcoder"):  # ReLU: a latent is active above 0
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
    factor = tensors.pop("finetuning_scaling_factor", tensors.pop("scaling_factor", None))
    if factor is not None and not bool((factor == 1).all()):
        raise refuse(where, "its latents have a scaling factor from fine-tuning; that is not supported.")
    consistent(tensors, file, isinstance(arch, Transcoder))
    if not config.get("apply_b_dec_to_input", True) and not isinstance(arch, Transcoder):
        subtract_b_dec_in_biases(tensors)
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    sae = build(arch, tensors, file)
    sae.metadata = (
        {k: v for k, v in own.items() if k != "arch"} if own else _foreign_metadata(metadata, architecture)
    )
    return sae


def write(sae: SAE, out: Path) -> None:
    """Our own layout, where sae-lens can read it. InputError for crosscoders."""
    if isinstance(sae.config, Crosscoder):
        raise InputError(
            "sae-lens has no crosscoders: keep it in steerkit's own layout (steerkit), which is the same but for that."
        )
    sae.save(out)


def load_release(name: str) -> SAE:
    """One of SAELens's pretrained SAEs by `release/id`. InputError when there is none, or it cannot be fetched."""
    try:
        import sae_lens
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise InputError(
            f"saelens:{name} needs sae-lens ({first_line(error)}): pip install sae-lens."
        ) from None
    release, _, sae_id = name.partition("/")
    table = get_pretrained_saes_directory()
    if release not in table:
        raise InputError(
            f"SAELens has no release {release!r}.{did_you_mean(release, table)} "
            "Its list: https://decoderesearch.github.io/SAELens/latest/pretrained_saes/."
        )
    ids = table[release].saes_map
    if sae_id not in ids:
        some = ", ".join(list(ids)[:3])
        raise InputError(
            f"SAELens's release {release!r} has no SAE {sae_id!r}.{did_you_mean(sae_id, ids)} There are {some} and so on."
        )
    try:
        theirs = sae_lens.SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except Exception as error:  # whatever its loaders, the hub or the network raise
        raise InputError(
            f"saelens:{name} could not be fetched ({why_unfetched(error)}). "
            "Check the network and, for gated repositories, `hf auth login`."
        ) from None
    tensors = {key: tensor.detach().float() for key, tensor in theirs.state_dict().items()}
    where = Path(f"saelens:{name}")
    return from_parts(theirs.cfg.to_dict(), tensors, where, where)


def _modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as sae-lens >= 6 writes it; older ones have the metadata at the top, and other names."""
    if "metadata" in config:
        return dict(config)
    names = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    found = {names.get(key, key): value for key, value in config.items()}
    found.setdefault("architecture", "standard")
    activation = found.get("activation_fn") or "relu"
    if activation == "topk":
        found |= {"architecture": "topk", "k": found["activation_fn_kwargs"]["k"]}
    elif activation != "relu":
        raise InputError(
            f"SAEs with the activation function {activation!r} cannot be read; relu and topk can."
        )
    if found.get("finetuning_scaling_factor"):
        raise InputError("SAEs with a scaling factor from fine-tuning cannot be read.")
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = (
            "expected_average_only_in" if found["normalize_activations"] else "none"
        )
    kept = (
        "model_name",
        "hook_name",
        "context_size",
        "prepend_bos",
        "dataset_path",
        "model_from_pretrained_kwargs",
    )
    return {**found, "metadata": {key: found[key] for key in kept if key in found}}


def _arch_of(config: Mapping[str, Any], own: Mapping[str, Any], where: Path) -> Config:
    architecture, d_sae = config["architecture"], int(config["d_sae"])
    settings = dict(own.get("arch") or {})
    known = settings.pop("name", None)
    if architecture == "topk":
        settings["k"] = int(config["k"])
    plain = architecture.replace("skip_", "")
    if known in REGISTRY and plain in (get(known).saelens_architecture, get(known).own_thresholds):
        return get(known)(**{**settings, "d_sae": d_sae})
    if plain in ("transcoder", "jumprelu_transcoder", "topk_transcoder"):
        k = int(config["k"]) if plain == "topk_transcoder" else d_sae
        target = site_name((config.get("metadata") or {}).get("hook_name_out"))
        return Transcoder(
            d_sae, k=k, target_site=target, skip=plain != architecture, d_out=int(config["d_out"])
        )
    if architecture == "topk":
        return TopK(d_sae, k=settings["k"])
    if architecture == "standard":
        return L1(d_sae, target_l0=None, l1=0.0)
    if architecture == "gated":
        return Gated(d_sae, target_l0=None, l1=0.0)
    if architecture == "jumprelu":
        return jumprelu.fixed(d_sae)
    raise refuse(
        where,
        f"SAEs of the architecture {architecture!r} cannot be read; standard, gated, topk, jumprelu and transcoders can.",
    )


def _foreign_metadata(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": model_name(metadata.get("model_name")),
        "site": site_name(metadata.get("hook_name")),
        "source": f"sae-lens, {architecture}",
    }
    if metadata.get("context_size"):
        found["context"] = metadata["context_size"]
    if metadata.get("prepend_bos") is not None:
        found["bos"] = bool(metadata["prepend_bos"])
    if metadata.get("model_from_pretrained_kwargs"):
        found["caution"] = (
            f"It was trained on a model loaded with {dict(metadata['model_from_pretrained_kwargs'])}; "
            "the plain model's activations may differ."
        )
    plain = {
        key: value
        for key, value in metadata.items()
        if isinstance(value, (str, int, float, list, type(None)))
    }
    return {**found, "sae_lens": plain}


FORMAT = Format("saelens", (WEIGHTS_FILE,), (CONFIG_FILE,), read, write)
