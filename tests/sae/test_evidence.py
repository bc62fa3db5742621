"""Near misses, co-occurrence and the histogram of logit effects against plain, slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.architectures import REGISTRY
from sae.architectures.batch_topk import BatchTopK
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.topk import TopK
from sae.cooccurrence import Cooccurrence
from sae.latents import collect_latents, logit_effects
from sae.near_misses import N_MISSES
from steerkit.activations import token_batches
from steerkit.data import Permutation, load_documents

SITE = "blocks.0.hook_resid_post"
N_TOKENS = 2_500
D = 24


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(width=D)


@pytest.fixture(scope="module")
def documents():
    stories = load_documents("storyworld")
    return load_documents([stories[i] for i in range(60)])


def made(config, x):
    sae = config.build(D)
    generator = torch.Generator().manual_seed(1)
    sae.initialise(x, torch.zeros(D), generator)
    for name, parameter in sae.named_parameters():
        if name.startswith(("b_", "r_")) and name != "b_dec":
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture(scope="module", params=["topk", "jumprelu", "batch_topk"])
def sae(request, model, documents):
    configs = {
        "topk": TopK(80, k=5),
        "jumprelu": JumpReLU(80, target_l0=1.0),
        "batch_topk": BatchTopK(80, k=5),
    }
    return made(configs[request.param], model.activations(documents[:8], [SITE])[SITE])


@pytest.fixture(scope="module")
def stats(model, sae, documents):
    return collect_latents(model, sae, documents, SITE, tokens=N_TOKENS, quiet=True)


@pytest.fixture(scope="module")
def truth(model, sae, documents):
    """{row of token ids: (latents, margins)} of the tokens that count; latents 0 and margins -inf elsewhere"""
    rows = {}
    order = Permutation(len(documents), 0, 0)
    for batch in token_batches(model, documents, None, max_tokens=N_TOKENS, order=order):
        with torch.no_grad():
            acts = model.run(batch.input_ids, sites=[SITE])[SITE]
            latents, margins = sae.encode(acts) * batch.keep[..., None], sae.margins(acts)
        margins = torch.zeros_like(latents) if margins is None else margins
        margins = margins.masked_fill(~batch.keep[..., None], -torch.inf)
        for ids, mask, *values in zip(batch.input_ids, batch.attention_mask, latents, margins):
            n = int(mask.sum())
            rows[tuple(ids[:n].tolist())] = tuple(v[:n].numpy() for v in values)
    return rows


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"crosscoder"}))
def test_margins_are_positive_where_latents_are_active(name):
    x = 3 * torch.randn(200, D, generator=torch.Generator().manual_seed(2))
    sae = made(REGISTRY[name](40, **({"labels": ("a", "b")} if name == "guided" else {})), x)
    sae.finish()
    with torch.no_grad():
        for threshold in (sae.threshold, torch.full((40,), 0.3)):
            sae.threshold = threshold
            margins, latents = sae.margins(x), sae.encode(x)
            assert 0 < (latents > 0).float().mean() < 1
            assert margins is not None
            np.testing.assert_array_equal((margins > 0).numpy(), (latents > 0).numpy())


def test_the_margin_of_a_silent_topk_latent_is_what_it_lacks_to_the_weakest_that_is_active():
    sae = TopK(4, k=2).build(4)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
    margins = sae.margins(torch.tensor([[3.0, 1.0, 0.5, -1.0], [3.0, -0.5, -1.0, -2.0]]))
    torch.testing.assert_close(margins[0], torch.tensor([2.5, 0.5, -0.5, -2.0]))
    torch.testing.assert_close(margins[1], torch.tensor([3.0, -0.5, -1.0, -2.0]))


def test_latents_are_silent_in_their_near_misses(stats, truth, sae):
    found = 0
    for latent in range(stats.d_sae):
        rows = [i for i in stats.miss_row[latent] if i >= 0]
        assert len(rows) == len(set(rows))
        for row, position, closeness in zip(rows, stats.miss_position[latent], stats.miss_closeness[latent]):
            latents, margins = truth[tuple(stats.row(row))]
            assert not latents[:, latent].any()
            if isinstance(sae.config, BatchTopK):
                assert np.isnan(closeness)
            else:
                assert closeness <= 0
                assert closeness == pytest.approx(margins[position, latent], abs=1e-4)
            found += 1
    assert found > stats.d_sae


def test_near_misses_hold_the_nearest_rows_and_those_with_a_strong_token(stats, truth, sae):
    if isinstance(sae.config, BatchTopK):
        pytest.skip("no margins before its threshold is set")
    for latent in range(0, stats.d_sae, 5):
        strong = [t for t in stats.token_ids[latent, :4] if t >= 0]
        nearest, with_token = {}, {}
        for ids, (latents, margins) in truth.items():
            if not latents[:, latent].any():
                nearest[ids] = margins[:, latent].max()
                there = np.isin(ids, strong) & (margins[:, latent] > -np.inf)
                if there.any():
                    with_token[ids] = margins[there, latent].max()
        first = sorted(with_token, key=lambda ids: -with_token[ids])[:3]
        rest = sorted((value for ids, value in nearest.items() if ids not in first), reverse=True)
        expected = [*(with_token[ids] for ids in first), *rest][:N_MISSES]
        found = stats.miss_closeness[latent][stats.miss_row[latent] >= 0]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
@pytest.mark.parametrize("every", [1, 3])
def test_cooccurrence_is_that_of_the_dense_product(block, every):
    rng = np.random.default_rng(0)
    n, d_sae = 600, 70
    active = rng.random((n, d_sae)) < rng.random(d_sae) * 0.2
    active[:, 0], active[:, 1], active[:, 2] = False, active[:, 3], True
    keep = rng.random(n) < 0.9
    active &= keep[:, None]
    pairs = Cooccurrence(d_sae, n)
    pairs.every = every
    for part in np.array_split(np.arange(n), 5):
        pairs.add(*np.nonzero(active[part]), keep[part])
    found = pairs.finish(block)
    counted = active[np.flatnonzero(keep)[::every]].astype(int)
    both = counted.T @ counted
    count = np.diag(both)
    assert found["together_tokens"] == len(counted)
    np.testing.assert_array_equal(found["together_count"], count)
    for i in range(d_sae):
        jaccard = both[i] / np.maximum(count[i] + count - both[i], 1)
        jaccard[i] = 0
        expected = np.sort(jaccard[jaccard > 0])[::-1][:10]
        others = found["together"][i]
        others = others[others >= 0]
        np.testing.assert_allclose(found["together_jaccard"][i, : len(others)], expected, rtol=1e-6)
        np.testing.assert_array_equal(found["together_both"][i, : len(others)], both[i, others])
        pmi = np.log(both[i, others] * len(counted) / (count[i] * count[others]))
        np.testing.assert_allclose(found["together_pmi"][i, : len(others)], pmi, rtol=1e-4, atol=1e-6)
    assert found["together"][1, 0] == 3


def test_mutual_information_of_large_counts_does_not_overflow():
    n = 200_000
    pairs = Cooccurrence(2, n)
    pairs.add(np.repeat(np.arange(n), 2), np.tile([0, 1], n), np.ones(n, dtype=bool))
    np.testing.assert_allclose(pairs.finish()["together_pmi"][:, 0], 0, atol=1e-6)


def test_cooccurrence_counts_fewer_tokens_where_there_are_many_pairs():
    pairs = Cooccurrence(1_000, 10_000_000)
    token, latent = np.repeat(np.arange(100), 200), np.tile(np.arange(200), 100)
    pairs.add(token, latent, np.ones(100, dtype=bool))
    assert pairs.every == np.ceil(10_000_000 * 200**2 / 2**29)
    assert pairs.n_tokens == 1


def test_cooccurrence_of_the_statistics(stats, truth):
    active = np.concatenate([latents for latents, _ in truth.values()]) > 0
    both = active.T.astype(int) @ active
    np.testing.assert_array_equal(stats.together_count, stats.count)
    for i, others in enumerate(stats.together):
        others = others[others >= 0]
        np.testing.assert_array_equal(stats.together_both[i, : len(others)], both[i, others])


def test_logit_histogram_counts_every_token_of_the_vocabulary(model, sae):
    effects = logit_effects(model, sae, "blocks.1.hook_resid_post")
    expected = (sae.W_dec.detach() * model.model.model.norm.weight.detach()) @ model.W_U.detach()
    low, high = effects["logit_range"].T
    np.testing.assert_allclose(low, expected.amin(1), rtol=1e-3)
    np.testing.assert_allclose(high, expected.amax(1), rtol=1e-3)
    for i in range(0, 80, 9):
        counts, _ = np.histogram(expected[i], 30, (low[i], high[i]))
        assert effects["logit_histogram"][i].sum() == model.d_vocab
        assert np.abs(effects["logit_histogram"][i] - counts).sum() <= 4


def test_a_latent_of_one_document_is_known(stats, truth):
    rows = list(truth.values())
    documents_of = sum((latents > 0).any(0).astype(int) for latents, _ in rows)
    np.testing.assert_array_equal(stats.one_document, documents_of == 1)
