"""Similarity of representations: two models, two checkpoints, or the layers of one.

    found = similarity(acts_base, acts_tuned, "linear_cka", documents=documents, pairs="matched", permutations=100)
    moved = drift(acts_base, acts_tuned, documents=documents)
    fitter = LinearCKA().fitter(pairs="all");  fitter.update(batch_a, batch_b, documents);  fitter.result()

A measure is a file with its paper and formula; it declares its invariances as data.
"""

from probes.similarity.base import (
    Invariances,
    Measure,
    Null,
    Pair,
    Settings,
    Similarity,
    SimilarityWarning,
)
from probes.similarity.cca import CCA, PWCCA, SVCCA
from probes.similarity.cka import LinearCKA
from probes.similarity.drift import Drift, DriftFitter, drift
from probes.similarity.minibatch_cka import MinibatchCKA
from probes.similarity.pairwise import MEASURES, TopRows, get, similarity
from probes.similarity.procrustes import Procrustes
from probes.similarity.rbf_cka import RBFCKA
from probes.similarity.rsa import RSA

__all__ = [
    "CCA",
    "MEASURES",
    "PWCCA",
    "RBFCKA",
    "RSA",
    "SVCCA",
    "Drift",
    "DriftFitter",
    "Invariances",
    "LinearCKA",
    "Measure",
    "MinibatchCKA",
    "Null",
    "Pair",
    "Procrustes",
    "Settings",
    "Similarity",
    "SimilarityWarning",
    "TopRows",
    "drift",
    "get",
    "similarity",
]
