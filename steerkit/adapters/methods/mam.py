"""Mix-and-match (MAM): a short prefix in attention, and a wide scaled parallel adapter beside the FFN.

    attention:  softmax(Q [P_K; K]ᵀ / √d_head) [P_V; V]       P_K, P_V: l trained keys and values a head
    FFN:        y' = FFN(x) + s (U f(D x + b_D) + b_U)          `parallel`

He et al. 2022, https://arxiv.org/abs/2110.04366: l = 30, s = 4, width 512, f = ReLU. peft's prefix tuning moves the
text behind the prefix and cannot stand beside another adapter; here each attention module is handed its keys and
values through the cache that it would append to, so positions stay what they are, and hooks, `generate` and padding
work as ever. The prefix itself has no positions (rotary models read P_K as it is).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.bottleneck import check_bottleneck
from steerkit.adapters.methods.loreft import CACHES, past_length
from steerkit.adapters.methods.parallel import Parallel, parallel_count, parallel_edit, parallel_facts
from steerkit.adapters.slots import Slot, find_slots
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.sites import first_tensor, takes_mask


@register
@dataclass(frozen=True)
class MAM(EditMethod):
    """A prefix in attention and a parallel adapter beside the FFN."""

    rank: int = 16
    """Width of the bottleneck."""
    prefix: int = 30
    """l."""
    scale: float = 4.0
    """s."""
    activation: str = "relu"
    """relu, gelu or silu."""

    name: ClassVar[str] = "mam"
    paper: ClassVar[str] = "He et al. 2022, https://arxiv.org/abs/2110.04366"
    equation: ClassVar[str] = "softmax(Q [P_K; K]ᵀ) [P_V; V]; y' = FFN(x) + s (U f(D x + b_D) + b_U)"
    hypothesis: ClassVar[str] = (
        "Attention needs little change, the FFN much: share the parameters accordingly."
    )
    family: ClassVar[str] = "activation"
    identity: ClassVar[str] = "the prefix takes a share of the attention from the start"
    merge: ClassVar[str] = "it is a nonlinear function of activations, no change of weights"
    linear: ClassVar[bool] = False
    modules: ClassVar[str] = "down"
    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        check_bottleneck(self.rank, self.activation)
        if self.prefix < 1:
            raise InputError(f"prefix is {self.prefix}; it is at least 1 long.")

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if getattr(model.model.config, "is_encoder_decoder", False):
            raise InputError(f"{model.name} has an encoder and a decoder: mam is made for one of them.")
        ffn = Parallel().targets(model, modules, layers)
        attention = [_attention(model, layer) for layer in sorted({slot.layer for slot in ffn})]
        return sorted([*attention, *ffn], key=lambda slot: slot.layer)

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        head = _head_width(model)
        prefixes = {
            slot.path: {"layer": slot.layer, "heads": slot.d_out // head, "head": head}
            for slot in slots
            if slot.kind == "attention"
        }
        return {**parallel_facts([slot for slot in slots if slot.kind != "attention"]), **prefixes}

    def edit(self, target: Target) -> Edit:
        if "heads" in target.facts:
            return _Prefix(target, self.prefix)
        return parallel_edit(target, self.rank, self.scale, self.activation)

    def count_at(self, slot: Slot) -> int:
        return 2 * self.prefix * slot.d_out if slot.kind == "attention" else parallel_count(slot, self.rank)


def _head_width(model: HookedModel) -> int:
    return next(slot for slot in find_slots(model) if slot.kind == "o").d_in // model.n_heads


def _attention(model: HookedModel, layer: int) -> Slot:
    """The attention module of a layer: the nearest about its queries that takes a mask. `d_out` is the width of all keys."""
    slots = {slot.kind: slot for slot in find_slots(model) if slot.layer == layer}
    query = slots.get("q") or slots.get("qkv")
    if query is None or "o" not in slots:
        raise InputError(
            f"Layer {layer} of {model.name} has no queries that are known: mam has nowhere to go."
        )
    width = slots["k"].d_out if "k" in slots else (query.d_out - slots["o"].d_in) // 2
    path = query.path
    while path and not takes_mask(model.model.get_submodule(path)):
        path = path.rpartition(".")[0]
    return Slot(path, layer, "attention", width, query.d_in)


class _Prefix(Edit):
    """Keys and values before those of the text. At α each of them counts α times: log α is added to its scores."""

    alpha = 1.0

    def __init__(self, target: Target, length: int) -> None:
        super().__init__()
        self.names = list(inspect.signature(target.module.forward).parameters)
        self.path, self.layer = target.path, target.facts["layer"]
        self.cache = next((name for name in CACHES if name in self.names), "")
        if not self.cache:
            raise InputError(f"{target.path} ({type(target.module).__name__}) {_NO_CACHE}")
        kind = getattr(target.model.config, "_attn_implementation", "eager")
        if kind not in ("sdpa", "eager"):
            raise InputError(f"mam needs a mask that it can extend: load the model with sdpa, not {kind}.")
        self.causal = any(getattr(module, "is_causal", False) for module in target.module.modules())
        shape = (target.facts["heads"], length, target.facts["head"])
        generator = target.generator()
        self.K = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        self.V = nn.Parameter(0.02 * torch.randn(shape, generator=generator))

    def around(self, module: Base, *args: Any, **options: Any) -> Any:
        given = {**dict(zip(self.names, args)), **options}
        h = first_tensor(args, options)[1]
        assert h is not None
        if self.alpha < 0:
            raise InputError(f"A prefix cannot be scaled by {self.alpha}: attention has no negative shares.")
        cache = _Extended(given.get(self.cache), self.K, self.V)
        mask = self.mask(given, h)
        out = module(**{**given, self.cache: cache, "attention_mask": mask})
        if not cache.used:
            raise InputError(f"{self.path} {_NO_CACHE}")
        return out

    def mask(self, given: Mapping[str, Any], h: Float[Tensor, "batch pos d"]) -> Tensor | None:
        """The mask with the prefix seen by all, None where every key may be seen."""
        mask, length, queries = given.get("attention_mask"), self.K.shape[1], h.shape[1]
        if mask is None:
            if self.alpha == 1 and (not self.causal or queries == 1):
                return None
            past = past_length(given, self.layer)
            mask = torch.ones(1, 1, queries, past + queries, dtype=torch.bool, device=h.device)
            mask = mask.tril(past) if self.causal else mask
        if mask.dim() != 4:
            raise InputError(f"mam cannot extend a mask of the shape {tuple(mask.shape)}: load with sdpa.")
        seen = float(mask.dtype == torch.bool)
        if self.alpha != 1:
            least = torch.finfo(h.dtype).min
            if mask.dtype == torch.bool:
                mask = h.new_zeros(mask.shape).masked_fill(~mask, least)
            seen = math.log(self.alpha) if self.alpha > 0 else least
        return torch.cat([mask.new_full((*mask.shape[:-1], length), seen), mask], -1)


_NO_CACHE = "does not append to a cache of keys and values: mam cannot extend them."


class _Extended:
    """A cache, or none, that puts the prefix before what it gives."""

    def __init__(
        self, inner: Any, K: Float[Tensor, "heads l head"], V: Float[Tensor, "heads l head"]
    ) -> None:
        self.inner, self.K, self.V, self.used = inner, K, V, False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, *args, **options)
        self.used = True

        def before(prefix: Tensor, text: Tensor) -> Tensor:
            return torch.cat([prefix.to(text.dtype).expand(len(text), -1, -1, -1), text], 2)

        return before(self.K, keys), before(self.V, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
