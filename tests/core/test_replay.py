"""A batch run again from a site on ends where a whole run would, for every family, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch

from steerkit.models import HookedModel
from steerkit.replay import Replay
from tests.core.families import CAUSAL, FAMILIES, build

SITES = ("1.hook_resid_pre", "1.attn.hook_z", "2.hook_mlp_out", "1.hook_resid_post", "2.hook_resid_post")


def batch_for(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.d_vocab, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    if not model.is_causal:
        mask[0, 6:] = 0
    return ids, mask


def turned(act):
    return act.flip(-1) + 0.5


def whole(model, site, ids, mask):
    with torch.no_grad(), model.hooks({site: turned}):
        return model.final(ids, mask)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_replay_ends_where_a_whole_run_does(family):
    model = HookedModel.from_pretrained(build(family))
    names = [name for name, site in model.sites.items() if site.verified and name.endswith(SITES)]
    assert names
    for name in names:
        replay = Replay(model, name)
        for seed in range(2):
            ids, mask = batch_for(model, seed)
            acts, final = replay.run(ids, mask)
            with torch.no_grad():
                assert torch.equal(final, model.final(ids, mask))
                assert torch.equal(acts, model.run(ids, mask, sites=[name])[name])
            expected = whole(model, name, ids, mask)
            for _ in range(2):  # a replay does not spoil what the next one needs
                assert torch.equal(replay.again(turned), expected)
            assert not torch.equal(expected, final)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_several_copies_of_a_batch_run_in_one_forward(family):
    model = HookedModel.from_pretrained(build(family))
    name = next(n for n, s in model.sites.items() if s.verified and n.endswith("1.hook_resid_post"))
    replay = Replay(model, name)
    ids, mask = batch_for(model)
    replay.run(ids, mask)
    factor = torch.tensor([1.0, 0.5]).repeat_interleave(len(ids))[:, None, None]
    both = replay.again(lambda act: act * factor, copies=2)
    for rows, part in zip(both.split(len(ids)), (1.0, 0.5)):
        torch.testing.assert_close(
            rows, replay.again(lambda act, part=part: act * part), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", CAUSAL)
def test_blocks_before_the_site_are_not_computed_again(family):
    model = HookedModel.from_pretrained(build(family))
    calls = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for path, module in model.model.named_modules()
        if path.endswith(("mlp", "fc2"))
    ]
    replay = Replay(model, "blocks.1.hook_resid_post")
    replay.run(*batch_for(model))
    calls.clear()
    replay.again(turned)
    assert replay.skips == 2
    assert len(calls) == len(handles) // 3
    for handle in handles:
        handle.remove()


@pytest.fixture
def model():
    return HookedModel.from_pretrained(build("llama"))


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    replay = Replay(model, "blocks.1.hook_resid_post")
    replay.run(*batch_for(model))
    replay.again(turned)

    def fail(act):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay.again(fail)
    assert all("forward" not in vars(module) for module in model.model.modules())
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in model.model.modules()
    )
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_forward_of_its_own_on_a_block_is_put_back(model):
    """accelerate sets such forwards on the blocks of models that are split over devices."""
    block = model.model.model.layers[0]
    original = block.forward

    def own(*args, **kwargs):
        return original(*args, **kwargs)

    block.forward = own
    replay = Replay(model, "blocks.1.hook_resid_post")
    replay.run(*batch_for(model))
    assert torch.equal(replay.again(turned), whole(model, "blocks.1.hook_resid_post", *batch_for(model)))
    assert vars(block)["forward"] is own


def test_other_threads_run_the_whole_model_meanwhile(model):
    ids, mask = batch_for(model)
    other, _ = batch_for(model, seed=1)
    with torch.no_grad():
        expected = model.final(other)
    found = []

    def run_beside(act):
        def forward():
            with torch.no_grad():
                found.append(model.final(other))

        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    replay = Replay(model, "blocks.1.hook_resid_post")
    replay.run(ids, mask)
    replay.again(run_beside)
    assert torch.equal(found[-1], expected)


@pytest.mark.parametrize(
    "outer", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]
)
def test_hooks_around_it_act_once(model, outer):
    batch = batch_for(model)
    with model.hooks({outer: lambda act: act.roll(1, -1) + 1}):
        replay = Replay(model, "blocks.1.hook_resid_post")
        replay.run(*batch)
        assert torch.equal(replay.again(turned), whole(model, "blocks.1.hook_resid_post", *batch))
    assert replay.skips == 2


def test_a_model_whose_blocks_do_more_than_return_is_run_whole(model):
    """Later blocks that read what earlier ones left elsewhere: skipping would feed them the last batch's."""
    layers = model.model.model.layers
    first_ran = []

    def leave(module, args):
        first_ran.append(True)

    def read(module, args, output):
        shift = len(first_ran)
        first_ran.clear()
        return output + shift

    handles = [layers[0].mlp.register_forward_pre_hook(leave), layers[2].register_forward_hook(read)]
    replay = Replay(model, "blocks.1.hook_resid_post")
    replay.run(*batch_for(model))
    assert replay.skips == 0
    assert torch.equal(replay.again(turned), whole(model, "blocks.1.hook_resid_post", *batch_for(model)))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("site", ["hook_embed", "blocks.0.hook_resid_pre", "ln_final"])
def test_sites_with_nothing_before_them_work_too(model, site):
    replay = Replay(model, site)
    replay.run(*batch_for(model))
    assert torch.equal(replay.again(turned), whole(model, site, *batch_for(model)))
    assert replay.skips == 0
