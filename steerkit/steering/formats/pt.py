"""Files of `torch.save`, and the objects of steering-vectors and repeng themselves.

    a tensor (d)                    BiPO (vec_ep*_layer*.pt), CAA (vec_layer_*.pt): which site is not in the file
    a tensor (n_concepts, d)        AxBench (<Method>_weight.pt): one row is a vector
    a dictionary layer -> (d)       steering-vectors' `layer_activations`, repeng's `directions`; blocks are counted from 0

A file is read as numbers alone: pickled objects are refused, and none of their code is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import CheckpointError, InputError
from steerkit.runs import atomic_path
from steerkit.steering.edits import Add
from steerkit.steering.formats.base import (
    Format,
    Hints,
    as_vector,
    begins,
    block_of,
    built,
    directions,
    lose,
    read_pt,
    warn_of_tokens,
)
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

_LAYER_TYPES = {
    "decoder_block": "hook_resid_post",
    "self_attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
}
"""steering-vectors' kinds of layers, by our sites."""


def write(vector: SteeringVector, out: Path) -> Path:
    """One addition as a bare tensor, several as a dictionary of blocks. Raises InputError for anything else."""
    added = directions(vector, "A .pt file")
    stored: Tensor | dict[int, Tensor]
    if len(added) == 1:
        site, stored = next(iter(added.items()))
        lose(f"A bare tensor does not say where it acts: this one is for {site}.")
    else:
        stored = {block_of(site, "hook_resid_post", "A .pt file"): v for site, v in added.items()}
    warn_of_tokens(vector, "what reads such files")
    with atomic_path(out) as temporary:
        torch.save(stored, temporary)
    return out


def read(path: Path, hints: Hints) -> SteeringVector:
    """A dictionary steers every token, as the toolkits do; a bare tensor says nothing and leaves BOS alone.

    Raises InputError when site or index are needed, CheckpointError for a file that is damaged or holds more than numbers.
    """
    stored = read_pt(path)
    if isinstance(stored, Mapping):
        if hints.site is not None or hints.index is not None:
            raise InputError(f"{path} says which blocks its vectors are for: leave --site and --index out.")
        return _of_dictionary(stored, path)
    if not isinstance(stored, Tensor):
        raise CheckpointError(
            f"{path} holds a {type(stored).__name__}, neither a tensor nor a dictionary of them."
        )
    if stored.dim() == 2 and (len(stored) > 1 or hints.index is not None):
        stored = _row(stored, hints.index, path)
    elif hints.index is not None:
        raise InputError(f"{path} holds one vector: leave --index out.")
    tensor = as_vector(stored, "the tensor", path)
    if hints.site is None:
        found = re.search(r"layer_?(\d+)", path.name)
        named = f" Its name says layer {found[1]}: --layer {found[1]}?" if found else ""
        raise InputError(f"{path} does not say where it acts: give `steer convert` --site or --layer.{named}")
    facts = {} if hints.index is None else {"index": hints.index}
    return built(path, [Add(hints.site, tensor)], Where(), source="pt", **facts)


def _row(stored: Tensor, index: int | None, path: Path) -> Tensor:
    n = len(stored)
    if index is None:
        raise InputError(f"{path} holds {n} vectors, a row each: give `steer convert` --index, from 0.")
    if not 0 <= index < n:
        raise InputError(f"{path} has no vector {index}: it holds {n}, from 0.")
    return stored[index]


def _of_dictionary(stored: Mapping[Any, Any], path: Path) -> SteeringVector:
    kind = stored.get("layer_type", "decoder_block")
    for key in ("layer_activations", "directions"):
        if isinstance(stored.get(key), Mapping):
            stored = stored[key]
    edits = _additions(stored, kind, path)
    return built(path, edits, Where.every_token(), source="pt")


def from_steering_vectors(vector: Any) -> SteeringVector:
    """The steering vector of an object of steering-vectors, at all tokens. Raises InputError for a kind of layer without a site."""
    name = type(vector).__name__
    edits = _additions(vector.layer_activations, vector.layer_type, name)
    return SteeringVector(tuple(edits), {"source": "steering-vectors"}, Where.every_token())


def from_repeng(vector: Any) -> SteeringVector:
    """The steering vector of repeng's ControlVector, at all tokens; its layer k is the output of block k, from 0."""
    edits = _additions(vector.directions, "decoder_block", type(vector).__name__)
    hint = getattr(vector, "model_type", None)
    return SteeringVector(tuple(edits), {"source": "repeng", "model_hint": hint}, Where.every_token())


def _additions(layers: Mapping[Any, Any], kind: str, path: Path | str) -> list[Add]:
    if kind not in _LAYER_TYPES:
        raise InputError(
            f"{path} is for layers of type {kind!r}; there are sites for {', '.join(_LAYER_TYPES)}."
        )
    found: dict[int, Tensor] = {}
    for key, value in layers.items():
        block = _block(key, path)
        if block in found:
            raise CheckpointError(f"{path} has two vectors for layer {block}.")
        found[block] = as_vector(value, f"the vector of layer {block}", path)
    if not found:
        raise CheckpointError(f"{path} holds no vector.")
    widths = sorted({len(vector) for vector in found.values()})
    if len(widths) > 1:
        raise CheckpointError(f"{path} is damaged: its vectors are {widths[0]} and {widths[-1]} wide.")
    return [Add(f"blocks.{block}.{_LAYER_TYPES[kind]}", found[block]) for block in sorted(found)]


def _block(key: Any, path: Path | str) -> int:
    text = str(key)
    if text.startswith("-") and text[1:].isdecimal():
        raise InputError(
            f"{path} counts layer {text} from the end: save it with layers that count from 0, the first block."
        )
    if not (isinstance(key, (int, str)) and text.isascii() and text.isdecimal()):
        raise CheckpointError(f"{path} has a vector under {key!r}, which is no number of a layer.")
    return int(text)


def recognises(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".pt", ".pth", ".bin") or begins(path, b"PK"))


FORMAT = Format("pt", recognises, read, write, frozenset({"site", "index"}))
