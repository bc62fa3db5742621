"""Grouped folds, held-out scores, paired comparisons, control tasks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from probes.controls import control_codes
from probes.crossval import cross_validate
from probes.linear import fit_linear
from probes.methods import Logistic
from probes.scores import HeldOut, difference, difference_on_other_labels
from probes.splits import grouped_folds, shuffled_within
from steerkit.errors import InputError


def planted(n_groups=120, per_group=5, d=20, effect=1.5, seed=0):
    """Rows of groups that share a label and some noise; the label moves the first coordinate."""
    g = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    codes = g.integers(0, 3, n_groups)[groups]
    x = g.normal(size=(len(groups), d)) + 0.5 * g.normal(size=(n_groups, d))[groups]
    x[:, :3] += effect * np.eye(3)[codes]
    return torch.from_numpy(x).float(), codes, groups


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 5))
def test_folds_never_split_a_group_and_share_out_the_classes(seed, n_folds, n_classes):
    g = np.random.default_rng(seed)
    n_groups = n_classes * n_folds * 3
    of_group = np.arange(n_groups) % n_classes
    groups = np.repeat(g.permutation(n_groups), g.integers(1, 5, n_groups))
    codes = of_group[groups]
    folds = grouped_folds(codes, groups, n_folds, seed=seed)
    for group in np.unique(groups):
        assert len(np.unique(folds[groups == group])) == 1
    counts = np.array(
        [
            [len(np.unique(groups[(folds == f) & (codes == k)])) for k in range(n_classes)]
            for f in range(n_folds)
        ]
    )
    assert counts.max(0).min() - counts.min(0).max() <= 1
    assert np.array_equal(folds, grouped_folds(codes, groups, n_folds, seed=seed))


def test_a_class_missing_from_a_fold_and_too_few_groups_are_refused():
    with pytest.raises(InputError, match="Class 1"):
        grouped_folds(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 4, 4]), 3)
    with pytest.raises(InputError, match="3 folds of 2 groups"):
        grouped_folds(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), 3)


def test_shuffled_labels_keep_groups_and_each_folds_frequencies():
    _, codes, groups = planted()
    folds = grouped_folds(codes, groups, 4)
    shuffled = shuffled_within(codes, folds, groups, seed=1)
    assert not np.array_equal(shuffled, codes)
    for group in np.unique(groups):
        assert len(set(shuffled[groups == group])) == 1
    for fold in range(4):
        assert np.array_equal(np.bincount(shuffled[folds == fold]), np.bincount(codes[folds == fold]))


def test_every_row_is_scored_by_a_probe_that_has_not_seen_its_group():
    """Fold by fold it is what a loop over the folds gives."""
    x, codes, groups = planted()
    found = cross_validate({"s": x}, codes, groups, method=Logistic(C=0.1), n_folds=4)
    for fold in range(4):
        out = found.folds == fold
        probe = fit_linear(x[~out], codes[~out], method=Logistic(C=0.1))
        expected = probe.probabilities(x[out]).numpy()
        np.testing.assert_allclose(found.held_out["s"].probabilities[out], expected, atol=1e-5)


def test_group_memory_is_no_score():
    """Each group has its own place and a random label: a probe can learn the groups by heart, and must score at chance."""
    g = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), 8)
    x = torch.from_numpy(3 * g.normal(size=(80, 100))[groups] + 0.1 * g.normal(size=(640, 100))).float()
    codes = g.permutation(np.arange(80) % 2)[groups]
    found = cross_validate({"s": x}, codes, groups, method=Logistic(C=1.0))
    assert found.held_out["s"].scores().accuracy.high > 0.5 > found.held_out["s"].scores().accuracy.low - 0.05
    assert (found.probes["s"].predict(x) == codes).mean() == 1.0


def test_scores_are_sklearns():
    x, codes, groups = planted()
    held = cross_validate({"s": x}, codes, groups).held_out["s"]
    scores = held.scores()
    p = held.probabilities.astype(float)
    p /= p.sum(1, keepdims=True)
    assert scores.accuracy.estimate == pytest.approx((p.argmax(1) == codes).mean())
    assert scores.balanced_accuracy.estimate == pytest.approx(balanced_accuracy_score(codes, p.argmax(1)))
    assert scores.auroc.estimate == pytest.approx(roc_auc_score(codes, p, multi_class="ovr"))
    assert scores.cross_entropy.estimate == pytest.approx(log_loss(codes, p), rel=1e-5)
    assert scores.bits.estimate == pytest.approx(log_loss(codes, p) / math.log(2), rel=1e-5)


def test_calibration_error_is_known_for_planted_probabilities():
    """Predicted 0.9, true in 60 %; predicted 0.6, true in 60 %: half of the rows are off by 0.3."""
    n = 1000
    p1 = np.repeat([0.9, 0.6], n // 2)
    codes = np.tile(np.r_[np.ones(6), np.zeros(4)], n // 10).astype(int)
    held = HeldOut(np.stack([1 - p1, p1], axis=1), codes, np.arange(n))
    assert held.scores().ece.estimate == pytest.approx(0.15)


def test_intervals_are_of_groups_not_rows():
    """Copies of rows add nothing."""
    x, codes, groups = planted(per_group=1)
    once = cross_validate({"s": x}, codes, groups, shuffled=False).held_out["s"]
    copied = HeldOut(*(np.repeat(v, 6, axis=0) for v in (once.probabilities, codes, groups)))
    a, b = once.scores(), copied.scores()
    for name in ("accuracy", "cross_entropy", "auroc", "balanced_accuracy"):
        assert getattr(b, name).standard_error == pytest.approx(getattr(a, name).standard_error, rel=1e-6)


def test_paired_differences_are_sharper_than_their_parts_and_need_the_same_rows():
    x, codes, groups = planted()
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    held = cross_validate({"a": x, "b": noisy}, codes, groups, shuffled=False).held_out
    found = difference(held["a"], held["b"]).difference
    parts = [held[s].scores().accuracy.standard_error for s in "ab"]
    assert found.estimate == pytest.approx(
        held["a"].scores().accuracy.estimate - held["b"].scores().accuracy.estimate
    )
    assert found.standard_error < math.hypot(*parts)
    assert difference(held["a"], held["a"]).p_value == 1.0
    with pytest.raises(InputError, match="same rows"):
        difference(held["a"], held["b"].of_rows(np.arange(10)))


def test_null_and_signal_are_told_apart():
    x, codes, groups = planted(effect=2.0)
    found = cross_validate({"s": x}, codes, groups)
    chance = np.bincount(codes).max() / len(codes)
    assert found.held_out["s"].scores().accuracy.low > chance + 0.2
    assert found.shuffled["s"].scores().accuracy.low < chance


def test_control_labels_belong_to_types_and_have_the_tasks_frequencies():
    g = np.random.default_rng(0)
    types = g.integers(0, 3000, 20_000)
    codes = g.choice(3, size=20_000, p=[0.6, 0.3, 0.1])
    control = control_codes(types, codes, seed=3)
    for kind in range(50):
        assert len(set(control[types == kind])) == 1
    first = np.unique(types, return_index=True)[1]
    np.testing.assert_allclose(np.bincount(control[first]) / len(first), [0.6, 0.3, 0.1], atol=0.04)


def test_selectivity_of_word_identity_and_of_what_is_not_a_word():
    """One-hot words know the control task on types that they have seen; features that are no words reach the commonest label."""
    g = np.random.default_rng(0)
    n, n_types = 3000, 30
    types, groups = g.integers(0, n_types, n), np.arange(n)
    codes = g.choice(2, size=n, p=[0.7, 0.3])
    control = control_codes(types, codes, seed=1)
    share = max(control.mean(), 1 - control.mean())
    words = torch.eye(n_types)[types]
    blind = torch.from_numpy(g.normal(size=(n, 10))).float()
    found = cross_validate(
        {"words": words, "blind": blind}, codes, groups, control=control, method=Logistic(C=1.0)
    )
    assert found.control["words"].scores().accuracy.estimate == 1.0
    assert found.control["blind"].scores().accuracy.estimate == pytest.approx(share, abs=0.02)
    selectivity = difference_on_other_labels(found.held_out["words"], found.control["words"])
    assert selectivity.difference.high < -0.2
