"""Intervals have their closed forms, cover as they say, and AUROC is scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from steerkit import stats
from steerkit.errors import InputError


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def test_the_interval_of_a_mean_is_the_jackknifes_and_scipys():
    values = np.random.default_rng(1).normal(size=5)
    found = stats.mean_interval(values, level=0.9)
    jackknifed = stats.jackknife(np.stack([values, np.ones(5)], 1), mean, level=0.9)
    assert [found.estimate, found.low, found.high, found.standard_error] == pytest.approx(
        [jackknifed.estimate, jackknifed.low, jackknifed.high, jackknifed.standard_error]
    )
    assert (found.low, found.high) == pytest.approx(
        scipy_stats.t.interval(0.9, 4, loc=values.mean(), scale=scipy_stats.sem(values))
    )
    with pytest.raises(InputError, match="at least two"):
        stats.mean_interval([1.0])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    found = stats.jackknife(np.stack([values, np.ones(30)], 1), mean)
    assert found.estimate == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 30**0.5)
    from scipy import stats as scipy_stats

    low, high = scipy_stats.t.interval(0.95, 29, values.mean(), values.std(ddof=1) / 30**0.5)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(1).normal(size=50)
    found = stats.bootstrap(np.stack([values, np.ones(50)], 1), mean, resamples=20_000)
    assert found.standard_error == pytest.approx(values.std(ddof=0) / 50**0.5, rel=0.03)
    assert found.low < found.estimate < found.high


def test_the_same_seed_gives_the_same_interval():
    sums = np.random.default_rng(2).random((20, 2)) + 1
    assert stats.bootstrap(sums, mean, seed=3) == stats.bootstrap(sums, mean, seed=3)
    assert stats.bootstrap(sums, mean, seed=3) != stats.bootstrap(sums, mean, seed=4)


@pytest.mark.parametrize("interval", [stats.jackknife, lambda s, f: stats.bootstrap(s, f, resamples=400)])
def test_intervals_over_groups_cover_the_truth(interval):
    """Tokens of a group share most of their variance: intervals over tokens would cover far less."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        groups = np.repeat(np.arange(40), generator.integers(5, 15, 40))
        values = generator.normal(size=40)[groups] + 0.5 * generator.normal(size=len(groups))
        found = interval(stats.group_sums(np.stack([values, np.ones_like(values)], 1), groups), mean)
        covered += found.low < 0 < found.high
    assert 0.915 < covered / 400 < 0.98


def test_sums_over_groups_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    values, groups = generator.random((50, 3)), generator.choice(["a", "c", "b"], 50)
    expected = np.stack([values[groups == name].sum(0) for name in "abc"])
    np.testing.assert_allclose(stats.group_sums(values, groups), expected)


def test_one_group_is_refused():
    with pytest.raises(InputError, match="at least two documents"):
        stats.jackknife(np.ones((1, 2)), mean)
    with pytest.raises(InputError, match="at least two documents"):
        stats.bootstrap(np.ones((1, 2)), mean)


def test_a_paired_test_sees_what_an_unpaired_one_would_not():
    generator = np.random.default_rng(0)
    base = generator.normal(scale=5, size=60)
    a = np.stack([base + 0.3 + 0.3 * generator.normal(size=60), np.ones(60)], 1)
    b = np.stack([base, np.ones(60)], 1)
    found = stats.paired_test(a, b, mean)
    assert found.p_value < 0.01
    assert found.difference.low > 0
    assert found.difference.estimate == pytest.approx((a - b)[:, 0].mean())


def test_a_paired_test_rejects_as_often_as_it_says():
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(300):
        a, b = (np.stack([generator.normal(size=40), np.ones(40)], 1) for _ in range(2))
        rejected += stats.paired_test(a, b, mean, resamples=300).p_value < 0.05
    assert rejected / 300 < 0.09


def test_a_paired_test_needs_the_same_groups():
    with pytest.raises(InputError, match="same groups"):
        stats.paired_test(np.ones((3, 2)), np.ones((4, 2)), mean)


def test_p_values_of_permutations_are_uniform_under_the_null():
    generator = np.random.default_rng(0)
    p_values = []
    for seed in range(200):
        values, labels = generator.normal(size=20), np.arange(20) < 8

        def difference(labels, values=values):
            return values[labels].mean() - values[~labels].mean()

        found, p_value, null = stats.permutation_test(difference, labels, permutations=99, seed=seed)
        assert found == difference(labels)
        assert len(null) == 99
        p_values.append(p_value)
    assert min(p_values) >= 1 / 100
    assert 0.02 <= np.mean(np.array(p_values) <= 0.1) <= 0.18


def test_permuted_groups_stay_whole():
    groups = np.repeat(np.arange(10), 4)
    labels = groups % 2 == 0
    seen = []
    stats.permutation_test(lambda y: float(seen.append(y) or 0), labels, groups=groups, permutations=20)
    assert all(len({bool(v) for v in y[groups == g]}) == 1 for y in seen for g in range(10))
    with pytest.raises(InputError, match="one label"):
        stats.permutation_test(lambda y: 0.0, np.arange(40) % 3 == 0, groups=groups)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
def test_auroc_is_scikit_learns(items):
    scores, labels = np.array([s for s, _ in items], float), np.array([y for _, y in items])
    if labels.all() or not labels.any():
        assert np.isnan(stats.auroc(scores, labels))
    else:
        assert stats.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("pure", [True, False])
def test_the_jackknife_of_an_auroc_leaves_groups_out(pure):
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 12, 150)
    labels = groups % 3 == 0 if pure else generator.random(150) < 0.3
    scores = np.round(generator.normal(size=150) + labels, 1)
    left_out = np.array([roc_auc_score(labels[groups != g], scores[groups != g]) for g in range(12)])
    expected = stats.jackknife_of(roc_auc_score(labels, scores), left_out).clipped(0, 1)
    found = stats.auroc_interval(scores, labels, groups)
    assert found.to_dict() == pytest.approx(expected.to_dict(), abs=1e-12)


def test_intervals_of_an_auroc_cover_the_truth():
    """Scores of a story move together, as do their labels; the truth comes from many stories."""
    generator = np.random.default_rng(4)

    def stories(n):
        labels = np.arange(n) % 2 == 0
        level = generator.normal(size=n) + 0.8 * labels
        groups = np.repeat(np.arange(n), 8)
        return level[groups] + generator.normal(size=8 * n), labels[groups], groups

    truth = stats.auroc(*stories(40_000)[:2])
    covered = 0
    for _ in range(600):
        found = stats.auroc_interval(*stories(40))
        covered += found.low < truth < found.high
    assert 0.92 < covered / 600 < 0.98


def test_an_area_of_one_is_not_certain():
    """20 positive groups above all of 100 negative ones: 1, as far as 20 groups can show."""
    labels = np.repeat(np.arange(120) < 20, 5)
    groups = np.repeat(np.arange(120), 5)
    for sign in (1.0, -1.0):
        found = stats.auroc_interval(sign * labels, labels, groups)
        assert found.estimate == (sign + 1) / 2
        assert abs(found.low - found.high) == pytest.approx(0.0577, abs=0.008)
        assert found.estimate in (found.low, found.high)
    tied = stats.auroc_interval(np.zeros(600), labels, groups)
    assert tied.low < 0.4 < tied.estimate < 0.6 < tied.high
