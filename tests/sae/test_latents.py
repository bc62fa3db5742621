"""Statistics of latents against plain, slow definitions, on a tiny random model."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch

from sae.architectures.topk import TopK
from sae.latents import (
    N_INTERVALS,
    N_PER_INTERVAL,
    N_SAMPLED,
    N_TOP,
    WINDOW,
    LatentStats,
    collect_latents,
    logit_effects,
)
from steerkit.activations import Tokenization, token_batches
from steerkit.data import Permutation, load_documents
from steerkit.errors import CheckpointError, InputError
from steerkit.models import HookedModel

SITE = "blocks.0.hook_resid_post"
N_TOKENS = 3_000


@pytest.fixture(scope="module")
def model() -> HookedModel:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from steerkit.storyworld import model_path

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def documents():
    stories = load_documents("storyworld")
    return load_documents([stories[i] for i in range(120)])


@pytest.fixture(scope="module")
def sae():
    sae = TopK(d_sae=96, k=6).build(32)
    generator = torch.Generator().manual_seed(1)
    sae.initialise(torch.randn(8, 32, generator=generator), torch.zeros(32), generator)
    with torch.no_grad():
        sae.W_enc[:, 90:] = 0
        sae.b_enc[90:] = -1e3
    return sae


@pytest.fixture(scope="module")
def stats(model, sae, documents) -> LatentStats:
    return collect_latents(model, sae, documents, SITE, tokens=N_TOKENS, quiet=True)


@pytest.fixture(scope="module")
def truth(model, sae, documents):
    """(rows of token ids, latents of each row with 0 where a token doesn't count)"""
    rows, latents = [], []
    order = Permutation(len(documents), 0, 0)
    for batch in token_batches(model, documents, None, max_tokens=N_TOKENS, order=order):
        with torch.no_grad():
            acts = model.run(batch.input_ids, sites=[SITE])[SITE]
            found = sae.encode(acts) * batch.keep[..., None]
        for ids, mask, values in zip(batch.input_ids, batch.attention_mask, found):
            n = int(mask.sum())
            rows.append(ids[:n].numpy())
            latents.append(values[:n].numpy())
    return rows, latents


def test_counts_maxima_and_means(stats, truth):
    latents = np.concatenate(truth[1])
    active = (latents > 0).sum(0)
    assert stats.n_tokens == N_TOKENS
    np.testing.assert_array_equal(stats.count, active)
    np.testing.assert_allclose(stats.density, active / N_TOKENS)
    np.testing.assert_allclose(stats.maximum, latents.max(0), rtol=1e-5)
    np.testing.assert_allclose(stats.mean, latents.sum(0) / np.maximum(active, 1), rtol=1e-4, atol=1e-7)
    assert (stats.count[90:] == 0).all()


def test_it_is_told_in_a_line(stats, truth):
    told = repr(stats)
    assert "\n" not in told
    assert len(told) < 250
    assert f"{len(stats.count)} latents" in told
    assert f"{(stats.count == 0).sum()} of them silent" in told


def test_histogram_counts_every_active_token_in_its_bin(stats, truth):
    np.testing.assert_array_equal(stats.histogram.sum(1), stats.count)
    values = np.concatenate(truth[1])
    values = values[values > 0].astype(np.float64)
    near = np.abs(values[:, None] / stats.edges[None, 1:-1] - 1).min() < 1e-4
    expected, _ = np.histogram(values, stats.edges)
    if near:
        assert np.abs(np.cumsum(expected) - np.cumsum(stats.histogram.sum(0))).max() <= 3
    else:
        np.testing.assert_array_equal(stats.histogram.sum(0), expected)


def test_strongest_contexts_are_the_rows_with_the_highest_maxima(stats, truth):
    peaks = np.stack([latents.max(0) for latents in truth[1]])
    for latent in range(stats.d_sae):
        top = [example for example in stats.examples(latent) if example.interval == 0]
        expected = np.sort(peaks[:, latent][peaks[:, latent] > 0])[::-1][:N_TOP]
        np.testing.assert_allclose([example.activation for example in top], expected, rtol=1e-4)
        assert len({example.row for example in top}) == len(top)


def test_examples_show_the_activations_of_their_row(stats, truth):
    rows, latents = truth
    where = defaultdict(list)
    for number, ids in enumerate(rows):
        where[tuple(ids)].append(number)
    for latent in range(0, stats.d_sae, 7):
        for example in stats.examples(latent):
            matches = []
            for number in where[tuple(stats.row(example.row))]:
                line = np.pad(latents[number][:, latent], WINDOW)
                window = line[example.position : example.position + 2 * WINDOW + 1]
                matches.append(np.allclose(window, example.window, atol=example.activation / 255 + 1e-6))
            assert any(matches)
            assert example.window[WINDOW] == pytest.approx(example.activation, rel=1e-5)


@pytest.mark.parametrize("n_rows", [0, 7, N_TOP, N_TOP + 3, N_TOP + 12, 80, 400])
def test_fifths_are_ordered_full_and_apart_from_the_strongest(n_rows):
    activations = np.random.default_rng(0).exponential(size=n_rows).astype(np.float32)
    kinds, values, rows = sampled(activations, seed=0)
    fifths = [values[kinds == i + 1] for i in range(N_INTERVALS)]
    for weaker, stronger in itertools.pairwise([fifth for fifth in fifths if len(fifth)]):
        assert weaker.max() <= stronger.min()
    assert len(set(rows)) == len(rows) == (kinds == 0).sum() + sum(map(len, fifths))
    np.testing.assert_allclose(values[kinds == 0], np.sort(activations)[::-1][:N_TOP])
    others = min(max(n_rows - N_TOP, 0), N_SAMPLED - N_TOP)
    assert all(min(others // N_INTERVALS, N_PER_INTERVAL) <= len(fifth) <= N_PER_INTERVAL for fifth in fifths)


def test_samples_are_drawn_evenly_from_the_rows():
    """Over many seeds the shares of the sample are those of the rows, strongest ones left out."""
    activations = np.concatenate([np.full(900, 0.19), np.full(100, 0.01), np.ones(N_TOP)])
    shares = []
    for seed in range(40):
        kinds, values, _ = sampled(activations.astype(np.float32), seed)
        shares.append((values[kinds > 0] > 0.1).mean())
    assert 0.85 < np.mean(shares) < 0.95


def sampled(activations: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(0 or fifth, activation, row) of the examples of a latent with these activations, each in a row of its own."""
    from sae.latents import _Pass

    pass_ = _Pass(TopK(d_sae=1, k=1).build(1), seed)
    pass_._keep_contexts(torch.from_numpy(activations)[:, None, None], 0)
    pass_.rows, pass_.row_document = [np.zeros(1, np.int32)] * len(activations), [0] * len(activations)
    found = pass_._examples()
    return found["example_interval"], found["example_activation"], found["example_row"]


def test_a_token_that_does_not_count_may_be_anything(model, sae, documents):
    """NaN at a pad or a sink reaches nothing."""
    from sae.latents import _Pass

    batch = next(iter(token_batches(model, documents[:4])))
    with torch.no_grad():
        acts = model.run(batch.input_ids, sites=[SITE])[SITE]
        passes = [_Pass(sae, 0), _Pass(sae, 0)]
        for pass_, rest in zip(passes, (0.0, float("nan"))):
            pass_.add(batch, acts.masked_fill(~batch.keep[..., None], rest), batch.keep)
    plain, odd = (pass_.finish() for pass_ in passes)
    for name in plain:
        np.testing.assert_array_equal(plain[name], odd[name], err_msg=name)


def test_top_tokens_are_those_with_the_largest_sums(stats, truth):
    ids, latents = np.concatenate(truth[0]), np.concatenate(truth[1])
    for latent in range(0, 90, 11):
        sums = np.bincount(ids, weights=latents[:, latent], minlength=500)
        best = np.sort(sums)[::-1][:10]
        here = stats.token_ids[latent]
        np.testing.assert_allclose(sums[here[here >= 0]], best[best > 0], rtol=1e-4)
        np.testing.assert_allclose(
            stats.token_share[latent][here >= 0], best[best > 0] / sums.sum(), rtol=1e-4
        )
        token = here[0]
        active = latents[(ids == token) & (latents[:, latent] > 0), latent]
        assert stats.token_count[latent, 0] == len(active)
        assert stats.token_mean[latent, 0] == pytest.approx(active.mean(), rel=1e-4)


def test_rare_tokens_are_dropped_before_frequent_ones():
    from sae.latents import _TokenSums

    sums = _TokenSums(d_sae=2, limit=8)
    rng = np.random.default_rng(0)
    for _ in range(30):
        latent = np.repeat([0, 1], 200)
        token = np.concatenate([rng.integers(0, 3, 200), rng.integers(100, 9_000, 200)])
        sums.add(latent, token, np.ones(400))
        sums._merge()
    assert len(sums.key) <= 16
    found = sums.finish(np.array([6_000.0, 6_000.0]))
    assert set(found["token_ids"][0][:3]) == {0, 1, 2}
    assert found["token_count"][0].sum() == 6_000


def test_neighbours_are_the_nearest_decoder_directions(stats, sae):
    W = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosine = W @ W.T
    cosine.fill_diagonal_(-2)
    best = cosine.topk(10, dim=1)
    np.testing.assert_allclose(stats.neighbour_cosine, best.values.numpy(), atol=1e-5)
    assert (stats.neighbours != np.arange(stats.d_sae)[:, None]).all()
    alive = torch.cosine_similarity(sae.W_enc.detach().T, sae.W_dec.detach(), dim=1)
    np.testing.assert_allclose(stats.encoder_cosine[:90], alive[:90].numpy(), atol=1e-5)


def test_logit_effects_go_through_the_final_norms_gain(model, sae):
    """What a direction adds to the logits, up to the final norm's division by the stream's size."""
    model = model.randomized(seed=3)
    with torch.no_grad():
        model.model.model.norm.weight.uniform_(0.5, 2.0)
    effects = logit_effects(model, sae, "blocks.1.hook_resid_post")
    weight = model.model.model.norm.weight.detach()
    expected = (sae.W_dec.detach() * weight) @ model.W_U.detach()
    for latent in (0, 17):
        top = expected[latent].topk(10)
        np.testing.assert_array_equal(effects["logit_ids"][latent, :10], top.indices.numpy())
        np.testing.assert_allclose(effects["logit_values"][latent, :10], top.values.numpy(), rtol=1e-3)
        low = expected[latent].topk(10, largest=False)
        np.testing.assert_array_equal(effects["logit_ids"][latent, 10:], low.indices.flip(0).numpy())


def test_logit_effects_centre_where_the_final_norm_does(sae):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.uniform_(0.5, 2.0)
        gpt2.transformer.ln_f.bias.normal_()
    effects = logit_effects(HookedModel.from_pretrained(gpt2), sae, SITE)
    W = sae.W_dec.detach()
    expected = (W - W.mean(1, keepdim=True)) * gpt2.transformer.ln_f.weight.detach() @ gpt2.lm_head.weight.T
    np.testing.assert_allclose(
        effects["logit_values"][:, :10], expected.topk(10, dim=1).values.detach(), rtol=1e-3
    )


def test_a_small_gain_is_not_taken_for_centring(model, sae):
    norm = model.model.model.norm
    before = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(1e-3)
    found = logit_effects(model, sae, SITE)["logit_values"]
    with torch.no_grad():
        norm.weight.copy_(before)
    expected = (1e-3 * sae.W_dec @ model.W_U).topk(10, dim=1).values.detach()
    np.testing.assert_allclose(found[:, :10], expected, rtol=1e-3)


def test_no_logit_effects_through_a_head_with_layers_of_its_own(sae):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    bert = HookedModel.from_pretrained(BertForMaskedLM(config).eval())
    assert bert.has_lm_head
    assert logit_effects(bert, sae, SITE)["logit_ids"] is None


def test_no_logit_effects_inside_a_block(model):
    sae = TopK(d_sae=8, k=2).build(32)
    assert logit_effects(model, sae, "blocks.0.attn.hook_z")["logit_ids"] is None


def test_the_same_again(model, sae, documents, stats):
    again = collect_latents(model, sae, documents, SITE, tokens=N_TOKENS, quiet=True)
    for field in dataclasses.fields(stats):
        np.testing.assert_array_equal(getattr(stats, field.name), getattr(again, field.name))


def test_sinks_do_not_count(model, sae, documents, stats):
    batch = next(token_batches(model, documents, max_tokens=N_TOKENS))
    with torch.no_grad():
        norms = model.run(batch.input_ids, sites=[SITE])[SITE][batch.keep].norm(dim=-1)
    fewer = collect_latents(
        model, sae, documents, SITE, tokens=N_TOKENS, sink_threshold=float(norms.median()), quiet=True
    )
    assert 0.2 * stats.n_tokens < fewer.n_tokens < 0.8 * stats.n_tokens


def test_round_trip(stats, tmp_path):
    stats.save(tmp_path)
    back = LatentStats.load(tmp_path)
    assert back.info == stats.info
    np.testing.assert_array_equal(back.example_window, stats.example_window)
    (tmp_path / "latents.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        LatentStats.load(tmp_path)


def test_bad_input(model, sae, documents, stats):
    with pytest.raises(InputError, match="width 32"):
        collect_latents(model, sae, documents, "blocks.0.mlp.hook_post", tokens=100)
    with pytest.raises(InputError, match="at least 1"):
        collect_latents(model, sae, documents, SITE, tokens=0)
    with pytest.raises(InputError, match="no latent 96"):
        stats.examples(96)


def test_packed_text_and_kept_special_tokens(model, sae, documents):
    tokenization = Tokenization(context=64, packing=True, drop_special=False)
    stats = collect_latents(model, sae, documents, SITE, tokenization=tokenization, tokens=1_000, quiet=True)
    assert stats.n_tokens == 1_000
    assert all(len(stats.row(i)) <= 64 for i in range(len(stats.row_document)))
