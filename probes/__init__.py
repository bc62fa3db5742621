"""What is in a model's activations, and what training did to them.

probe = probes.fit_linear(acts[site], labels)
found = probes.probe_model(model, "storyworld:mood")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.causal import causal_check
    from probes.controls import control_codes
    from probes.crossval import cross_validate
    from probes.data import load_labelled, read_rows
    from probes.erasure import Eraser, LeaceFitter, fit_eraser
    from probes.latents import latent_probes
    from probes.linear import LinearProbe, fit_linear, load_probes, save_probes
    from probes.mdl import online_code
    from probes.methods import Lda, LeastSquares, Logistic, MassMean, Mlp
    from probes.report import save_study
    from probes.scores import HeldOut, difference
    from probes.splits import grouped_folds
    from probes.study import StudyConfig, probe_model

_EXPORTS = {
    "Eraser": "probes.erasure",
    "HeldOut": "probes.scores",
    "Lda": "probes.methods",
    "LeaceFitter": "probes.erasure",
    "LeastSquares": "probes.methods",
    "LinearProbe": "probes.linear",
    "Logistic": "probes.methods",
    "MassMean": "probes.methods",
    "Mlp": "probes.methods",
    "StudyConfig": "probes.study",
    "causal_check": "probes.causal",
    "control_codes": "probes.controls",
    "cross_validate": "probes.crossval",
    "difference": "probes.scores",
    "fit_eraser": "probes.erasure",
    "fit_linear": "probes.linear",
    "grouped_folds": "probes.splits",
    "latent_probes": "probes.latents",
    "load_labelled": "probes.data",
    "load_probes": "probes.linear",
    "online_code": "probes.mdl",
    "probe_model": "probes.study",
    "read_rows": "probes.data",
    "save_probes": "probes.linear",
    "save_study": "probes.report",
}

__all__ = [
    "Eraser",
    "HeldOut",
    "Lda",
    "LeaceFitter",
    "LeastSquares",
    "LinearProbe",
    "Logistic",
    "MassMean",
    "Mlp",
    "StudyConfig",
    "causal_check",
    "control_codes",
    "cross_validate",
    "difference",
    "fit_eraser",
    "fit_linear",
    "grouped_folds",
    "latent_probes",
    "load_labelled",
    "load_probes",
    "online_code",
    "probe_model",
    "read_rows",
    "save_probes",
    "save_study",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
