"""AntiPaSTO: the rotation is one, within its bound; the edit is the rotated weight matrix; the method leaves nothing behind."""

import math
from dataclasses import replace

import pytest
import torch

from steerkit import HookedModel, steering, storyworld
from steerkit.errors import InputError
from steerkit.finetune import frozen, optimise
from steerkit.steering import SingularRotate, SteeringVector, Where
from steerkit.steering.methods.antipasto import (
    AntiPaSTO,
    _Loss,
    _opposite,
    coherence,
    monotone,
    positive_pull,
    select,
    separation,
    writers,
)
from steerkit.steering.methods.learning import encode_pairs

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


def test_what_is_trained_pulls_the_sides_apart_and_the_sign_is_found(model, pairs):
    losses = []
    method = AntiPaSTO(rank=16, epochs=6, batch_size=20, coherence=0.0, monotone=0.0)
    examples = encode_pairs(model, pairs[:20])
    make, trained = method._parts(model, examples, writers(model, SITE), 3)
    loss = _Loss(method, model, SITE, 3, make, examples, 8)
    with frozen(model):
        losses = optimise(trained, examples, loss, replace(method, epochs=8))
    assert losses[-1] < losses[0] - 5
    vector = steering.fit(model, pairs, method="antipasto", site=SITE, **QUICK)
    held_out = encode_pairs(model, steering.load_pairs(storyworld.persona_pairs(["colour"], 16, seed=7)))
    pull = positive_pull(model, vector, held_out, 3, SITE)
    assert pull > 0
    assert positive_pull(model, _opposite(vector), held_out, 3, SITE) == pytest.approx(-pull, abs=1e-4)
    swapped = steering.fit(model, pairs.swapped(), method="antipasto", site=SITE, **QUICK)
    assert positive_pull(model, swapped, held_out, 3, SITE) < 0


def test_the_losses_are_their_equations():
    generator = torch.Generator().manual_seed(0)
    d, L = torch.randn(4, 16, generator=generator), torch.eye(16)[:8]
    inside = torch.cat([d[:, :8], torch.zeros(4, 8)], 1)
    antiparallel = separation(d, 0.3 * inside, -0.1 * inside, L, 30.0)
    assert float(antiparallel) == pytest.approx(-30.0, rel=1e-4)
    assert float(separation(d, inside, inside, L, 30.0)) == pytest.approx(30 + 900, rel=1e-4)
    half = separation(d, 0.3 * inside + 0.3 * inside.roll(8, 1), -inside, L, 30.0)
    assert float(half) == pytest.approx(-30.0 * 0.5**0.375, rel=1e-4)

    base = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    steered = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]])
    entropy = torch.tensor([[math.log(2), 0.0]])
    above = 0.4 - 0.9 * math.sqrt(0.02)
    found = coherence(base.log(), steered.log(), entropy)
    assert float(found) == pytest.approx((math.log1p(10 * above) ** 2 + above) / 2, rel=1e-5)
    assert float(coherence(base.log(), base.log(), entropy)) == 0.0

    t = torch.tensor([0.1, 0.1])
    up, down = torch.tensor([0.3, 0.0]), torch.tensor([-0.3, 0.2])
    assert float(monotone(up, down, t)) == pytest.approx((0.0 + 0.1 + 0.3) / 2)
    assert float(monotone(-up, -down, t)) == pytest.approx((0.0 + 0.1 + 0.3) / 2)  # the order is free


def test_what_moves_is_the_gap_or_the_side_that_is_drawn_over(model, pairs):
    base, up, down = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    examples = encode_pairs(model, pairs[:4])
    for moved, wanted in [
        ("gap", (up[:2] - up[2:] - base[:2] + base[2:], down[:2] - down[2:] - base[:2] + base[2:])),
        ("sides", (up[2:] - base[2:], down[:2] - base[:2])),
    ]:
        loss = _Loss(AntiPaSTO(moved=moved), model, SITE, 3, None, examples, 1)
        for found, delta in zip(loss.changes(base, up, down), wanted):
            torch.testing.assert_close(found, delta)


def test_dimensions_are_taken_in_turn():
    V, S = torch.eye(6), torch.ones(6)
    positive = torch.tensor([[9.0, 0.0, 4.0, 6.0, 0.0, 8.0], [9.0, 0.0, -4.0, 6.0, 0.0, 8.0]])
    negative = torch.tensor([[9.0, 7.0, 4.0, 1.0, 0.0, 8.0], [9.0, -7.0, 4.0, 1.0, 0.0, 8.0]])
    assert select(positive, negative, V, S, 3) == [
        0,
        3,
        5,
    ]  # loudest; then loudest of the rest; greatest difference of means
    assert select(positive, negative, V, S, 100) == list(range(6))
    assert select(positive, negative, V, torch.tensor([0, 1.0, 1, 1, 9, 0]), 1) == [3]


def test_another_architecture_and_another_layout_of_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=486, initializer_range=0.3)
    tokenizer = HookedModel.from_pretrained("storyworld").tokenizer
    model = HookedModel.from_pretrained(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    found = list(writers(model, "blocks.2.hook_resid_mid", skip=0.25))
    assert found == [
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.2.attn.c_proj",
    ]
    pairs = steering.load_pairs(
        [(f"Anna {verb} the truth.", f"Anna {verb} a lie.") for verb in ("tells", "told")]
    )
    vector = steering.fit(
        model, pairs, method="antipasto", site="blocks.1.hook_resid_post", epochs=1, rank=999
    )
    ids = torch.tensor([[3, 5, 7]])
    plain = model.logits(ids)
    for edit in vector.edits:
        weight = model.model.get_submodule(edit.site).weight.detach().T
        torch.testing.assert_close(edit.U @ torch.diag(edit.S) @ edit.V.T, weight, atol=1e-4, rtol=1e-4)
    with model.steer(vector):
        assert not torch.allclose(model.logits(ids), plain)


def test_bad_input_is_one_clear_line(model, pairs):
    _, edit = random_edit()
    for make, message in [
        (lambda: replace(edit, max_angle=4.0), "max_angle is 4.0"),
        (lambda: replace(edit, S=edit.S[:3]), "do not have the same r"),
        (lambda: AntiPaSTO(rank=0), "rank is 0"),
        (lambda: AntiPaSTO(max_angle=0.0), "max_angle is 0.0"),
        (lambda: AntiPaSTO(monotone=-1.0), "monotone is -1.0"),
        (lambda: AntiPaSTO(calibration=1.0), "calibration 1.0"),
        (lambda: AntiPaSTO(moved="both"), "moved is 'both'"),
        (lambda: steering.fit(model, pairs, "antipasto", [SITE, SITE]), "one site, and 2"),
        (lambda: steering.fit(model, pairs, "antipasto", "hook_embed"), "before hook_embed"),
        (lambda: steering.fit(model, pairs[:1], "antipasto", SITE), "at least 2 pairs"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
