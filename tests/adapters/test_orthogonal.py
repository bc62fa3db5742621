"""GOFT, qGOFT, ETHER and ETHER+: products that are orthogonal, distances that are bounded."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from edit_cases import edit_of, fill, linear, trained

from steerkit.adapters.methods.ether import ETHER
from steerkit.adapters.methods.ether_plus import ETHERPlus
from steerkit.adapters.methods.goft import GOFT
from steerkit.adapters.methods.qgoft import QGOFT
from steerkit.errors import InputError

SIZES = [1, 2, 3, 7, 16, 24]


def givens(d, i, j, block):
    G = torch.eye(d)
    G[i, i], G[i, j], G[j, i], G[j, j] = block.flatten()
    return G


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("method", [GOFT(), QGOFT()])
def test_the_cascade_is_the_product_of_its_planes(method, d):
    edit = fill(edit_of(method, linear(5, d)), 0.5)
    blocks, product, used, left = edit.blocks().detach(), torch.eye(d), 0, list(range(d))
    while len(left) > 1:
        half = len(left) // 2
        for i, j in zip(left[:half], left[half:]):
            product = givens(d, i, j, blocks[used]) @ product
            used += 1
        left = left[:half] + left[2 * half :]
    assert used == len(blocks) == d - 1
    torch.testing.assert_close(edit.rotation(), product, atol=1e-5, rtol=0)


@pytest.mark.parametrize("d", SIZES)
def test_goft_is_orthogonal_also_after_training(d):
    module = linear(5, d)
    edit = edit_of(GOFT(), module)
    assert torch.equal(edit.rotation(), torch.eye(d))
    for changed in (fill(edit, 3.0), trained(edit, module) if d > 1 else edit):
        Q = changed.rotation()
        torch.testing.assert_close(Q.T @ Q, torch.eye(d), atol=1e-5, rtol=0)


def test_the_angles_of_goft_gather_any_vector_in_one_coordinate():
    d = 16
    x = torch.randn(d, generator=torch.Generator().manual_seed(0))
    edit, angles, left = edit_of(GOFT(), linear(5, d)), [], x
    while len(left) > 1:
        a, b = left.chunk(2)
        angles.append(torch.atan2(-b, a))
        left = torch.hypot(a, b)
    with torch.no_grad():
        edit.angles.copy_(torch.cat(angles))
    gathered = torch.zeros(d)
    gathered[0] = x.norm()
    torch.testing.assert_close(edit.turned(x), gathered, atol=1e-5, rtol=0)


def test_gains_stretch_the_turned_coordinates():
    module = linear(5, 8)
    edit = fill(edit_of(GOFT(gains=True), module), 0.7)
    plain = edit_of(GOFT(), module)
    plain.angles = edit.angles
    torch.testing.assert_close(edit.rotation(), torch.diag(edit.gains) @ plain.rotation())


def test_qgoft_pays_for_planes_that_are_not_orthogonal_and_for_nothing_else():
    edit = edit_of(QGOFT(orthogonality=0.5), linear(5, 8))
    angle, length = torch.tensor(0.7), 1.7
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    with torch.no_grad():
        edit.M.copy_(length * rotation - torch.eye(2))
    assert float(edit.penalty()) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        edit.M[3] = torch.tensor([[0.0, 2.0], [1.0, 0.0]])  # columns (1, 1) and (2, 1)
    assert float(edit.penalty()) == pytest.approx(0.5 * 9)


def test_the_regulariser_is_the_sum_over_modules(model):
    from steerkit import adapters

    tuned = adapters.get(model, "qgoft", layers=[0])
    try:
        assert float(tuned.method.regulariser(tuned.model)) == 0
        edits = [m for m in tuned.model.modules() if isinstance(m, adapters.tuner.Edit)]
        for edit in edits:
            fill(edit, 0.3)
        total = tuned.method.regulariser(tuned.model)
        assert float(total) == pytest.approx(sum(float(edit.penalty()) for edit in edits), rel=1e-5)
    finally:
        tuned.remove()


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_ether_is_a_reflection_at_distance_two_in_each_block(blocks, size):
    module = linear(20, 28)
    edit = fill(edit_of(ETHER(blocks), module), size)
    for changed in (edit, trained(edit, module)):
        H = changed.reflected(torch.eye(28))
        torch.testing.assert_close(H @ H, torch.eye(28), atol=1e-5, rtol=0)
        torch.testing.assert_close(H.T, H, atol=1e-6, rtol=0)
        width = 28 // blocks
        for b in range(blocks):
            own = slice(b * width, (b + 1) * width)
            distance = (H[own, own] - torch.eye(width)).norm()
            assert float(distance) == pytest.approx(2, abs=1e-5)
            H = H.clone()
            H[own, own] = 0
        assert float(H.abs().max()) == 0  # nothing outside the blocks


def test_ether_multiplies_the_weight_by_its_blocks():
    module = linear(20, 28)
    edit = edit_of(ETHER(4), module)
    unit = torch.nn.functional.normalize(edit.u.detach(), dim=1)
    H = torch.block_diag(*[torch.eye(7) - 2 * torch.outer(u, u) for u in unit])
    torch.testing.assert_close(module.weight + edit.delta(module.weight), module.weight @ H)
    x = torch.randn(3, 28)
    torch.testing.assert_close(edit(x, module), x @ (module.weight @ H).T + module.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_ether_plus_stays_within_its_distance_on_both_sides(size):
    module = linear(20, 28)
    edit = edit_of(ETHERPlus(4), module)
    assert not edit.delta(module.weight).any()
    assert not torch.equal(edit.u_in[0], edit.u_in[1])
    for changed in (trained(edit, module), fill(edit, size)):
        for change, d in ((changed.into, 28), (changed.out_of, 20)):
            away = change(torch.eye(d))
            for b in range(4):
                own = slice(b * d // 4, (b + 1) * d // 4)
                assert 0 < float(away[own, own].norm()) <= math.sqrt(2) + 1e-5
            assert float(away.square().sum()) <= 4 * 2 + 1e-4


def test_ether_plus_is_the_product_of_its_three_factors():
    module = linear(20, 28)
    edit = fill(edit_of(ETHERPlus(4), module), 1.0)
    H, out = torch.eye(28) + edit.into(torch.eye(28)).T, torch.eye(20) + edit.out_of(torch.eye(20)).T
    wanted = out @ module.weight @ H
    torch.testing.assert_close(module.weight + edit.delta(module.weight), wanted, atol=1e-5, rtol=1e-5)
    x = torch.randn(3, 28)
    torch.testing.assert_close(edit(x, module), x @ wanted.T + module.bias, atol=1e-5, rtol=1e-5)


def test_blocks_fit_the_sides():
    edit = edit_of(ETHERPlus(6), linear(20, 28))
    assert (len(edit.u_in), len(edit.u_out)) == (4, 5)
    with pytest.raises(InputError, match="blocks is 0"):
        ETHER(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [GOFT(), QGOFT(), ETHERPlus()])
def test_bases_of_other_types(method, dtype):
    module = linear(20, 28, dtype=dtype)
    edit = edit_of(method, module).to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(4, 28, dtype=dtype)
    assert torch.equal(edit(x, module), module(x))
    assert fill(edit, 0.1)(x, module).dtype == dtype
