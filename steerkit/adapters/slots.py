"""Which modules an adapter goes to: the linear maps of a model's blocks, by what they do.

    choose(model, "attention")                 q, k, v and o of every layer
    choose(model, ["q", "v"], layers=[0, 1])   two projections of two layers; of a fused QKV map only its rows
    choose(model, ["mlp.down_proj"])           or by the end of a module's path

Groups: `all`, `attention` (q, k, v, o), `ffn` (gate, up, down).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.sites import weight_of

ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
GROUPS = {"all": ATTENTION + FFN, "attention": ATTENTION, "ffn": FFN}
NAMES = {
    "q": ("q_proj", "query", "q_lin", "q", "wq"),
    "k": ("k_proj", "key", "k_lin", "k", "wk"),
    "v": ("v_proj", "value", "v_lin", "v", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "att_proj"),
    "gate": ("gate_proj", "gate", "w1", "wi_0"),
    "gate_up": ("gate_up_proj", "Wi"),
}
"""The last part of a module's path, in the families of transformers. What is none of these is o or down where the hook sites say so
(`hook_z`, `hook_post`), else up."""
_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Slot:
    """A linear map of a block, or some of its rows."""

    path: str
    layer: int
    kind: str
    """q, k, v, o, gate, up, down; qkv or gate_up where they are one map."""
    d_out: int
    d_in: int
    rows: tuple[tuple[int, int], ...] = ()
    """(first, end) of the output rows that are meant, where it is not all of them."""

    @property
    def n_rows(self) -> int:
        """How many rows are meant."""
        return sum(end - first for first, end in self.rows) or self.d_out


def find_slots(model: HookedModel) -> list[Slot]:
    """All linear maps of the blocks, layer by layer. Raises InputError for a model without any."""
    ends = {
        site.path: kind
        for name, site in model.sites.items()
        for end, kind in (("attn.hook_z", "o"), ("mlp.hook_post", "down"))
        if name.endswith(end)
    }
    found = []
    for path, layer in model.linear_modules().items():
        last = path.removesuffix(".base_layer").rpartition(".")[2]
        named = next((kind for kind, names in NAMES.items() if last in names), "up")
        d_out, d_in = _sides(model.model.get_submodule(path))
        found.append(Slot(path, layer, ends.get(path, named), d_out, d_in))
    if not found:
        raise InputError(f"{model.name} has no linear modules in its blocks: there is nothing to adapt.")
    return found


def _sides(module: Any) -> tuple[int, int]:
    """(d_out, d_in); a quantised weight is packed, and has another shape."""
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    d_out, d_in = weight_of(module).shape
    return d_out, d_in


def choose(
    model: HookedModel, modules: str | Sequence[str] = "all", layers: Iterable[int] | None = None
) -> list[Slot]:
    """The slots of some groups, kinds or ends of paths, in some layers. Raises InputError for what matches nothing."""
    slots = find_slots(model)
    wanted = [modules] if isinstance(modules, str) else list(modules)
    if not wanted:
        raise InputError("modules is empty: name some, or leave it away for the method's own.")
    chosen: dict[str, Slot] = {}
    for name in wanted:
        if name in GROUPS:
            matches = [slot for slot in slots if {*_PARTS.get(slot.kind, (slot.kind,))} <= {*GROUPS[name]}]
        else:
            matches = _matching(model, slots, name)
        if not matches:
            raise InputError(_nothing(model, name, slots))
        for slot in matches:
            chosen[slot.path] = _joined(chosen[slot.path], slot) if slot.path in chosen else slot
    if layers is not None:
        keep = set(layers)
        if not keep:
            raise InputError("layers is empty: name some, or leave it away for all of them.")
        absent = sorted(keep - {slot.layer for slot in slots})
        if absent:
            raise InputError(
                f"{model.name} has layers 0–{model.n_layers - 1}; there is no layer {', '.join(map(str, absent))}."
            )
        chosen = {path: slot for path, slot in chosen.items() if slot.layer in keep}
    return [_whole(chosen[slot.path]) for slot in slots if slot.path in chosen]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm with a gain of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def layer_of(path: str) -> int:
    """The first number in a module's path, which is its block's; -1 without one."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else -1


def _matching(model: HookedModel, slots: Sequence[Slot], name: str) -> list[Slot]:
    found = [s for s in slots if s.kind == name or s.path == name or s.path.endswith("." + name)]
    for slot in slots:
        if name in _PARTS.get(slot.kind, ()):
            found.append(replace(slot, rows=(_rows(model, slot, name),)))
    return found


def _rows(model: HookedModel, slot: Slot, part: str) -> tuple[int, int]:
    """The rows of a fused map that are `part`: heads of queries first, then those of keys and of values."""
    if slot.kind == "gate_up":
        half = slot.d_out // 2
        return (0, half) if part == "gate" else (half, 2 * half)
    config = model.model.config
    config = getattr(config, "text_config", None) or config
    if slot.path.endswith("query_key_value"):
        raise InputError(f"{slot.path} interleaves queries, keys and values head by head: take qkv whole.")
    kv_heads = getattr(config, "num_key_value_heads", None) or model.n_heads
    head = slot.d_out // (model.n_heads + 2 * kv_heads)
    ends = [model.n_heads * head, (model.n_heads + kv_heads) * head, slot.d_out]
    at = _PARTS["qkv"].index(part)
    return ([0, *ends][at], ends[at])


def _joined(one: Slot, other: Slot) -> Slot:
    return replace(one, rows=() if not (one.rows and other.rows) else tuple(sorted({*one.rows, *other.rows})))


def _whole(slot: Slot) -> Slot:
    covered = sum(end - first for first, end in slot.rows)
    return replace(slot, rows=()) if covered == slot.d_out else slot


def _nothing(model: HookedModel, name: str, slots: Sequence[Slot]) -> str:
    ends = sorted(
        {slot.path.rpartition(".")[2] for slot in slots} | {slot.kind for slot in slots} | set(GROUPS)
    )
    near = difflib.get_close_matches(name, ends, n=3, cutoff=0.4)
    return f"No linear module of {model.name} is {name!r}: " + (
        f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ends)}."
    )
