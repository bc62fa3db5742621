"""CLOVER: what is between a head's singular directions, trained as a full matrix.

    output and value of head h:  O_h V_h = L_h diag(s_h) R_hᵀ  ->  L_h (diag(s_h) + M_h) R_hᵀ,   M_h (d_head, d_head)
    query and key likewise, Q_hᵀ K_h, where positions are not rotated between them; else, and for every `width` rows of an MLP's
    map, inside one map:         K_h = T_h B_h              ->  (T_h + M_h) B_h,   B_h with orthonormal rows

Meng et al. 2024, https://arxiv.org/abs/2411.17426. M = 0 at the start: exactly the base, with grouped queries too, where a value
head is paired with each of the output heads that share it. L, R and B are never made: the change of O is O_h C_h M_h D_h, that of K
C_h M_h D_h K_h, with C_h and D_h (d_head, d_head) from two QRs and one small SVD. V and Q stay. Published learning rate:
1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.sizes import greatest_divisor
from steerkit.adapters.slots import Slot, choose
from steerkit.adapters.svd import svd
from steerkit.adapters.tuner import Base, Edit, Target
from steerkit.errors import InputError
from steerkit.models import HookedModel

PARTNER = {"o": "v", "k": "q"}
"""Kind of a target -> kind of the map that it is decomposed with."""


@register
@dataclass(frozen=True)
class CLOVER(EditMethod):
    """Full matrices between each head's own singular directions."""

    width: int = 64
    """Rows of an MLP's map that are taken as one head; the greatest number up to it that divides them."""

    name: ClassVar[str] = "clover"
    paper: ClassVar[str] = "Meng et al. 2024, https://arxiv.org/abs/2411.17426"
    equation: ClassVar[str] = "O_h V_h = L_h S_h R_hᵀ, S_h trained as a full matrix"
    hypothesis: ClassVar[str] = (
        "Each head has the directions that it needs; which of them it reads for which that it writes has to change."
    )
    family: ClassVar[str] = "singular"
    size: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ("o", "k", "up")

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"width is {self.width}; it must be at least 1.")

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        """Heads; whether they lie along the input; the other map that they are decomposed with, and its rows."""
        rotary = any("rotary" in type(module).__name__.lower() for module in model.model.modules())
        return {slot.path: self._facts(model, slot, rotary) for slot in slots}

    def _facts(self, model: HookedModel, slot: Slot, rotary: bool) -> dict[str, Any]:
        if slot.kind in ("up", "gate"):
            width = 1 if self.width == 1 else greatest_divisor(self.width, [slot.d_out], "width")
            if width > slot.d_in:
                raise InputError(
                    f"width is {self.width}, of which {slot.path} takes {width}: more than its {slot.d_in} inputs."
                )
            return {"heads": slot.d_out // width}
        if slot.kind not in PARTNER:
            raise InputError(f"clover goes to o, k, up and gate; {slot.path} is {slot.kind}.")
        other = _nearest(slot, choose(model, PARTNER[slot.kind]))
        partner = {"partner": other.path, "rows": other.rows[0] if other.rows else None}
        if slot.kind == "o":
            return {"heads": model.n_heads, "reads": True, **partner}
        heads = slot.d_out * model.n_heads // other.n_rows
        joint = heads == model.n_heads and not rotary
        return {"heads": heads, **(partner if joint else {})}

    def edit(self, target: Target) -> Edit:
        return _CLOVER(target)

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        heads = {path: facts["heads"] for path, facts in self.facts(model, slots).items()}
        sides = {slot.path: slot.d_in if slot.kind == "o" else slot.d_out for slot in slots}
        return sum(sides[path] ** 2 // heads[path] for path in heads)


def _nearest(slot: Slot, others: Sequence[Slot]) -> Slot:
    """The one of the same attention module: with the longest beginning of the path in common."""

    def common(other: Slot) -> int:
        same = [one == two for one, two in zip(slot.path.split("."), other.path.split("."))]
        return [*same, False].index(False)

    return max(others, key=common)


class _CLOVER(Edit):
    C: Tensor
    D: Tensor
    bias: Tensor

    def __init__(self, target: Target) -> None:
        super().__init__()
        n, weight = target.facts["heads"], target.weight
        self.reads = target.facts.get("reads", False)
        own = _triangles(_heads(weight if self.reads else weight.T, n))
        C = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device).expand_as(own)
        D = _inverse(own).mT
        if "partner" in target.facts:
            other = target.sibling(target.facts["partner"], target.facts["rows"])
            n_other = len(other) // own.shape[-1]
            other = _triangles(_heads(other.T, n_other)).repeat_interleave(n // n_other, dim=0)
            left, right = (own, other) if self.reads else (other, own)
            A, _, Bh = svd(left @ right.mT)
            C, D = _inverse(left) @ A, Bh @ _inverse(right).mT
        for name, value in (("C", C.to(weight)), ("D", D.to(weight)), ("bias", target.bias)):
            self.register_buffer(name, value.contiguous(), persistent=False)
        self.M = nn.Parameter(torch.zeros(C.shape))

    def blocks(self) -> Float[Tensor, "n w w"]:
        """What each head is mapped by, less the identity."""
        return self.C @ self.M @ self.D

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.reads:
            return base(x + _each(self.blocks(), x.to(self.M.dtype)).to(x.dtype))
        y = base(x)
        return y + _each(self.blocks(), y.to(self.M.dtype) - self.bias).to(y.dtype)

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        blocks = self.blocks()
        return _each(blocks.mT, weight) if self.reads else _each(blocks, weight.T).T


def _each(blocks: Float[Tensor, "n w w"], x: Float[Tensor, "... nw"]) -> Float[Tensor, "... nw"]:
    """Each head mapped by its block."""
    heads = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("hij,...hj->...hi", blocks, heads).flatten(-2)


def _heads(columns: Float[Tensor, "d nw"], n: int) -> Float[Tensor, "n d w"]:
    return columns.unflatten(1, (n, -1)).transpose(0, 1)


def _triangles(heads: Float[Tensor, "n d w"]) -> Float[Tensor, "n w w"]:
    """R of each head's QR, in float64, with a positive diagonal: unique."""
    R = torch.linalg.qr(heads.double(), mode="r").R
    return R * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)


def _inverse(R: Float[Tensor, "n w w"]) -> Float[Tensor, "n w w"]:
    """What is as good as zero has none: those directions stay as they are."""
    return torch.linalg.pinv(R, rtol=1e-5)
