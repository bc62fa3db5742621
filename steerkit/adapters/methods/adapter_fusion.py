"""AdapterFusion: adapters that were trained apart, mixed token by token by attention over them.

    y' = y + V Σ_t s_t δ_t(y),   s = softmax_t((Q y)ᵀ K δ_t(y)),   δ_t(y) = U_t f(D_t y + b_D) + b_U

Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247. The adapters δ_t (`houlsby`, saved directories) are frozen; Q,
K (random) and V (the identity) are trained, with ‖V - I‖² penalised as in their code; learning rate 5e-5. The
adapters' weights are copied into the fusion's own directory: theirs are not needed to load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.adapters.base import EditMethod, register
from steerkit.adapters.bottleneck import ACTIVATIONS
from steerkit.adapters.slots import Slot
from steerkit.adapters.tuner import Base, Edit, EditConfig, EditLayer, Target
from steerkit.errors import InputError
from steerkit.loading import adapter_origin
from steerkit.models import HookedModel

_PARTS = ("D", "b_D", "U", "b_U")


@register
@dataclass(frozen=True)
class AdapterFusion(EditMethod):
    """Trained adapters, mixed."""

    adapters: tuple[str, ...] = ()
    """Directories of saved `houlsby` adapters of one model, of the same settings and places."""
    penalty: float = 0.01
    """What ‖V - I‖² is multiplied by in the loss."""
    bottleneck: int = 0
    """Width of the adapters: read from them."""
    activation: str = ""
    """f: read from them."""

    name: ClassVar[str] = "adapter_fusion"
    paper: ClassVar[str] = "Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247"
    equation: ClassVar[str] = "y' = y + V Σ s_t δ_t(y), s = softmax((Q y)ᵀ K δ_t(y))"
    hypothesis: ClassVar[str] = (
        "What tasks have taught apart can be recombined: each token needs its own mixture of them."
    )
    family: ClassVar[str] = "activation"
    identity: ClassVar[str] = "it starts as a mixture of the trained adapters"
    merge: ClassVar[str] = "it is a nonlinear function of activations, no change of weights"
    linear: ClassVar[bool] = False
    size: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ("o", "down")
    lr: ClassVar[float] = 5e-4

    def peft_config(self, model: HookedModel, slots: Sequence[Slot], seed: int) -> EditConfig:
        config = super().peft_config(model, slots, seed)
        config.settings = {**config.settings, **self._common(model, self.paths(slots))}
        return config

    def _common(self, model: HookedModel, paths: Sequence[str]) -> dict[str, Any]:
        """The settings that the adapters have in common. Raises InputError where they cannot be fused."""
        if len(self.adapters) < 2:
            raise InputError("adapters has fewer than two directories of saved houlsby adapters to fuse.")
        found = [_config(folder) for folder in self.adapters]
        for folder, config in zip(self.adapters, found):
            origin = adapter_origin(Path(folder), model.name)
            if origin is not None:
                origin.require(model.fingerprint, folder)
            missing = sorted(set(paths) - set(config.target_modules))
            if missing:
                raise InputError(
                    f"{folder} has no adapter at {missing[0]}: give the modules and layers it has."
                )
            if config.settings != found[0].settings:
                raise InputError(
                    f"{folder} ({config.settings}) and {self.adapters[0]} ({found[0].settings}) differ in their settings."
                )
        settings = found[0].settings
        return {"bottleneck": settings["rank"], "activation": settings["activation"]}

    def prepare(self, model: nn.Module) -> None:
        from safetensors.torch import load_file

        saved = [load_file(Path(folder) / "adapter_model.safetensors") for folder in self.adapters]
        for path, layer in model.named_modules():
            if isinstance(layer, EditLayer):
                for edit in layer.steerkit_edits.values():
                    edit.take([_weights(weights, path) for weights in saved])  # type: ignore[operator]

    def edit(self, target: Target) -> Edit:
        return _Fusion(target, self)

    def count_at(self, slot: Slot) -> int:
        return 3 * slot.d_out**2


def _config(folder: str) -> EditConfig:
    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"There is no adapter in {folder}.")
    config = EditConfig.from_pretrained(folder)
    if getattr(config, "method", "") != "houlsby":
        raise InputError(f"{folder} is no houlsby adapter.")
    return config


def _weights(saved: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    return {part: saved[f"{path}.steerkit_edits.adapter.{part}"] for part in _PARTS}


class _Fusion(Edit):
    alpha = 1.0
    D: Tensor
    b_D: Tensor
    U: Tensor
    b_U: Tensor

    def __init__(self, target: Target, config: AdapterFusion) -> None:
        super().__init__()
        n, m, d = len(config.adapters), config.bottleneck, target.d_out
        self.activation, self.strength = ACTIVATIONS[config.activation], config.penalty
        for name, shape in zip(_PARTS, ((n, m, d), (n, m), (n, d, m), (n, d))):
            self.register_buffer(name, torch.zeros(shape))
        generator = target.generator()
        self.Q = nn.Parameter(torch.randn(d, d, generator=generator) * d**-0.5)
        self.K = nn.Parameter(torch.randn(d, d, generator=generator) * d**-0.5)
        self.V = nn.Parameter(torch.eye(d))

    def take(self, adapters: Sequence[dict[str, Tensor]]) -> None:
        """The weights of the adapters."""
        for part in _PARTS:
            getattr(self, part).copy_(torch.stack([adapter[part] for adapter in adapters]))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        mixed = nn.functional.linear(self.mixed(y.to(self.V.dtype)), self.V)
        return y + self.alpha * mixed.to(y.dtype)

    def mixed(self, h: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """Σ_t s_t δ_t(h), without any δ_t (d wide) itself: only their insides (m wide) are kept."""
        inside = self.activation(torch.einsum("...d,nmd->...nm", h, self.D) + self.b_D)
        read = nn.functional.linear(h, self.Q) @ self.K
        scores = (torch.einsum("...d,ndm->...nm", read, self.U) * inside).sum(-1) + read @ self.b_U.T
        shares = scores.softmax(-1)
        return torch.einsum("...nm,ndm->...d", shares.unsqueeze(-1) * inside, self.U) + shares @ self.b_U

    def penalty(self) -> Tensor:
        return self.strength * (self.V - torch.eye(len(self.V)).to(self.V)).pow(2).sum()
