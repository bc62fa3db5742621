"""Heads, neurons and attention: equal to the definitions worked out by hand, and to closed forms."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from probes.attention import attention_scores, read_attention, rotary_usage
from probes.heads import head_importance
from probes.neurons import key_contexts, neuron_memories, value_rows, value_tokens
from steerkit.errors import InputError, NumericsError, SiteError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer
from tests.core.families import FAMILIES, build

TEXTS = [
    "Tom is a happy bear. Tom carries a red ball.",
    "Mary walks to the park in the rain.",
    "The ball is blue. The ball is red.",
]


@pytest.fixture(scope="module", autouse=True)
def words():
    """Families' vocabularies are smaller than StoryWorld's: a tokenizer needs as many rows."""
    return build_tokenizer()


def model_of(family, words, seed=0):
    import transformers

    config_class, model_class, options = FAMILIES[family]
    options = {**options, "vocab_size": len(words)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    return HookedModel.from_pretrained(model.eval(), tokenizer=words)


@pytest.fixture(scope="module")
def llama(words):
    return model_of("llama", words)


def loss(model, text):
    """Cross-entropy of each next token of a text alone, special tokens not counted."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    logits = model.logits(ids)[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    special = torch.tensor([int(i) in model.special_ids for i in ids[0]])
    return losses[~(special[:-1] | special[1:])]


def test_zero_ablation_is_the_loss_without_the_heads_columns(llama):
    found = head_importance(llama, TEXTS, "zero")
    weight = llama.model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        before = torch.cat([loss(llama, text) for text in TEXTS]).mean()
        kept = weight[:, 8:16].clone()
        weight[:, 8:16] = 0
        after = torch.cat([loss(llama, text) for text in TEXTS]).mean()
        weight[:, 8:16] = kept
    assert found.scores[1, 1] == pytest.approx(float(after - before), abs=1e-5)
    assert found.interval(1, 1).estimate == pytest.approx(found.scores[1, 1])


def test_the_gradient_is_the_slope_in_a_mask_of_the_head(words):
    model = model_of("llama", words)
    model.model.double()
    found = head_importance(model, TEXTS, "gradient")
    slopes, step = [], 1e-5
    for text in TEXTS:
        ends = []
        for mask in (1 + step, 1 - step):

            def scaled(z, mask=mask):
                new = z.clone()
                new[..., 8:16] *= mask
                return new

            with torch.no_grad(), model.hooks({"blocks.2.attn.hook_z": scaled}):
                ends.append(float(loss(model, text).mean()))
        slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    assert found.scores[2, 1] == pytest.approx(np.mean(slopes), rel=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found.normalized, axis=1), 1)


@pytest.mark.parametrize("method", ["zero", "mean", "gradient"])
def test_a_head_that_says_nothing_is_worth_nothing(words, method):
    model = model_of("gpt2", words)
    with torch.no_grad():  # values of head 3 of layer 1
        for parameter in (
            model.model.transformer.h[1].attn.c_attn.weight,
            model.model.transformer.h[1].attn.c_attn.bias,
        ):
            parameter[..., 64 + 24 :] = 0
    found = head_importance(model, TEXTS, method)
    assert abs(found.scores[1, 3]) < 1e-7
    assert np.abs(np.delete(found.scores, 7)).min() > 1e-7
    assert "1.3" not in repr(found)
    assert found.figure().data[0].z.shape == (3, 4)


def test_a_head_whose_output_never_changes_is_worth_nothing_beside_its_mean(words):
    """Zeroing it is not the same: what it always adds is gone."""
    model = model_of("gpt2", words)
    attention = model.model.transformer.h[1].attn.c_attn
    with torch.no_grad():
        attention.weight[:, 64 + 24 :] = 0
        attention.bias[64 + 24 :] = 1
    assert abs(head_importance(model, TEXTS, "mean").scores[1, 3]) < 1e-6
    assert abs(head_importance(model, TEXTS, "zero").scores[1, 3]) > 1e-3


def test_a_masked_language_models_heads_are_measured_by_their_predictions(words):
    model = model_of("bert", words)
    assert (head_importance(model, TEXTS, "zero").scores > 0).all()
    with pytest.raises(InputError, match="does not predict the next token"):
        head_importance(model, TEXTS, "gradient")


def test_value_rows_are_columns_of_the_down_projection(llama, words):
    down = llama.model.model.layers[1].mlp.down_proj.weight.detach()
    torch.testing.assert_close(value_rows(llama, 1), down.T)
    found = value_tokens(llama, 1, [4, 40], n_tokens=3)
    logits = (down.T * llama.model.model.norm.weight.detach()) @ llama.W_U.detach()
    for neuron, value in found.items():
        top = logits[neuron].topk(3)
        assert value.ids == tuple(top.indices.tolist())
        assert value.tokens == tuple(words.convert_ids_to_tokens(top.indices.tolist()))
        np.testing.assert_allclose(value.logits, top.values, rtol=1e-4)
    gpt2 = model_of("gpt2", words)
    torch.testing.assert_close(value_rows(gpt2, 0), gpt2.model.transformer.h[0].mlp.c_proj.weight.detach())


def test_keys_are_the_texts_in_which_a_neuron_fires_most(llama):
    site = "blocks.1.mlp.hook_post"
    found = key_contexts(llama, TEXTS, 1, [4, 40])
    for neuron, contexts in found.items():
        expected = []
        for document, text in enumerate(TEXTS):
            acts = llama.activations([text], [site])[site][:, neuron]
            expected.append((float(acts.max()), document, int(acts.argmax())))
        expected = sorted((e for e in expected if e[0] > 0), reverse=True)
        assert [c.document for c in contexts] == [document for _, document, _ in expected]
        for context, (value, document, position) in zip(contexts, expected):
            assert context.activation == pytest.approx(value, abs=1e-5)
            ids = llama.tokenizer(TEXTS[document], add_special_tokens=False)["input_ids"]
            assert context.text == llama.tokenizer.decode(ids[max(0, position - 15) : position + 1])
            assert context.next_id == (ids[position + 1] if position + 1 < len(ids) else -1)


def test_memories_hold_both_and_count_where_they_agree(llama):
    found = neuron_memories(llama, TEXTS, 2)
    assert set(found.values) == set(found.keys) == set(range(48))
    pairs = [(n, c) for n, contexts in found.keys.items() for c in contexts if c.next_id >= 0]
    assert found.agreement == np.mean([found.values[n].ids[0] == c.next_id for n, c in pairs])
    assert "48 neurons of layer 2" in repr(found)
    with pytest.raises(InputError, match="no neuron 48"):
        value_tokens(llama, 0, [48])
    with pytest.raises(SiteError, match="layers 0–2"):
        value_tokens(llama, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "opt", "bert", "qwen3"])
def test_weights_are_the_models_own(words, family):
    model = model_of(family, words)
    before = model.model.config._attn_implementation
    found = read_attention(model, TEXTS[0])
    assert model.model.config._attn_implementation == before
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)
    eager = type(model.model)._from_config(model.model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.model.state_dict())
    ids = torch.tensor([words(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
    np.testing.assert_allclose(found.weights, torch.cat(expected), atol=1e-5)


def test_a_model_whose_attention_raises_is_left_as_it_was(llama):
    def fail(act):
        raise RuntimeError("stop")

    before = llama.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), llama.hooks({"blocks.1.attn.hook_z": fail}):
        read_attention(llama, TEXTS[0])
    assert llama.model.config._attn_implementation == before


def test_attention_that_never_chooses_has_closed_forms(words):
    model = model_of("llama", words)
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = attention_scores(model, TEXTS, n_random=2, random_length=5)
    rows = [words(text)["input_ids"] for text in TEXTS]
    seen = np.concatenate([
        [i + 1 for i in range(1, len(row)) if row[i] not in model.special_ids] for row in rows
    ])  # fmt: skip
    np.testing.assert_allclose(found["entropy"], np.log(seen).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["first_token"], (1 / seen).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["previous_token"], (1 / seen).mean(), rtol=1e-5)
    bos = model.bos_id is not None
    np.testing.assert_allclose(found["induction"], (1 / (np.arange(6, 11) + bos)).mean(), rtol=1e-5)
    assert found.interval("entropy", 0, 0).estimate == pytest.approx(found["entropy"][0, 0])
    assert len(found.figure().data) == 4
    with pytest.raises(InputError, match="no score 'sharpness'"):
        found["sharpness"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox", "phi"])
def test_rotary_frequencies_make_up_the_logits(words, family):
    """NeoX and Phi turn a part of each head only: the rest has frequency 0."""
    model = model_of(family, words)
    found = rotary_usage(model, TEXTS)
    np.testing.assert_allclose(found.share.sum(-1), 1, atol=1e-6)
    assert (found.norm >= 0).all()
    assert found.frequencies[0] == 1
    assert (found.frequencies[-1] == 0) == (family in ("neox", "phi"))
    assert found.share.shape == found.norm.shape == (3, 4, len(found.frequencies))
    assert "frequencies" in repr(found)
    assert len(found.figure().data[0].y) == 12


def test_a_head_that_uses_one_frequency_is_found(words):
    """Llama turns coordinate i with i + d/2."""
    model = model_of("llama", words)
    with torch.no_grad():
        q = model.model.model.layers[1].self_attn.q_proj.weight.view(4, 8, 32)
        kept = q[2, [1, 5]].clone()
        q[2] = 0
        q[2, [1, 5]] = kept
    share = rotary_usage(model, TEXTS).share[1]
    np.testing.assert_allclose(share[2], [0, 1, 0, 0], atol=1e-6)
    assert np.abs(share[0]).min() > 1e-6


def test_texts_of_one_token_are_refused(llama):
    for read in (head_importance, rotary_usage):
        with pytest.raises(InputError, match="give longer"):
            read(llama, ["Tom"])
    with pytest.raises(InputError, match="give longer"):
        head_importance(llama, ["Tom"], "gradient")
    with pytest.raises(InputError, match="at least one"):
        value_tokens(llama, 0, [])


@pytest.mark.parametrize("method", ["zero", "gradient"])
def test_nan_is_named(words, method):
    model = model_of("llama", words)
    model.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        head_importance(model, TEXTS, method)
    with pytest.raises(NumericsError, match="layer 2"):
        read_attention(model, TEXTS[0])


def test_models_without_rotary_embeddings_or_one_stack_are_refused(words):
    with pytest.raises(InputError, match="no rotary embedding"):
        rotary_usage(model_of("gpt2", words), TEXTS)
    with pytest.raises(InputError, match="two stacks"):
        attention_scores(HookedModel.from_pretrained(build("t5"), tokenizer=words), ["a"])
