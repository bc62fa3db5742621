"""Drift between a base and a tuned model: closed forms, intervals, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probes.similarity import DriftFitter, drift
from steerkit.errors import InputError, NumericsError
from steerkit.stats import group_sums, jackknife


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_scaled_model_drifts_in_norm_only():
    x = normal(200, 6)
    found = drift(x, 3 * x, rank=3)["x"]
    for measured, expected in (
        (found.cosine, 1),
        (found.centred_cosine, 1),
        (found.norm_ratio, 3),
        (found.relative_change, 2),
        (found.subspace_overlap, 1),
    ):
        assert measured.estimate == pytest.approx(expected, abs=1e-9)
        assert measured.standard_error == pytest.approx(0, abs=1e-9)
    assert found.angles == pytest.approx((0, 0, 0), abs=1e-4)


def test_a_mean_that_both_share_fills_up_the_cosine_but_not_the_centred_one():
    x, y = normal(4000, 8), normal(4000, 8, seed=1)
    found = drift(x + 10, y + 10)["x"]
    assert found.cosine.estimate > 0.98
    assert abs(found.centred_cosine.estimate) < 0.02


def test_a_rotation_by_an_angle_is_found():
    """The leading plane is spanned by axes 0 and 1; axis 1 turns by 0.3 into axis 2."""
    x = normal(5000, 6) * torch.tensor([10.0, 5.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    turn = torch.eye(6, dtype=torch.float64)
    turn[1, 1] = turn[2, 2] = math.cos(0.3)
    turn[1, 2], turn[2, 1] = math.sin(0.3), -math.sin(0.3)
    found = drift(x, x @ turn, rank=2)["x"]
    assert found.angles == pytest.approx((0, math.degrees(0.3)), abs=0.05)
    assert found.subspace_overlap.estimate == pytest.approx((1 + math.cos(0.3) ** 2) / 2, abs=1e-3)
    assert found.norm_ratio.estimate == pytest.approx(1)


def test_unrelated_subspaces_overlap_by_chance():
    overlaps = [
        drift(normal(100, 20, seed=s), normal(100, 20, seed=100 + s), rank=5, blocks=2)["x"]
        for s in range(20)
    ]
    assert overlaps[0].chance_overlap == 0.25
    assert np.mean([found.subspace_overlap.estimate for found in overlaps]) == pytest.approx(0.25, abs=0.03)


def test_cosines_are_streamed_and_leave_out_documents_one_by_one():
    x, y = normal(90, 5), normal(90, 5, seed=1) + normal(90, 5)
    documents = torch.randint(0, 30, (90,), generator=torch.Generator().manual_seed(0))
    fitter = DriftFitter(rank=2)
    for rows in torch.arange(90).split(17):
        fitter.update({"p": x[rows], "q": y[rows]}, {"p": y[rows], "q": x[rows]}, documents[rows])
    found = fitter.result()
    assert list(found) == ["p", "q"]
    cosines = torch.nn.functional.cosine_similarity(x, y).numpy()
    sums = group_sums(np.stack([cosines, np.ones(90)], 1), documents.numpy())
    expected = jackknife(sums, lambda s: s[..., 0] / s[..., 1])
    assert found["p"].cosine.estimate == pytest.approx(expected.estimate)
    assert found["p"].cosine.standard_error == pytest.approx(expected.standard_error)
    change = found["p"].relative_change.estimate
    assert change == pytest.approx(float((y - x).norm() / x.norm()))
    centred = [side - side.mean(0) for side in (x, y)]
    expected_centred = float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))
    assert found["p"].centred_cosine.estimate == pytest.approx(expected_centred)


def test_other_widths_constants_and_nan_are_refused():
    x = normal(20, 4)
    with pytest.raises(InputError, match="4 wide in one model and 3 in the other"):
        drift({"p": x}, {"p": x[:, :3]})
    with pytest.raises(InputError, match="No site is on both sides"):
        drift({"p": x}, {"q": x})
    with pytest.raises(InputError, match="Activations at p are constant"):
        drift({"p": x}, {"p": torch.ones(20, 4)})
    with pytest.raises(NumericsError, match="NaN or inf at p"):
        drift({"p": x}, {"p": x / 0})
