"""What can be done to activations and weights: each edit is an equation.

h is a token's activation at the edit's site, s its strength there: that of the call, times the edit's own `scale`, times what
`Where` gives the token; at 0 nothing is changed. Edits of modules – `WeightDelta` – have x, the module's input, besides.

Tensors are float32 where they are kept and are brought to the activations' type and device when they are applied. A new kind of
edit is a subclass here or anywhere, with `@register`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.steering.where import Tokens

Strength = float | Tensor
"""A number, or (batch, pos, 1)."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one place."""

    site: str
    """A hook site; for edits with `of_module` the path of a module, as in `model.get_submodule(path)`."""
    scale: float = field(default=1.0, kw_only=True)
    """A factor of every strength: what `2 * vector` changes."""

    name: ClassVar[str] = ""
    of_module: ClassVar[bool] = False
    """Whether the edit is of a module's output given its input, rather than of an activation at a hook site."""
    sized_by: ClassVar[str] = "vector"
    """The tensor whose last axis is as wide as the activations."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if not tensor.isfinite().all():
                raise NumericsError(f"{name} of the {self.name} edit at {self.site} has NaN or inf.")

    def apply(
        self, h: Float[Tensor, "batch pos width"], s: Strength, tokens: Tokens, x: Tensor | None
    ) -> Tensor:
        """The edited activation."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The width of the activations that it fits."""
        return getattr(self, self.sized_by).shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def settings(self) -> dict[str, Any]:
        """The rest of it, plain data."""
        return {f.name: value for f in fields(self) if not isinstance(value := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Edit:
        """A copy with its tensors there and so."""
        moved: dict[str, Any] = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def scaled(self, factor: float) -> Edit:
        return replace(self, scale=self.scale * factor)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors().items())
        return f"{type(self).__name__}({self.site!r}, {shapes}, scale {self.scale:g})"


KINDS: dict[str, type[Edit]] = {}

E = TypeVar("E", bound=type[Edit])


def register(kind: E) -> E:
    """Make a kind of edit known to `SteeringVector.load`."""
    KINDS[kind.name] = kind
    return kind


def rebuild(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """The edit that `settings` (with its `kind`) and `tensors` are of. Raises InputError when there is none."""
    rest: dict[str, Any] = {**settings, **tensors}
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"There is no edit {kind!r}; there are {', '.join(sorted(KINDS))}.")
    try:
        return KINDS[kind](**rest)
    except TypeError as error:
        raise InputError(f"This is no {kind} edit: {error}.") from error


@register
@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """h + s v"""

    vector: Float[Tensor, " width"]
    name: ClassVar[str] = "add"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        return h + s * self.vector


@register
@dataclass(frozen=True, eq=False, repr=False)
class AddMatrix(Edit):
    """h_p + s M_{p - start} for the T prompt tokens from position `start` on (ActAdd); 1 is the token after BOS."""

    matrix: Float[Tensor, "t width"]
    start: int = 1
    name: ClassVar[str] = "add_matrix"
    sized_by: ClassVar[str] = "matrix"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        if tokens.uniform_step is not None:
            return h
        row = tokens.position - self.start
        inside = (
            (row >= 0) & (row < len(self.matrix)) & tokens.real & (tokens.position < tokens.prompt_length)
        )
        change = self.matrix[row.clamp(0, len(self.matrix) - 1)] * inside.unsqueeze(-1)
        return h + s * change


@register
@dataclass(frozen=True, eq=False, repr=False)
class Project(Edit):
    """h - s Qᵀ Q h: the span of the rows of Q (orthonormal) taken out; s = 1 all of it, s = 2 a reflection."""

    directions: Float[Tensor, "k width"]
    name: ClassVar[str] = "project"
    sized_by: ClassVar[str] = "directions"

    @classmethod
    def out(cls, site: str, directions: Float[Tensor, "k width"]) -> Project:
        """From any directions. Raises InputError when they are zero or dependent."""
        directions = torch.atleast_2d(directions).float()
        q, r = torch.linalg.qr(directions.T)
        if not (r.diagonal().abs() > 1e-6 * directions.norm(dim=1).max().clamp_min(1e-30)).all():
            raise InputError(f"The directions to project out at {site} are zero or linearly dependent.")
        return cls(site, q.T.contiguous())

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        return h - s * ((h @ self.directions.T) @ self.directions)


@register
@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Edit):
    """h + s (c - u·h) u: the component along u (of unit norm) becomes c where s = 1."""

    direction: Float[Tensor, " width"]
    value: float = 0.0
    name: ClassVar[str] = "clamp"
    sized_by: ClassVar[str] = "direction"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        unit = self.direction / self.direction.norm()
        return h + s * (self.value - h @ unit).unsqueeze(-1) * unit


@register
@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Edit):
    """h turned by the angle s φ in the plane of the two orthonormal rows (u, w), from u towards w; the rest of h stays."""

    plane: Float[Tensor, "2 width"]
    angle: float = 1.0
    """φ, in radians."""
    name: ClassVar[str] = "rotate"
    sized_by: ClassVar[str] = "plane"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        turn = torch.as_tensor(s, dtype=torch.float32, device=h.device) * self.angle
        cos, sin = torch.cos(turn).to(h.dtype), torch.sin(turn).to(h.dtype)
        a, b = (h @ self.plane.T).split(1, dim=-1)
        u, w = self.plane
        return h + ((cos - 1) * a - sin * b) * u + (sin * a + (cos - 1) * b) * w


@register
@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Edit):
    """h + s Rᵀ (W h + b - R h): LoReFT; without one of W, b and R h it is the others of its family.

    Wu et al. 2024, https://arxiv.org/abs/2404.03592. `R_out` writes; `W` reads, its own part subtracted where LoReFT does.
    """

    R: Float[Tensor, "r width"]
    W: Float[Tensor, "r width"]
    """What is read, all in all: W - R for LoReFT, W for DiReFT, -R for ConsReFT, 0 for LobiReFT."""
    b: Float[Tensor, " r"]
    name: ClassVar[str] = "low_rank"
    sized_by: ClassVar[str] = "R"

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        return h + s * ((h @ self.W.T + self.b) @ self.R)


@register
@dataclass(frozen=True, eq=False, repr=False)
class WeightDelta(Edit):
    """W + s B A at a linear module, as y + s (x Aᵀ) Bᵀ: a weight change of rank r that is never made dense."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    name: ClassVar[str] = "weight_delta"
    of_module: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return self.B.shape[0]

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        assert x is not None
        return h + s * ((x @ self.A.T) @ self.B.T)


@register
@dataclass(frozen=True, eq=False, repr=False)
class SingularRotate(Edit):
    """y + x V [R(s) diag(S + s dS) - diag(S)] Uᵀ at a linear module: r of its singular dimensions turned and stretched (AntiPaSTO).

        R(s) = (I - s A/2)⁻¹ (I + s A/2),   A = B / √(1 + ‖B‖²/a²),   B = P - Pᵀ,   a = 2 tan(max_angle/2)

    With ‖·‖ the spectral norm, no plane is turned by more than `max_angle` for s from -1 to 1, whatever P is. R(-s) = R(s)⁻¹. The
    rest of the weight matrix is not needed, and at s = 0 the module is as it was, exactly.
    """

    V: Float[Tensor, "d_in r"]
    S: Float[Tensor, " r"]
    U: Float[Tensor, "d_out r"]
    P: Float[Tensor, "r r"]
    dS: Float[Tensor, " r"]
    max_angle: float = math.pi / 3
    """Radians, above 0 and below π."""
    name: ClassVar[str] = "singular_rotate"
    of_module: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.P.shape[-1]
        if not 0 < self.max_angle < math.pi:
            raise InputError(
                f"max_angle is {self.max_angle}; it is in radians, above 0 and below π ({math.pi:.4f})."
            )
        shapes = [self.V.shape[1:], self.S.shape, self.U.shape[1:], self.P.shape[1:], self.dS.shape]
        if self.P.dim() != 2 or any(tuple(shape) != (r,) for shape in shapes) or len(self.P) != r:
            raise InputError(f"V, S, U, P and dS at {self.site} do not have the same r: {self!r}.")

    @property
    def width(self) -> int:
        return self.U.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> SingularRotate:
        """Small tensors stay float32: in less, R would not be a rotation."""
        small: dict[str, Any] = {name: getattr(self, name).to(device) for name in ("S", "P", "dS")}
        return replace(self, V=self.V.to(device, dtype), U=self.U.to(device, dtype), **small)

    @property
    def skew(self) -> Float[Tensor, "r r"]:
        """A."""
        return self._bounded() if self.P.requires_grad else self._fixed

    @cached_property
    def _fixed(self) -> Tensor:
        with torch.inference_mode(False):
            return self._bounded()

    def _bounded(self) -> Tensor:
        B = self.P - self.P.T
        bound = 2 * math.tan(self.max_angle / 2)
        return B / (1 + (torch.linalg.matrix_norm(B, ord=2) / bound).square()).sqrt()

    def rotation(self, s: float) -> Float[Tensor, "r r"]:
        """R(s)."""
        return torch.eye(len(self.P), device=self.P.device) + self._turn(s)

    def change(self, s: float) -> Float[Tensor, "r r"]:
        """R(s) diag(S + s dS) - diag(S)."""
        return self._turn(s) * (self.S + s * self.dS) + torch.diag(s * self.dS)

    def delta(self, s: float) -> WeightDelta:
        """The weight change that it is at strength s: for merging, and for export as a LoRA adapter."""
        s *= self.scale
        return WeightDelta(self.site, self.V.T.contiguous(), self.U @ self.change(s).T.to(self.U))

    def _turn(self, s: float) -> Float[Tensor, "r r"]:
        """R(s) - I."""
        identity = torch.eye(len(self.P), device=self.P.device)
        return torch.linalg.solve(identity - 0.5 * s * self.skew, s * self.skew)

    def apply(self, h: Tensor, s: Strength, tokens: Tokens, x: Tensor | None) -> Tensor:
        assert x is not None
        excited = x @ self.V
        if not isinstance(s, Tensor):
            return h + excited @ self.change(float(s)).to(h.dtype) @ self.U.T
        turned = torch.zeros_like(excited)
        for value in s.unique().tolist():
            if value:
                turned = turned + (excited * (s == value)) @ self.change(value).to(h.dtype)
        return h + turned @ self.U.T


def as_delta(edit: Edit) -> Edit:
    """A rotation of singular dimensions as the weight delta that it is at its own strength; any other edit as it is."""
    return edit.delta(1.0) if isinstance(edit, SingularRotate) else edit
