"""The one peft tuner behind all adapters that peft lacks.

    class Scale(Edit):                                      # what it does to one module, and nothing else
        def __init__(self, target, config):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(target.d_out))
        def forward(self, x, base):  return self.gain * base(x)
        def delta(self, weight):     return (self.gain[:, None] - 1) * weight

peft knows it as the type STEERKIT, whose `adapter_config.json` names the method and its settings: loading, saving, switching,
disabling and merging are peft's own. Several may be active; each sees the one before as its base. peft has no door for new types
(https://github.com/huggingface/peft/issues/2273): its enumeration of types is extended in place, so that others stay registrable.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import peft_types, register_peft_method
from torch import Tensor, nn
from torch.func import functional_call

from steerkit.errors import InputError
from steerkit.sites import first_tensor, is_projection, is_transposed, weight_of

TYPE = "STEERKIT"
Base = Callable[..., Any]
"""The module that is edited, as a function."""


@dataclass(frozen=True)
class Target:
    """One module that an edit is made for."""

    path: str
    module: nn.Module
    """The base's own module."""
    model: nn.Module
    """The base model."""
    shared: dict[str, Any]
    """What the edits of one adapter have in common: parameters (`Edit.tie`), and what one hands on to another."""
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What `EditMethod.facts` says of this module."""

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The base's weight in float32 at least, a copy. Raises InputError for a module that is no linear map."""
        return _weight(self.path, self.module)

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """The base's bias in float32 at least, a copy; zeros where there is none."""
        bias = getattr(self.module, "bias", None)
        return torch.zeros(self.d_out) if bias is None else _wide(bias)

    def sibling(self, path: str, rows: Sequence[int] | None = None) -> Float[Tensor, "d_out d_in"]:
        """The weight of another module of the base, or its rows from first to end."""
        module = self.model.get_submodule(path)
        while isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        weight = _weight(path, module)
        return weight if rows is None else weight[slice(*rows)]

    @property
    def d_out(self) -> int:
        return self._features("out_features", 1)

    @property
    def d_in(self) -> int:
        return self._features("in_features", 0)

    def _features(self, name: str, conv1d_axis: int) -> int:
        if is_transposed(self.module):
            return int(self.module.weight.shape[conv1d_axis])  # type: ignore[index]
        if not hasattr(self.module, name):
            raise InputError(f"{self.path} is a {type(self.module).__name__}, not a linear map.")
        return int(getattr(self.module, name))

    def generator(self) -> torch.Generator:
        """Random numbers of this module: the same for the same seed and path."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(self.path.encode()))


def _weight(path: str, module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    if not is_projection(module):
        raise InputError(f"{path} is a {type(module).__name__}, not a linear map with a weight.")
    weight = weight_of(module)
    if not weight.is_floating_point():
        raise InputError(
            f"The weight of {path} is quantised ({weight.dtype}): this method needs it in floating point."
        )
    return _wide(weight)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


class Edit(nn.Module):
    """What an adapter does to one module. Parameters are what is trained; what is frozen is a buffer, `persistent=False` where it
    follows from the base's weights and the seed."""

    alpha: float | None = None
    """Where an edit has a way of its own from the base (0) to what was trained (1): how far along it. `Adapted.scaled` sets it."""

    def forward(self, x: Tensor, base: Base) -> Any:
        """The module's new output: `base(x)` is the old one."""
        raise NotImplementedError

    def around(self, module: Base, *args: Any, **options: Any) -> Any:
        """The module's whole call: `forward`, unless an edit needs to see or to change other arguments than the first tensor."""
        place, x = first_tensor(args, options)
        if isinstance(x, Tensor) and _takes_weight(module, x):
            weight = self.folded(module.weight, x.numel() // max(1, x.shape[-1]))
            if weight is not None:
                return functional_call(module, {"weight": weight}, args, options)

        def base(x: Tensor) -> Any:
            if isinstance(place, str):
                return module(*args, **{**options, place: x})
            return module(*args[:place], x, *args[place + 1 :], **options)  # type: ignore[operator]

        return self(x, base)

    def folded(self, weight: Float[Tensor, "d_out d_in"], n_tokens: int) -> Tensor | None:
        """The changed weight, where a call with so many tokens is cheaper through it than by `forward`; None where it is not."""
        return None

    def delta(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """What is added to the weight by merging. Raises InputError where the edit is no change of it."""
        raise InputError(f"{type(self).__name__} is no change of the weight, and cannot be merged.")

    def delta_bias(self, bias: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"] | None:
        """What is added to the bias (zeros if the module has none), or None."""
        return None

    def penalty(self) -> Tensor | None:
        """Its term of the loss, or None."""
        return None

    def tie(self, name: str, target: Target, key: str, make: Callable[[], Tensor]) -> None:
        """A parameter in common with the edits of the same `key`. It belongs to the first of them, and is saved once."""
        first = key not in target.shared
        if first:
            target.shared[key] = nn.Parameter(make())
            self.register_parameter(name, target.shared[key])
        else:
            object.__setattr__(self, name, target.shared[key])


def _takes_weight(module: Base, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear map whose product loses nothing of a small change that is added to the weight beforehand."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # accelerate's, which brings weights of its own
        and x.dtype == module.weight.dtype == torch.promote_types(x.dtype, torch.float32)
        and not torch.is_autocast_enabled(x.device.type)
    )


@dataclass
class EditConfig(PeftConfig):
    """adapter_config.json of such an adapter."""

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Path (or its end) -> the setting `rank` there."""
    seed: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> what the edit there has to know of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_types.PeftType[TYPE]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def settings_at(self, path: str) -> dict[str, Any]:
        """The settings for one module."""
        for end, rank in self.rank_pattern.items():
            if path == end or path.endswith("." + end):
                return {**self.settings, "rank": rank}
        return self.settings


class EditLayer(nn.Module, BaseTunerLayer):
    """A module of the base with the edits of all adapters."""

    adapter_layer_names = ("steerkit_edits",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.steerkit_edits = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}
        self._active_adapter: list[str] = []

    def update_layer(self, name: str, edit: Edit, inference_mode: bool) -> None:
        """Add the edit of the adapter `name`."""
        self.steerkit_edits[name] = edit
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Edits stay float32 at least, whatever the base's type."""
        for own in self.get_base_layer().parameters():
            dtype = torch.promote_types(own.dtype, torch.float32) if own.is_floating_point() else None
            self.steerkit_edits[adapter_name].to(device=device or own.device, dtype=dtype)
            return

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        run: Base = self.base_layer
        if not (self.disable_adapters or self.merged):
            for edit in self._active():
                run = partial(edit.around, run)
        return run(*args, **options)

    def _active(self) -> list[Edit]:
        return [self.steerkit_edits[name] for name in self.active_adapters if name in self.steerkit_edits]  # type: ignore[misc]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active edits into the weight. `unmerge` gives back the very bits."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.steerkit_edits:
                continue
            edit: Edit = self.steerkit_edits[name]  # type: ignore[assignment]
            layer = self.get_base_layer()
            before = {key: p.detach().clone() for key, p in layer.named_parameters(recurse=False)}
            self._merge_one(layer, edit, name, safe_merge)
            self._unmerged = self._unmerged or before
            self.merged_adapters.append(name)

    def _merge_one(self, layer: nn.Module, edit: Edit, name: str, safe: bool) -> None:
        weight = weight_of(layer)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        changed = wide + edit.delta(wide)
        if safe and not bool(changed.isfinite().all()):
            raise ValueError(f"NaN or inf in the merged weight of the adapter {name}.")
        old = getattr(layer, "bias", None)
        bias = edit.delta_bias(
            torch.zeros(len(weight), device=weight.device) if old is None else old.detach()
        )
        if bias is not None and old is None:
            raise InputError(
                f"{name} adds a bias to a {type(layer).__name__} that has none: it cannot be merged."
            )
        weight.copy_(changed)
        if bias is not None:
            old.add_(bias.to(old))  # type: ignore[union-attr]

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for key, value in self._unmerged.items():
            getattr(self.get_base_layer(), key).copy_(value)
        self._unmerged = {}
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "steerkit." + super().__repr__()


class EditModel(BaseTuner):
    """peft's side of it."""

    prefix = "steerkit_"
    tuner_layer_cls = EditLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    uses_shared_state = True

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """peft's own wants a weight of every module; edits are on their device already."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key in the file: peft itself expects parameters right under the adapter's name, not in modules of an edit."""
        return key.replace(f".steerkit_edits.{adapter_name}.", ".steerkit_edits.", 1)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(self, "_shared"):
            self._shared: dict[str, dict[str, Any]] = {}
        layer = target if isinstance(target, EditLayer) else EditLayer(target)
        path = current_key.replace(".base_layer", "")
        place = Target(
            path,
            layer.get_base_layer(),
            self.model,
            self._shared.setdefault(adapter_name, {}),
            peft_config.seed,
            peft_config.facts.get(path, {}),
        )
        edit = make_edit(peft_config.method, place, peft_config.settings_at(path))
        layer._active_adapter = layer._active_adapter or list(self.active_adapters)
        layer.update_layer(adapter_name, edit, peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


EDITS: dict[str, Callable[[Target, Mapping[str, Any]], Edit]] = {}
"""Method -> what makes its edit of a module from the settings."""


def make_edit(method: str, target: Target, settings: Mapping[str, Any]) -> Edit:
    """The edit of one module. Raises InputError for an unknown method."""
    if method not in EDITS:
        raise InputError(f"There is no adapter {method!r} here; there are {', '.join(sorted(EDITS))}.")
    return EDITS[method](target, settings)


def _register() -> None:
    types = peft_types.PeftType
    if TYPE in types.__members__:
        return
    member = str.__new__(types, TYPE)
    member._name_, member._value_ = TYPE, TYPE
    for table in ("_member_map_", "_value2member_map_"):
        getattr(types, table)[TYPE] = member
    types._member_names_.append(TYPE)
    type.__setattr__(types, TYPE, member)
    register_peft_method(
        name=TYPE.lower(), config_cls=EditConfig, model_cls=EditModel, prefix=EditModel.prefix
    )


_register()
