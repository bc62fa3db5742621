"""LoRA adapters, as peft saves them: weight deltas that vLLM and others serve, adapter by adapter.

    W + (alpha / r) B A        adapter_config.json: r, lora_alpha, target_modules
                               adapter_model.safetensors: base_model.model.<module>.lora_A.weight, … lora_B.weight

What is written has alpha = r everywhere, the strength being in B, so that readers which know one scale for all are right too. An
adapter acts on every token, BOS included. Rotations of singular dimensions (AntiPaSTO) are written as the deltas that they are at
their strength. https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import CheckpointError, InputError
from steerkit.runs import atomic_path, atomic_write, read_json, write_json
from steerkit.steering.edits import WeightDelta, as_delta
from steerkit.steering.formats.base import (
    Format,
    Hints,
    built,
    finite,
    only,
    read_pt,
    warn_of_tokens,
)
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

SETTINGS, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_REFUSED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""What makes an adapter more, or something else, than weight deltas at all tokens."""


def write(vector: SteeringVector, out: Path) -> Path:
    """Deltas of the same module become one of their summed rank. Raises InputError for anything but weight changes."""
    from safetensors.torch import save

    a: dict[str, list[Tensor]] = {}
    b: dict[str, list[Tensor]] = {}
    vector = replace(vector, edits=tuple(map(as_delta, vector.edits)))
    for edit in only(WeightDelta, vector, "LoRA"):
        path = edit.site.removeprefix(_PREFIX)
        a.setdefault(path, []).append(edit.A.detach().float().cpu())
        b.setdefault(path, []).append(edit.scale * edit.B.detach().float().cpu())
    warn_of_tokens(vector, "an adapter")
    tensors = {
        f"{_PREFIX}{path}.lora_A.weight": torch.cat(parts, 0).contiguous() for path, parts in a.items()
    }
    tensors |= {
        f"{_PREFIX}{path}.lora_B.weight": torch.cat(parts, 1).contiguous() for path, parts in b.items()
    }
    ranks = {path: sum(map(len, parts)) for path, parts in a.items()}
    rank = max(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": vector.provenance.get("model"),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    with atomic_path(out) as temporary:
        temporary.mkdir()
        atomic_write(temporary / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(temporary / SETTINGS, config)
    return out


def read(path: Path, hints: Hints) -> SteeringVector:
    """Raises InputError for an adapter that is more than weight deltas, CheckpointError for a damaged one."""
    config = read_json(path / SETTINGS)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path} is a {config.get('peft_type')} adapter; LoRA ones can be read.")
    for setting in _REFUSED:
        if config.get(setting):
            raise InputError(f"{path} uses {setting}, which is more than weight deltas: merge it with peft.")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path} trains biases too, which weight deltas have not: merge it with peft.")
    tensors = _tensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found is None:
            raise InputError(f"{path} has {name!r}, which is no matrix of a plain LoRA.")
        modules.setdefault(found[1], {})[found[2]] = finite(tensor.float(), f"the tensor {name!r}", path)
    edits = []
    for module, pair in modules.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{path} is damaged: {module} has only lora_{next(iter(pair))}.")
        A, B = pair["A"], pair["B"]
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
            raise CheckpointError(
                f"{path} is damaged: of {module}, lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}."
            )
        edits.append(WeightDelta(module, A, B * _scaling(config, module, len(A))))
    if not edits:
        raise CheckpointError(f"{path} has no weights in it.")
    model = config.get("base_model_name_or_path")
    return built(path, edits, Where.every_token(), source="lora", **({"model": model} if model else {}))


def _tensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / WEIGHTS).is_file() and (path / PICKLED).is_file():
        return read_pt(path / PICKLED)
    try:
        return load_file(path / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{path / WEIGHTS} does not exist.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path / WEIGHTS} is damaged: {error}.") from None


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r (rsLoRA); a key of alpha_pattern is a regular expression for the end of a module's path."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)),
        config["lora_alpha"],
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def recognises(path: Path) -> bool:
    return path.is_dir() and (path / SETTINGS).is_file()


FORMAT = Format("lora", recognises, read, write, directory=True)
