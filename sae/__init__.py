"""Sparse autoencoders: training, formats, evaluation, pruning, dashboards.

    run = sae.train(model, "storyworld", site="blocks.2.hook_resid_post", arch=sae.Gated(d_sae=1024), tokens=2_000_000, out="g")
    latents = run.sae.encode(acts)
    same = sae.load("g")

Architectures are in `sae.architectures`, one file each.
"""

from sae.architectures import L1, REGISTRY, SAE, Config, Gated, SqrtL1, TopK, get
from sae.evaluation import Evaluation, evaluate
from sae.formats import convert, load, save
from sae.training import SAERun, TrainConfig, fit, train

__all__ = [
    "L1",
    "REGISTRY",
    "SAE",
    "Config",
    "Evaluation",
    "Gated",
    "SAERun",
    "SqrtL1",
    "TopK",
    "TrainConfig",
    "convert",
    "evaluate",
    "fit",
    "get",
    "load",
    "save",
    "train",
]
