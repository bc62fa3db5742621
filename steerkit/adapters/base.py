"""What all ways to adapt a model have in common.

A method is a frozen dataclass of settings in a file of its own (`steerkit.adapters.methods`), which opens with paper and equation.
It says what it claims (the hypothesis) and what it starts from, and makes the peft config; `register` puts it into `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from steerkit.adapters import tuner
from steerkit.adapters.slots import Slot, choose
from steerkit.errors import InputError
from steerkit.models import HookedModel


class Removable(Protocol):
    """A hook's handle, or what acts like one."""

    def remove(self) -> None: ...


@dataclass(frozen=True)
class AdapterMethod:
    """Settings of one way to adapt a model."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Author, year, address."""
    equation: ClassVar[str] = ""
    hypothesis: ClassVar[str] = ""
    """What it claims about how a pretrained model wants to be changed, in one sentence."""
    family: ClassVar[str] = ""
    """low-rank, singular, orthogonal, magnitude, sparse, fixed-basis, activation, prompt or full."""
    identity: ClassVar[str] = "exact"
    """How it starts: `exact`ly the base model, the base up to `rounding`, or, in words, why not."""
    merge: ClassVar[str] = "exact"
    """`exact` where it becomes a change of weights, or, in words, why not."""
    linear: ClassVar[bool] = True
    """Whether each adapted module stays linear in its input: then it has an effective change of weight."""
    mutates_base: ClassVar[bool] = False
    """Whether peft changes the base's own weights for it."""
    no_sites: ClassVar[str] = ""
    """Why activations cannot be read and written under it, where they cannot."""
    size: ClassVar[str] = "rank"
    """The setting that parameters grow with; empty where there is none."""
    modules: ClassVar[str | tuple[str, ...]] = "all"
    """Where it goes unless told (`steerkit.adapters.slots.choose`)."""
    lr: ClassVar[float] = 1e-3
    """Where the search for a learning rate begins."""

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> Any:
        """The config that peft makes the adapter from."""
        raise NotImplementedError

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        """Trained parameters, by formula."""
        return sum(self.count_at(slot) for slot in slots)

    def count_at(self, slot: Slot) -> int:
        """Trained parameters in one module."""
        raise NotImplementedError

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        """Where it goes, for what the user asked for. Raises InputError for places that match nothing."""
        return choose(model, modules if modules is not None else self.modules, layers)

    def paths(self, slots: Sequence[Slot]) -> list[str]:
        """The modules' paths. Raises InputError for a slot that is only some rows of a fused map."""
        parts = [slot.path for slot in slots if slot.rows]
        if parts:
            raise InputError(f"{self.name} takes whole maps: {parts[0]} is fused, ask for all of it.")
        return [slot.path for slot in slots]

    def prepare(self, model: nn.Module) -> None:
        """Called once, when a fresh adapter is in the model: for starts that are neither random nor of the base's weights."""

    def hold(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        """Called when the adapter, fresh or loaded, is in the model: lets no gradient reach what has to stay as it starts inside
        of trained tensors; how many numbers that are."""
        return 0

    def portable(self, folder: Path, first: Mapping[str, Tensor]) -> None:
        """Make what peft saved, for the base that it changed, fit the base as it was. `first` is the adapter as it started."""

    def unpacked(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `portable` was made from."""
        return state

    def attach(self, base: HookedModel, model: nn.Module) -> list[Removable]:
        """Called with `hold`: puts hooks into the base where the method needs them; what takes them out."""
        return []

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]] | None:
        """Parameter groups for the optimiser where they differ (LoRA+); None for the usual ones."""
        return None

    def regulariser(self, model: nn.Module) -> Tensor | None:
        """What is added to the loss, or None."""
        return None

    def after_step(self, model: nn.Module, step: int, n_steps: int) -> None:
        """Called after each step of the optimiser, counted from 0."""

    def finish(self, model: nn.Module) -> None:
        """Called once after training."""

    def settings(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class EditMethod(AdapterMethod):
    """A method that is an `Edit` of each module, made by steerkit's own tuner."""

    def edit(self, target: tuner.Target) -> tuner.Edit:
        """The edit of one module."""
        raise NotImplementedError

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> tuner.EditConfig:
        return tuner.EditConfig(
            method=self.name,
            settings=self.settings(),
            target_modules=self.paths(slots),
            seed=seed,
            facts=self.facts(model, slots),
        )

    def facts(self, model: HookedModel, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        """Path -> what the edit there has to know of the model beyond its own module. Plain data, saved with the adapter."""
        return {}

    def regulariser(self, model: nn.Module) -> Tensor | None:
        edits = [module for module in model.modules() if isinstance(module, tuner.Edit)]
        terms = [term for edit in edits if (term := edit.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None


@dataclass(frozen=True)
class SubsetMethod(AdapterMethod):
    """A method that trains some of the base's own parameters."""

    def trained(self, model: HookedModel, slots: Sequence[Slot]) -> list[str]:
        """Names of the parameters that are trained."""
        raise NotImplementedError

    def count(self, model: HookedModel, slots: Sequence[Slot]) -> int:
        parameters = dict(model.model.named_parameters())
        return sum(parameters[name].numel() for name in self.trained(model, slots))


@dataclass(frozen=True)
class PromptMethod(AdapterMethod):
    """A method that puts something trained before the text, and is in no module."""

    length: int = 16
    """Virtual tokens."""

    family: ClassVar[str] = "prompt"
    merge: ClassVar[str] = "it is something read before the text, no change of weights"
    linear: ClassVar[bool] = False
    no_sites: ClassVar[str] = "adds virtual tokens that shift positions"
    size: ClassVar[str] = "length"
    modules: ClassVar[str | tuple[str, ...]] = "prompt"

    def targets(
        self, model: HookedModel, modules: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[Slot]:
        if modules not in (None, "prompt") or layers is not None:
            raise InputError(f"{self.name} goes before the text: leave modules and layers away.")
        if not (model.is_causal and model.has_lm_head):
            raise InputError(
                f"{self.name} is for causal language models with a head, which {model.name} is not."
            )
        if not 1 <= self.length < model.context:
            raise InputError(
                f"length is {self.length}; {model.name} leaves room for 1 to {model.context - 1}."
            )
        return []


METHODS: dict[str, type[AdapterMethod]] = {}
T = TypeVar("T", bound=type[AdapterMethod])


def register(method: T) -> T:
    """Make a method known under its name."""
    if method.name in METHODS:
        raise ValueError(f"There are two adapters {method.name!r}.")
    METHODS[method.name] = method
    if issubclass(method, EditMethod):
        tuner.EDITS[method.name] = lambda target, settings: make(method.name, **settings).edit(target)  # type: ignore[attr-defined]
    return method


def make(name: str, **settings: Any) -> AdapterMethod:
    """A method with settings. Raises InputError for a name or a setting that does not exist, with what comes near."""
    import difflib

    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4) or sorted(METHODS)
        raise InputError(f"There is no adapter {name!r}: did you mean {', '.join(near)}?")
    known = [field.name for field in fields(METHODS[name])]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.3) or known
            raise InputError(f"{name} has no setting {key!r}: it has {', '.join(near)}.")
    hints = get_type_hints(METHODS[name])
    return METHODS[name](**{key: _typed(key, value, hints[key]) for key, value in settings.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as its field has it: JSON's lists as the tuples they were, numbers that YAML reads as text (1e-3) as numbers."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    allowed = tuple(get_origin(kind) or kind for kind in kinds)
    if Any in allowed:
        return value
    if isinstance(value, list):
        value = tuple(value)
    elif {int, float} & {*allowed} and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            number = float(value)
            whole = int in allowed and number.is_integer()
            value = int(value) if whole else number if float in allowed else value
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        kind = _KINDS.get(allowed[0], str(hint))
        raise InputError(f"{key} is {value!r}; it must be {kind}.")
    return value


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    Mapping: "names with values",
}
