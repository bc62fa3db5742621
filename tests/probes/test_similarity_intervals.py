"""Intervals of similarities: leaving out documents is done right, and covers the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probes.similarity import CCA, RBFCKA, RSA, LinearCKA, MinibatchCKA, Procrustes, similarity
from probes.similarity.rbf_cka import rbf_kernel
from steerkit.stats import jackknife_of

pytestmark = pytest.mark.filterwarnings("ignore::probes.similarity.SimilarityWarning")


def clustered(
    seed: int, documents: int, rows: int, d: int = 8, s: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X ~ N(0, I), half of whose variance rows of a document share, X + s noise of the same kind, and the documents."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> torch.Tensor:
        shared, own = (
            torch.randn(documents, n, d, generator=generator, dtype=torch.float64) for n in (1, rows)
        )
        return ((shared + own) / math.sqrt(2)).flatten(0, 1)

    x = side()
    return x, x + s * side(), torch.arange(documents).repeat_interleave(rows)


@pytest.mark.parametrize(
    "measure",
    [
        LinearCKA(route="gram"),
        LinearCKA(debiased=False, route="gram"),
        LinearCKA(route="moments"),
        LinearCKA(debiased=False, route="moments"),
        RSA(),
        CCA(),
        Procrustes(held_out=False),
    ],
    ids=repr,
)
def test_the_jackknife_is_that_of_computing_anew_without_each_document(measure):
    x, y, documents = clustered(0, 7, 9, d=4)
    shuffled = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    x, y, documents = x[shuffled], y[shuffled], documents[shuffled]
    found = similarity(x, y, measure, documents=documents, blocks=7)
    assert found.n_documents == 7
    interval = found["x", "x"].interval
    without = [
        similarity(x[documents != out], y[documents != out], measure, interval=False)["x", "x"].value
        for out in range(7)
    ]
    expected = jackknife_of(interval.estimate, np.array(without))
    assert interval.standard_error == pytest.approx(expected.standard_error, rel=1e-8)
    assert interval.low == pytest.approx(expected.low, abs=1e-9)


def test_the_jackknife_of_the_gaussian_kernel_keeps_the_bandwidth():
    x, y, documents = clustered(0, 6, 8, d=4)
    kernels = [rbf_kernel(side - side.mean(0), 0.8)(0, 48) for side in (x, y)]

    def cka(kept: torch.Tensor) -> float:
        centring = torch.eye(int(kept.sum()), dtype=torch.float64) - 1 / kept.sum()
        k, other = (centring @ kernel[kept][:, kept] @ centring for kernel in kernels)
        return float((k * other).sum() / (k.norm() * other.norm()))

    found = similarity(x, y, RBFCKA(debiased=False), documents=documents)["x", "x"].interval
    expected = jackknife_of(found.estimate, np.array([cka(documents != out) for out in range(6)]))
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-8)


def test_the_jackknife_of_minibatches_takes_documents_out_of_every_batch():
    x, y, documents = clustered(0, 5, 20, d=4)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    x, y, documents = x[order], y[order], documents[order]

    def cka(kept: torch.Tensor) -> float:
        fitter = MinibatchCKA(batch_size=1000).fitter(interval=False)
        for rows in torch.arange(100).split(25):
            rows = rows[kept[rows]]
            fitter.update(x[rows], y[rows])
        return fitter.result()["x", "x"].value

    fitter = MinibatchCKA(batch_size=25).fitter(blocks=5)
    fitter.update(x, y, documents)
    found = fitter.result()["x", "x"].interval
    expected = jackknife_of(cka(documents >= 0), np.array([cka(documents != out) for out in range(5)]))
    assert found.estimate == pytest.approx(expected.estimate, abs=1e-10)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-8)


def test_one_document_has_no_interval_and_no_interval_ends_above_one():
    x, y, _ = clustered(0, 5, 8)
    one = similarity(x, y, documents=torch.zeros(40, dtype=torch.long))["x", "x"].interval
    assert math.isfinite(one.estimate)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    near = similarity(x, x + 0.05 * y, documents=torch.arange(40) // 8)["x", "x"].interval
    assert near.low < near.estimate <= near.high <= 1


@pytest.mark.parametrize(
    ("measure", "truth", "options"),
    [
        (LinearCKA(route="gram"), 1 / 1.49, {}),
        (LinearCKA(route="moments"), 1 / 1.49, {"blocks": 8}),
        (Procrustes(), 1 / math.sqrt(1.49), {"blocks": 8}),
    ],
    ids=lambda part: repr(part) if isinstance(part, (LinearCKA, Procrustes)) else "",
)
def test_intervals_cover_the_truth(measure, truth, options):
    """95 ± 3 %, of rows that share half their variance within documents."""
    covered = 0
    for seed in range(250):
        x, y, documents = clustered(seed, documents=100, rows=3)
        interval = similarity(x, y, measure, documents=documents, top_rows=None, **options)["x", "x"].interval
        covered += interval.low < truth < interval.high
    assert 0.92 <= covered / 250 <= 0.98


def test_leaving_out_rows_instead_of_documents_would_cover_too_seldom():
    covered = 0
    for seed in range(100):
        x, y, _ = clustered(seed, documents=15, rows=20, s=2.0)
        interval = similarity(x, y, LinearCKA(debiased=False, route="gram"), top_rows=None)["x", "x"].interval
        covered += interval.low < 1 / 5 < interval.high
    assert covered < 85
