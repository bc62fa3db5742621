"""Every architecture, by name. A new one is a file here and a line in the registry."""

from __future__ import annotations

from sae.architectures.base import SAE, Config, Sparsity, Step, Terms
from sae.architectures.batch_topk import BatchTopK
from sae.architectures.crosscoder import Crosscoder
from sae.architectures.gated import Gated
from sae.architectures.guided import Guided
from sae.architectures.hierarchical_topk import HierarchicalTopK
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.l1 import L1
from sae.architectures.matryoshka import Matryoshka
from sae.architectures.p_anneal import PAnneal
from sae.architectures.sqrt_l1 import SqrtL1
from sae.architectures.topk import TopK
from sae.architectures.transcoder import Transcoder
from steerkit.errors import InputError, did_you_mean

REGISTRY: dict[str, type[Config]] = {
    config.name: config
    for config in (
        L1,
        SqrtL1,
        Gated,
        TopK,
        BatchTopK,
        JumpReLU,
        Matryoshka,
        HierarchicalTopK,
        PAnneal,
        Guided,
        Transcoder,
        Crosscoder,
    )
}


def get(name: str) -> type[Config]:
    """The config class of an architecture. Raises InputError for an unknown name."""
    if name not in REGISTRY:
        known = ", ".join(REGISTRY)
        raise InputError(f"Unknown architecture {name!r}; there are {known}.{did_you_mean(name, REGISTRY)}")
    return REGISTRY[name]


__all__ = [
    "L1",
    "REGISTRY",
    "SAE",
    "BatchTopK",
    "Config",
    "Crosscoder",
    "Gated",
    "Guided",
    "HierarchicalTopK",
    "JumpReLU",
    "Matryoshka",
    "PAnneal",
    "Sparsity",
    "SqrtL1",
    "Step",
    "Terms",
    "TopK",
    "Transcoder",
    "get",
]
