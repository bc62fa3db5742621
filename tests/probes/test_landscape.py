"""Landscapes: they hold the models exactly, are their formula in between, and a known surface comes out as it is."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import changed, decoder, encoder, state

from probes.landscape import line, moved, plane, random_direction
from probes.weights import weights_of
from steerkit.errors import InputError, NumericsError


@pytest.fixture(scope="module")
def base():
    return decoder()


@pytest.fixture(scope="module")
def tuned():
    return changed(decoder())


@pytest.fixture(scope="module")
def other():
    return changed(decoder(), seed=2)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.model.parameters()])


def test_the_corners_are_the_models_bit_for_bit_and_the_model_comes_back(base, tuned, other):
    before = state(tuned)
    for (a, b), model in (((0, 0), base), ((1, 0), tuned), ((0, 1), other)):
        wanted = state(model)
        with moved(tuned, base, a, b, other=other):
            assert same(state(tuned), wanted)
    assert same(state(tuned), before)


def test_points_in_between_are_their_formula(base, tuned, other):
    origin, first, second = flat(base), flat(tuned), flat(other)
    with moved(tuned, base, 0.3, -0.7, other=other):
        found = flat(tuned)
    torch.testing.assert_close(
        found, origin + 0.3 * (first - origin) - 0.7 * (second - origin), atol=1e-6, rtol=1e-5
    )


def test_a_quadratic_surface_comes_out_as_it_is(base, tuned, other):
    origin, first, second = flat(base), flat(tuned), flat(other)

    def distance(model):
        return float((flat(model) - first).square().sum())

    found = plane(tuned, base, distance, other=other, alphas=(0, 0.5, 1), betas=(0, 1))
    for i, a in enumerate(found.alphas):
        for j, b in enumerate(found.betas):
            wanted = ((a - 1) * (first - origin) + b * (second - origin)).square().sum()
            assert found.values[i, j] == pytest.approx(float(wanted), rel=1e-5, abs=1e-9)
    assert "other" in [*found.figure().data[1].text]
    own = line(tuned, base, distance, alphas=(0.0, 0.5, 1.0, 1.5))
    length = float((first - origin).square().sum())
    assert [s.estimate / length for s in own.scores] == pytest.approx([1, 0.25, 0, 0.25], abs=1e-6)
    assert own.barrier == pytest.approx(0)
    hill = line(tuned, base, lambda m: -distance(m), alphas=(0.0, 0.5, 1.0))
    assert hill.barrier == pytest.approx(0.25 * length, rel=1e-5)
    assert len(own.figure().data[0].x) == 4


def test_values_of_examples_give_intervals(base, tuned):
    found = line(tuned, base, lambda m: np.arange(5.0), alphas=(0.0, 1.0))
    assert found.scores[0].estimate == 2
    assert found.scores[0].standard_error == pytest.approx(np.arange(5.0).std(ddof=1) / np.sqrt(5))


@pytest.mark.parametrize("build", [decoder, encoder])
def test_a_random_direction_has_each_filter_s_norm(build):
    """GPT-2 keeps its weights transposed."""
    model = build()
    found, weights = random_direction(model, 3), weights_of(model)
    for name, step in found.items():
        dim = 0 if build is decoder and ".h." in name else 1
        torch.testing.assert_close(step.norm(dim=dim), weights[name].norm(dim=dim))
    assert all(w.dim() == 1 for name, w in weights.items() if name not in found and name != "lm_head.weight")
    again = random_direction(model, 3)
    assert same(found, again)
    assert not same(found, random_direction(model, 4))


def test_a_plane_across_a_random_direction(base, tuned):
    direction = random_direction(tuned, 5)
    first = flat(tuned)
    size = float(sum(step.double().square().sum() for step in direction.values()))

    def distance(model):
        return float((flat(model) - first).square().sum())

    found = plane(tuned, base, distance, alphas=(1.0,), betas=(-1.0, 0.0, 2.0), seed=5)
    assert found.values[0] == pytest.approx([size, 0, 4 * size], rel=1e-5)
    assert "seed 5" in repr(found)


def test_errors_name_what_is_wrong(base, tuned, other):
    with pytest.raises(InputError, match="along b"), moved(tuned, base, 0.5, 0.5):
        pass
    with pytest.raises(InputError, match="one architecture"), moved(tuned, encoder(), 0.5):
        pass
    with pytest.raises(NumericsError, match=r"a 0\.5"):
        line(tuned, base, lambda m: float("nan"), alphas=(0.5,))
    with pytest.raises(InputError, match="0 and 1"):
        _ = line(tuned, base, lambda m: 1.0, alphas=(0.5,)).barrier
