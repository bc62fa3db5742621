"""Scaling laws: what was planted comes back, published laws allocate compute as published, intervals cover."""

import math

import numpy as np
import pytest

from probes.scaling import Kaplan, chinchilla, fit_chinchilla, fit_kaplan, fit_power_law
from steerkit.errors import InputError, NumericsError

HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def runs(n=7):
    parameters, tokens = np.meshgrid(np.geomspace(5e7, 1.5e10, n), np.geomspace(2e9, 5e11, n))
    return parameters.ravel(), tokens.ravel()


@pytest.mark.parametrize("planted", [HOFFMANN, BESIROGLU])
@pytest.mark.parametrize("huber", [None, 1e-3])
def test_planted_parameters_of_chinchilla_s_form_come_back(planted, huber):
    parameters, tokens = runs()
    law = fit_chinchilla(
        parameters, tokens, chinchilla(*planted)(parameters, tokens), huber=huber, resamples=0
    )
    assert law.values == pytest.approx(planted, rel=1e-6)
    assert law.residual < 1e-9
    assert math.isnan(law.alpha.low)


def test_huber_s_loss_shrugs_off_a_run_that_failed():
    parameters, tokens = runs()
    losses = chinchilla(*HOFFMANN)(parameters, tokens)
    losses[10] *= 1.5
    robust = fit_chinchilla(parameters, tokens, losses, huber=1e-3, resamples=0)
    squares = fit_chinchilla(parameters, tokens, losses, resamples=0)
    assert robust.values[3:] == pytest.approx(HOFFMANN[3:], rel=0.01)
    assert np.abs(squares.values[3:] - HOFFMANN[3:]).max() > 0.02


@pytest.mark.parametrize(("planted", "wanted"), [(HOFFMANN, 92.6), (BESIROGLU, 18.4)])
def test_published_laws_allocate_chinchilla_s_compute_as_published(planted, wanted):
    """Tokens a parameter at 5.76e23 FLOP; 20 were used: the rounded first law does not say so."""
    law = chinchilla(*planted)
    best = law.optimal(5.76e23)
    assert best.tokens_per_parameter == pytest.approx(wanted, abs=0.05)
    assert 6 * best.parameters.estimate * best.tokens.estimate == pytest.approx(5.76e23)
    for factor in (0.9, 1.1):  # a minimum on the isoFLOP line
        n = best.parameters.estimate * factor
        assert law(n, 5.76e23 / 6 / n) > best.loss.estimate


def test_intervals_cover_the_planted_exponents_and_come_with_the_allocation():
    parameters, tokens = runs()
    law, covered = chinchilla(*HOFFMANN), 0
    for seed in range(5):
        noise = np.exp(0.003 * np.random.default_rng(seed).normal(size=len(parameters)))
        found = fit_chinchilla(parameters, tokens, law(parameters, tokens) * noise, resamples=30, seed=seed)
        covered += found.alpha.low <= 0.34 <= found.alpha.high
        assert found.alpha.estimate == pytest.approx(0.34, abs=0.03)
    assert covered >= 4
    best = found.optimal(1e21)
    assert best.parameters.low < best.parameters.estimate < best.parameters.high
    assert "alpha 0.3" in repr(found)
    assert len(found.figure().data) == 14


def test_kaplan_s_joint_law_comes_back():
    planted = np.array([0.076, 0.103, math.log(6.4e13), math.log(1.8e13)])
    parameters, tokens = runs(5)
    law = fit_kaplan(parameters, tokens, Kaplan.predict(planted, parameters, tokens), resamples=0)
    assert law.values == pytest.approx(planted, rel=1e-5)


def test_a_power_law_comes_back_with_and_without_an_irreducible_loss():
    sizes = np.geomspace(1e6, 1e9, 8)
    pure = fit_power_law(sizes, (8.8e13 / sizes) ** 0.076, resamples=20)
    assert pure.values == pytest.approx([0, math.log(8.8e13), 0.076])
    assert pure.alpha.high - pure.alpha.low < 1e-10
    raised = fit_power_law(sizes, 2 + (1e8 / sizes) ** 0.3, irreducible=True, resamples=0)
    assert raised.values == pytest.approx([2, math.log(1e8), 0.3], rel=1e-6)
    assert raised(1e7) == pytest.approx(2 + 10**0.3)


def test_errors_name_what_is_wrong(tmp_path):
    parameters, tokens = runs(3)
    losses = chinchilla(*HOFFMANN)(parameters, tokens)
    with pytest.raises(InputError, match="5 runs"):
        fit_chinchilla(parameters[:5], tokens[:5], losses[:5])
    with pytest.raises(InputError, match="1 different sizes"):
        fit_chinchilla(np.full(9, 1e9), tokens, losses)
    with pytest.raises(NumericsError, match="finite"):
        fit_chinchilla(parameters, tokens, np.where(np.arange(9) == 3, np.nan, losses))
    with pytest.raises(InputError, match="its loss"):
        fit_kaplan(parameters, tokens[:8], losses)
    with pytest.raises(InputError, match="compute"):
        chinchilla(*HOFFMANN).optimal(-1.0)
    with pytest.raises(InputError, match="A and B"):
        chinchilla(1.7, 0.0, 400.0, 0.3, 0.3).optimal(1e21)
    fit_chinchilla(parameters, tokens, losses, resamples=2).save(tmp_path / "law.json")
