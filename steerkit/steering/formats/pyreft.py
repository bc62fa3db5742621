"""pyreft's and pyvene's directories: config.json and one intkey_<key>.bin for each intervention of the LoReFT family.

    Loreft   h + Rᵀ(W h + b - R h)       Noreft    the same, the rows of R not orthonormal
    Direft   h + Rᵀ(W h + b)             Nodireft  the same
    Consreft h + Rᵀ(b - R h)             Lobireft  h + Rᵀ b

All of them are a `LowRank` edit, and any such edit is a Loreft. The class is known by its name, as config.json has it.
The files do not say which tokens are steered: give pyreft's `f7+l7`. (The last 7 of pyreft's own data sets are the 7 before the
prompt's last. Its loader makes W and b bfloat16.) Wu et al. 2024, https://arxiv.org/abs/2404.03592, https://github.com/stanfordnlp/pyreft.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import CheckpointError, InputError
from steerkit.runs import atomic_path, read_json, write_json
from steerkit.steering.edits import LowRank
from steerkit.steering.formats.base import Format, Hints, block_of, built, finite, lose, only, read_pt
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Constant, Span, Where

SETTINGS = "config.json"
_SITES = {"block_output": "hook_resid_post", "block_input": "hook_resid_pre"}
_CLASSES = ("Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft")


def write(vector: SteeringVector, out: Path) -> Path:
    """Raises InputError for anything but low-rank edits at blocks.<n>.hook_resid_post, one each."""
    edits: dict[int, LowRank] = {}
    for edit in only(LowRank, vector, "pyreft"):
        block = block_of(edit.site, "hook_resid_post", "pyreft")
        if block in edits:
            raise InputError(f"pyreft has one intervention at a site; this vector has two at {edit.site}.")
        edits[block] = edit
    positions = _positions(vector.where)
    lose(
        f"pyreft's files do not say which tokens are steered: use them with positions {positions!r}."
        if positions
        else "pyreft's files do not say which tokens are steered, and its positions cannot say what this vector does."
    )
    keys = {block: f"layer_{block}_comp_block_output_unit_pos_nunit_1#0" for block in sorted(edits)}
    ranks = {block: len(edits[block].R) for block in keys}
    config = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [edits[block].width for block in keys],
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * len(keys),
        "mode": "parallel",
        "representations": [[block, "block_output", "pos", 1, ranks[block], *[None] * 9] for block in keys],
        "sorted_keys": list(keys.values()),
    }
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for block, key in keys.items():
            torch.save(_loreft(edits[block]), temporary / f"intkey_{key}.bin")
        write_json(temporary / SETTINGS, config)
    return out


def _loreft(edit: LowRank) -> OrderedDict[str, Tensor]:
    """s Rᵀ(W h + b) = Qᵀ(s T (W h + b)) with orthonormal rows Q and Rᵀ = Qᵀ T; Loreft's own W has Q besides."""
    R, W, b = (tensor.detach().double().cpu() for tensor in (edit.R, edit.W, edit.b))
    q, t = torch.linalg.qr(R.T)
    W, b = edit.scale * t @ W, edit.scale * t @ b
    state = {"weight": W + q.T, "bias": b, "rotate_layer": q}
    return OrderedDict((name, tensor.float().contiguous()) for name, tensor in state.items())


def read(path: Path, hints: Hints) -> SteeringVector:
    """Raises InputError for interventions of other kinds, CheckpointError for a damaged directory."""
    config = read_json(path / SETTINGS)
    keys, types = config["sorted_keys"], config["intervention_types"]
    representations = config["representations"]
    if not isinstance(types, list):
        types = [types] * len(keys)
    if not keys or not len(keys) == len(types) == len(representations):
        raise CheckpointError(
            f"{path / SETTINGS} is damaged: it has {len(keys)} keys, {len(types)} types and "
            f"{len(representations)} representations."
        )
    edits = [
        _edit(path, key, str(kind), representation)
        for key, kind, representation in zip(keys, types, representations)
    ]
    if len({edit.site for edit in edits}) < len(edits):
        raise InputError(
            f"{path} has separate weights for first and last tokens, and a vector has one `where`: "
            "train with share_weights, or read one part of it by hand."
        )
    if hints.positions is None:
        lose(f"{path} does not say which tokens are steered: all of the prompt's, without positions='f7+l7'.")
        where = Where(generation=False, bos=True)
    else:
        where = where_of(hints.positions)
    return built(path, edits, where, source="pyreft", method="reft")


def _edit(path: Path, key: str, kind: str, representation: Any) -> LowRank:
    found = re.search(r"(\w+?)Intervention(_\w+)?'?>?$", kind)
    name = found[1] if found else kind
    if name not in _CLASSES:
        raise InputError(
            f"{path} has a {kind}; of pyreft's interventions there are {', '.join(_CLASSES)} here."
        )
    file = path / f"intkey_{Path(key).name}.bin"
    state = read_pt(file)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} is damaged: it holds something other than tensors by their names.")
    state = {
        name.removeprefix("learned_source."): finite(value.detach().float(), f"the tensor {name!r}", file)
        for name, value in state.items()
    }
    try:
        R, W, b = _tensors(name, state)
    except KeyError as error:
        raise CheckpointError(f"{file} is no {name}: it has no tensor {error}.") from None
    except RuntimeError as error:
        raise CheckpointError(f"{file} is damaged: {str(error).splitlines()[0]}.") from None
    if R.dim() != 2 or W.shape != R.shape or b.shape != R.shape[:1]:
        raise CheckpointError(
            f"{file} is damaged: R is {tuple(R.shape)}, W {tuple(W.shape)}, b {tuple(b.shape)}."
        )
    return LowRank(_site(representation, path), R.contiguous(), W.contiguous(), b.contiguous())


def _tensors(name: str, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """R, what is read all in all, and b."""
    if name in ("Noreft", "Nodireft"):
        R, W, b = state["proj_layer.weight"], state["weight"], state["bias"]
        return (R, W, b) if name == "Nodireft" else (R, W - R, b - state.get("proj_layer.bias", 0.0))
    R = _rotation(state).T
    if name in ("Consreft", "Lobireft"):
        b = state["learned_source"]
        return R, -R if name == "Consreft" else torch.zeros_like(R), b
    W, b = state["weight"], state["bias"]
    return R, W - R if name == "Loreft" else W, b


def _rotation(state: dict[str, Tensor]) -> Tensor:
    """(d, r), as it is or as torch's orthogonal parametrisation keeps it."""
    if "rotate_layer" in state:
        return state["rotate_layer"]
    prefix = "rotate_layer."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    layer = nn.Module()
    layer.weight = nn.Parameter(
        torch.nn.init.orthogonal_(torch.empty(own["parametrizations.weight.original"].shape))
    )
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict(own)
    return layer.weight.detach()


def _site(representation: Any, path: Path) -> str:
    """Of a list or dictionary with layer and component, or of a path such as model.layers[15].output."""
    if isinstance(representation, Mapping):
        layer, component = representation.get("layer"), representation.get("component")
    else:
        layer, component = representation[:2]
    if found := re.fullmatch(r"[\w.]*\b(?:layers|h)\[(\d+)\]\.(output|input)", str(component)):
        layer, component = int(found[1]), f"block_{found[2]}"
    if component not in _SITES or not isinstance(layer, int):
        raise InputError(f"{path} intervenes at {component!r}; there are {', '.join(_SITES)} here.")
    return f"blocks.{layer}.{_SITES[component]}"


# tokens


def where_of(positions: str) -> Where:
    """The prompt's tokens that pyreft calls f<first>+l<last>. Raises InputError for anything else."""
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", positions)
    first, last = (int(number or 0) for number in found.groups()) if found else (0, 0)
    ranges: list[Span] = [(0, first)] if first else []
    ranges += [(-last, 0)] if last else []
    if not ranges:
        raise InputError(f"positions are {positions!r}; they are like f7+l7, f1 or l1.")
    return Where.spans(*ranges, generation=False)


def _positions(where: Where) -> str | None:
    """The reverse; None where pyreft has no word for it."""
    first, last = 0, 0
    for start, stop in where.ranges:
        if start in (None, 0) and stop is not None and stop > 0:
            first = max(first, stop)
        elif start is not None and start < 0 and stop in (None, 0):
            last = max(last, -start)
        else:
            return None
    plain = where.prompt and where.bos and where.marker is None and isinstance(where.schedule, Constant)
    if where.generation or not plain or not (first or last):
        return None
    return "+".join(f"{side}{n}" for side, n in (("f", first), ("l", last)) if n)


def recognises(path: Path) -> bool:
    return path.is_dir() and any(path.glob("intkey_*.bin"))


FORMAT = Format("pyreft", recognises, read, write, frozenset({"positions"}), directory=True)
