"""What can be done to activations and weights: each edit is an equation.

h is a token's activation at the edit's site, s its strength there: that of the call, times the edit's own `scale`, times what
`Where` gives the token; at 0 nothing is changed. Edits of modules – `WeightDelta` – have x, the module's input, besides.

Tensors are float32 where they are kept and are brought to the activations' type and device when they are applied. A new kind of
edit is a subclass here or anywhere, with `@register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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
