"""X-LoRA: a mixture of LoRAs, weighed anew for each token.

    y' = y + s Σ_k g_k B_k A_k x,   g = softmax(G h + c) for each token, h the final state that the base gives it

Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148. Every forward runs the model twice, first as the base, to know h.
`adapters` are directories of saved LoRAs, which stay as they are while G and c are trained; without them there are `experts`
fresh ones, trained too. peft's own X-LoRA does not save what it trains of its experts, and weighs them only where the whole
model is called; this is an edit of steerkit's, of the same equation, with G 0 at first: all alike. It is read again by
`adapters.load`. Texts are generated without a cache, which would hold the states of one of the two passes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, Removable, register
from steerkit.adapters.sizes import check_rank
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, EditConfig, EditLayer, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel


@register
@dataclass(frozen=True)
class XLoRA(EditMethod):
    """A mixture of LoRAs, weighed anew for each token."""

    rank: int = 4
    """Of each fresh expert."""
    experts: int = 4
    """Fresh ones, where no adapters are given."""
    adapters: tuple[str, ...] = ()
    """Directories of saved `lora` adapters of this model, of one rank and scale, at all modules that are asked for."""
    scale: float = 2.0
    """s; that of the adapters where they are given."""

    name: ClassVar[str] = "xlora"
    paper: ClassVar[str] = "Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148"
    equation: ClassVar[str] = "W' x = W x + s Σ_k g_k(token) B_k A_k x"
    hypothesis: ClassVar[str] = "What tasks need can be mixed token by token from what others needed."
    family: ClassVar[str] = "low-rank"
    merge: ClassVar[str] = "its weights differ from token to token"
    linear: ClassVar[bool] = False
    no_sites: ClassVar[str] = "runs every block twice"
    lr: ClassVar[float] = 2e-3

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> EditConfig:
        if not self.adapters:
            check_rank(self.name, self.rank, slots)
        if len(self.adapters) == 1 or self.experts < 2:
            raise InputError("xlora mixes two experts or more.")
        config = super().peft_config(model, slots, seed)
        if self.adapters:
            config.settings = {**config.settings, **_common(self.adapters)}
        return config

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        return {slot.path: {"d_model": model.d_model} for slot in slots}

    def prepare(self, model: nn.Module) -> None:
        from safetensors.torch import load_file

        saved = [load_file(Path(folder) / "adapter_model.safetensors") for folder in self.adapters]
        for path, layer in model.named_modules():
            if saved and isinstance(layer, EditLayer):
                for edit in layer.steerkit_edits.values():
                    edit.take(path, saved)  # type: ignore[operator]

    def attach(self, base: HookedModel, model: nn.Module) -> list[Removable]:
        edits = [module for module in model.modules() if isinstance(module, _Experts)]
        return [
            base.trunk.register_forward_pre_hook(_Weigher(edits[0]), with_kwargs=True),
            _WithoutCache(base.model),
        ]

    def edit(self, target: Target) -> Edit:
        return _Experts(target, self)

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        gate = (len(self.adapters) or self.experts) * (model.d_model + 1)
        if self.adapters:
            return gate
        return gate + sum(self.experts * self.rank * (slot.d_out + slot.d_in) for slot in slots)


def _common(folders: Sequence[str]) -> dict[str, Any]:
    """Rank and scale of saved LoRAs. Raises InputError where they differ, or are none."""
    from peft import LoraConfig, PeftConfig

    found = set()
    for folder in folders:
        if not (Path(folder) / "adapter_config.json").is_file():
            raise InputError(f"There is no adapter in {folder}.")
        config: Any = PeftConfig.from_pretrained(folder)
        if type(config) is not LoraConfig or config.use_dora or config.rank_pattern:
            raise InputError(f"{folder} is no plain LoRA of one rank.")
        found.add((config.r, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)))
    if len(found) > 1:
        raise InputError(f"The adapters differ in rank and scale: {', '.join(map(str, sorted(found)))}.")
    rank, scale = found.pop()
    return {"rank": rank, "scale": scale}


class _Experts(Edit):
    """The experts of one module, next to each other: A (K r, d_in), B (d_out, K r)."""

    A: Tensor
    B: Tensor

    def __init__(self, target: Target, config: XLoRA) -> None:
        super().__init__()
        self.shared, self.rank, self.scale = target.shared, config.rank, config.scale
        self.n = len(config.adapters) or config.experts
        bound = target.d_in**-0.5
        A = torch.empty(self.n * config.rank, target.d_in).uniform_(
            -bound, bound, generator=target.generator()
        )
        B = torch.zeros(target.d_out, self.n * config.rank)
        for name, value in (("A", A), ("B", B)):
            if config.adapters:
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))
        self.tie("gate", target, "gate", lambda: torch.zeros(self.n, target.facts["d_model"]))
        self.tie("offset", target, "offset", lambda: torch.zeros(self.n))

    def take(self, path: str, saved: Sequence[dict[str, Tensor]]) -> None:
        """The weights of saved adapters."""
        if f"{path}.lora_A.weight" not in saved[0]:
            raise InputError(f"The adapters have nothing at {path}: give the modules and layers they have.")
        self.A.copy_(torch.cat([weights[f"{path}.lora_A.weight"] for weights in saved]))
        self.B.copy_(torch.cat([weights[f"{path}.lora_B.weight"] for weights in saved], 1))

    def weigh(self, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """Each expert's share at each token."""
        gate, offset = self.shared["gate"], self.shared["offset"]
        return nn.functional.linear(h.to(gate.dtype), gate, offset).softmax(-1)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if self.shared.get("plain"):
            return y
        if "shares" not in self.shared:
            raise InputError("X-LoRA weighs its experts with the model's help: read it by adapters.load.")
        inside = nn.functional.linear(x.to(self.A.dtype), self.A).unflatten(-1, (self.n, self.rank))
        inside = inside * self.shared["shares"].view(*inside.shape[:-1], 1)
        return y + (self.scale * nn.functional.linear(inside.flatten(-2), self.B)).to(y.dtype)


class _Weigher:
    """Before the model runs: runs it as the base, and weighs the experts by its final states."""

    def __init__(self, experts: _Experts) -> None:
        self.experts = experts

    def __call__(self, trunk: nn.Module, args: tuple, options: dict) -> None:
        shared = self.experts.shared
        if shared.get("plain"):
            return
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise InputError("X-LoRA runs without a cache: give use_cache=False.")
        shared["plain"] = True
        try:
            with torch.no_grad():
                final = trunk(*args, **{**options, "past_key_values": None, "use_cache": False})[0]
        finally:
            shared["plain"] = False
        shared["shares"] = self.experts.weigh(final)


class _WithoutCache:
    """Lets a model generate without a cache, until removed."""

    def __init__(self, model: Any) -> None:
        self.settings = getattr(model, "generation_config", None)
        if self.settings is not None:
            self.before, self.settings.use_cache = self.settings.use_cache, False

    def remove(self) -> None:
        if self.settings is not None:
            self.settings.use_cache = self.before
