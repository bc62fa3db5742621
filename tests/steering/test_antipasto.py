"""AntiPaSTO: the rotation is one, within its bound; the edit is the rotated weight matrix; the method leaves nothing behind."""

import math
from dataclasses import replace

import pytest
import torch

from steerkit import HookedModel, steering, storyworld
from steerkit.steering import SingularRotate, SteeringVector, Where
from steerkit.steering.methods.antipasto import (
    writers,
)

SITE = "blocks.1.hook_resid_post"
WRITERS = [
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.down_proj",
]
QUICK = {"rank": 16, "epochs": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def pairs():
    return steering.load_pairs(storyworld.persona_pairs(["colour"], 24, seed=0))


@pytest.fixture(scope="module")
def vector(model, pairs):
    return steering.fit(model, pairs, method="antipasto", site=SITE, **QUICK)


def random_edit(path="m", d_in=24, d_out=20, r=8, size=1.0, seed=0, max_angle=math.pi / 3):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    P, dS = size * torch.randn(r, r, generator=generator), 0.3 * torch.randn(r, generator=generator)
    chosen = torch.randperm(len(S), generator=generator)[:r]
    return weight, SingularRotate(path, Vh.T[:, chosen], S[chosen], U[:, chosen], P, dS, max_angle=max_angle)


@pytest.mark.parametrize("r", [2, 8, 16])
@pytest.mark.parametrize("size", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("max_angle", [0.2, math.pi / 3, 2.5])
def test_no_plane_turns_by_more_than_the_bound(r, size, max_angle):
    for seed in range(5):
        _, edit = random_edit(r=r, size=size, seed=seed, max_angle=max_angle)
        for alpha in (1.0, -1.0, 0.4):
            angles = torch.linalg.eigvals(edit.rotation(alpha).double()).angle().abs()
            assert float(angles.max()) <= max_angle + 1e-5
        if size == 1e6:
            angles = torch.linalg.eigvals(edit.rotation(1.0).double()).angle().abs()
            assert float(angles.max()) == pytest.approx(max_angle, rel=1e-3)  # the bound is reached


@pytest.mark.parametrize("r", [2, 8, 16])
def test_minus_alpha_is_the_inverse(r):
    _, edit = random_edit(r=r, size=3.0)
    identity = torch.eye(r)
    for alpha in (0.3, 1.0, 4.0):
        forth, back = edit.rotation(alpha), edit.rotation(-alpha)
        torch.testing.assert_close(back @ forth, identity, atol=1e-5, rtol=0)
        torch.testing.assert_close(forth.T @ forth, identity, atol=1e-5, rtol=0)
    assert torch.equal(edit.rotation(0.0), identity)


def test_the_edit_is_the_rotated_weight_matrix():
    weight, edit = random_edit(size=0.5)
    rest = weight - edit.U @ torch.diag(edit.S) @ edit.V.T
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    for alpha in (-1.0, 0.0, 0.25, 1.0):
        turned = edit.V @ edit.rotation(alpha) @ torch.diag(edit.S + alpha * edit.dS) @ edit.U.T
        wanted = x @ turned + x @ rest.T
        found = edit.apply(x @ weight.T, alpha, None, x)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        low_rank = edit.delta(alpha).apply(x @ weight.T, 1.0, None, x)
        torch.testing.assert_close(low_rank, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(edit.apply(x @ weight.T, 0.0, None, x), x @ weight.T)
    torch.testing.assert_close(edit.scaled(0.5).delta(0.5).B, edit.delta(0.25).B)


def test_strengths_token_by_token_are_those_of_each_alone():
    weight, edit = random_edit(size=0.5)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    y = x @ weight.T
    strengths = torch.tensor([0.0, 1.0, -0.5, 1.0, 0.25]).expand(3, 5)[..., None]
    found = edit.apply(y, strengths, None, x)
    for position, alpha in enumerate(strengths[0, :, 0].tolist()):
        torch.testing.assert_close(found[:, position], edit.apply(y, alpha, None, x)[:, position])
    assert torch.equal(found[:, 0], y[:, 0])
    half = edit.to("cpu", torch.bfloat16)
    assert half.P.dtype == half.S.dtype == torch.float32
    found = half.apply(y.bfloat16(), 1.0, None, x.bfloat16())
    torch.testing.assert_close(found.float(), edit.apply(y, 1.0, None, x), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("size", [0.0, 0.003, 10.0])
def test_gradients_reach_the_rotation_and_the_stretching(size):
    _, edit = random_edit(size=size)
    P, dS = edit.P.clone().requires_grad_(), (0 * edit.dS).requires_grad_()
    edit = replace(edit, P=P, dS=dS)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    edit.apply(torch.zeros(3, 5, 20), 1.0, None, x).square().sum().backward()
    edit.apply(torch.zeros(3, 5, 20), -0.5, None, x).sum().backward()
    for tensor in (P, dS):
        assert tensor.grad.isfinite().all()
        assert float(tensor.grad.abs().max()) > 0


def test_the_bound_has_the_gradient_of_finite_differences():
    _, edit = random_edit(r=4, size=0.7)
    with torch.enable_grad():
        P = edit.P.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: replace(edit, P=p).skew, (P,), atol=1e-4)


def test_the_method_trains_it_and_leaves_the_model_alone(model, vector, pairs, tmp_path):
    assert vector.sites == tuple(WRITERS) == tuple(writers(model, SITE))
    assert vector.where == Where(bos=True)
    assert vector.provenance["settings"]["rank"] == 16
    assert not any(tensor.requires_grad for edit in vector.edits for tensor in edit.tensors().values())
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    again = steering.fit(model, pairs, method="antipasto", site=SITE, **QUICK)
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    ids = torch.tensor([model.tokenizer(pairs[0].positive)["input_ids"]])
    plain = model.logits(ids)
    for other in (again, loaded):
        for one, two in zip(vector.edits, other.edits):
            assert one.settings() == two.settings()
            assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    with model.steer(loaded, strength=1.0):
        assert float((model.logits(ids) - plain).abs().max()) > 0.01
    with model.steer(loaded, strength=0.0):
        assert torch.equal(model.logits(ids), plain)
    with model.steer(loaded, strength=[0.0]):
        assert torch.equal(model.logits(ids), plain)
    assert torch.equal(model.logits(ids), plain)
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())


def test_generation_with_a_cache_is_generation_without(model, vector, pairs):
    for where in (Where(bos=True), Where.generation_only()):
        with model.steer(vector, strength=[1.0, -1.0, 0.5], where=where):
            cached, plain = (
                model.generate(
                    [pairs[i].positive for i in range(3)], max_new_tokens=12, do_sample=False, use_cache=use
                )
                for use in (True, False)
            )
        assert cached == plain
