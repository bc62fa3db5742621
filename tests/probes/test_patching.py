"""Patching everything is the other run, patching nothing is the run itself, and in between it is what hooks by hand do."""

import copy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from probes.attention import read_attention
from probes.attribution import attribute
from probes.contrasts import Contrast
from probes.patching import Place, heads, latents, patch, sites
from sae.architectures import TopK
from steerkit import storyworld
from steerkit.errors import InputError, NumericsError, SiteError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer
from tests.core.families import SMALL, build
from tests.probes.linear_model import build_linear

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
LENGTH = 6


def prompts(model, n=3, seed=0):
    """Pairs that differ in the third token, and in the last of them but the final one."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, model.d_vocab, (n, LENGTH), generator=generator)
    corrupt = clean.clone()
    corrupt[:, [2, 4]] = torch.randint(3, model.d_vocab, (n, 2), generator=generator)
    return clean.tolist(), corrupt.tolist()


def contrast_of(model, n=3):
    return Contrast.of_prompts(model, *prompts(model, n), answers=5, wrong=7)


def some_sae(width, d_sae=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = TopK(d_sae=d_sae, k=4).build(width)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return HookedModel.from_pretrained(build("llama"))


@pytest.fixture(scope="module")
def linear():
    return HookedModel.from_pretrained(build_linear().double())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "opt"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_everything_is_the_other_run_bit_for_bit(family, direction):
    model = HookedModel.from_pretrained(build(family))
    contrast = contrast_of(model)
    places = [
        Place(name)
        for name, site in model.sites.items()
        if site.verified and name.endswith(RESIDUAL) and "cross" not in name
    ]
    assert len(places) >= 6
    found = patch(contrast, places, "all", direction=direction)
    assert (found.patched == found.source).all()
    assert (found.effect == 1).all()
    assert (found.source != found.target).all()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_what_does_not_differ_is_the_run_itself_bit_for_bit(llama, direction):
    contrast = contrast_of(llama)
    found = patch(contrast, sites(llama, RESIDUAL), direction=direction, batch_tokens=1)
    before = found.patched[:, :2]
    assert (before == found.target).all()
    assert (found.effect[:, :2] == 0).all()
    # The last token is the same in both: before the first block there is nothing to tell.
    assert (found.patched[0, -1] == found.target).all()
    # After the last block nothing else is read.
    last = [i for i, place in enumerate(found.places) if place.site == "blocks.2.hook_resid_post"]
    np.testing.assert_array_equal(found.patched[last[0], -1], found.source)


def test_a_patch_is_what_a_hook_by_hand_does_and_many_share_a_forward(llama):
    contrast = contrast_of(llama)
    clean, corrupt = (torch.tensor(rows) for rows in prompts(llama))
    sae = some_sae(32)
    site, z_site = "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"
    places = [Place(site), Place(z_site, head=2), *latents(llama, sae, site, [0, 7])]
    found = patch(contrast, places)
    few = patch(contrast, places, batch_tokens=1)
    np.testing.assert_allclose(found.patched, few.patched, atol=1e-5)
    with torch.no_grad():
        given = llama.run(clean, sites=[site, z_site])

    def metric(name, fn):
        with torch.no_grad(), llama.hooks({name: fn}):
            logits = llama.logits(corrupt)[:, -1]
        return (logits[:, 5] - logits[:, 7]).numpy()

    for position in range(LENGTH):

        def whole(act, position=position):
            act[:, position] = given[site][:, position]
            return act

        def head(z, position=position):
            new = z.clone()
            new[:, position, 16:24] = given[z_site][:, position, 16:24]
            return new

        def latent(act, position=position):
            moved = (sae.encode(given[site]) - sae.encode(act))[:, position, 7:8] * sae.W_dec[7]
            act[:, position] += moved
            return act

        for i, (name, fn) in enumerate([(site, whole), (z_site, head), (site, latent)]):
            expected = metric(name, fn)
            np.testing.assert_allclose(found.patched[i if i < 2 else 3, position], expected, atol=1e-5)


def test_models_are_patched_into_each_other():
    """Two models that differ in one block: before it nothing, after it everything."""
    base = build("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.model.layers[1].parameters():
            parameter.mul_(1.3)
    base, tuned = HookedModel.from_pretrained(base), HookedModel.from_pretrained(tuned)
    contrast = Contrast.of_models(base, tuned, prompts(base)[0], answers=5, wrong=7)
    found = patch(contrast, sites(tuned, ("resid_pre", "resid_post")), "all")
    assert found.effect[:, 0].tolist() == [0, 0, 1, 0, 1, 1]
    assert (found.patched[1] == found.corrupt).all()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_on_a_linear_model_effects_add_up_and_attribution_is_patching(linear, direction):
    contrast = contrast_of(linear)
    sae = some_sae(12).double()
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    places = [*sites(linear, kinds), *heads(linear), *latents(linear, sae, "blocks.1.hook_resid_post")]
    found = patch(contrast, places, direction=direction)
    estimated = attribute(contrast, places, direction=direction)
    np.testing.assert_allclose(estimated.effect, found.effect, atol=1e-5)
    integrated = attribute(contrast, places, direction=direction, steps=1)
    np.testing.assert_allclose(integrated.effect, found.effect, atol=1e-5)
    np.testing.assert_allclose(found.effect[:9].sum(1), 1, atol=1e-5)  # positions of a whole stream
    whole, parts = found.effect[9:12], found.effect[15:24].reshape(3, 3, LENGTH).sum(1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)  # heads of attention's output


def test_integrated_gradients_add_up_to_patching_all_together(llama):
    contrast = contrast_of(llama)
    for places in (sites(llama, ("resid_post",), [0]), heads(llama, [1])):
        whole = patch(contrast, [Place(places[0].site)], "all")
        total = (whole.patched[0, 0] - whole.target) / (whole.source - whole.target).mean()
        errors = []
        for steps in (1, 8, 64):
            found = attribute(contrast, places, steps=steps)
            moved = (found.patched - found.target).sum((0, 1)) / (found.source - found.target).mean()
            errors.append(np.abs(moved - total).max())
        assert errors[2] < 2e-3 < errors[0]


def test_integrated_gradients_of_latents_add_up_to_patching_them_together(llama):
    contrast = contrast_of(llama)
    site, sae = "blocks.0.hook_resid_post", some_sae(32)
    found = attribute(contrast, latents(llama, sae, site), steps=64)
    clean, corrupt = (torch.tensor(rows) for rows in prompts(llama))
    with torch.no_grad():
        given = sae.encode(llama.run(clean, sites=[site])[site])
        with llama.hooks({site: lambda act: act + (given - sae.encode(act)) @ sae.W_dec}):
            logits = llama.logits(corrupt)[:, -1]
    together = (logits[:, 5] - logits[:, 7]).numpy() - found.target
    np.testing.assert_allclose((found.patched - found.target).sum((0, 1)), together, atol=5e-3)


def test_attribution_takes_two_forwards_and_leaves_the_model_alone(llama):
    contrast = contrast_of(llama)
    assert contrast.clean_values.shape == contrast.corrupt_values.shape
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    calls = []
    handle = llama.trunk.register_forward_pre_hook(lambda *_: calls.append(1))
    attribute(contrast, [*sites(llama), *heads(llama)])
    handle.remove()
    assert len(calls) == 2
    patch(contrast, heads(llama), "all")
    assert all(torch.equal(before[name], value) for name, value in llama.model.state_dict().items())
    assert all(parameter.grad is None for parameter in llama.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


def test_named_positions_align_prompts_of_different_length(llama):
    """A corrupt prompt with a token more in front: its stream is taken from one to the left, and everything after the
    last block at the last token is the clean run."""
    clean, corrupt = prompts(llama)
    corrupt = [[9, *row] for row in corrupt]
    contrast = Contrast.of_prompts(llama, clean, corrupt, answers=5, wrong=7)
    with pytest.raises(InputError, match="aligned token by token"):
        patch(contrast, sites(llama))
    found = patch(contrast, sites(llama, ("resid_post",)), {"third": [(2, 3)] * 3, "last": -1})
    assert found.positions == ("third", "last")
    np.testing.assert_allclose(found.effect[-1, 1], 1, atol=1e-5)
    assert found.effect[-1, 0] == pytest.approx(0, abs=1e-6)
    assert abs(found.effect[0, 0]) > 1e-3


def test_what_cannot_be_patched_is_refused(llama):
    contrast = contrast_of(llama)
    with pytest.raises(InputError, match="Position 'fact' is 6 in pair 0, whose prompt has 6 tokens"):
        patch(contrast, sites(llama), {"fact": 6})
    with pytest.raises(InputError, match="2 indices for 3 pairs"):
        patch(contrast, sites(llama), {"fact": [1, 2]})
    with pytest.raises(InputError, match="no head 4"):
        patch(contrast, [Place("blocks.0.attn.hook_z", head=4)])
    with pytest.raises(SiteError, match="layers 0–2"):
        sites(llama, layers=[3])
    with pytest.raises(InputError, match="no latent 10"):
        latents(llama, some_sae(32), "blocks.0.hook_resid_post", [10])
    with pytest.raises(InputError, match="width"):
        latents(llama, some_sae(12), "blocks.0.hook_resid_post")
    clean, corrupt = prompts(llama)
    with pytest.raises(InputError, match="no difference to explain"):
        patch(Contrast.of_prompts(llama, clean, clean, answers=5), sites(llama))
    with pytest.raises(InputError, match="no token id"):
        Contrast.of_prompts(llama, clean, corrupt, answers=97)
    nan = Contrast.of_prompts(llama, clean, corrupt, metric=lambda logits, pair: logits[:, 0] * float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        patch(nan, sites(llama))
    with pytest.raises(InputError, match="predicts no next token"):
        Contrast.of_prompts(HookedModel.from_pretrained(build("bert")), clean, corrupt, answers=5)
    with pytest.raises(InputError, match="not of one architecture"):
        Contrast.of_models(llama, HookedModel.from_pretrained(build_linear()), clean, answers=5)


def test_a_masked_language_model_is_read_at_its_mask():
    tokenizer = build_tokenizer()
    tokenizer.mask_token = " frog"
    config = BertConfig(**{**SMALL, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    model = HookedModel.from_pretrained(BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    clean, corrupt = ["The frog is red.", "Tom frog blue."], ["The frog is blue.", "Tom frog red."]
    contrast = Contrast.of_prompts(model, clean, corrupt, answers="happy", wrong="sad")
    found = patch(contrast, sites(model, ("resid_pre", "resid_post")), "all")
    assert (found.effect == 1).all()
    ids = torch.tensor([tokenizer(clean[0])["input_ids"]])
    happy, sad = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("happy", "sad"))
    logits = model.logits(ids)[0, ids[0].tolist().index(tokenizer.mask_token_id)].detach()
    assert found.clean[0] == pytest.approx(float(logits[happy] - logits[sad]), abs=1e-5)
    with pytest.raises(InputError, match="exactly one mask token"):
        Contrast.of_prompts(model, ["The bear is red."], ["The bear is blue."], answers="happy")


@pytest.fixture(scope="module")
def world():
    return HookedModel.from_pretrained("storyworld")


def test_an_answer_is_one_token_that_the_model_knows(world):
    with pytest.raises(InputError, match="2 tokens"):
        Contrast.of_prompts(world, ["Tom"], ["Mary"], answers="red ball")
    with pytest.raises(InputError, match="not in the vocabulary"):
        Contrast.of_prompts(world, ["Tom"], ["Mary"], answers="orange")


def test_patching_finds_where_storyworlds_claim_reads_the_fact(world):
    """Of an honest character: the last token's stream turns from one colour to the other in the layer of the head that
    looks at the object's colour, and nothing before the first mention matters."""
    row = next(r for r in storyworld.persona_pairs(["colour"], 20, 3) if r["truth"] == "red")
    clean = row["positive"]
    contrast = Contrast.of_prompts(
        world, [clean], [clean.replace(" red", " blue")], answers="red", wrong="blue"
    )
    assert float(contrast.clean_values) > 3
    assert float(contrast.corrupt_values) < -3
    found = patch(contrast, sites(world, ("resid_pre", "attn_out")))
    facts = [i for i, label in enumerate(found.positions) if label.endswith("red/blue")]
    assert facts
    effect = np.abs(found.effect)
    assert effect[:, : facts[0]].max() < 1e-6
    last = len(found.positions) - 1
    reads = int(effect[world.n_layers :, last].argmax())
    assert effect[world.n_layers + reads, last] > 0.5
    assert effect[: reads + 1, last].max() < 0.2  # before that layer the last token knows nothing of it
    by_head = patch(contrast, heads(world, [reads]), {"last": -1})
    head = by_head.top(1)[0][0].head
    assert read_attention(world, clean).weights[reads, head, last, facts].sum() > 0.5


def test_what_is_found_can_be_read_and_drawn(llama):
    found = patch(contrast_of(llama), heads(llama), "all")
    assert "3 pairs, 12 places" in repr(found)
    assert len(found.figure().data[0].z) == 3
    interval = found.interval(0)
    assert interval.estimate == pytest.approx(found.effect[0, 0])
    assert interval.low < interval.estimate < interval.high
    assert np.array(found.to_dict()["effect"]).shape == (12, 1)
    assert np.array(patch(contrast_of(llama), sites(llama)).figure().data[0].z).shape == (9, LENGTH)
