"""The value that steering is about: what is done, where in the model, and where it came from.

    vector = steering.fit(model, pairs, method="mean_diff", site="blocks.2.hook_resid_post")
    with model.steer(vector, strength=4.0, where=Where.generation_only()):
        model.generate("The fox", max_new_tokens=40)
    (2 * vector - other).save("kind.safetensors");  SteeringVector.load("kind.safetensors").cosine(vector)

A vector is one or more edits (`steerkit.steering.edits`) in the order in which they act; vectors of different places and kinds add
up to one that does both, the left one first. The file is safetensors, with JSON in its metadata.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.sites import weight_of
from steerkit.steering.edits import Add, Edit, WeightDelta, rebuild
from steerkit.steering.tracking import Tracker
from steerkit.steering.where import Tokens, Where
from steerkit.value_files import read_values, write_values

FORMAT = "steerkit-steering-1"

_READS_ENCODER = re.compile(r"\.EncDecAttention\.[kv]$")
"""Modules of the decoder that are given the encoder's tokens."""

Strengths = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Condition:
    """Steer a text only if the mean of its prompt's activations at `site` has a cosine with `vector` above `threshold` (CAST)."""

    site: str
    vector: Float[Tensor, " width"]
    threshold: float
    above: bool = True
    """False: below instead."""

    def fires(self, mean: Float[Tensor, "batch width"]) -> Tensor:
        """(batch, 1), 1 or 0."""
        cosine = torch.cosine_similarity(mean.float(), self.vector.to(mean.device).float()[None], dim=-1)
        return ((cosine > self.threshold) == self.above).float()[:, None]


@dataclass(frozen=True)
class SteeringVector:
    """Edits of a model's activations or weights, applied together."""

    edits: tuple[Edit, ...]
    """In the order in which they act, where they meet at a site."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model and its fingerprint, method and settings, read position, data and number of pairs, seed …"""
    where: Where = field(default_factory=Where)
    """The tokens it is meant for, unless the call says otherwise."""
    condition: Condition | None = None
    """When it acts at all; None: always."""

    @classmethod
    def add(cls, vectors: Mapping[str, Float[Tensor, " width"]], **provenance: Any) -> SteeringVector:
        """Additions at sites."""
        return cls(tuple(Add(site, vector.float()) for site, vector in vectors.items()), provenance)

    def __post_init__(self) -> None:
        if not self.edits:
            raise InputError("A steering vector needs at least one edit.")

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites and modules that it acts on."""
        return tuple(dict.fromkeys(edit.site for edit in self.edits))

    @property
    def directions(self) -> dict[str, Float[Tensor, " width"]]:
        """Site -> what is added there at strength 1. Raises InputError for a vector that does more than add."""
        found: dict[str, Tensor] = {}
        for edit in self.edits:
            if not isinstance(edit, Add):
                raise InputError(f"This vector does not only add: it has a {edit.name} edit at {edit.site}.")
            found[edit.site] = found.get(edit.site, 0.0) + edit.scale * edit.vector
        return found

    @property
    def norm(self) -> float:
        """The Euclidean norm of all that is changed at strength 1, as one long vector of additions and weight changes."""
        return _inner(self, self) ** 0.5

    def cosine(self, other: SteeringVector) -> float:
        """Of all that is changed, additions and weight changes; 0 for vectors that meet nowhere."""
        return _inner(self, other) / max(self.norm * other.norm, 1e-30)

    # arithmetic

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Both, this one first; additions at the same site become one."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if self.condition is not other.condition:
            raise InputError("Vectors under different conditions cannot be added: open two contexts instead.")
        edits = list(self.edits)
        for edit in other.edits:
            same = [i for i, own in enumerate(edits) if own.site == edit.site]
            if isinstance(edit, Add) and same and isinstance(last := edits[same[-1]], Add):
                edits[same[-1]] = Add(edit.site, last.scale * last.vector + edit.scale * edit.vector)
            else:
                edits.append(edit)
        return replace(
            self, edits=tuple(edits), provenance={"sum": [dict(self.provenance), dict(other.provenance)]}
        )

    def __mul__(self, factor: float) -> SteeringVector:
        return replace(self, edits=tuple(edit.scaled(float(factor)) for edit in self.edits))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + (-other)

    def __truediv__(self, divisor: float) -> SteeringVector:
        return self * (1 / divisor)

    def unit(self) -> SteeringVector:
        """The same of norm 1. Raises InputError when it is zero."""
        if not self.norm > 0:
            raise InputError("The vector is zero: it has no direction.")
        return self / self.norm

    # files

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        edits = []
        for i, edit in enumerate(self.edits):
            tensors |= {f"{i}.{name}": value for name, value in edit.tensors().items()}
            edits.append({"kind": edit.name, **edit.settings()})
        known: dict[str, Any] = {
            "format": FORMAT,
            "edits": edits,
            "where": self.where.to_dict(),
            "provenance": dict(self.provenance),
        }
        if self.condition is not None:
            tensors["condition"] = self.condition.vector
            known["condition"] = {
                "site": self.condition.site,
                "threshold": self.condition.threshold,
                "above": self.condition.above,
            }
        return write_values(path, tensors, known)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote.

        Raises InputError for a file that is missing or no steering vector, CheckpointError for a damaged one.
        """
        tensors, known = read_values(path, "steering vector", FORMAT, ": convert it first")
        edits = []
        for i, settings in enumerate(known["edits"]):
            own = {
                name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{i}.")
            }
            edits.append(rebuild(settings, own))
        condition = None
        if "condition" in known:
            condition = Condition(vector=tensors["condition"], **known["condition"])
        return cls(tuple(edits), known["provenance"], Where.from_dict(known["where"]), condition)

    # use

    def require_fit(self, model: HookedModel, *, other_model: bool = False) -> None:
        """Raise SiteError or InputError when the model has not these sites and widths, or is not what the vector was made for.

        The latter may be with `other_model`.
        """
        for edit in self.edits:
            width = _width(model, edit)
            if edit.width != width:
                raise InputError(
                    f"The vector is {edit.width} wide at {edit.site}, and {model.name} is {width} wide there: "
                    f"it was made for {self.provenance.get('model', 'another model')}."
                )
        made_for, here = self.provenance.get("fingerprint"), model.fingerprint
        if made_for is not None and made_for != here and not other_model:
            raise InputError(
                f"The vector was made for {self.provenance.get('model')}, and this is {model.name}: "
                "give other_model=True (--other-model) if that is meant."
            )

    @contextmanager
    def applied_to(
        self,
        model: HookedModel,
        *,
        strength: Strengths = 1.0,
        where: Where | None = None,
        prompt_lengths: Any = None,
        other_model: bool = False,
    ) -> Iterator[None]:
        """What `model.steer(vector, …)` opens: inside, every forward of this thread is steered.

        `strength` is one for all, or one for each row of the batch. `prompt_lengths` says, for forwards of whole texts, how many
        of each row's tokens are the prompt; without it, outside of `generate` and without a cache, all are.
        """
        self.require_fit(model, other_model=other_model)
        with ExitStack() as stack:
            for name, part in _by_stack(self, model).items():
                given = None if name == "encoder" else prompt_lengths
                applied = _Application(part, model, strength, where or self.where, given, name)
                stack.enter_context(applied.open())
            yield

    def __repr__(self) -> str:
        origin = self.provenance
        made = f", {origin['method']} for {origin.get('model')}" if "method" in origin else ""
        return f"SteeringVector({', '.join(map(repr, self.edits))}{made})"


class _Application:
    """A vector in effect on a model."""

    def __init__(
        self,
        vector: SteeringVector,
        model: HookedModel,
        strength: Strengths,
        where: Where,
        prompt_lengths: Any,
        stack: str,
    ) -> None:
        self.vector, self.model, self.where = vector, model, where
        self.rows: Tensor | None = None
        self.strength = 1.0
        if isinstance(strength, (int, float)):
            self.strength = float(strength)
        else:
            self.rows = torch.as_tensor(strength, dtype=torch.float32).view(-1, 1)
            if self.rows.numel() == 0:
                raise InputError("strength is empty: give a number, or one for each row.")
        finite = self.rows if self.rows is not None else torch.tensor(self.strength)
        if not finite.isfinite().all():
            raise InputError(f"strength is {strength}; it must be finite.")
        self.tracker = Tracker(model, where.marker, prompt_lengths, stack)
        self.tracker.on_prompt = self._begin
        self.gate: Tensor | None = None
        self._edits: dict[tuple[int, torch.device, torch.dtype], Edit] = {}
        self._last: tuple[Tokens | None, float | Tensor] = (None, 0.0)

    @contextmanager
    def open(self) -> Iterator[None]:
        of_sites: dict[str, list[Edit]] = {}
        of_modules: dict[str, list[Edit]] = {}
        for edit in self.vector.edits:
            (of_modules if edit.of_module else of_sites).setdefault(edit.site, []).append(edit)
        functions = {site: self._at_site(edits) for site, edits in of_sites.items()}
        condition = self.vector.condition
        with ExitStack() as stack:
            stack.enter_context(self.tracker.open())
            if condition is not None:
                stack.enter_context(self.model.hooks({condition.site: self._judge(condition)}))
            if functions:
                stack.enter_context(self.model.hooks(functions))
            for path, edits in of_modules.items():
                handle = self.model.model.get_submodule(path).register_forward_hook(self._at_module(edits))
                stack.callback(handle.remove)
            yield

    def _begin(self) -> None:
        self.gate = None

    def _judge(self, condition: Condition) -> Any:
        def judge(h: Tensor) -> None:
            tokens = self.tracker.tokens
            if self.gate is None and tokens is not None:
                counted = (tokens.real & ~tokens.bos & (tokens.position < tokens.prompt_length)).to(h)[
                    ..., None
                ]
                self.gate = condition.fires((h * counted).sum(1) / counted.sum(1).clamp_min(1))
                self._last = (None, 0.0)

        return judge

    def _at_site(self, edits: Sequence[Edit]) -> Any:
        def fn(h: Tensor) -> Tensor | None:
            return self._edited(edits, h, None)

        return fn

    def _at_module(self, edits: Sequence[Edit]) -> Any:
        thread = threading.get_ident()

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            y, x = output if isinstance(output, Tensor) else output[0], args[0]
            flat = y.dim() == 2
            if flat and self.tracker.tokens is not None:
                y, x = (_by_row(t, self.tracker.tokens, edits[0].site) for t in (y, x))
            new = self._edited(edits, y, x)
            if new is None:
                return None
            new = new.flatten(0, 1) if flat else new
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return hook

    def _edited(self, edits: Sequence[Edit], h: Tensor, x: Tensor | None) -> Tensor | None:
        tokens = self.tracker.tokens
        if tokens is None:
            return None
        strength = self._strength(tokens)
        if isinstance(strength, float):
            if strength == 0.0:
                return None
            weighted: float | Tensor = strength
        else:
            weighted = strength.to(h.device, h.dtype)
        for edit in edits:
            key = (id(edit), h.device, h.dtype)
            if key not in self._edits:
                self._edits[key] = edit.to(h.device, h.dtype)
            h = self._edits[key].apply(h, edit.scale * weighted, tokens, x)
        return h

    def _strength(self, tokens: Tokens) -> float | Tensor:
        """A number, or (batch, pos, 1): the same for all edits of a forward."""
        if self._last[0] is tokens:
            return self._last[1]
        found = self.where.weights(tokens)
        if self.rows is None and self.gate is None:
            strength = found * self.strength
        else:
            factor: Tensor = torch.tensor([[self.strength]]) if self.rows is None else self.rows
            factor = factor.to(tokens.position.device)
            if self.gate is not None:
                factor = factor * self.gate
            batch = len(tokens.position)
            if batch % len(factor):
                raise InputError(f"{len(factor)} strengths were given, and the batch has {batch} rows.")
            strength = factor.repeat_interleave(batch // len(factor), dim=0) * found
        if isinstance(strength, Tensor):
            strength = strength.unsqueeze(-1)
        self._last = (tokens, strength)
        return strength


def _by_stack(vector: SteeringVector, model: HookedModel) -> dict[str, SteeringVector]:
    """The vector; of an encoder-decoder model, what acts in its `encoder` and in its `decoder`.

    Raises InputError for a condition of one that is on the other.
    """
    if not any(name.startswith("decoder.") for name in model.sites):
        return {"": vector}

    def stack_of(path: str) -> str:
        return "encoder" if path.startswith("encoder.") or _READS_ENCODER.search(path) else "decoder"

    parts: dict[str, list[Edit]] = {}
    for edit in vector.edits:
        name = edit.site if edit.of_module else model.site(edit.site).name
        parts.setdefault(stack_of(name), []).append(edit)
    if vector.condition is not None and set(parts) != {stack_of(model.site(vector.condition.site).name)}:
        raise InputError("The condition is on one stack and steers another: take a site of the same.")
    return {name: replace(vector, edits=tuple(edits)) for name, edits in parts.items()}


def _by_row(flat: Tensor, tokens: Tokens, site: str) -> Tensor:
    """(batch, pos, width) of a module that sees the batch's tokens in one row (OPT's MLP). Raises InputError if it sees some."""
    shape = tokens.position.shape
    if len(flat) != shape.numel():
        raise InputError(
            f"{site} sees {len(flat)} of the {shape.numel()} tokens (an expert?): which ones, hooks cannot tell. "
            "Merge the vector into the weights."
        )
    return flat.unflatten(0, shape)


def _width(model: HookedModel, edit: Edit) -> int:
    """The width of the activations or outputs that an edit changes. Raises SiteError when the place does not exist."""
    if not edit.of_module:
        return model.site(edit.site).width
    try:
        module = model.model.get_submodule(edit.site)
    except AttributeError:
        raise InputError(f"{model.name} has no module {edit.site!r}.") from None
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise InputError(f"{edit.site} of {model.name} is no linear module: {type(module).__name__}.")
    return weight_of(module).shape[0]


def _inner(one: SteeringVector, other: SteeringVector) -> float:
    """The inner product of what two vectors change."""
    total = 0.0
    for a in one.edits:
        for b in other.edits:
            if a.site != b.site or type(a) is not type(b):
                continue
            factor = a.scale * b.scale
            if isinstance(a, WeightDelta):
                assert isinstance(b, WeightDelta)
                total += factor * float(
                    ((b.B.double().T @ a.B.double()) * (b.A.double() @ a.A.double().T)).sum()
                )
            elif isinstance(a, Add):
                assert isinstance(b, Add)
                total += factor * float(a.vector.double() @ b.vector.double())
            else:
                raise InputError(f"A {a.name} edit has no norm and no cosine.")
    return total
