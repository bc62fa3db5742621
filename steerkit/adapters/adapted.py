"""A model with an adapter in it.

tuned = adapters.get(model, "svft", rank=2)            # a HookedModel; until `remove`, `model` has the adapter in it too
with tuned.disabled(): ...                             # exactly the base
with tuned.scaled(0.5): ...                            # W + 0.5 ΔW, or half of what the adapter adds to its modules' outputs
tuned.save("runs/svft/adapter"); tuned.merge("merged") # a peft adapter directory; an ordinary checkpoint
tuned.changes()                                        # {path: Change(weight, ΔW)}
model = tuned.remove()                                 # the base, bit for bit
tuned = adapters.load("runs/svft/adapter")             # to be trained further
"""

from __future__ import annotations

import copy
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from steerkit.adapters.base import AdapterMethod, PromptMethod, SubsetMethod, make
from steerkit.adapters.inside import Change, effective_delta
from steerkit.adapters.prompted import PromptedBackend
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Edit
from steerkit.errors import CheckpointError, InputError, SiteError
from steerkit.loading import ADAPTER_RECORD, Loaded, adapter_origin, quiet
from steerkit.models import HookedModel
from steerkit.runs import atomic_path, read_json, write_json
from steerkit.sites import Site, is_projection, weight_of


def get(
    model: HookedModel,
    method: str | AdapterMethod,
    *,
    modules: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Adapted:
    """Put an adapter into the model; `modules` and `layers` say where (`slots.choose`), by default where the method belongs.

    Raises InputError for an unknown method or setting, for places that match nothing, and for what the method cannot take.
    """
    if isinstance(method, str):
        method = make(method, **settings)
    elif settings:
        raise InputError(f"Settings {', '.join(settings)} were given beside a method that has its own.")
    return _kind(method)(model, method, method.targets(model, modules, layers), seed)


def load(folder: str | Path, model: HookedModel | None = None, *, other_model: bool = False) -> Adapted:
    """What `Adapted.save` has written, put into the model it was made for (loaded if not given), to be trained further.

    Raises InputError for a directory that was not written by it, and, without `other_model`, for a model that is another.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_RECORD).is_file():
        raise InputError(
            f"{folder} has no {ADAPTER_RECORD}: HookedModel.from_pretrained reads other adapters."
        )
    record = read_json(folder / ADAPTER_RECORD)
    model = model if model is not None else HookedModel.from_pretrained(record["base"])
    origin = adapter_origin(folder, model.name)
    if origin is not None and not other_model:
        origin.require(model.fingerprint, str(folder))
    method = make(record["method"], **record["settings"])
    slots = [
        Slot(**{**slot, "rows": tuple((first, end) for first, end in slot["rows"])})
        for slot in record["slots"]
    ]
    return _kind(method)(model, method, slots, record["seed"], folder)


def _kind(method: AdapterMethod) -> type[Adapted]:
    if isinstance(method, PromptMethod):
        return PromptAdapted
    return SubsetAdapted if isinstance(method, SubsetMethod) else PeftAdapted


class Adapted(HookedModel, ABC):
    """See the module."""

    _present: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    """Models that have an adapter in them."""
    _held = 0
    """Numbers inside of trained tensors that stay as they are."""

    def __init__(
        self,
        base: HookedModel,
        method: AdapterMethod,
        slots: Sequence[Slot],
        seed: int,
        folder: Path | None = None,
    ) -> None:
        """Fresh, or as saved in `folder`."""
        if base.model in self._present or hasattr(base.model, "peft_config"):
            raise InputError(f"{base.name} has an adapter already: remove or merge it first.")
        self.base, self.method, self.slots, self.seed = base, method, list(slots), seed
        self._made_for = base.fingerprint
        self._flags = [(p, p.requires_grad) for p in base.model.parameters()]
        self._kept: dict[str, Tensor] = {}
        """What is changed of the base's weights, as it was."""
        try:
            self._put_in(f"{base.name} + {method.name}", folder)
        except BaseException:
            self._take_out()
            self._restore_flags()
            raise
        self._present.add(base.model)

    @abstractmethod
    def _put_in(self, name: str, folder: Path | None) -> None:
        """Change the base, and become a HookedModel of that name."""

    def _become(self, model: nn.Module, name: str) -> None:
        """The base's own HookedModel with another model in it: for what leaves its sites as they are."""
        self.__dict__.update({**vars(self.base), **vars(self), "model": model, "name": name})

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def n_trainable(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.trainable().values()) - self._held

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Inside, it is exactly the base."""

    @abstractmethod
    def scaled(self, alpha: float) -> AbstractContextManager[None]:
        """Inside, each adapted module gives base + α (adapted - base): weights W + α ΔW where it is linear. α = 0 is the base.

        Raises InputError for prompts and prefixes, which are in no module.
        """

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """Weight and effective change of every adapted linear map. Raises InputError for a method that is not linear."""

    def save(self, folder: str | Path) -> Path:
        """A directory that `load` and `HookedModel.from_pretrained` read: peft's, which plain peft reads too where it has the
        method, or an ordinary checkpoint."""
        return self._write(folder, self.model, record=True)

    def merge(self, folder: str | Path) -> Path:
        """Write the model with the adapter in its weights, as an ordinary checkpoint. The model in memory stays as it is.

        Raises InputError where the method is no change of weights.
        """
        if self.method.merge != "exact":
            raise InputError(f"{self.method.name} cannot be merged: {self.method.merge}.")
        return self._write(folder, self._merged(), record=False)

    @abstractmethod
    def _merged(self) -> nn.Module:
        """The model with the adapter in its weights, apart from the one in memory."""

    def _write(self, folder: str | Path, model: Any, *, record: bool) -> Path:
        folder = Path(folder)
        with atomic_path(folder) as new, quiet():
            model.save_pretrained(str(new))
            if self.base.tokenizer is not None:
                self.base.tokenizer.save_pretrained(str(new))
            if record:
                write_json(
                    new / ADAPTER_RECORD,
                    {
                        "method": self.method.name,
                        "settings": self.method.settings(),
                        "slots": [asdict(slot) for slot in self.slots],
                        "seed": self.seed,
                        "base": self.base.name,
                        "fingerprint": self._made_for,
                    },
                )
        return folder

    def remove(self) -> HookedModel:
        """Take the adapter out; the base as it was, bit for bit."""
        self._take_out()
        self._restore_flags()
        self._present.discard(self.base.model)
        return self.base

    @abstractmethod
    def _take_out(self) -> None:
        """Give the base its modules and weights back."""

    def _restore_flags(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


class SubsetAdapted(Adapted):
    """A model some of whose own weights are trained. The originals are kept on the CPU."""

    method: SubsetMethod

    def _put_in(self, name: str, folder: Path | None) -> None:
        named = dict(self.base.model.named_parameters())
        self._trained = {key: named[key] for key in self.method.trained(self.base, self.slots)}
        self._kept = {key: p.detach().cpu().clone() for key, p in self._trained.items()}
        self.base.model.requires_grad_(False)
        for parameter in self._trained.values():
            parameter.requires_grad_(True)
        self._become(self.base.model, name)
        if folder is not None:
            saved = dict(HookedModel.from_pretrained(folder, device="cpu").model.named_parameters())
            with torch.no_grad():
                for key, parameter in self._trained.items():
                    parameter.copy_(saved[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._with(self._kept):
            yield

    @contextmanager
    def scaled(self, alpha: float) -> Iterator[None]:
        with self._with({key: self._at(key, alpha) for key in self._trained}):
            yield

    def _at(self, key: str, alpha: float) -> Tensor:
        """W + α ΔW; W and W + ΔW themselves at 0 and 1."""
        tuned = self._trained[key].detach()
        wide = torch.promote_types(tuned.dtype, torch.float32)
        return self._kept[key].to(tuned.device, wide).lerp(tuned.to(wide), alpha).to(tuned.dtype)

    @contextmanager
    def _with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The trained parameters with other values. They are exchanged, not overwritten, so that a graph that was made before
        can still go backward afterwards."""
        tuned = {key: p.data for key, p in self._trained.items()}
        try:
            for key, p in self._trained.items():
                p.data = values[key].to(p.device)
            yield
        finally:
            for key, p in self._trained.items():
                p.data = tuned[key]

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        found = {}
        for slot in self.slots:
            key = f"{slot.path}.weight"
            if key in self._trained:
                before, after = self._kept[key], self._trained[key].detach().cpu()
                if _turned(self.base.model.get_submodule(slot.path)):
                    before, after = before.T, after.T
                found[slot.path] = Change(before, after.float() - before.float())
        return found

    def _merged(self) -> nn.Module:
        return self.model

    def _take_out(self) -> None:
        for key, value in self._kept.items():
            p = self._trained[key]
            p.data, p.grad = value.to(p.device), None


class PeftAdapted(Adapted):
    """A model with an adapter of peft's, or of steerkit's own tuner."""

    def _put_in(self, name: str, folder: Path | None) -> None:
        self.peft = self._injected(folder)
        self._held = self.method.hold(self.peft, self.slots)
        self._attached = self.method.attach(self.base, self.peft)
        self._wrap(name)

    def _wrap(self, name: str) -> None:
        if self.method.no_sites:
            self._become(self.peft, name)
            return
        base = self.base
        HookedModel.__init__(self, Loaded(self.peft, base.tokenizer, name, base.revision, base.has_lm_head))

    def site(self, name: str) -> Site:
        if not self.method.no_sites:
            return super().site(name)
        raise SiteError(
            f"{self.method.name} {self.method.no_sites}: read and steer {self.base.name} without it."
        )

    def _injected(self, folder: Path | None) -> PeftModel:
        if self.method.mutates_base:
            self._kept = {s.path: self._module(s.path).weight.detach().clone() for s in self.slots}
        training = self.base.model.training
        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                for kind in (UserWarning, FutureWarning):
                    warnings.filterwarnings("ignore", category=kind)
                torch.manual_seed(self.seed)
                return self._peft_model(folder).train(training)
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights of the adapter in {folder} can't be read: {error}."
            ) from error
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"{self.method.name} cannot be put into {self.base.name}: {error}") from error

    def _peft_model(self, folder: Path | None) -> PeftModel:
        anew = self.method.mutates_base or isinstance(
            self.method, PromptMethod
        )  # peft cannot load these to be trained
        if folder is not None and not anew:
            return PeftModel.from_pretrained(self.base.model, str(folder), is_trainable=True)
        config = self.method.peft_config(self.base, self.slots, self.seed)
        config.base_model_name_or_path = self.base.name
        made = get_peft_model(self.base.model, config)
        self.method.prepare(made)
        if self.method.mutates_base:
            self._first = {name: value.clone() for name, value in get_peft_model_state_dict(made).items()}
        if folder is not None:
            state = load_peft_weights(str(folder), device="cpu")
            set_peft_model_state_dict(made, self.method.unpacked(state))
        return made

    def save(self, folder: str | Path) -> Path:
        return self._write(folder, _Portable(self) if self.method.mutates_base else self.model, record=True)

    def _module(self, path: str) -> Any:
        module: Any = self.base.model.get_submodule(path)
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def tuner_layers(self) -> dict[str, BaseTunerLayer]:
        """Path in the base -> the layer that has replaced it."""
        return {
            path: module
            for path, module in self.base.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, it is exactly the base."""
        with self._originals(), self.peft.disable_adapter():
            yield

    @contextmanager
    def _originals(self) -> Iterator[None]:
        changed = {path: self._module(path).weight.detach().clone() for path in self._kept}
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(changed)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for path, weight in weights.items():
            self._module(path).weight.copy_(weight)

    @contextmanager
    def scaled(self, alpha: float) -> Iterator[None]:
        """Inside, each adapted module gives base + α (adapted - base): weights W + α ΔW where it is linear. α = 0 is the base.
        A method whose edits have an `alpha` goes its own way there.

        Raises InputError for prompts and prefixes, which are in no module.
        """
        layers = self.tuner_layers()
        if not layers:
            raise InputError(f"{self.method.name} changes no module's output: it cannot be scaled.")
        own = [edit for edit in self.peft.modules() if isinstance(edit, Edit) and edit.alpha is not None]
        if own:
            with _along(own, alpha):
                yield
            return

        def blend(path: str, layer: BaseTunerLayer) -> Any:
            def hook(module: nn.Module, args: tuple, options: dict, output: Any) -> Any:
                plain = self._plain(path, layer, args, options)
                return plain + alpha * (output - plain)

            return hook

        handles = [
            layer.register_forward_hook(blend(path, layer), with_kwargs=True)  # type: ignore[attr-defined]
            for path, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _plain(self, path: str, layer: BaseTunerLayer, args: tuple, options: dict) -> Tensor:
        module = layer.get_base_layer()
        if path not in self._kept:
            return module(*args, **options)
        return torch.func.functional_call(module, {"weight": self._kept[path]}, args, options)

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        """Weight and effective change of every adapted linear map. Raises InputError for a method that is not linear."""
        if not self.method.linear:
            raise InputError(f"{self.method.name} is no change of weights: it is not linear in its input.")
        found = {}
        for path, layer in self.tuner_layers().items():
            module: Any = layer.get_base_layer()
            if not is_projection(module):
                continue
            weight = (
                self._kept[path].T
                if path in self._kept and _turned(module)
                else self._kept.get(path, weight_of(module))
            )
            before = _linear(weight, getattr(module, "bias", None))
            found[path] = effective_delta(before, layer, weight.shape[1])  # type: ignore[arg-type]
        return found

    def _merged(self) -> nn.Module:
        return copy.deepcopy(self.peft).merge_and_unload(safe_merge=True)

    def _take_out(self) -> None:
        model = self.base.model
        for attached in vars(self).get("_attached", ()):
            attached.remove()
        if "peft" not in vars(self):
            _unwrap(model)
        elif not self.peft.active_peft_config.is_prompt_learning:
            self.peft.unload()
        self._put(self._kept)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)


def _unwrap(model: nn.Module) -> None:
    """Take out what peft has put in before it failed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(module, name, child.get_base_layer())


class _Portable:
    """An adapter that changed its base, saved for the base as it was."""

    def __init__(self, tuned: PeftAdapted) -> None:
        self.tuned = tuned

    def save_pretrained(self, folder: str) -> None:
        self.tuned.peft.save_pretrained(folder)
        self.tuned.method.portable(Path(folder), self.tuned._first)


class PromptAdapted(PeftAdapted):
    """A model with virtual tokens before the text: it gives logits, final states and text."""

    method: PromptMethod

    def _wrap(self, name: str) -> None:
        super()._wrap(name)
        self._backend = PromptedBackend(self.base._backend, self.peft)
        self.context = self.base.context - self.method.length


@contextmanager
def _along(edits: Sequence[Edit], alpha: float) -> Iterator[None]:
    before = [edit.alpha for edit in edits]
    for edit in edits:
        edit.alpha = alpha
    try:
        yield
    finally:
        for edit, value in zip(edits, before):
            edit.alpha = value


def _turned(module: Any) -> bool:
    return weight_of(module) is not module.weight


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    return lambda x: nn.functional.linear(x, weight, bias)
