"""ReFT as an adapter: the steering module's edits, at the prompt's ends."""

import pytest
import torch

from steerkit import adapters
from steerkit.adapters.methods.loreft import orthonormal
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.edits import LowRank
from steerkit.steering.methods import reft
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

SETTINGS = {"rank": 2, "first": 2, "last": 3}


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(model):
    """Makes adapters that do something."""
    tuned = []

    def make(**settings):
        tuned.append(adapters.get(model, "loreft", **{**SETTINGS, **settings}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuned[-1].trainable().values():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        return tuned[-1]

    yield make
    for one in tuned:
        one.remove()


def edits(tuned):
    return [layer.steerkit_edits["default"] for layer in tuned.tuner_layers().values()]


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_it_is_the_steering_modules_edit(model, ids, made, kind):
    tuned = made(kind=kind)
    lowrank = []
    for layer, edit in enumerate(edits(tuned)):
        R = reft.orthonormal(edit.R) if kind == "loreft" else edit.R
        read = edit.W if kind == "direft" else edit.W - R
        lowrank.append(LowRank(f"blocks.{layer}.hook_resid_post", R.detach(), read.detach(), edit.b.detach()))
    vector = SteeringVector(tuple(lowrank), {}, Where.spans((0, 2), (-3, None), generation=False))
    found = tuned.logits(ids).detach()
    with tuned.disabled(), tuned.base.steer(vector):
        expected = tuned.base.logits(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_the_ends_of_a_prompt_are_edited(model, ids, made):
    tuned = made()
    site = "blocks.0.hook_resid_post"
    with torch.no_grad():
        after = tuned.run(ids, sites=[site])[site]
        with tuned.disabled():
            before = tuned.run(ids, sites=[site])[site]
    changed = (after - before).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[True] * 2 + [False] * 4 + [True] * 3] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_not_counted(ids, made, side):
    tuned = made()
    pads = torch.full((3, 2), tuned.pad_id)
    rows = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
    mask = torch.cat([pads * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pads * 0], 1)
    found = tuned.logits(rows, mask)
    found = found[:, 2:] if side == "left" else found[:, :-2]
    torch.testing.assert_close(found, tuned.logits(ids), rtol=0, atol=1e-5)


def test_generated_tokens_are_left_alone(ids, made):
    tuned = made()
    with torch.no_grad():
        prompt = tuned.model(input_ids=ids, use_cache=True)
        last = ids[:, -1:]
        found = tuned.model(input_ids=last, past_key_values=prompt.past_key_values).logits
        cache = tuned.model(input_ids=ids, use_cache=True).past_key_values
        with tuned.disabled():
            expected = tuned.model(input_ids=last, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_token_is_edited_where_asked_for_with_a_cache_or_without(ids, made):
    tuned = made(first=0, last=0)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tuned.pad_id}
    mask = torch.ones_like(ids)
    with_cache, without = (
        tuned.model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_rows_of_R_are_orthonormal_whatever_was_trained():
    R = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 3
    found = orthonormal(R)
    torch.testing.assert_close(found @ found.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, reft.orthonormal(R), rtol=0, atol=1e-5)


def test_under_gradient_checkpointing_it_learns_the_same(ids, made):
    tuned = made()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            tuned.base.model.gradient_checkpointing_enable({"use_reentrant": False})
            tuned.model.train()
        tuned.model.zero_grad()
        other = tuned.logits(ids[:, :6]).square().mean()
        (tuned.logits(ids).square().mean() + other).backward()
        grads.append({name: p.grad.clone() for name, p in tuned.trainable().items()})
    tuned.model.eval()
    tuned.base.model.gradient_checkpointing_disable()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_loaded_one_has_all_sites(ids, made, tmp_path):
    tuned = made()
    loaded = HookedModel.from_pretrained(tuned.save(tmp_path / "loreft"))
    assert all(site.verified for site in loaded.sites.values())
    site = "blocks.0.hook_resid_post"
    torch.testing.assert_close(loaded.run(ids, sites=[site])[site], tuned.run(ids, sites=[site])[site])


def test_direft_and_noreft_start_as_the_base(model, ids):
    before = model.logits(ids)
    for kind in ("direft", "noreft"):
        tuned = adapters.get(model, "loreft", kind=kind, **SETTINGS)
        assert torch.equal(tuned.logits(ids), before)
        tuned.remove()


def test_mistakes_are_named(model):
    with pytest.raises(InputError, match="loreft, noreft"):
        adapters.get(model, "loreft", kind="reft")
    with pytest.raises(InputError, match="give layers"):
        adapters.get(model, "loreft", modules="attention")
    with pytest.raises(InputError, match="width of the stream, 32"):
        adapters.get(model, "loreft", rank=33)
    assert not hasattr(model.model, "peft_config")
