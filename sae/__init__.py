"""Sparse autoencoders: training, formats, evaluation, pruning, dashboards.

    run = sae.train(model, "storyworld", site="blocks.2.hook_resid_post", arch=sae.Gated(d_sae=1024), tokens=2_000_000, out="g")
    latents = run.sae.encode(acts)
    same = sae.load("g")
    run = sae.open_run("saelens:gpt2-small-res-jb/blocks.7.hook_resid_pre", data="corpus.txt")

Architectures are in `sae.architectures`, one file each.
"""

from sae.architectures import (
    L1,
    REGISTRY,
    SAE,
    BatchTopK,
    Config,
    Crosscoder,
    Gated,
    Guided,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    PAnneal,
    SqrtL1,
    TopK,
    Transcoder,
    get,
)
from sae.concepts import ConceptScores, concept_scores
from sae.evaluation import Evaluation, NullTable, evaluate, evaluate_nulls, random_sae
from sae.formats import convert, load, push_to_hub
from sae.pretrained import open_run
from sae.pruning import PruneCurve, keep_top, prune, prune_curve
from sae.random_model import train_on_random_model
from sae.sweep import Job, job_names
from sae.trainer import TrainConfig, fit
from sae.training import SAERun, train, train_many

__all__ = [
    "L1",
    "REGISTRY",
    "SAE",
    "BatchTopK",
    "ConceptScores",
    "Config",
    "Crosscoder",
    "Evaluation",
    "Gated",
    "Guided",
    "HierarchicalTopK",
    "Job",
    "JumpReLU",
    "Matryoshka",
    "NullTable",
    "PAnneal",
    "PruneCurve",
    "SAERun",
    "SqrtL1",
    "TopK",
    "TrainConfig",
    "Transcoder",
    "concept_scores",
    "convert",
    "evaluate",
    "evaluate_nulls",
    "fit",
    "get",
    "job_names",
    "keep_top",
    "load",
    "open_run",
    "prune",
    "prune_curve",
    "push_to_hub",
    "random_sae",
    "train",
    "train_many",
    "train_on_random_model",
]
