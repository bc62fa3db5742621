"""The online code: its exact value without features, what it says of signal and of noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.mdl import online_code
from probes.methods import Logistic
from steerkit.errors import InputError

FAST = Logistic(Cs=(1e-3, 1e-2, 1e-1), exact=False)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=60), st.integers(0, 5))
def test_without_features_row_by_row_it_is_laplaces_code(labels, seed):
    """log₂((n + 1) C(n, k)), whatever the order."""
    if len(set(labels)) < 2:
        return
    n, k = len(labels), sum(labels)
    x = {"s": torch.zeros(n, 1, dtype=torch.float64)}
    x["s"][0] = 1.0
    every_row = [(i + 1) / n for i in range(n)]
    found = online_code(x, labels, method="prior", fractions=every_row, seed=seed)["s"]
    assert found.bits == pytest.approx(math.log2((n + 1) * math.comb(n, k)), abs=1e-9)
    assert found.uniform_bits == n
    assert found.ends == tuple(range(1, n + 1))


def test_the_first_block_is_uniform_and_blocks_add_up():
    g = np.random.default_rng(0)
    codes = np.tile(np.arange(4), 100)
    x = {"s": torch.from_numpy(g.normal(size=(400, 8))).float()}
    found = online_code(x, codes, method=Logistic(C=0.1), fractions=(0.1, 0.5, 1.0))["s"]
    assert found.ends == (40, 200, 400)
    assert found.block_bits[0] == 40 * 2
    assert found.bits == pytest.approx(sum(found.block_bits))
    assert found.compression == pytest.approx(800 / found.bits)


def test_signal_is_compressed_and_random_labels_are_not():
    g = np.random.default_rng(1)
    n = 3000
    codes = g.integers(0, 2, n)
    signal = g.normal(size=(n, 10))
    signal[:, 0] += 4 * codes
    rows = {"signal": torch.from_numpy(signal), "noise": torch.from_numpy(g.normal(size=(n, 10)))}
    found = online_code(rows, codes, method=FAST)
    assert found["signal"].compression > 4
    assert found["noise"].compression < 1.01


def test_a_code_needs_fewer_bits_the_sooner_the_labels_can_be_read():
    """Both are separable in the end; the one that hides the label among 200 coordinates pays for the rows that it takes."""
    g = np.random.default_rng(2)
    n, codes = 1000, np.random.default_rng(3).integers(0, 2, 1000)
    plain = g.normal(size=(n, 2)) * 0.3
    plain[:, 0] += codes
    hidden = np.concatenate([plain, g.normal(size=(n, 200))], axis=1)
    found = online_code(
        {"plain": torch.from_numpy(plain), "hidden": torch.from_numpy(hidden)}, codes, method=FAST
    )
    assert found["plain"].bits < 0.8 * found["hidden"].bits


def test_blocks_never_split_a_group():
    g = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 10)
    codes = g.integers(0, 2, 300)
    found = online_code({"s": torch.from_numpy(g.normal(size=(300, 3)))}, codes, groups, method=FAST)["s"]
    assert all(end % 10 == 0 for end in found.ends)
    assert found.ends[-1] == 300


def test_fractions_that_are_none_are_refused():
    x, codes = {"s": torch.randn(20, 2)}, np.arange(20) % 2
    for fractions in ((0.5,), (0.5, 0.2, 1.0), (0.0, 1.0)):
        with pytest.raises(InputError, match="rise"):
            online_code(x, codes, fractions=fractions)
    with pytest.raises(InputError, match="One block"):
        online_code(x, codes, np.zeros(20), fractions=(0.5, 1.0))
