"""SVFT, SSVD and AntiPaSTO: changes inside the singular basis; rotations that are ones, within their bound."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from edit_cases import edit_of, fill, linear, trained

from steerkit import adapters
from steerkit.adapters.methods.antipasto import AntiPaSTO
from steerkit.adapters.methods.ssvd import SSVD
from steerkit.adapters.methods.svft import SVFT
from steerkit.adapters.rotations import bounded, skew, spectral_bound
from steerkit.adapters.svd import svd
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering import SingularRotate


def angles_of(rotation):
    return torch.linalg.eigvals(rotation.detach().double()).angle().abs()


def assert_orthogonal(rotation, atol=1e-5):
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(len(rotation)), atol=atol, rtol=0)


@pytest.mark.parametrize(
    "method", [SVFT(rank=3), SVFT(pattern="plain"), SVFT(pattern="random"), SSVD(8), AntiPaSTO(8)]
)
def test_the_change_lies_inside_the_singular_basis(method):
    module = linear(20, 28)
    edit = trained(edit_of(method, module), module)
    U, S, Vh = svd(module.weight)
    inside = U.T @ edit.delta(module.weight) @ Vh.T
    torch.testing.assert_close(U @ inside @ Vh, edit.delta(module.weight), atol=1e-5, rtol=0)
    allowed = torch.zeros(20, 20, dtype=torch.bool)
    if isinstance(method, SVFT):
        allowed[edit.rows, edit.columns] = True
    else:
        allowed[:8, :8] = True
    assert inside[~allowed].abs().max() < 1e-6
    assert inside[allowed].abs().max() > 1e-3


@pytest.mark.parametrize("method", [SSVD(12), AntiPaSTO(12)])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_rotations_are_orthogonal_also_after_training(method, size):
    module = linear(20, 28)
    edit = fill(edit_of(method, module), size)
    assert_orthogonal(edit.rotation())
    assert_orthogonal(trained(edit, module, lr=0.1 * size).rotation())


def test_ssvd_is_the_turned_and_stretched_decomposition():
    module = linear(20, 28)
    edit = fill(edit_of(SSVD(8), module), 0.5)
    U, S, Vh = svd(module.weight)
    S, G = S.clone(), torch.eye(20)
    S[:8] += edit.dS.detach()
    A = skew(edit.angles.detach(), 8)
    G[:8, :8] = torch.linalg.inv(torch.eye(8) - A / 2) @ (torch.eye(8) + A / 2)
    torch.testing.assert_close(
        module.weight + edit.delta(module.weight), U @ torch.diag(S) @ G @ Vh, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("r", [2, 8, 64])
@pytest.mark.parametrize("size", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("max_angle", [0.3, math.pi / 4, 2.5])
def test_no_plane_turns_by_more_than_the_bound(r, size, max_angle):
    edit = fill(edit_of(AntiPaSTO(r, max_angle=max_angle), linear(64, 80)), size)
    for edit.alpha in (1.0, -1.0, 0.4):
        assert_orthogonal(edit.rotation())
        assert float(angles_of(edit.rotation()).max()) <= max_angle + 1e-5
    if size == 1e6:  # and the bound is nearly used: m is at most (r/2)^(1/16) too large
        edit.alpha = 1.0
        least = 2 * math.atan(math.tan(max_angle / 2) / (r / 2) ** (1 / 16))
        assert float(angles_of(edit.rotation()).max()) >= least - 1e-4


@pytest.mark.parametrize("r", [2, 3, 8, 64])
def test_the_spectral_bound_is_one_and_tight(r):
    generator = torch.Generator().manual_seed(r)
    for size in (1e-3, 1.0, 1e4):
        A = skew(size * torch.randn(r * (r - 1) // 2, generator=generator), r)
        norm, found = torch.linalg.matrix_norm(A, ord=2), spectral_bound(A).sqrt()
        assert norm * (1 - 1e-5) <= found <= norm * (r / 2) ** (1 / 16) * (1 + 1e-3) + 1e-5 * (size < 1)


def test_the_bound_has_the_gradient_of_finite_differences_and_a_finite_one_at_zero():
    entries = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda e: bounded(skew(e, 4), 1.0), (entries.requires_grad_(),))
    at_zero = torch.zeros(6, requires_grad=True)
    bounded(skew(at_zero, 4), 1.0)[0].sum().backward()
    assert torch.equal(at_zero.grad, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("r", [2, 8, 64])
def test_minus_alpha_is_the_inverse(r):
    edit = fill(edit_of(AntiPaSTO(r), linear(64, 80)), 3.0)
    for alpha in (0.3, 1.0):
        edit.alpha = alpha
        forth = edit.rotation()
        edit.alpha = -alpha
        torch.testing.assert_close(edit.rotation() @ forth, torch.eye(r), atol=1e-5, rtol=0)


def test_antipasto_is_the_steering_edit_of_the_same_planes():
    """For r = 2 the two bounds are one: the steering module's own edit is the independent implementation."""
    module = linear(20, 28)
    edit = fill(edit_of(AntiPaSTO(2, max_angle=1.2), module), 0.8)
    P = torch.tensor([[0.0, float(edit.angles)], [0.0, 0.0]])
    other = SingularRotate("m", edit.Vh.T, edit.S, edit.U, P, edit.dS.detach(), max_angle=1.2)
    x = torch.randn(5, 28, generator=torch.Generator().manual_seed(1))
    for edit.alpha in (-1.0, 0.0, 0.5, 1.0):
        wanted = other.apply(module(x)[None], edit.alpha, None, x[None])[0]
        torch.testing.assert_close(edit(x, module), wanted, atol=1e-5, rtol=1e-5)
        merged = torch.nn.functional.linear(x, module.weight + edit.delta(module.weight), module.bias)
        torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)


def test_scaling_goes_through_the_rotation(model):
    tuned = adapters.get(model, "antipasto", rank=8)
    try:
        ids = torch.arange(5, 12)[None]
        edits = [m for m in tuned.model.modules() if isinstance(m, adapters.tuner.Edit)]
        for edit in edits:
            fill(edit, 0.5)
        with tuned.disabled():
            base = tuned.logits(ids)
        with tuned.scaled(0.0):
            assert torch.equal(tuned.logits(ids), base)
        with tuned.scaled(-0.5):
            there = [edit.rotation() for edit in edits]
            half = {path: change.delta for path, change in tuned.changes().items()}
        with tuned.scaled(0.5):
            for edit, back in zip(edits, there):
                torch.testing.assert_close(edit.rotation() @ back, torch.eye(8), atol=1e-5, rtol=0)
        whole = tuned.changes()
        assert all(edit.alpha == 1.0 for edit in edits)
        for (
            path,
            delta,
        ) in half.items():  # no blend of weights: the inverse rotation is not minus the rotation
            assert (delta + 0.5 * whole[path].delta).norm() > 0.1 * delta.norm()
    finally:
        tuned.remove()


def test_chosen_dimensions_and_mistakes():
    module = linear(20, 28)
    U, S, Vh = svd(module.weight)
    edit = edit_of(AntiPaSTO(3, dimensions={"m": [7, 1, 19]}), module)
    assert torch.equal(edit.S, S[[7, 1, 19]])
    assert torch.equal(edit_of(AntiPaSTO(3, dimensions={"other": [7, 1, 19]}), module).S, S[:3])
    for chosen in ([1, 1, 2], [1, 2], [1, 2, 20]):
        with pytest.raises(InputError, match="3 different ones of 0–19"):
            edit_of(AntiPaSTO(3, dimensions={"m": chosen}), module)
    for method in (SSVD(21), AntiPaSTO(21)):
        with pytest.raises(InputError, match="m has 20 singular dimensions"):
            edit_of(method, module)
    with pytest.raises(InputError, match="below π"):
        AntiPaSTO(max_angle=4.0)


def test_chosen_dimensions_are_there_again_when_loaded(model, tmp_path):
    paths = [slot.path for slot in adapters.choose(model, ("o", "down"))]
    chosen = dict.fromkeys(paths[1:], (2, 11, 5))
    tuned = adapters.get(model, "antipasto", rank=3, dimensions=chosen)
    try:
        tuned.save(tmp_path / "a")
    finally:
        tuned.remove()
    loaded = HookedModel.from_pretrained(tmp_path / "a")
    for path in paths:
        module = model.model.get_submodule(path)
        (edit,) = (e for name, e in loaded.model.named_modules() if f"{path}.steerkit_edits.default" in name)
        assert torch.equal(edit.S, svd(module.weight)[1][list(chosen.get(path, (0, 1, 2)))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [SVFT(), SSVD(8), AntiPaSTO(8)])
def test_bases_of_other_types(method, dtype):
    module = linear(20, 28, dtype=dtype)
    edit = edit_of(method, module).to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(4, 28, dtype=dtype)
    assert torch.equal(edit(x, module), module(x))
    assert edit(x, module).dtype == dtype
