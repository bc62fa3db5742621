"""What is planted in a weight change is found, and what is random lies at its null."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import beta
from torch import nn

from steerkit.adapters.inside import (
    Change,
    MagnitudeDirection,
    Spectrum,
    base_energy,
    coupling,
    effective_delta,
    energy_in,
    gain,
    hyperspherical_energy,
    intruders,
    layer_and_kind,
    layer_norms,
    linear_map,
    magnitude_direction,
    null_share,
    rotation,
    spectrum,
    summarise,
)
from steerkit.adapters.inside_figures import energy_heatmap, report
from steerkit.adapters.inside_pairs import similarity, subspace_overlap, truncated_svd_match
from steerkit.adapters.inside_subspace import VECTOR, Projection, RandomSubspace, d90
from steerkit.errors import InputError, NumericsError


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(d, k, seed=0):
    return torch.linalg.qr(normal(d, k, seed=seed))[0]


def of_spectrum(values, d_out, d_in, seed=0):
    """A matrix of these singular values in random directions."""
    U, V = orthonormal(d_out, len(values), seed), orthonormal(d_in, len(values), seed + 1000)
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


def planar_rotation(d, angles, seed=0):
    """Turns planes of random directions by these angles, and nothing else."""
    K, Q = torch.zeros(d, d, dtype=torch.float64), orthonormal(d, d, seed)
    for i, angle in enumerate(angles):
        K[2 * i, 2 * i + 1], K[2 * i + 1, 2 * i] = -angle, angle
    return Q @ torch.matrix_exp(K) @ Q.T


# Reading a map


@pytest.mark.parametrize("batch", [1, 5, 512])
@pytest.mark.parametrize("bias", [True, False])
def test_the_matrix_of_a_linear_module_is_its_weight(batch, bias):
    module = nn.Linear(12, 7, bias=bias).double()
    found = linear_map(module, 12, batch=batch, dtype=torch.float64)
    torch.testing.assert_close(found, module.weight.detach(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_change_of_a_peft_adapter_is_what_merging_it_adds(settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 6)).double()
    before = copy.deepcopy(base)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings)
    ).double()
    change = effective_delta(before, model.base_model.model[0].eval(), 10, dtype=torch.float64)
    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(change.delta, merged.detach() - before[0].weight.detach(), atol=1e-12, rtol=0)
    assert change.norm > 0.1


def test_a_map_that_is_not_linear_has_no_matrix():
    linear = nn.Linear(8, 8)
    bottleneck = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    for after in (bottleneck, nn.Sequential(linear, nn.Dropout(0.5)).train()):
        with pytest.raises(InputError, match="not linear in its input"):
            effective_delta(linear, after, 8)
    assert effective_delta(linear, nn.Sequential(linear, nn.Dropout(0.5)).eval(), 8).norm == 0


def test_what_is_no_change_is_refused():
    with pytest.raises(InputError, match="one shape"):
        Change(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InputError, match="not the same module"):
        effective_delta(nn.Linear(4, 3), nn.Linear(4, 2), 4)
    with pytest.raises(InputError, match="float32 or float64"):
        linear_map(nn.Linear(4, 3).bfloat16(), 4, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="act on rows"):
        linear_map(lambda x: x[None], 4)
    with pytest.raises(NumericsError):
        Change(torch.ones(2, 2), torch.full((2, 2), math.nan))


# Spectrum


def test_a_planted_spectrum_is_found():
    values = [4.0, 2.0, 2.0, 1.0]
    found = spectrum(Change(normal(12, 9), of_spectrum(values, 12, 9)))
    torch.testing.assert_close(found.values[:4], torch.tensor(values, dtype=torch.float64))
    assert found.stable_rank == pytest.approx(25 / 16)
    shares = np.array(values) / 9
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert [found.energy(r) for r in (1, 2, 4)] == pytest.approx([16 / 25, 20 / 25, 1])
    assert [found.rank_at(s) for s in (0.6, 0.7, 0.9, 0.99)] == [1, 2, 3, 4]
    assert found.truncation_error(1) == pytest.approx(3 / 5)
    with pytest.raises(InputError, match="Rank 10"):
        found.energy(10)


def test_ranks_of_equal_singular_values_are_their_number():
    found = Spectrum(torch.ones(20))
    assert (found.stable_rank, found.effective_rank, found.rank_at(0.9)) == (
        pytest.approx(20),
        pytest.approx(20),
        18,
    )


def test_the_truncated_svd_is_the_error_it_says():
    delta = normal(10, 8)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    cut = (U[:, :3] * S[:3]) @ Vh[:3]
    found = spectrum(Change(delta, delta))
    assert found.truncation_error(3) == pytest.approx(float((delta - cut).norm() / delta.norm()))
    assert found.truncation_error(3) ** 2 + found.energy(3) == pytest.approx(1)


# Energy in directions, and nulls


def test_a_change_in_the_bases_own_directions_is_found_there():
    base = normal(12, 9)
    U, _, Vh = torch.linalg.svd(base, full_matrices=False)
    top = base_energy(Change(base, U[:, :3] @ normal(3, 3) @ Vh[:3]), k=3)
    assert (top.top.left.value, top.top.both.value) == (pytest.approx(1), pytest.approx(1))
    assert top.bottom.right.value == pytest.approx(0, abs=1e-12)
    bottom = base_energy(Change(base, U[:, -2:] @ normal(2, 9)), k=2)
    assert bottom.bottom.left.value == pytest.approx(1)
    assert bottom.bottom.right.value < 0.9


def test_the_null_is_the_closed_form():
    found = base_energy(Change(normal(12, 9), normal(12, 9, seed=1)), k=3)
    assert found.top.left.null == pytest.approx(3 / 12)
    assert found.top.right.null == pytest.approx(3 / 9)
    assert found.bottom.both.null == pytest.approx(9 / 108)


@pytest.mark.parametrize(("d", "k"), [(16, 3), (40, 20)])
def test_the_null_of_one_direction_is_a_beta_distribution(d, k):
    mean, sd = null_share(torch.ones(1), (d, 7), k, 7)
    assert (mean, sd) == (
        pytest.approx(beta(k / 2, (d - k) / 2).mean()),
        pytest.approx(beta(k / 2, (d - k) / 2).std()),
    )


@pytest.mark.parametrize(("k", "j"), [(3, 3), (2, 5), (6, 1)])
def test_the_null_of_an_orthogonal_change_is_that_of_two_subspaces(k, j):
    """‖P R Q‖² of an orthogonal R is the overlap of P with a random subspace of Q's dimension."""
    whole, two = null_share(torch.ones(8), (8, 8), k, j), null_share(torch.ones(j), (8, j), k, j)
    assert np.array(whole) == pytest.approx(np.array(two) * j / 8)


def test_the_null_is_that_of_the_transpose():
    values = torch.tensor([3.0, 1.0, 0.2])
    assert null_share(values, (9, 4), 5, 2) == pytest.approx(null_share(values, (4, 9), 2, 5))


@pytest.mark.parametrize(("n_out", "n_in"), [(4, 7), (9, 3), (4, 3)])
def test_random_changes_have_the_mean_and_spread_of_the_null(n_out, n_in):
    values, shares = [3.0, 2.0, 2.0, 0.5], []
    left, right = torch.eye(9, dtype=torch.float64)[:, :n_out], torch.eye(7, dtype=torch.float64)[:, :n_in]
    for seed in range(1500):
        energy = energy_in(Change(normal(9, 7), of_spectrum(values, 9, 7, seed)), left, right)
        shares.append(energy.both.value)
    assert np.mean(shares) == pytest.approx(energy.both.null, abs=4 * energy.both.null_sd / 1500**0.5)
    assert np.std(shares) == pytest.approx(energy.both.null_sd, rel=0.08, abs=1e-12)


# Intruders


def test_a_planted_intruder_is_found_and_a_scaled_direction_is_none():
    base = of_spectrum([8.0, 6.0, 4.0, 2.0, 1.0], 30, 20)
    U, _, Vh = torch.linalg.svd(base, full_matrices=True)
    planted = 5.0 * torch.outer(U[:, 20], Vh[10])
    found = intruders(Change(base, planted), k=4)
    assert found.indices == (2,)
    assert found.cosines[:2] == pytest.approx((1, 1))
    assert intruders(Change(base, 5.0 * torch.outer(U[:, 3], Vh[3])), k=4).count == 0
    assert intruders(Change(base, 5.0 * torch.outer(U[:, 20], Vh[10])), k=2).count == 0


def test_intruders_are_as_many_as_peft_counts():
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(n, m) for n, m in [(40, 40), (40, 24), (24, 40)]))
    for layer in base:
        layer.weight.data *= torch.linspace(1, 6, layer.weight.shape[0])[:, None]
    names = ["0", "1", "2"]
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=60, target_modules=names, init_lora_weights=False)
    )
    layers = {name: model.base_model.model.get_submodule(name) for name in names}
    ours = {
        name: intruders(effective_delta(layer.base_layer, layer, layer.in_features), k=12, eps=0.6).count
        for name, layer in layers.items()
    }
    said = []
    reduce_intruder_dimension(model, top_k=12, threshold_epsilon=0.6, logging_sink=said.append)
    theirs = {
        line.split(":")[0].split(".")[-1]: int(line.split()[-1]) if "Intruders:" in line else 0
        for line in said
        if ":" in line
    }
    assert ours == theirs
    assert sum(ours.values()) > 3


# DoRA's and OFT's view


def test_scaling_changes_magnitude_alone_and_rotating_direction_alone():
    base = normal(10, 8)
    scaled = magnitude_direction(Change(base, 0.5 * base))
    assert scaled.magnitude == pytest.approx(float(0.5 * base.norm(dim=1).mean()))
    assert scaled.direction == pytest.approx(0, abs=1e-15)
    turned = magnitude_direction(Change(base, base @ planar_rotation(8, [1.0]) - base))
    assert turned.magnitude == pytest.approx(0, abs=1e-12)
    assert turned.direction > 0.01


@pytest.mark.parametrize(("per", "dim"), [("output", 1), ("input", 0)])
def test_magnitude_and_direction_are_the_papers(per, dim):
    base, tuned = normal(10, 8), normal(10, 8, seed=1)
    tuned[3] = base[3]
    found = magnitude_direction(Change(base, tuned - base), per)
    cosine = torch.cosine_similarity(base, tuned, dim=dim)
    assert found.direction == pytest.approx(float((1 - cosine).mean()))
    assert found.magnitude == pytest.approx(float((tuned.norm(dim=dim) - base.norm(dim=dim)).abs().mean()))


def test_coupling_is_the_correlation():
    points = [MagnitudeDirection(m, d) for m, d in [(1.0, 2.0), (2.0, 3.5), (4.0, 4.0)]]
    assert coupling(points) == pytest.approx(np.corrcoef([1, 2, 4], [2, 3.5, 4])[0, 1])
    assert math.isnan(coupling(points[:2]))


@pytest.mark.parametrize("d_out", [20, 8, 5])
def test_a_planted_rotation_is_found(d_out):
    """With fewer neurons than inputs (5) it is turned as little as explains it."""
    R = planar_rotation(8, [1.2, 0.3, 1e-5])
    base = normal(d_out, 8)
    found = rotation(Change(base, base @ R - base))
    assert found.explained == pytest.approx(1)
    torch.testing.assert_close(
        found.matrix.T @ found.matrix, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert found.energy_after == pytest.approx(found.energy_before)
    cosines = torch.cosine_similarity(base, base @ R)
    torch.testing.assert_close(found.neuron_angles.cos(), cosines)
    if d_out >= 8:
        torch.testing.assert_close(found.matrix, R, atol=1e-10, rtol=0)
        expected = torch.tensor([1.2, 1.2, 0.3, 0.3, 1e-5, 1e-5, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(found.angles, expected, atol=1e-10, rtol=0)


def test_what_rounding_adds_to_a_low_rank_is_not_turned():
    exact = of_spectrum([3.0, 2.0, 1.0], 10, 8)
    old, new = ((exact + 5e-8 * normal(10, 8, seed=seed)).float() for seed in range(2))
    found = rotation(Change(old, new - old))
    assert found.null == pytest.approx((3 * 5 + 3) / 80)
    assert float(found.angles.max()) < 1e-6


def test_scaling_is_no_rotation():
    base = normal(6, 9)
    found = rotation(Change(base, 0.3 * base))
    assert found.explained == pytest.approx(0, abs=1e-9)
    assert float(found.angles.max()) < 1e-9
    assert float(found.neuron_angles.max()) < 1e-9


@pytest.mark.parametrize("d_out", [12, 7, 4])
def test_a_small_random_change_is_as_much_rotation_as_the_null_says(d_out):
    base = normal(d_out, 7)
    found = [rotation(Change(base, 1e-4 * normal(d_out, 7, seed=seed))) for seed in range(300)]
    assert np.mean([f.explained for f in found]) == pytest.approx(found[0].null, abs=0.02)


def test_hyperspherical_energy_is_the_sum_over_pairs():
    weight = normal(7, 5) * torch.arange(1, 8)[:, None]
    units = weight / weight.norm(dim=1, keepdim=True)
    expected = sum(1 / float((units[i] - units[j]).norm()) for i in range(7) for j in range(i))
    for rows in (3, 1024):
        assert hyperspherical_energy(weight, rows) == pytest.approx(expected)
    with_zeros = torch.cat([weight, torch.zeros(1, 5)])
    assert hyperspherical_energy(with_zeros) == pytest.approx(expected)
    assert hyperspherical_energy(torch.eye(2)) == pytest.approx(1 / 2**0.5)


# Data, and whole models


def test_the_gain_is_that_of_the_direction_of_the_data():
    base = torch.eye(6, dtype=torch.float64)
    delta = torch.zeros(6, 6, dtype=torch.float64)
    delta[0, 0] = 0.5
    change = Change(base, delta)
    along = torch.zeros(40, 6, dtype=torch.float64)
    along[:, 0] = normal(40)
    found = gain(change, along)
    assert (found.gain, found.median) == (pytest.approx(0.5), pytest.approx(0.5))
    noise = gain(change, normal(20_000, 6, seed=2), np.arange(20_000) // 20)
    assert noise.isotropic == pytest.approx(0.5 / 6**0.5)
    assert noise.interval.low < noise.isotropic < noise.interval.high
    with pytest.raises(InputError, match="rows of 6"):
        gain(change, normal(4, 5))
    with pytest.raises(NumericsError):
        gain(change, torch.full((4, 6), math.nan))


def test_norms_of_layers_are_those_of_their_modules_together():
    changes = {
        "model.layers.1.mlp.up": Change(normal(4, 3), normal(4, 3, seed=1)),
        "model.layers.0.attn.q": Change(normal(4, 3, seed=2), normal(4, 3, seed=3)),
        "model.layers.1.attn.q": Change(normal(5, 3, seed=4), normal(5, 3, seed=5)),
        "lm_head": Change(normal(5, 3, seed=4), normal(5, 3, seed=5)),
    }
    found = layer_norms(changes)
    assert list(found) == [0, 1, None]
    both = [changes["model.layers.1.mlp.up"], changes["model.layers.1.attn.q"]]
    stacked = [torch.cat([getattr(c, name) for c in both]).norm() for name in ("delta", "base")]
    assert found[1] == pytest.approx(float(stacked[0] / stacked[1]))
    assert layer_and_kind("model.layers.11.self_attn.q_proj") == (11, "self_attn.q_proj")
    assert layer_and_kind("lm_head") == (None, "lm_head")


def test_rows_and_page_hold_every_module_also_one_without_a_change(tmp_path):
    changes = {
        f"layers.{i}.{kind}": Change(normal(16, 8, seed=i), 0.1 * normal(16, 8, seed=9 + i))
        for i in range(2)
        for kind in ("<up>", "down")
    }
    changes["layers.2.down"] = Change(normal(16, 8), torch.zeros(16, 8))
    rows = summarise(changes)
    assert [row["path"] for row in rows] == list(changes)
    assert rows[-1]["stable_rank"] is None
    assert rows[-1]["rank_90"] is None
    assert (rows[-1]["norm"], rows[-1]["intruders"], rows[-1]["neuron_angle"]) == (0, 0, 0)
    assert rows[0]["null_both"] == pytest.approx(8 / 16)
    text = report({"a & b": changes}, tmp_path / "inside.html").read_text()
    assert text.count('class="figure"') == 3
    assert "a &amp; b" in text
    assert "<up>" not in text
    assert all(f"<td>{row['path'].replace('<up>', '&lt;up&gt;')}</td>" in text for row in rows)


def test_the_heat_map_says_times_the_null_and_takes_one_stack_of_layers():
    changes = {
        "layers.1.q": Change(normal(16, 8), normal(16, 8, seed=1)),
        "layers.0.k": Change(normal(6, 8), normal(6, 8, seed=2)),
    }
    drawn = energy_heatmap(changes, k=2).data[0]
    share = base_energy(changes["layers.1.q"], 2).top.both
    assert (list(drawn.x), list(drawn.y)) == (["0", "1"], ["q", "k"])
    assert drawn.z[0][0] is None
    assert drawn.z[0][1] == pytest.approx(share.value / (2 * 2 / (16 * 8)))
    changes |= {"decoder.layers.1.q": changes["layers.1.q"]}
    with pytest.raises(InputError, match="same layer and kind"):
        energy_heatmap(changes)


# Two changes


def test_the_same_change_is_wholly_similar_and_a_random_one_lies_at_the_null():
    delta = of_spectrum([3.0, 2.0, 1.0], 40, 30)
    same = similarity(Change(delta, delta), Change(delta, 2 * delta), rank=3)
    assert same.cosine == pytest.approx(1)
    assert (same.left.share.value, same.right.share.value) == (pytest.approx(1), pytest.approx(1))
    assert max(same.left.angles) < 1e-6
    found = [
        similarity(Change(delta, delta), Change(delta, of_spectrum([3.0, 2.0, 1.0], 40, 30, seed)), rank=3)
        for seed in range(1, 400)
    ]
    shares = [f.left.share.value for f in found]
    null = found[0].left.share
    assert null.null == pytest.approx(3 / 40)
    assert np.mean(shares) == pytest.approx(null.null, abs=4 * null.null_sd / 400**0.5)
    assert np.std(shares) == pytest.approx(null.null_sd, rel=0.15)
    assert np.std([f.cosine for f in found]) == pytest.approx(found[0].cosine_null_sd, rel=0.15)


def test_principal_angles_are_scipys():
    from scipy.linalg import subspace_angles

    a, b = orthonormal(9, 3), orthonormal(9, 3, seed=1)
    assert subspace_overlap(a, b).angles == pytest.approx(sorted(subspace_angles(a.numpy(), b.numpy())))


def test_a_rank_above_the_changes_own_is_refused():
    low = Change(normal(9, 8), of_spectrum([2.0, 1.0], 9, 8))
    with pytest.raises(InputError, match="dW has rank 2"):
        similarity(low, Change(normal(9, 8), normal(9, 8)), rank=3)
    with pytest.raises(InputError, match="not of one map"):
        similarity(low, Change(normal(8, 9), normal(8, 9)), rank=1)


def test_the_truncated_svd_matches_itself_and_a_random_change_does_not():
    base, full = normal(20, 16), normal(20, 16, seed=1)
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    cut = (U[:, :4] * S[:4]) @ Vh[:4]
    found = truncated_svd_match(Change(base, cut), Change(base, full), rank=4)
    assert [found.cosine, found.captured.value, found.inside.both.value] == pytest.approx([1, 1, 1])
    assert found.captured.null == pytest.approx(16 / 320 / spectrum(Change(base, full)).energy(4))
    random = [
        truncated_svd_match(
            Change(base, of_spectrum([1.0] * 4, 20, 16, seed)), Change(base, full), 4
        ).captured
        for seed in range(300)
    ]
    mean = np.mean([share.value for share in random])
    assert mean == pytest.approx(random[0].null, abs=4 * random[0].null_sd / 300**0.5)


# Random subspaces


def dense(project, d):
    return torch.stack([project(e) for e in torch.eye(d, dtype=torch.float64)], 1)


@pytest.mark.parametrize(("D", "d"), [(1, 1), (5, 3), (64, 64), (100, 7), (1500, 20)])
def test_the_projection_is_linear_and_its_gradient_its_adjoint(D, d):
    project = Projection(D, d, seed=3)
    P, v, g = dense(project, d), normal(d).requires_grad_(), normal(D, seed=1)
    torch.testing.assert_close(project(v), P @ v)
    (adjoint,) = torch.autograd.grad(project(v), v, g)
    torch.testing.assert_close(adjoint, P.T @ g)
    assert float(project(v).detach() @ g) == pytest.approx(float(v.detach() @ adjoint))


def test_the_projection_is_the_hadamard_matrix_with_signs():
    project = Projection(50, 6, seed=0)
    H = torch.from_numpy(hadamard(64)).double() / 8
    signs = project.signs_out[:, None] * project.signs_in
    expected = project.scale * signs * H[:50, project.places]
    torch.testing.assert_close(dense(project, 6), expected)
    assert expected.abs().unique().numel() == 1


def test_the_projection_keeps_norms():
    whole = dense(Projection(128, 9, seed=0), 9)
    torch.testing.assert_close(whole.T @ whole, torch.eye(9, dtype=torch.float64))
    v = normal(9)
    squares = [
        float(Projection(100, 9, seed=seed)(v).square().sum() / v.square().sum()) for seed in range(400)
    ]
    assert np.mean(squares) == pytest.approx(1, abs=4 * np.std(squares) / 400**0.5)
    assert np.std(squares) > 0


def small_model():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(11, 6), "mid": nn.Linear(6, 6), "head": nn.Linear(6, 11)}
    ).double()
    model["head"].weight = model["embed"].weight  # tied
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = small_model()

    def forward(self, ids):
        return self.parts["head"](self.parts["mid"](self.parts["embed"](ids)).tanh())


def loss_of(model, seed=0):
    ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids), ids.roll(1))


def test_the_gradient_of_the_vector_is_that_of_the_parameters_projected():
    model = Tied()
    loss_of(model).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with RandomSubspace(model, d=5, seed=1) as subspace:
        loss_of(model).backward()
        assert [name for name, _ in model.named_parameters()] == [VECTOR]
        torch.testing.assert_close(subspace.vector.grad, dense(subspace.project, 5).T @ g)


def test_training_in_a_subspace_lowers_the_loss_and_leaves_the_model_as_it_was():
    model = Tied()
    model.parts["mid"].bias.requires_grad_(False)
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = loss_of(model).item()
    with RandomSubspace(model, d=40) as subspace:
        assert loss_of(model).item() == first
        optimizer = torch.optim.Adam([subspace.vector], lr=0.1)
        for _ in range(15):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        with torch.no_grad():
            last = float(loss_of(model))
    assert last < 0.8 * first
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    delta = subspace.delta()
    assert "parts.mid.bias" not in delta
    with torch.no_grad():
        for name, added in delta.items():
            model.get_parameter(name).add_(added)
        assert float(loss_of(model)) == pytest.approx(last, rel=1e-12)


def test_each_forward_pass_has_the_vector_as_it_is_and_its_own_graph():
    model = Tied()
    with RandomSubspace(model, d=8, seed=2) as subspace:
        losses = [loss_of(model, seed) for seed in range(2)]
        for loss in losses:
            loss.backward()
        with torch.no_grad():
            at_zero = loss_of(model)
            subspace.vector.data.copy_(normal(8))
            moved = loss_of(model)
            subspace.vector.zero_()
            assert loss_of(model) == at_zero
        assert moved != at_zero
        for _ in range(2):  # a part alone, after its graph is gone
            model.parts["mid"](normal(3, 6)).sum().backward()


def fail_inside(subspace):
    with subspace:
        raise RuntimeError("stop")


def test_the_model_is_put_back_after_an_exception_and_only_one_subspace_holds():
    model = Tied()
    subspace, other = RandomSubspace(model, d=3), RandomSubspace(model, d=2)
    with pytest.raises(RuntimeError, match="stop"):
        fail_inside(subspace)
    assert isinstance(model.parts["mid"].weight, nn.Parameter)
    assert model.parts["head"].weight is model.parts["embed"].weight
    with subspace, pytest.raises(InputError, match="already"):
        other.__enter__()
    with pytest.raises(InputError, match="from 1 to"):
        RandomSubspace(model, d=10**6)
    with pytest.raises(InputError, match="requires a gradient"):
        RandomSubspace(model.requires_grad_(False), d=3)


def test_a_language_model_trains_in_a_subspace():
    from steerkit.models import HookedModel

    model = HookedModel.from_pretrained("storyworld")
    ids = torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with torch.no_grad():
        logits = model.model(ids).logits
    with RandomSubspace(model.model.requires_grad_(), d=100) as subspace:
        model.model.train()
        with torch.no_grad():
            torch.testing.assert_close(model.model(ids).logits, logits, atol=0, rtol=0)
        losses = []
        for _ in range(4):
            loss = model.model(ids, labels=ids).loss
            (gradient,) = torch.autograd.grad(loss, subspace.vector)
            subspace.vector.data -= 0.3 * gradient / gradient.norm()
            losses.append(loss.item())
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.model(ids, labels=ids).loss.backward()
        model.model.gradient_checkpointing_disable()
        (plain,) = torch.autograd.grad(model.model(ids, labels=ids).loss, subspace.vector)
        torch.testing.assert_close(subspace.vector.grad, plain)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_d90_interpolates_in_log_d():
    scores = {10: 0.5, 100: 0.7, 1000: 0.9, 10_000: 0.92}
    assert d90(scores, full=1.0) == pytest.approx(1000)
    assert d90(scores, full=0.8 / 0.9) == pytest.approx(10**2.5)
    assert d90(scores, full=0.9, chance=0.5) == pytest.approx(10 ** (2 + 0.16 / 0.2))
    assert d90(scores, full=0.4) == 10
    assert d90(scores, full=1.2) is None
    with pytest.raises(InputError, match="above chance"):
        d90(scores, full=0.4, chance=0.5)
