"""MAM: the prefix is keys and values of attention, and nothing else moves."""

import pytest
import torch
import transformers

from steerkit import adapters
from steerkit.errors import InputError
from steerkit.models import HookedModel

N = 5


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tuned(model):
    made = adapters.get(model, "mam", rank=4, prefix=N)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    yield made
    made.remove()


def prefixes(tuned):
    return [
        edit
        for layer in tuned.tuner_layers().values()
        for edit in layer.steerkit_edits.values()
        if hasattr(edit, "K")
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_prefix_is_what_a_filled_cache_would_be(model_folder, ids, implementation):
    raw = transformers.AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=implementation)
    model = HookedModel.from_pretrained(raw.eval())
    tuned = adapters.get(model, "mam", rank=4, prefix=N)
    cache = transformers.DynamicCache()
    for layer, edit in enumerate(prefixes(tuned)):
        with torch.no_grad():
            for tensor in (edit.K, edit.V):
                tensor.normal_(generator=torch.Generator().manual_seed(layer))
            edit.V.mul_(3)
            cache.update(*(t.expand(len(ids), -1, -1, -1).clone() for t in (edit.K, edit.V)), layer)
    found = tuned.logits(ids).detach()
    tuned.remove()
    with torch.no_grad():
        expected = raw(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=torch.ones(len(ids), N + ids.shape[1], dtype=torch.int64),
            position_ids=torch.arange(ids.shape[1]).expand(len(ids), -1),
        ).logits
    assert not torch.allclose(found, model.logits(ids), atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_logits_are_those_of_the_text(tuned, ids):
    assert tuned.logits(ids).shape == (*ids.shape, tuned.d_vocab)
    torch.testing.assert_close(tuned.logits(ids[:, :5]), tuned.logits(ids)[:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing(tuned, ids, side):
    pads = torch.full((3, 2), tuned.pad_id)
    rows = torch.cat([pads, ids] if side == "left" else [ids, pads], 1)
    mask = torch.cat([pads * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pads * 0], 1)
    found = tuned.logits(rows, mask)
    found = found[:, 2:] if side == "left" else found[:, :-2]
    torch.testing.assert_close(found, tuned.logits(ids), rtol=0, atol=1e-5)


def test_text_is_generated_alike_with_and_without_a_cache(tuned, ids):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tuned.pad_id}
    mask = torch.ones_like(ids)
    with_cache, without = (
        tuned.model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_all_sites_stay(tuned):
    assert all(site.verified for site in tuned.sites.values())


def test_an_encoder_takes_it_too(tokenizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = HookedModel.from_pretrained(transformers.BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    tuned = adapters.get(model, "mam", rank=4, prefix=N)
    with torch.no_grad():
        for edit in prefixes(tuned):
            edit.K.normal_()
            edit.V.normal_()
    ids = torch.randint(5, model.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    torch.testing.assert_close(tuned.logits(ids, mask)[:1, :5], tuned.logits(ids[:1, :5]), rtol=0, atol=1e-5)


def test_attention_that_hands_its_keys_to_no_cache_is_refused(tokenizer):
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    model = HookedModel.from_pretrained(
        transformers.DistilBertForMaskedLM(config).eval(), tokenizer=tokenizer
    )
    names = list(dict(model.model.named_modules()))
    with pytest.raises(InputError, match="cache of keys and values"):
        adapters.get(model, "mam", rank=4, prefix=N)
    assert list(dict(model.model.named_modules())) == names


def test_scaled_the_prefix_counts_so_many_times(model, ids):
    once, twice = (adapters_of_length(model, n) for n in (N, 2 * N))
    found = []
    for make, alpha in ((once, 1.0), (twice, 0.5), (once, 0.0)):
        tuned = make()
        with tuned.scaled(alpha):
            found.append(tuned.logits(ids).detach())
            if alpha == 0.5:
                options = {"max_new_tokens": 3, "do_sample": False, "use_cache": True}
                assert tuned.model.generate(input_ids=ids, **options).shape[1] == ids.shape[1] + 3
        with pytest.raises(InputError, match="negative"), tuned.scaled(-1.0):
            tuned.logits(ids)
        tuned.remove()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], model.logits(ids), rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-2)


def adapters_of_length(model, length):
    """Makes MAM adapters whose prefix is N vectors, again and again."""

    def make():
        tuned = adapters.get(model, "mam", rank=4, prefix=length)
        for layer, edit in enumerate(prefixes(tuned)):
            heads, _, width = edit.K.shape
            generator = torch.Generator().manual_seed(layer)
            with torch.no_grad():
                for tensor in (edit.K, edit.V):
                    one = torch.randn(heads, N, width, generator=generator)
                    tensor.copy_(one.repeat(1, length // N, 1))
        return tuned

    return make
