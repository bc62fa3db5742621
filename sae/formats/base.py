"""What the formats share: their registry entry, reading tensors without running code, checking and building."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import SAE, Config, jumprelu
from sae.architectures.jumprelu import JumpReLU
from steerkit.errors import CheckpointError, InputError
from steerkit.runs import read_json


@dataclass(frozen=True)
class Format:
    """A layout of an SAE on disk. Reading raises InputError for what it cannot express, CheckpointError for damage."""

    name: str
    weights: tuple[str, ...] = ()
    """A directory that has the first of these files, or any other, is in this format."""
    config: tuple[str, ...] = ()
    """What else is read."""
    read: Callable[[Path], SAE] | None = None
    write: Callable[[SAE, Path], None] | None = None

    def recognises(self, path: Path) -> bool:
        return any((path / file).is_file() for file in self.weights)


def as_jumprelu(sae: SAE) -> SAE:
    """The same SAE as ReLU latents that are cut off at thresholds. Of a TopK SAE the limit to k latents is given up.

    Raises InputError for transcoders and crosscoders, which no JumpReLU SAE is the same as.
    """
    if sae.config.own_thresholds is not None:
        raise InputError(f"A {sae.arch} is no JumpReLU SAE: keep it in steerkit's own layout.")
    made = jumprelu.fixed(sae.d_sae).build(sae.d_in)
    made.load_state_dict(sae.jumprelu_weights())
    made.metadata = dict(sae.metadata) | (
        {} if isinstance(sae.config, JumpReLU) else {"trained_as": sae.config.to_dict()}
    )
    return made.to(sae.device).eval().requires_grad_(False)


def build(arch: Config, tensors: Mapping[str, Tensor], file: Path) -> SAE:
    """An SAE with these tensors. CheckpointError when one is missing, of another shape, or not finite."""
    sae = arch.build(tensors["W_enc"].shape[0])
    if arch.own_thresholds is not None and "threshold" in tensors:
        sae.threshold = torch.zeros(sae.d_sae)
    wanted = sae.state_dict()
    for name, empty in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{file} is damaged: it has no tensor {name!r}.")
        check_shape(name, tensors[name], tuple(empty.shape), file)
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{file} is damaged: the tensor {name!r} holds NaN or inf.")
    sae.load_state_dict({name: tensors[name] for name in wanted})
    return sae


def renamed(stored: Mapping[str, Tensor], names: Mapping[str, str], file: Path) -> dict[str, Tensor]:
    """The tensors under our names, in float32; `names` maps theirs to ours. CheckpointError when one is missing or has not
    the dimensions that it should have."""
    missing = [name for name in names if name not in stored]
    if missing:
        raise CheckpointError(f"{file} is damaged: it has no tensor {missing[0]!r}.")
    tensors = {own: stored[name].float() for name, own in names.items()}
    for name, tensor in tensors.items():
        if tensor.ndim != (2 if name.startswith("W") else 1) and not (
            name == "threshold" and tensor.ndim == 0
        ):
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{file} is damaged: the tensor {name!r} has the shape {shape}.")
    return tensors


def consistent(tensors: dict[str, Tensor], file: Path, transcoder: bool = False) -> dict[str, Tensor]:
    """`tensors` itself. CheckpointError when the shapes do not fit together, W_enc being (d_in, d_sae); what a transcoder gives
    may be of another width."""
    for name in ("W_enc", "W_dec", "b_dec"):
        if name not in tensors:
            raise CheckpointError(f"{file} is damaged: it has no tensor {name!r}.")
    if tensors["W_enc"].ndim != 2:
        shape = tuple(tensors["W_enc"].shape)
        raise CheckpointError(
            f"{file} is damaged: the tensor 'W_enc' has the shape {shape}, not two dimensions."
        )
    d_in, d_sae = tensors["W_enc"].shape
    d_out = len(tensors["b_dec"]) if transcoder else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    shapes |= dict.fromkeys(("b_enc", "threshold", "b_gate", "b_mag", "r_mag"), (d_sae,))
    for name, shape in shapes.items():
        if name in tensors:
            check_shape(name, tensors[name], shape, file)
    return tensors


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], file: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{file} is damaged: the tensor {name!r} is {tuple(tensor.shape)}, not {tuple(shape)}."
        )


def subtract_b_dec_in_biases(tensors: dict[str, Tensor]) -> None:
    """From an encoder that acts on x to one that acts on x - b_dec."""
    shift = tensors["b_dec"] @ tensors["W_enc"]
    for name, factor in (
        ("b_enc", 1.0),
        ("b_gate", 1.0),
        ("b_mag", tensors["r_mag"].exp() if "r_mag" in tensors else 1.0),
    ):
        if name in tensors:
            tensors[name] = tensors[name] + factor * shift


# files


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in float32. CheckpointError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read ({first_line(error)}).") from None
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file, in float32. Arrays of objects, which are pickles, are refused: nothing in a file is run."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    except Exception as error:  # a damaged archive can raise almost anything
        raise CheckpointError(
            f"{path} cannot be read as arrays of numbers alone ({first_line(error)})."
        ) from None


def read_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`. CheckpointError when it is damaged or holds anything else, which is not run."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as tensors alone ({first_line(error)}).") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise CheckpointError(
            f"{path} is no dictionary: it holds something other than tensors by their names."
        )
    return stored


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError when the file is missing or holds anything else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds no settings.")
    return config


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next(iter(str(error).splitlines()), type(error).__name__).strip().rstrip(".")


def why_unfetched(error: Exception) -> str:
    """Why something of the Hugging Face hub could not be had, in short."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return "the hub cannot be reached, and it was not fetched before"
    return f"{type(error).__name__}: {first_line(error)}"


# names


_SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}


def site_name(name: str | None) -> str | None:
    """Our name of a site that other toolkits write as `resid_post_layer_3`, `layers.3` or `model.layers.3` (a block's output).

    Names of TransformerLens are ours too; what is not known stays as it is.
    """
    if name is None:
        return None
    if found := re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d+)", name):
        return f"blocks.{found[2]}.{_SITES[found[1]]}"
    if found := re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)[._](\d+)", name):
        return f"blocks.{found[1]}.hook_resid_post"
    return name


def model_name(name: str | None) -> str | None:
    """The Hugging Face id of a model that TransformerLens knows by a short name; other names stay as they are."""
    if name is None or "/" in name:
        return name
    if found := re.fullmatch(r"gpt2-(small|medium|large|xl)", name):
        return "openai-community/" + ("gpt2" if found[1] == "small" else name)
    for start, owner in (
        ("gemma-", "google"),
        ("pythia-", "EleutherAI"),
        ("Llama-3", "meta-llama"),
        ("Qwen", "Qwen"),
    ):
        if name.startswith(start):
            return f"{owner}/{name}"
    return name


def refuse(path: Path, reason: str) -> InputError:
    """An SAE that cannot be expressed by what there is here."""
    return InputError(f"{path}: {reason}")
