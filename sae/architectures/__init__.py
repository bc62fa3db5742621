"""Every architecture, by name. A new one is a file here and a line in the registry."""

from __future__ import annotations

from sae.architectures.base import SAE, Config, Sparsity, Step
from sae.architectures.gated import Gated
from sae.architectures.l1 import L1
from sae.architectures.sqrt_l1 import SqrtL1
from sae.architectures.topk import TopK
from steerkit.errors import InputError, did_you_mean

REGISTRY: dict[str, type[Config]] = {config.name: config for config in (L1, SqrtL1, Gated, TopK)}


def get(name: str) -> type[Config]:
    """The config class of an architecture. Raises InputError for an unknown name."""
    if name not in REGISTRY:
        known = ", ".join(REGISTRY)
        raise InputError(f"Unknown architecture {name!r}; there are {known}.{did_you_mean(name, REGISTRY)}")
    return REGISTRY[name]


__all__ = ["L1", "REGISTRY", "SAE", "Config", "Gated", "Sparsity", "SqrtL1", "Step", "TopK", "get"]
