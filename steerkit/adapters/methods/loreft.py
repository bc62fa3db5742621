"""Representation fine-tuning (ReFT): low-rank edits of the stream behind blocks, at the prompt's first and last tokens.

    loreft    h + Rᵀ (W h + b - R h)      rows of R orthonormal
    noreft    h + Rᵀ (W h + b - R h)      R free
    direft    h + Rᵀ (W h + b)            R free

Wu et al. 2024, https://arxiv.org/abs/2404.03592: rank 4 to 8, the first and the last 7 tokens (f7+l7), learning rate
9e-4 on billions of weights. They start at random; here W = R (direft: W = 0) and b = 0, so nothing is changed at
first. `steerkit.steering.methods.reft` has the family as steering vectors, with the prompt told from its
continuation; here a forward's whole text is the prompt, and what is generated with a cache is not edited. Generation
without a cache would take each longer text for a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel

KINDS = ("loreft", "noreft", "direft")
CACHES = ("past_key_values", "layer_past")
"""Names of the argument that is the cache."""


@register
@dataclass(frozen=True)
class LoReFT(EditMethod):
    """Low-rank edits of the stream."""

    rank: int = 4
    """Rows of R."""
    kind: str = "loreft"
    """Which of the family."""
    first: int = 7
    """Tokens at the beginning of the prompt that are edited …"""
    last: int = 7
    """… and at its end; `first` and `last` both 0: every token, generated ones included."""

    name: ClassVar[str] = "loreft"
    paper: ClassVar[str] = "Wu et al. 2024, https://arxiv.org/abs/2404.03592"
    equation: ClassVar[str] = "h' = h + Rᵀ (W h + b - R h)"
    hypothesis: ClassVar[str] = (
        "Concepts are linear subspaces of the stream: to set a few coordinates at a few tokens is enough."
    )
    family: ClassVar[str] = "activation"
    identity: ClassVar[str] = "rounding"
    merge: ClassVar[str] = "it edits activations at some tokens, no weights"
    linear: ClassVar[bool] = False
    lr: ClassVar[float] = 2e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r}; it is one of {', '.join(KINDS)}.")
        if self.rank < 1 or self.first < 0 or self.last < 0:
            raise InputError(
                f"rank is {self.rank}, first {self.first}, last {self.last}: 1 or more, and 0 or more."
            )

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if modules is not None:
            raise InputError(f"{self.name} edits what leaves a block: give layers, not modules.")
        chosen = sorted({slot.layer for slot in super().targets(model, None, layers)})
        d = model.d_model
        paths = [model.site(f"blocks.{layer}.hook_resid_post").path for layer in chosen]
        return [Slot(path, layer, "block", d, d) for path, layer in zip(paths, chosen)]

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        return {slot.path: {"layer": slot.layer, "d_model": slot.d_out} for slot in slots}

    def edit(self, target: Target) -> Edit:
        return _LoReFT(target, self)

    def count_at(self, slot: Slot) -> int:
        return 2 * self.rank * slot.d_out + self.rank


class _LoReFT(Edit):
    alpha = 1.0

    def __init__(self, target: Target, config: LoReFT) -> None:
        super().__init__()
        rank, d = config.rank, target.facts["d_model"]
        if rank > d:
            raise InputError(f"rank is {rank}; it is at most the width of the stream, {d}.")
        self.config, self.layer = config, target.facts["layer"]
        self.names = list(inspect.signature(target.module.forward).parameters)
        R = orthonormal(torch.randn(rank, d, generator=target.generator()))
        if config.kind == "loreft":
            R = orthonormal(R)
        self.R = nn.Parameter(R)
        self.W = nn.Parameter(torch.zeros_like(R) if config.kind == "direft" else R.clone())
        self.b = nn.Parameter(torch.zeros(rank))

    def around(self, module: Base, *args: Any, **options: Any) -> Any:
        given = {**dict(zip(self.names, args)), **options}
        generated = past_length(given, self.layer) > 0
        out = module(*args, **options)
        if generated and self.ends:
            return out
        h = out if isinstance(out, Tensor) else out[0]
        change = self.alpha * self.change(h).to(h.dtype)
        if not generated:
            change = change * self.chosen(real_tokens(given.get("attention_mask"), h)).unsqueeze(-1)
        return h + change if isinstance(out, Tensor) else (h + change, *out[1:])

    def change(self, h: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Rᵀ (W h + b - R h)"""
        R = orthonormal(self.R) if self.config.kind == "loreft" else self.R
        read = self.W if self.config.kind == "direft" else self.W - R
        return nn.functional.linear(h.to(R.dtype), read, self.b) @ R

    @property
    def ends(self) -> bool:
        """Whether the prompt's ends alone are edited."""
        return bool(self.config.first or self.config.last)

    def chosen(self, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which tokens of a prompt are edited. Pads never are."""
        if not self.ends:
            return real
        position, length = real.cumsum(-1) - 1, real.sum(-1, keepdim=True)
        return real & ((position < self.config.first) | (position >= length - self.config.last))


def orthonormal(R: Float[Tensor, "rank d"]) -> Float[Tensor, "rank d"]:
    """Gram and Schmidt's rows, with gradients: L⁻¹ R with L Lᵀ = R Rᵀ."""
    with torch.autocast(R.device.type, enabled=False):
        L = torch.linalg.cholesky_ex(R @ R.T).L
        return torch.linalg.solve_triangular(L, R, upper=False)


def past_length(given: Mapping[str, Any], layer: int) -> int:
    """Tokens that the cache among a block's arguments holds of this layer, before the block has run."""
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    return 0 if cache is None else int(cache.get_seq_length(layer))


def real_tokens(mask: Any, h: Float[Tensor, "batch pos d"]) -> Bool[Tensor, "batch pos"]:
    """Which tokens of a prompt are no pads, from the mask that a block gets.

    That is none at all, or of tokens (batch, keys), or of pairs of them (batch, heads, queries, keys), boolean or added to the
    scores. A token that nothing attends to is a pad.
    """
    batch, length = h.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=h.device)
    if not isinstance(mask, Tensor):
        raise InputError(
            f"A mask of the type {type(mask).__name__} cannot be read: load the model with sdpa."
        )
    allowed = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    if allowed.dim() > 2:
        allowed = allowed.flatten(1, -2).any(1)
    return allowed[:, :length].expand(batch, length)
