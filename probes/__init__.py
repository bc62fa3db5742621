"""What is in a model's activations, and what training did to them.

probe = probes.fit_linear(acts[site], labels)
found = probes.probe_model(model, "storyworld:mood")
report = probes.compare(base, tuned, "storyworld");  report.save("report.html")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.attention import attention_scores, read_attention, rotary_usage
    from probes.attribution import attribute
    from probes.causal import causal_check
    from probes.comparison import ComparisonConfig, compare
    from probes.contrasts import Contrast
    from probes.controls import control_codes
    from probes.crossval import cross_validate
    from probes.data import load_labelled, read_rows
    from probes.dictionaries import compare_dictionaries
    from probes.direct import direct_attribution
    from probes.erasure import Eraser, LeaceFitter, fit_eraser
    from probes.freezing import freezing_sweep
    from probes.heads import head_importance
    from probes.instability import Remedies, representation_instability, seed_runs
    from probes.latents import latent_probes
    from probes.lens import TunedLens, fit_tuned_lens, read_lens
    from probes.linear import LinearProbe, fit_linear, load_probes, save_probes
    from probes.mdl import online_code
    from probes.methods import Lda, LeastSquares, Logistic, MassMean, Mlp
    from probes.neurons import neuron_memories
    from probes.noise_scale import NoiseMeter, critical_batch
    from probes.patching import patch
    from probes.report import save_study
    from probes.rollback import rollback_sweep, rolled_back
    from probes.scaling import fit_chinchilla, fit_kaplan, fit_power_law
    from probes.scores import HeldOut, difference
    from probes.splits import grouped_folds
    from probes.study import StudyConfig, probe_model

_EXPORTS = {
    "ComparisonConfig": "probes.comparison",
    "Contrast": "probes.contrasts",
    "Eraser": "probes.erasure",
    "HeldOut": "probes.scores",
    "Lda": "probes.methods",
    "LeaceFitter": "probes.erasure",
    "LeastSquares": "probes.methods",
    "LinearProbe": "probes.linear",
    "Logistic": "probes.methods",
    "MassMean": "probes.methods",
    "Mlp": "probes.methods",
    "NoiseMeter": "probes.noise_scale",
    "Remedies": "probes.instability",
    "StudyConfig": "probes.study",
    "TunedLens": "probes.lens",
    "attention_scores": "probes.attention",
    "attribute": "probes.attribution",
    "causal_check": "probes.causal",
    "compare": "probes.comparison",
    "compare_dictionaries": "probes.dictionaries",
    "control_codes": "probes.controls",
    "critical_batch": "probes.noise_scale",
    "cross_validate": "probes.crossval",
    "difference": "probes.scores",
    "direct_attribution": "probes.direct",
    "fit_chinchilla": "probes.scaling",
    "fit_eraser": "probes.erasure",
    "fit_kaplan": "probes.scaling",
    "fit_linear": "probes.linear",
    "fit_power_law": "probes.scaling",
    "fit_tuned_lens": "probes.lens",
    "freezing_sweep": "probes.freezing",
    "grouped_folds": "probes.splits",
    "head_importance": "probes.heads",
    "latent_probes": "probes.latents",
    "load_labelled": "probes.data",
    "load_probes": "probes.linear",
    "neuron_memories": "probes.neurons",
    "online_code": "probes.mdl",
    "patch": "probes.patching",
    "probe_model": "probes.study",
    "read_attention": "probes.attention",
    "read_lens": "probes.lens",
    "read_rows": "probes.data",
    "representation_instability": "probes.instability",
    "rollback_sweep": "probes.rollback",
    "rolled_back": "probes.rollback",
    "rotary_usage": "probes.attention",
    "save_probes": "probes.linear",
    "save_study": "probes.report",
    "seed_runs": "probes.instability",
}

__all__ = [
    "ComparisonConfig",
    "Contrast",
    "Eraser",
    "HeldOut",
    "Lda",
    "LeaceFitter",
    "LeastSquares",
    "LinearProbe",
    "Logistic",
    "MassMean",
    "Mlp",
    "NoiseMeter",
    "Remedies",
    "StudyConfig",
    "TunedLens",
    "attention_scores",
    "attribute",
    "causal_check",
    "compare",
    "compare_dictionaries",
    "control_codes",
    "critical_batch",
    "cross_validate",
    "difference",
    "direct_attribution",
    "fit_chinchilla",
    "fit_eraser",
    "fit_kaplan",
    "fit_linear",
    "fit_power_law",
    "fit_tuned_lens",
    "freezing_sweep",
    "grouped_folds",
    "head_importance",
    "latent_probes",
    "load_labelled",
    "load_probes",
    "neuron_memories",
    "online_code",
    "patch",
    "probe_model",
    "read_attention",
    "read_lens",
    "read_rows",
    "representation_instability",
    "rollback_sweep",
    "rolled_back",
    "rotary_usage",
    "save_probes",
    "save_study",
    "seed_runs",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
