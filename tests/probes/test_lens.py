"""A lens ends in the model's own predictions; a tuned one begins as the logit lens; direct attribution adds up."""

import numpy as np
import pytest
import torch

from probes.direct import _unembedding, direct_attribution
from probes.lens import TunedLens, fit_tuned_lens, read_lens
from steerkit import storyworld
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.models import HookedModel
from tests.core.families import build
from tests.probes.linear_model import build_linear

PROMPTS = [[3, 17, 42, 8, 60], [9, 9, 31, 75], [55, 4, 12, 90, 23]]


@pytest.fixture(scope="module")
def world():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def texts():
    return [story.text for story in storyworld.sample(60, seed=11)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt-post-norm"])
def test_after_the_last_block_the_lens_is_the_model(family):
    model = HookedModel.from_pretrained(build(family))
    if family == "opt-post-norm":  # its states are projected after the last block
        with pytest.raises(InputError, match="more than a norm"):
            read_lens(model, PROMPTS, answers=5)
        return
    found = read_lens(model, PROMPTS, answers=5)
    assert found.kl.shape == (4, 3)
    assert (found.kl[-1] == 0).all()
    assert (found.kl[:-1] > 0).all()
    for i, ids in enumerate(PROMPTS):
        logits = model.logits(torch.tensor([ids]))[0, -1].detach()
        assert found.probability[-1, i] == pytest.approx(float(logits.softmax(-1)[5]), rel=1e-4)
        assert found.rank[-1, i] == int((logits > logits[5]).sum())
        assert found.top[-1, i] == int(logits.argmax())


def test_without_answers_the_answer_is_the_next_token(world, texts):
    found = read_lens(world, texts[:2])
    ids = torch.tensor([world.tokenizer(texts[1])["input_ids"]])
    with torch.no_grad():
        probability = world.logits(ids).softmax(-1)[0].gather(1, ids[0, 1:, None])
    own = found.probability[-1, found.document == 1]
    special = set(world.special_ids)
    read = [i for i in range(len(ids[0]) - 1) if not {int(ids[0, i]), int(ids[0, i + 1])} & special]
    np.testing.assert_allclose(own, probability[read, 0], rtol=1e-3, atol=1e-6)
    middle = found.mean("kl")[0]
    assert middle.low < middle.estimate < middle.high


def test_an_unfitted_tuned_lens_is_the_logit_lens(world, texts):
    plain = read_lens(world, texts[:3])
    lens = TunedLens(world.n_layers, world.d_model, world.fingerprint)
    np.testing.assert_array_equal(read_lens(world, texts[:3], lens=lens).kl, plain.kl)
    assert repr(fit_tuned_lens(world, texts[:3], steps=0)) == repr(lens)


def test_fitting_brings_held_out_text_nearer_and_survives_the_disk(world, texts, tmp_path):
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    lens = fit_tuned_lens(world, texts[:50], steps=15, batch_tokens=512)
    plain, tuned = (read_lens(world, texts[50:], lens=x).kl.mean(1) for x in (None, lens))
    assert (tuned[:-1] < 0.9 * plain[:-1]).all()
    assert tuned[-1] == 0
    assert all(torch.equal(before[name], value) for name, value in world.model.state_dict().items())
    assert all(parameter.grad is None for parameter in world.model.parameters())
    again = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    np.testing.assert_array_equal(
        read_lens(world, texts[50:52], lens=again).kl, read_lens(world, texts[50:52], lens=lens).kl
    )
    with pytest.raises(InputError, match="another model"):
        read_lens(HookedModel.from_pretrained(build("llama")), PROMPTS, answers=5, lens=again)
    (tmp_path / "lens.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        TunedLens.load(tmp_path / "lens.safetensors")


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "neox", "phi", "linear"]
)
def test_direct_attribution_adds_up_to_the_logit_difference(family):
    model = HookedModel.from_pretrained(build_linear() if family == "linear" else build(family))
    prompts = [[i % model.d_vocab for i in ids] for ids in PROMPTS]
    found = direct_attribution(model, prompts, answers=5, wrong=7)
    for i, ids in enumerate(prompts):
        logits = model.logits(torch.tensor([ids]))[0, -1].detach()
        assert found.total[i] == pytest.approx(float(logits[5] - logits[7]), abs=1e-5)
    np.testing.assert_allclose(sum(found.parts().values()), found.total, atol=1e-4)
    assert np.abs(found.heads).max() > 1e-3
    one = direct_attribution(model, prompts, answers=5)
    np.testing.assert_allclose(sum(one.parts().values()), one.total, atol=1e-4)


def test_a_heads_share_is_what_its_output_matrix_writes():
    """By hand on Llama: z_h W_O,h times the final norm's gain over the stream's size, times the unembedding."""
    model = HookedModel.from_pretrained(build("llama"))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        acts = model.run(ids, sites=["blocks.1.attn.hook_z", "blocks.2.hook_resid_post"])
        last = acts["blocks.2.hook_resid_post"][0, -1]
        scale = (last.square().mean() + model.model.config.rms_norm_eps).sqrt()
        o_proj = model.model.model.layers[1].self_attn.o_proj.weight
        written = o_proj[:, 16:24] @ acts["blocks.1.attn.hook_z"][0, -1, 16:24]
        direction = model.W_U[:, 5] - model.W_U[:, 7]
        expected = float((written * model.model.model.norm.weight / scale) @ direction)
    found = direct_attribution(model, PROMPTS[:1], answers=5, wrong=7)
    assert found.heads[1, 2, 0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "not the sum of its heads"),
        ("gemma3", "not the sum of its heads"),
        ("opt-post-norm", "post-norm"),
    ],
)
def test_direct_attribution_refuses_what_does_not_add_up(family, reason):
    model = HookedModel.from_pretrained(build(family))
    with pytest.raises(InputError, match=reason):
        direct_attribution(model, PROMPTS, answers=5, wrong=7)


def test_a_capped_head_is_no_sum(world):
    """The cap bends the logits, whatever the blocks do."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedModel.from_pretrained(Gemma2ForCausalLM(config).eval())
    with pytest.raises(InputError, match="soft cap"):
        _unembedding(model, torch.tensor([5]), torch.tensor([7]))
    bfloat = HookedModel.from_pretrained(build("llama").bfloat16())
    with pytest.raises(InputError, match="float32"):
        direct_attribution(bfloat, PROMPTS, answers=5)


def test_nan_is_named_and_texts_of_one_token_refused(world):
    model = HookedModel.from_pretrained(build("llama"))
    model.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        read_lens(model, PROMPTS, answers=5)
    with pytest.raises(NumericsError, match="NaN"):
        direct_attribution(model, PROMPTS, answers=5)
    with pytest.raises(InputError, match="followed by another"):
        read_lens(world, ["Tom"])


def test_what_is_found_can_be_read_and_drawn(world, texts):
    found = read_lens(world, texts[:3])
    assert "logit lens" in repr(found)
    assert len(found.figure().data) == 2
    direct = direct_attribution(world, texts[:2], answers="red", wrong="blue")
    assert "logit of the answer" in repr(direct)
    assert len(direct.figure().data[0].x) == len(direct.to_dict()["parts"]) == 4 * (4 + 2) + 2
