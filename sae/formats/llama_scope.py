"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

    x' = s x,  z = ReLU(x' W_enc + b_enc),  f = z · 1[z > s θ / ‖W_dec,i‖],  x̂ = (f W_dec + b_dec) / s,     s = √d / mean ‖x‖

He et al. 2024, https://arxiv.org/abs/2410.20526. The factor s of the data set is folded into the weights. The one threshold θ is
in the units of raw activations, for decoder rows of unit norm (where the file says that the decoder's norm counts). Latents are in
normalised units, as SAELens gives them. Transcoders, gated linear encoders and normalisation token by token are refused.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae.architectures import SAE, Config, jumprelu
from sae.architectures.jumprelu import JumpReLU
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
    subtract_b_dec_in_biases,
)

WEIGHTS, SETTINGS = "checkpoints/final.safetensors", "hyperparams.json"
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}


def read(path: Path) -> SAE:
    file, config = path / WEIGHTS, read_config(path / SETTINGS)
    site, target = config["hook_point_in"], config.get("hook_point_out")
    if target not in (None, site):
        raise refuse(
            path,
            f"this is a transcoder ({site} to {target}), not an SAE; those of Llama Scope cannot be read.",
        )
    if config.get("use_glu_encoder"):
        raise refuse(path, "SAEs with a gated linear encoder (use_glu_encoder) cannot be read.")
    tensors = renamed(read_safetensors(file), _NAMES, file)
    tensors["W_enc"], tensors["W_dec"] = tensors["W_enc"].T.contiguous(), tensors["W_dec"].T.contiguous()
    d_in, d_sae = consistent(tensors, file)["W_enc"].shape
    if not config.get("apply_decoder_bias_to_pre_encoder", False):
        subtract_b_dec_in_biases(tensors)
    norms = tensors["W_dec"].norm(dim=1)
    counts = bool(config.get("sparsity_include_decoder_norm", True))
    scale = _scale(config, d_in, path)
    theta = scale * float(config.get("jump_relu_threshold", 0.0))
    activation, arch = config.get("act_fn", "jumprelu"), _arch(config, d_sae, path)
    if isinstance(arch, JumpReLU):
        cut = torch.full_like(norms, theta if activation != "relu" else 0.0)
        tensors["threshold"] = cut / norms.clamp_min(1e-12) if counts else cut
    elif counts:
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    sae = build(arch, tensors, file)
    sae.fold_scale(scale)
    sae.metadata = {
        "model": "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in path.absolute().as_posix() else None,
        "site": site_name(site),
        "source": f"Llama Scope, {activation}",
        "scale": scale,
        "bos": True,
    }
    return sae


def _arch(config: dict, d_sae: int, path: Path) -> Config:
    activation = config.get("act_fn", "jumprelu")
    if activation in ("jumprelu", "relu") or (
        activation == "topk" and config.get("jump_relu_threshold", 0) > 0
    ):
        return jumprelu.fixed(d_sae)
    if activation == "topk":
        return TopK(d_sae, k=int(config["top_k"]))
    raise refuse(path, f"SAEs with the activation function {activation!r} cannot be read.")


def _scale(config: dict, d_in: int, path: Path) -> float:
    normalisation = config.get("norm_activation", "dataset-wise")
    if normalisation == "inference":
        return 1.0
    if normalisation != "dataset-wise":
        raise refuse(
            path, f"activations are normalised {normalisation!r}; that cannot be folded into weights."
        )
    norm = float(config["dataset_average_activation_norm"]["in"])
    if not norm > 0:
        raise refuse(path, f"dataset_average_activation_norm is {norm}; it must be positive.")
    return d_in**0.5 / norm


FORMAT = Format("llama_scope", (WEIGHTS,), (SETTINGS,), read)
