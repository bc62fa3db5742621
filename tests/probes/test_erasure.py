"""LEACE: nothing linear is left, no smaller change does it, and it is the published one."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probes.causal import causal_check
from probes.data import LabelledData, read_rows
from probes.erasure import Eraser, LeaceFitter, fit_eraser
from probes.methods import Logistic
from steerkit import storyworld
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.models import HookedModel


@pytest.fixture(scope="module")
def data():
    """(x (n, d) fp64 correlated and far from zero, codes of three classes)."""
    g = torch.Generator().manual_seed(0)
    n, d = 1500, 24
    codes = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(
        d, d, generator=g, dtype=torch.float64
    )
    x = x + 7 + 3 * torch.randn(3, d, generator=g, dtype=torch.float64)[codes]
    return x, codes


def cross_covariance(x, codes):
    z = torch.nn.functional.one_hot(codes).double()
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def test_no_covariance_with_the_labels_is_left(data):
    x, codes = data
    eraser = fit_eraser(x, codes)
    assert cross_covariance(x, codes).abs().max() > 0.1
    assert cross_covariance(eraser(x), codes).abs().max() < 1e-10
    assert eraser.rank == 2
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0))


def test_no_linear_probe_beats_the_class_frequencies(data):
    """The weights of an unpenalised logistic regression on what is left are zero, by its own gradient at zero."""
    x, codes = data
    left = fit_eraser(x, codes)(x)
    probe = LogisticRegression(C=1e6, max_iter=1000, tol=1e-10).fit(
        ((left - left.mean(0)) / left.std(0)).numpy(), codes
    )
    assert np.abs(probe.coef_).max() < 1e-4
    assert np.abs(LogisticRegression(max_iter=1000).fit(x.numpy(), codes).coef_).max() > 0.1


def test_erasing_twice_is_erasing_once(data):
    x, codes = data
    eraser = fit_eraser(x, codes)
    torch.testing.assert_close(eraser(eraser(x)), eraser(x))


def test_no_affine_map_that_erases_moves_the_rows_less(data):
    """Any eraser is LEACE plus a map that leaves the covariance with the labels at zero: all such additions cost, in any norm."""
    x, codes = data
    eraser = fit_eraser(x, codes)
    centred = x - x.mean(0)
    moved = eraser(x) - x
    constraint = cross_covariance(x, codes)
    # Maps N with N Σxz = 0 keep Cov(r(x) + N x, z) at zero.
    basis = torch.linalg.svd(constraint)[0][:, 2:]
    whiten = torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(x)))
    g = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1.0):
        other = scale * torch.randn(24, 22, generator=g, dtype=torch.float64) @ basis.T
        changed = moved + centred @ other.T
        assert cross_covariance(x + changed, codes).abs().max() < 1e-9
        for norm in (torch.eye(24, dtype=torch.float64), whiten):
            assert (changed @ norm.T).square().sum() > (moved @ norm.T).square().sum()
    orthogonal = torch.linalg.svd(constraint, full_matrices=False)[0][:, :2]
    projected = -(centred @ orthogonal) @ orthogonal.T
    assert cross_covariance(x + projected, codes).abs().max() < 1e-9
    assert moved.square().sum() < projected.square().sum()


def test_streaming_is_fitting_at_once_in_any_batches(data):
    x, codes = data
    whole = LeaceFitter(24, 3)
    whole.update(x, codes)
    parts = LeaceFitter(24, 3)
    for start in (0, 1, 8, 500, 501):
        end = {0: 1, 1: 8, 8: 500, 500: 501, 501: 1500}[start]
        parts.update(x[start:end], codes[start:end])
    parts.update(x[:0], codes[:0])
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.cross_covariance, whole.cross_covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.eraser()(x), whole.eraser()(x), rtol=1e-9, atol=1e-9)


def test_directions_without_variance_and_few_rows(data):
    x, codes = data
    flat = torch.cat([x, x[:, :3] * 2, torch.ones(len(x), 2, dtype=torch.float64)], dim=1)
    erased = fit_eraser(flat, codes)(flat)
    assert cross_covariance(erased, codes).abs().max() < 1e-9
    few = fit_eraser(x[:10], codes[:10])(x[:10])
    assert cross_covariance(few, codes[:10]).abs().max() < 1e-9


def test_it_is_the_published_eraser(data):
    package = pytest.importorskip("concept_erasure", reason="needs pip install concept-erasure")
    x, codes = data
    theirs = package.LeaceFitter.fit(
        x,
        torch.nn.functional.one_hot(codes).double(),
        shrinkage=False,
        constrain_cov_trace=False,
        svd_tol=1e-10,
    ).eraser
    torch.testing.assert_close(fit_eraser(x, codes)(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_random_directions_take_away_as_much_in_the_whitened_norm(data):
    x, codes = data
    fitter = LeaceFitter(24, 3)
    fitter.update(x, codes)
    whiten = torch.linalg.inv(torch.linalg.cholesky(fitter.covariance))
    costs = [
        ((e(x) - x) @ whiten.T).square().sum(1).mean() for e in (fitter.eraser(), fitter.random(2, seed=4))
    ]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-6, atol=0)
    assert float(costs[0]) == pytest.approx(2.0)


def test_a_saved_eraser_is_the_same_when_read(data, tmp_path):
    x, codes = data
    eraser = fit_eraser(x, codes, "blocks.0.hook_resid_post")
    eraser.save(tmp_path / "e.safetensors")
    read = Eraser.load(tmp_path / "e.safetensors")
    assert torch.equal(read(x), eraser(x))
    assert read.site == eraser.site
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged"):
        Eraser.load(tmp_path / "bad.safetensors")


def test_bad_input_is_refused(data):
    x, codes = data
    with pytest.raises(InputError, match="at least two classes"):
        fit_eraser(x, torch.zeros_like(codes))
    with pytest.raises(InputError, match="do not fit"):
        LeaceFitter(24, 3).update(x, codes[:5])
    with pytest.raises(NumericsError, match="NaN"):
        fit_eraser(x * torch.nan, codes)
    with pytest.raises(InputError, match="24 wide"):
        fit_eraser(x, codes)(x[:, :3])


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


SITE, LATER = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"


def tenses(n):
    stories = storyworld.sample(n, seed=11)
    return LabelledData.of([s.text for s in stories], [s.attributes["tense"] for s in stories])


def codes_of(rows):
    return torch.from_numpy(np.unique(rows.labels, return_inverse=True)[1])


def test_inside_the_model_the_concept_is_gone_and_afterwards_all_is_as_before(model):
    labelled = tenses(30)
    rows = read_rows(model, labelled, [SITE], per_text=1000)
    eraser = fit_eraser(rows.acts[SITE], codes_of(rows), SITE)
    erased = read_rows(model, labelled, [SITE], per_text=1000, erased=eraser)
    before = cross_covariance(rows.acts[SITE].double(), codes_of(rows)).abs().max()
    assert cross_covariance(erased.acts[SITE].double(), codes_of(rows)).abs().max() < 1e-5 * before
    untouched = read_rows(model, labelled, [SITE], per_text=1000)
    assert torch.equal(untouched.acts[SITE], rows.acts[SITE])


def test_applied_to_a_model_it_acts_at_every_position_and_leaves_nothing(model):
    g = torch.Generator().manual_seed(0)
    eraser = fit_eraser(torch.randn(500, 128, generator=g), torch.arange(500) % 2, SITE)
    ids = torch.tensor([model.tokenizer(tenses(10).texts[0])["input_ids"]])
    before, seen = model.logits(ids), model.run(ids, sites=[SITE])[SITE]
    with eraser.applied_to(model):
        torch.testing.assert_close(model.run(ids, sites=[SITE])[SITE], eraser(seen))
        assert not torch.equal(model.logits(ids), before)
    assert torch.equal(model.logits(ids), before)


def test_the_model_needs_what_is_erased_more_than_random_directions(model):
    """Every verb needs the tense."""
    labelled = tenses(80)
    rows = read_rows(model, labelled, [SITE], per_text=4)
    found = causal_check(
        model, labelled, rows, SITE, sites=[LATER], method=Logistic(C=0.01), per_text=4, n_folds=3
    )
    assert found.eraser.rank == 1
    assert found.kl.low > found.random_kl.high
    assert found.delta_ce.low > 0
    assert set(found.to_dict()["probes"]) == {SITE, LATER}
