"""Sparse products equal dense ones, on every path, and top-k torch's; Triton's kernels in its interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import kernels
from sae.kernels import CSRPattern, Pattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install triton)")
WAYS = ["csr", pytest.param("triton", marks=needs_triton)]
WAYS_AND_DTYPES = [("csr", torch.float32), ("csr", torch.float64)]
WAYS_AND_DTYPES += [pytest.param("triton", dtype, marks=needs_triton) for dtype in TOLERANCES]


def way(name):
    """(class of the pattern, device)."""
    if name == "csr":
        return CSRPattern, "cpu"
    from sae.kernels.triton_kernels import TritonPattern

    return TritonPattern, DEVICE


def random_case(where, d, dtype, device, seed=0):
    """Entries of the mask `where`, their values, a matrix for the columns and one for the rows."""
    generator = torch.Generator().manual_seed(seed)
    n, m = where.shape
    numbers = [torch.randn(shape, generator=generator) for shape in (int(where.sum()), (m, d), (n, d))]
    rows, columns = where.nonzero().T.to(device)
    return rows, columns, *(x.to(device, dtype) for x in numbers)


def assert_products_equal(kind, device, where, d, dtype):
    rows, columns, values, right, left = random_case(where, d, dtype, device)
    pattern = kind(rows, columns, tuple(where.shape))
    # The reference is computed in float64: what it is itself off by must not count.
    reference = Pattern(rows, columns, tuple(where.shape))
    exact_values, exact_right, exact_left = values.double(), right.double(), left.double()
    active = values > 0
    found_and_expected = {
        "times": (pattern.times(values, right), reference.times(exact_values, exact_right)),
        "sample": (pattern.sample(left, right), reference.sample(exact_left, exact_right)),
        "transposed": (
            pattern.transposed_times(values, left),
            reference.transposed_times(exact_values, exact_left),
        ),
        "sums": (pattern.column_sums(values), reference.column_sums(exact_values)),
        "counts": (pattern.counts(), reference.counts()),
        "active": (pattern.counts(active), reference.counts(active)),
    }
    for name, (found, expected) in found_and_expected.items():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=0, atol=TOLERANCES[dtype] * scale, msg=name
        )


def mask(kind):
    generator = torch.Generator().manual_seed(3)
    where = torch.rand(11, 14, generator=generator) < 0.2
    if kind == "no entries":
        where[:] = False
    elif kind == "one column":
        where[:] = False
        where[:, 7] = True
    elif kind == "one row":
        where[:] = False
        where[4] = True
    elif kind == "all entries":
        where[:] = True
    elif kind == "empty rows and columns":
        where[[0, 5, 10]] = False
        where[:, [0, 6, 13]] = False
    return where


@pytest.mark.parametrize(("name", "dtype"), WAYS_AND_DTYPES)
@pytest.mark.parametrize(
    "kind", ["no entries", "one column", "one row", "all entries", "empty rows and columns"]
)
def test_products_equal_the_dense_ones(name, dtype, kind):
    assert_products_equal(*way(name), mask(kind), 19, dtype)


@pytest.mark.parametrize("name", WAYS)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.sampled_from([1, 2, 7, 16, 33]),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_products_of_any_pattern_equal_the_dense_ones(name, n, m, d, density, seed):
    where = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < density
    assert_products_equal(*way(name), where, d, torch.float32)


@pytest.mark.parametrize("name", WAYS)
def test_operands_may_be_views_with_gaps(name):
    kind, device = way(name)
    where = torch.ones(5, 4, dtype=torch.bool)
    rows, columns, values, right, left = random_case(where, 6, torch.float32, device)
    with_gaps = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in (rows, columns, values, right, left)]
    assert not any(x.is_contiguous() for x in with_gaps)
    found, expected = kind(*with_gaps[:2], (5, 4)), Pattern(rows, columns, (5, 4))
    values_, right_, left_ = with_gaps[2:]
    torch.testing.assert_close(found.times(values_, right_), expected.times(values, right))
    torch.testing.assert_close(found.sample(left_, right_), expected.sample(left, right))
    torch.testing.assert_close(
        found.transposed_times(values_, left_), expected.transposed_times(values, left)
    )
    torch.testing.assert_close(found.column_sums(values_), expected.column_sums(values))


@needs_triton
def test_triton_sums_wide_rows_and_long_columns():
    # More than one strip of coordinates (256 of float32) and more than one step along a column (8 entries; 128 in sums).
    where = torch.zeros(150, 3, dtype=torch.bool)
    where[:, 1] = True
    where[::9, 2] = True
    assert_products_equal(*way("triton"), where, 300, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (40, 4), (33, 33), (64, 2), (1001, 5), (2048, 5), (4096, 64)])
def test_top_k_is_torchs(m, k, dtype):
    x = torch.randn(2, 3, m, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
    x[0, 1] = x[0, 1].sign()  # many equals
    x[0, 2] = -3.0
    x[1, 0, ::2] = -torch.inf
    x[1, 1] = x[1, 1].sort().values  # the largest are neighbours
    x[1, 2, 0] = torch.inf
    x.requires_grad_()
    values, indices = kernels.top_k(x, k)
    assert values.shape == indices.shape == (2, 3, k)
    assert torch.equal(values.sort(descending=True).values, x.topk(k).values)
    assert torch.equal(values, x.gather(-1, indices))
    assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())
    values.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(-1, indices, 1.0))


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([64, 96, 128]), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_top_k_with_few_values_is_torchs(seed, k, m, n_values):
    x = torch.randint(n_values, (4, m), generator=torch.Generator().manual_seed(seed)).float()
    values, indices = kernels.top_k(x, k)
    assert torch.equal(values.sort(descending=True).values, x.topk(k).values)
    assert torch.equal(values, x.gather(-1, indices))
    assert all(len(set(row)) == k for row in indices.tolist())


def architectures():
    """The cases of test_architectures.py."""
    spec = importlib.util.spec_from_file_location(
        "architectures_", Path(__file__).with_name("test_architectures.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARCHITECTURES = architectures()


@needs_triton
@pytest.mark.parametrize("config", ARCHITECTURES.CONFIGS, ids=ARCHITECTURES.NAMES)
def test_gradients_through_triton_equal_the_dense_ones(config, monkeypatch):
    """Dense as in: autograd of the plain objective. With dead latents, a third of the way in."""
    kind, device = way("triton")
    monkeypatch.setattr(kernels, "CSRPattern", kind)
    used = []
    monkeypatch.setattr(
        kind, "times", lambda self, *args, times=kind.times: used.append(1) or times(self, *args)
    )
    model, x, dead = ARCHITECTURES.made(config)
    model, x, dead = model.to(device), x[:24].to(device), dead.to(device)
    given_terms = ARCHITECTURES.terms(model, x, 0.3, dead, progress=0.3, sparse=True)
    loss = model.loss(x, given_terms)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    step = model.gradients(x, given_terms)
    assert used
    torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """The interpreter takes what the compiler may refuse: each kernel is compiled to machine code for an A100 and an H100."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 2 * 3 * 2


def test_triton_is_only_imported_where_it_is_used():
    code = "import sys, torch, sae, sae.kernels; assert 'triton' not in sys.modules"
    code += "; sae.kernels.make_pattern(torch.tensor([0]), torch.tensor([0]), (1, 1), torch.bfloat16)"
    code += "; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
