"""CKA beside published packages, where they are installed."""

from __future__ import annotations

import pytest
import torch

from probes.similarity import RBFCKA, LinearCKA, MinibatchCKA, similarity


def sides() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(101, 20, generator=generator, dtype=torch.float64)
    y[:, :12] += x
    return x, y


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_is_that_of_ckatorch(kernel, unbiased):
    ckatorch = pytest.importorskip("ckatorch", reason="ckatorch is not installed")
    x, y = sides()
    expected = float(ckatorch.cka_base(x, y, kernel=kernel, unbiased=unbiased, threshold=0.6))
    measure = LinearCKA(debiased=unbiased) if kernel == "linear" else RBFCKA(fraction=0.6, debiased=unbiased)
    assert similarity(x, y, measure, interval=False)["x", "x"].value == pytest.approx(expected, abs=1e-9)


def test_minibatch_cka_is_that_of_ckatorch():
    ckatorch = pytest.importorskip("ckatorch", reason="ckatorch is not installed")
    x, y = (side[:100] for side in sides())
    expected = float(ckatorch.cka_batch(x.unflatten(0, (4, 25)), y.unflatten(0, (4, 25))))
    fitter = MinibatchCKA(batch_size=25).fitter(interval=False)
    fitter.update(x, y)
    assert fitter.result()["x", "x"].value == pytest.approx(expected, abs=1e-9)


def test_hsic_of_torch_cka_gives_the_same_cka():
    torch_cka = pytest.importorskip("torch_cka", reason="torch-cka is not installed")
    theirs = torch_cka.CKA(torch.nn.Identity(), torch.nn.Identity(), "a", "b", [""], [""])
    x, y = (side.float() for side in sides())
    k, other = (side @ side.T for side in (x, y))
    k.fill_diagonal_(0), other.fill_diagonal_(0)
    hsic = theirs._HSIC
    expected = hsic(k, other) / (hsic(k, k) * hsic(other, other)) ** 0.5
    assert similarity(x, y, LinearCKA(), interval=False)["x", "x"].value == pytest.approx(expected, abs=1e-4)
