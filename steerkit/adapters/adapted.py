"""A model with an adapter in it.

tuned = adapters.get(model, "svft", rank=2)            # a HookedModel; until `remove`, `model` has the adapter in it too
with tuned.disabled(): ...                             # exactly the base
with tuned.scaled(0.5): ...                            # W + 0.5 ΔW, or half of what the adapter adds to its modules' outputs
tuned.save("runs/svft/adapter"); tuned.merge("merged") # a peft adapter directory; an ordinary checkpoint
tuned.changes()                                        # {path: Change(weight, ΔW)}
model = tuned.remove()                                 # the base, bit for bit
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from steerkit.adapters.base import AdapterMethod, make
from steerkit.adapters.inside import Change, effective_delta
from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.loading import Loaded, quiet
from steerkit.models import HookedModel
from steerkit.runs import atomic_path
from steerkit.sites import is_projection, weight_of


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
    if isinstance(model, Adapted) or hasattr(model.model, "peft_config"):
        raise InputError(f"{model.name} has an adapter already: remove or merge it first.")
    return Adapted(model, method, method.targets(model, modules, layers), seed)


class Adapted(HookedModel):
    """See the module."""

    def __init__(self, base: HookedModel, method: AdapterMethod, slots: Sequence[Slot], seed: int) -> None:
        self.base, self.method, self.slots, self.seed = base, method, list(slots), seed
        self._flags = [(p, p.requires_grad) for p in base.model.parameters()]
        self._kept: dict[str, Tensor] = {}
        """What peft changes of the base, as it was."""
        self.peft = self._injected()
        name = f"{base.name} + {method.name}"
        if self.peft.active_peft_config.is_prompt_learning:
            self.__dict__.update({**vars(base), **vars(self), "model": self.peft, "name": name})
        else:
            super().__init__(Loaded(self.peft, base.tokenizer, name, base.revision, base.has_lm_head))

    def _injected(self) -> PeftModel:
        config = self.method.peft_config(self.base, self.slots, self.seed)
        config.base_model_name_or_path = self.base.name
        if self.method.mutates_base:
            self._kept = {s.path: self._module(s.path).weight.detach().clone() for s in self.slots}
        training = self.base.model.training
        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                for kind in (UserWarning, FutureWarning):
                    warnings.filterwarnings("ignore", category=kind)
                torch.manual_seed(self.seed)
                return get_peft_model(self.base.model, config).train(training)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            self._restore()
            raise InputError(f"{self.method.name} cannot be put into {self.base.name}: {error}") from error
        except InputError:
            self._restore()
            raise

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

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    @property
    def n_trainable(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.trainable().values())

    def logits(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        if not self.peft.active_peft_config.is_prompt_learning:
            return super().logits(input_ids, attention_mask)
        ids, mask = self._checked(input_ids, attention_mask)
        found = self.peft(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits
        return found[:, -ids.shape[1] :]

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

        Raises InputError for prompts and prefixes, which are in no module.
        """
        layers = self.tuner_layers()
        if not layers:
            raise InputError(f"{self.method.name} changes no module's output: it cannot be scaled.")

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

    def save(self, folder: str | Path) -> Path:
        """A peft adapter directory, which `HookedModel.from_pretrained` reads, and plain peft where it has the method."""
        folder = Path(folder)
        with atomic_path(folder) as new, quiet():
            self.peft.save_pretrained(str(new))
            if self.base.tokenizer is not None:
                self.base.tokenizer.save_pretrained(str(new))
        return folder

    def merge(self, folder: str | Path) -> Path:
        """Write the model with the adapter in its weights, as an ordinary checkpoint. The model in memory stays as it is.

        Raises InputError where the method is no change of weights.
        """
        if self.method.merge != "exact":
            raise InputError(f"{self.method.name} cannot be merged: {self.method.merge}.")
        whole = copy.deepcopy(self.peft).merge_and_unload(safe_merge=True)
        folder = Path(folder)
        with atomic_path(folder) as new, quiet():
            whole.save_pretrained(str(new))
            if self.base.tokenizer is not None:
                self.base.tokenizer.save_pretrained(str(new))
        return folder

    def remove(self) -> HookedModel:
        """Take the adapter out; the base as it was, bit for bit."""
        if self.peft.active_peft_config.is_prompt_learning:
            inner: Any = self.peft.base_model
        else:
            inner = self.peft.unload()
        self._restore()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            inner.__dict__.pop(name, None)
        return self.base

    def _restore(self) -> None:
        self._put(self._kept)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def _turned(module: Any) -> bool:
    return weight_of(module) is not module.weight


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    return lambda x: nn.functional.linear(x, weight, bias)
