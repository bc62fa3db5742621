"""steerkit: see inside a language model, and change what it does.

    model = HookedModel.from_pretrained("storyworld")
    acts = model.activations(["The fox sleeps."], sites=["blocks.2.hook_resid_post"])

The packages `sae` and `probes` work on such activations.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.activation_cache import ActivationCache
    from steerkit.activations import ActivationStream, Tokenization
    from steerkit.data import Documents, load_documents
    from steerkit.models import HookedModel

__version__ = "0.1.0"

_EXPORTS = {
    "ActivationCache": "steerkit.activation_cache",
    "HookedModel": "steerkit.models",
    "ActivationStream": "steerkit.activations",
    "Tokenization": "steerkit.activations",
    "Documents": "steerkit.data",
    "load_documents": "steerkit.data",
}

__all__ = [
    "ActivationCache",
    "ActivationStream",
    "Documents",
    "HookedModel",
    "Tokenization",
    "__version__",
    "load_documents",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'steerkit' has no attribute {name!r}")
