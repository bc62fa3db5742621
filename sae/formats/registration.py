"""Architectures that sae-lens lacks, registered with it, so that `sae_lens.SAE.load_from_disk` reads their files.

    import sae, sae_lens                                  # in either order: nothing else is to be done
    sae_lens.SAE.load_from_disk("a_topk_transcoder")

sae-lens 6.54 has transcoders with ReLU and with thresholds, each with and without a skip connection; TopK ones are missing:

    f = TopK(ReLU(x W_enc + b_enc)),   y = f W_dec + b_dec  [+ W_skip x]          d_out, k and the rest in cfg.json

sae-lens is never imported from here before somebody asks for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {"topk_transcoder": "Transcoder", "topk_skip_transcoder": "SkipTranscoder"}
"""What is registered, and the class of sae-lens that it is made from."""


def register() -> None:
    """Register what is missing with sae-lens, which is imported if it was not. A second call does nothing."""
    import sae_lens
    from sae_lens.registry import SAE_CLASS_REGISTRY

    for name, base in ARCHITECTURES.items():
        if name not in SAE_CLASS_REGISTRY:
            sae_lens.register_sae_class(
                name, *_topk_version(name, getattr(sae_lens, base), getattr(sae_lens, base + "Config"))
            )


def register_when_imported() -> None:
    """`register` now if sae-lens is imported already, and otherwise as soon as it is."""
    if "sae_lens" in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _topk_version(name: str, base: Any, base_config: Any) -> tuple[type, type]:
    """(class, config class) of sae-lens's transcoder `base` with TopK in place of ReLU."""
    from dataclasses import dataclass

    @dataclass
    class Config(base_config):
        k: int = 16

        @classmethod
        def architecture(cls) -> str:
            return name

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "k": self.k}

    class TopKTranscoder(base):
        def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
            return lambda pre: _topk(pre, self.cfg.k)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any]) -> Any:
            return cls(Config.from_dict(config_dict))

    for made, title in ((TopKTranscoder, "TopK" + base.__name__), (Config, f"TopK{base.__name__}Config")):
        made.__name__ = made.__qualname__ = title
    return TopKTranscoder, Config


def _topk(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu())


class _Finder(MetaPathFinder):
    """Stands in front of the import machinery until sae-lens is imported, and calls `register` when that is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "sae_lens":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        register()
