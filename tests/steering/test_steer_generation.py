"""The same tokens are steered in `generate`, with a cache and without, where a model's `generate` goes ways of its own."""

import sys
from pathlib import Path

import pytest
import torch

from steerkit import HookedModel
from steerkit.errors import InputError
from steerkit.steering import Condition, SteeringVector, WeightDelta, Where

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

IDS = torch.tensor([[1, 6, 7, 8, 9, 10, 11]])
WHERES = {
    "every token": Where.every_token(),
    "all but BOS": Where(),
    "prompt": Where.prompt_only(),
    "generation": Where.generation_only(),
    "positions": Where.positions(2, -1),
}


def vector_at(model, site, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return SteeringVector.add({site: scale * torch.randn(model.site(site).width, generator=generator)})


# T5: the encoder is run once, by itself


@pytest.fixture(scope="module")
def t5():
    return HookedModel.from_pretrained(build("t5"))


def continued(model, ids, **options):
    """(tokens, logits of each step)."""
    mask = torch.ones_like(ids)
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "attention_mask": mask,
        **options,
    }
    found = model.model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **options)
    return found.sequences, torch.stack(found.logits, 1)


def same(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WHERES)
@pytest.mark.parametrize("site", ["encoder.blocks.1.hook_resid_post", "decoder.blocks.1.hook_resid_post"])
def test_both_stacks_of_t5_are_steered_as_in_a_forward(t5, site, name):
    ids, where, vector = torch.cat([IDS, IDS + 20]), WHERES[name], vector_at(t5, site)
    with t5.steer(vector, where=where):
        told, logits = continued(t5, ids)
        assert same(logits, continued(t5, ids, use_cache=False)[1])
        beams = continued(t5, ids, num_beams=3)[1]
        assert same(beams, continued(t5, ids, num_beams=3, use_cache=False)[1])
    with t5.steer(vector, where=where, prompt_lengths=[1, 1]), torch.no_grad():
        whole = t5.model(input_ids=ids, decoder_input_ids=told[:, :-1]).logits
    assert same(whole, logits)
    nothing_there = site.startswith("encoder") and not where.prompt  # the encoder's text is all prompt
    assert same(logits, continued(t5, ids)[1]) == nothing_there


def test_pads_of_the_encoder_change_nothing(t5):
    vector = vector_at(t5, "encoder.blocks.1.hook_resid_post")
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with t5.steer(vector):
        assert same(continued(t5, padded, attention_mask=mask)[1], continued(t5, IDS)[1])


def test_weights_of_t5_change_as_if_they_were_others(t5):
    generator = torch.Generator().manual_seed(0)
    paths = ["encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.0.layer.1.EncDecAttention.v"]
    edits = []
    for path in paths:
        out, inward = t5.model.get_submodule(path).weight.shape
        A, B = (torch.randn(*shape, generator=generator) / 2 for shape in ((2, inward), (out, 2)))
        edits.append(WeightDelta(path, A, B))
    vector = SteeringVector(tuple(edits), where=Where.every_token())
    with t5.steer(vector):
        _, logits = continued(t5, IDS)
    changed = build("t5")
    with torch.no_grad():
        for edit in edits:
            changed.get_submodule(edit.site).weight += edit.B @ edit.A
    assert same(logits, continued(HookedModel.from_pretrained(changed), IDS)[1])
    assert not same(logits, continued(t5, IDS)[1])


def test_a_condition_of_the_other_stack_is_refused(t5):
    vector = vector_at(t5, "decoder.blocks.1.hook_resid_post")
    condition = Condition("encoder.blocks.0.hook_resid_post", torch.ones(32), 0.0)
    steered = t5.steer(SteeringVector(vector.edits, condition=condition))
    with pytest.raises(InputError, match="steers another"), steered:
        pass


# TransformerLens: its `generate` calls `forward` past the hooks, on embeddings, with a cache of its own


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)} | {"<unk>": 96}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["HookedTransformer", "TransformerBridge"])
def lens(request, tmp_path_factory):
    library = pytest.importorskip("transformer_lens")
    if request.param == "HookedTransformer":
        config = library.HookedTransformerConfig(
            n_layers=2, d_model=32, n_ctx=40, d_head=8, n_heads=4, d_mlp=48, d_vocab=97, act_fn="gelu", device="cpu",
            init_weights=True, seed=0, initializer_range=0.3, normalization_type="RMS", gated_mlp=True,
            positional_embedding_type="rotary", rotary_dim=8, n_key_value_heads=2,
        )  # fmt: skip
        return HookedModel.from_pretrained(library.HookedTransformer(config), tokenizer=words())
    from transformer_lens.model_bridge import TransformerBridge

    place = tmp_path_factory.mktemp("bridge")
    words().save_pretrained(place)
    build("llama").save_pretrained(place)
    return HookedModel.from_pretrained(TransformerBridge.boot_transformers(str(place)), tokenizer=words())


@pytest.mark.parametrize("name", WHERES)
def test_transformer_lens_steers_the_same_tokens_with_its_cache_and_without(lens, name):
    where, vector = WHERES[name], vector_at(lens, "blocks.1.hook_resid_post")
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "tokens"}

    def told(cache):
        return lens.model.generate(IDS, use_past_kv_cache=cache, stop_at_eos=False, **options)

    expected = IDS
    with torch.no_grad():
        for _ in range(6):  # whole forwards, told where the prompt ends
            with lens.steer(vector, where=where, prompt_lengths=[IDS.shape[1]]):
                expected = torch.cat([expected, lens.logits(expected)[:, -1:].argmax(-1)], 1)
        plain, own = told(True), vars(lens.model).get("forward")
        with lens.steer(vector, where=where):
            assert torch.equal(told(True), expected)
            assert torch.equal(told(False), expected)
        assert vars(lens.model).get("forward") is own
        assert torch.equal(told(True), plain)


def test_transformer_lens_is_given_token_ids_while_it_is_steered(lens):
    with (
        lens.steer(vector_at(lens, "blocks.1.hook_resid_post")),
        pytest.raises(InputError, match="token ids"),
    ):
        lens.model.generate("w5 w6", max_new_tokens=2, verbose=False)
