"""Linear probes: scikit-learn's optimum, analytic accuracies, frozen values, bad input."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf as sklearn_ledoit_wolf
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from probes.linear import LinearProbe, fit_linear, load_probes, save_probes
from probes.methods import Lda, LeastSquares, Logistic, MassMean, Mlp, ProbeWarning, Problems
from probes.methods.lda import ledoit_wolf
from steerkit.errors import CheckpointError, InputError, NumericsError


def sample(n, d, n_classes, seed=0, offset=5.0):
    """Correlated rows far from zero, with noisy linear labels of unequal frequency."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    x = z @ torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5 * 3
    w = torch.randn(d, n_classes, generator=g, dtype=torch.float64) / d**0.5
    bias = torch.linspace(0, 1, n_classes, dtype=torch.float64)
    y = (x @ w + torch.randn(n, n_classes, generator=g, dtype=torch.float64) + bias).argmax(1)
    return x + offset, y


def sklearn_coefficients(model, x, y, standardize):
    scaler = StandardScaler(with_std=standardize).fit(x)
    model.fit(scaler.transform(x), y)
    weight = model.coef_ / (scaler.scale_ if standardize else 1.0)
    return np.atleast_2d(weight), model.intercept_ - np.atleast_2d(weight) @ scaler.mean_


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_logistic_is_sklearns_optimum(n_classes, standardize, balanced):
    x, y = sample(400, 30, n_classes)
    for C in (1e-3, 0.1, 1.0):
        reference = LogisticRegression(
            C=C, tol=1e-12, max_iter=20_000, class_weight="balanced" if balanced else None
        )
        weight, bias = sklearn_coefficients(reference, x.numpy(), y.numpy(), standardize)
        method = Logistic(C=C, standardize=standardize, balanced=balanced)
        fit = method.fit(x[None], Problems.single(y, n_classes))
        ours = fit.weight[0, 0].numpy()
        np.testing.assert_allclose(ours, weight, atol=1e-4)
        np.testing.assert_allclose(
            (fit.bias[0, 0] - fit.weight[0, 0] @ fit.center[0]).numpy(), bias, atol=1e-3
        )

        objective = partial(mean_loss, x, y, n_classes, C, balanced, standardize)
        found = objective(ours, (fit.bias[0, 0] - fit.weight[0, 0] @ fit.center[0]).numpy())
        assert found <= objective(weight, bias) + 1e-6


def mean_loss(x, y, n_classes, C, balanced, standardize, weight, bias):
    """The objective, written out."""
    z = torch.from_numpy(x.numpy() @ weight.T + bias)
    z = torch.cat([torch.zeros_like(z), z], 1) if n_classes == 2 else z
    counts = torch.bincount(y).double()
    share = (1 / counts[y] / n_classes) if balanced else torch.full((len(y),), 1 / len(y)).double()
    scale = x.numpy().std(0) if standardize else 1.0
    penalty = ((weight * scale) ** 2).sum() / (2 * C * len(x))
    return float((torch.nn.functional.cross_entropy(z, y, reduction="none") * share).sum()) + penalty


@pytest.mark.parametrize("n_classes", [2, 3])
def test_least_squares_is_sklearns_ridge(n_classes):
    x, y = sample(200, 15, n_classes)
    weight, bias = sklearn_coefficients(RidgeClassifier(alpha=3.0), x.numpy(), y.numpy(), True)
    fit = LeastSquares(alpha=3.0).fit(x[None], Problems.single(y, n_classes))
    np.testing.assert_allclose(fit.weight[0, 0].numpy(), weight, atol=1e-8)
    np.testing.assert_allclose((fit.bias[0, 0] - fit.weight[0, 0] @ fit.center[0]).numpy(), bias, atol=1e-7)


def test_shrinkage_is_sklearns():
    x, _ = sample(150, 20, 2, offset=0.0)
    x = x - x.mean(0)
    covariance = x.T @ x / len(x)
    found = float(ledoit_wolf(x[None], covariance[None]))
    assert found == pytest.approx(sklearn_ledoit_wolf(x.numpy(), assume_centered=True)[1], rel=1e-10)


def test_mass_mean_and_lda_reach_their_analytic_accuracies():
    """Two Gaussian classes N(±δ/2, Σ): Φ(|δ|²/(2√(δᵀΣδ))) and Φ(√(δᵀΣ⁻¹δ)/2)."""
    g = torch.Generator().manual_seed(1)
    d, n = 10, 60_000
    root = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5 + 0.5 * torch.eye(d)
    sigma, delta = root @ root.T, torch.randn(d, generator=g, dtype=torch.float64) * 0.6
    y = torch.arange(n) % 2
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ root.T + (y[:, None] - 0.5) * delta
    half = n // 2
    expected = {
        MassMean(): norm.cdf(float(delta @ delta / (2 * (delta @ sigma @ delta).sqrt()))),
        Lda(): norm.cdf(float((delta @ torch.linalg.solve(sigma, delta)).sqrt() / 2)),
    }
    for method, accuracy in expected.items():
        fit = method.fit(x[None, :half], Problems.single(y[:half], 2))
        found = (fit.probabilities(x[None, half:])[0, :, 0].argmax(-1) == y[half:]).double().mean()
        assert float(found) == pytest.approx(accuracy, abs=4 * math.sqrt(accuracy * (1 - accuracy) / half))
    assert expected[Lda()] > expected[MassMean()] + 0.02  # the covariance matters here


def test_an_mlp_finds_what_no_line_does():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=g)
    y = (x[:, 0] * x[:, 1] > 0).long()
    rows = torch.arange(2000) < 1000
    for method, low, high in ((Mlp(hidden=32, steps=300), 0.85, 1.0), (Logistic(C=1.0), 0.4, 0.6)):
        probe = fit_linear(x[rows], y[rows], method=method)
        accuracy = (probe.predict(x[~rows]) == y[~rows].numpy()).mean()
        assert low <= accuracy <= high


@pytest.mark.parametrize("method", ["logistic", "least_squares", "mass_mean", "lda", "mlp"])
def test_saved_probes_are_the_same_when_read(method, tmp_path):
    x, y = sample(120, 8, 3)
    names = np.array(["calm", "happy", "sad"])[y.numpy()]
    chosen = Mlp(steps=2) if method == "mlp" else method
    probes = fit_linear({"a": x, "b": x[:, :5]}, names, method=chosen)
    save_probes(probes, tmp_path / "p.safetensors")
    read = load_probes(tmp_path / "p.safetensors")
    assert list(read) == ["a", "b"]
    for site, rows in (("a", x), ("b", x[:, :5])):
        assert read[site].classes == ("calm", "happy", "sad")
        assert torch.equal(read[site].probabilities(rows), probes[site].probabilities(rows))
        assert repr(read[site]) == repr(probes[site])
        assert method in repr(read[site])


def test_a_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_probes(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"xx")
    with pytest.raises(CheckpointError, match="damaged"):
        load_probes(tmp_path / "broken.safetensors")
    x, y = sample(60, 4, 2)
    save_probes({"m": fit_linear(x, y, method=Mlp(steps=1))}, tmp_path / "mlp.safetensors")
    with pytest.raises(InputError, match="does not hold one LinearProbe"):
        LinearProbe.load(tmp_path / "mlp.safetensors")


def test_a_direction_moves_towards_its_class():
    x, y = sample(300, 10, 3)
    probe = fit_linear(x, y)
    for label in probe.classes:
        moved = probe.probabilities(x + 3 * probe.direction(label) / probe.direction(label).norm())
        assert (moved[:, label] > probe.probabilities(x)[:, label]).float().mean() > 0.9
    two = fit_linear(x, y > 0)
    torch.testing.assert_close(two.direction(), -two.direction(False))
    with pytest.raises(InputError, match="Towards which class"):
        probe.direction()


def test_the_penalty_is_chosen_on_folds_that_do_not_split_groups():
    """Rows of a group are copies with a group's own random label: only grouped folds see that nothing is learned."""
    g = torch.Generator().manual_seed(0)
    groups = np.repeat(np.arange(60), 10)
    x = torch.randn(60, 40, generator=g)[groups] + 0.01 * torch.randn(600, 40, generator=g)
    y = torch.randint(0, 2, (60,), generator=g)[groups]
    assert fit_linear(x, y, groups=groups).settings["C"] == min(Logistic().Cs)
    assert fit_linear(x, y).settings["C"] == max(Logistic().Cs)


def test_bad_input_is_refused_with_a_reason():
    x, y = sample(50, 6, 2)
    with pytest.raises(InputError, match="at least two classes"):
        fit_linear(x, torch.zeros(50))
    with pytest.raises(InputError, match="49 labels for 50 rows"):
        fit_linear(x, y[:49])
    with pytest.raises(NumericsError, match="3 of 50 rows"):
        fit_linear(torch.cat([x[:47], torch.full((3, 6), math.nan)]), y)
    with pytest.raises(InputError, match="missing"):
        fit_linear(x, np.array([None, *y[1:].tolist()], dtype=object))
    with pytest.raises(InputError, match="Did you mean 'logistic'"):
        fit_linear(x, y, method="logistc")
    with pytest.raises(InputError, match="6 wide"):
        fit_linear(x, y).predict(x[:, :5])


def test_few_rows_are_said_and_fitted():
    x, y = sample(20, 60, 2)
    with pytest.warns(ProbeWarning, match="20 rows to train on for 60"):
        probe = fit_linear(x, y, method=Logistic(C=0.1))
    assert probe.weight.isfinite().all()


@pytest.mark.parametrize("method", ["logistic", "least_squares", "mass_mean", "lda", "mlp"])
def test_constant_activations_leave_the_class_frequencies(method):
    y = torch.arange(100) % 4 == 0
    chosen = Mlp(steps=400, batch_size=100) if method == "mlp" else method
    with pytest.warns(ProbeWarning, match="constant"):
        probe = fit_linear({"s": torch.full((100, 5), 3.7)}, y, method=chosen)["s"]
    p = probe.probabilities(torch.full((1, 5), 3.7))[0]
    if method == "mass_mean":  # knows means only
        assert float(p[1]) == pytest.approx(0.5, abs=1e-5)
    else:
        assert float(p[1]) == pytest.approx(0.25, abs=0.02)
