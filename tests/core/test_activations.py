"""Activations collected and streamed: the right tokens, well mixed, exactly resumable."""

import collections
import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from steerkit.activations import ActivationStream, Tokenization, collect, is_sink, sink_threshold
from steerkit.data import load_documents
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer

POST = "blocks.1.hook_resid_post"
MLP = "blocks.0.hook_mlp_out"
EMBED = "blocks.0.hook_resid_pre"


def tiny_llama(width=16, layers=2, context=64) -> HookedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=context, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def documents():
    stories = load_documents("storyworld")
    return load_documents([stories[i] for i in range(120)])


def tokens_of(stream, n, site=POST):
    batches = [next(stream)[site] for _ in range(-(-n // stream.batch_size))]
    return torch.cat(batches)[:n]


def in_any_order(acts):
    """Rows sorted by a projection, to compare them as sets."""
    return acts[acts.double().sum(1).sort().indices]


@pytest.mark.parametrize("packing", [False, True])
def test_collect_agrees_with_a_forward_of_each_row_alone(model, packing):
    texts = ["Anna is an angry bear.", "", "red", "Tom walks to the park. The ball is red."]
    tokenization = Tokenization(context=8, packing=packing)
    acts = collect(model, texts, [POST, MLP], tokenization=tokenization, batch_tokens=20)
    ids = [i for text in texts for i in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert acts.token_ids.tolist() == ids
    lengths = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert acts.document.tolist() == np.repeat(range(4), lengths).tolist()
    stream = [i for t in texts if t for i in [*model.tokenizer(t, add_special_tokens=False)["input_ids"], 2]]
    rows = [stream] if packing else [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    for site in (POST, MLP):
        expected = []
        for row in rows:
            for start in range(0, len(row), 7):
                part = torch.tensor([[1, *row[start : start + 7]]])
                with torch.no_grad():
                    found = model.run(part, sites=[site])[site][0]
                expected.append(found[(part[0] != 1) & (part[0] != 2)])
        torch.testing.assert_close(acts[site], torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_collect_takes_what_is_asked(model):
    acts = model.activations(["red ball", "blue ball"], [POST], drop_special=False)
    assert acts.token_ids[acts.position == -1].tolist() == [1, 1]
    assert len(collect(model, ["red ball red ball"], POST, max_tokens=3).token_ids) == 3
    assert collect(model, ["red ball"], POST, dtype=torch.bfloat16)[POST].dtype == torch.bfloat16
    assert list(collect(model, ["red"], [POST, MLP, POST])) == [POST, MLP]
    with pytest.raises(InputError, match="not one token that counts"):
        collect(model, ["</s>"], POST)
    with pytest.raises(InputError, match="No site is named"):
        collect(model, ["red"], [])
    with pytest.raises(InputError, match="hook_resid_pst"):
        collect(model, ["red"], "blocks.0.hook_resid_pst")


def test_the_statistics_are_those_of_the_tokens(model, documents):
    acts = collect(model, documents, POST)
    stream = ActivationStream(model, documents, POST, block_tokens=10**9)
    for statistics in (acts.statistics[POST], stream.statistics(POST)):
        torch.testing.assert_close(statistics.mean, acts[POST].mean(0), atol=1e-5, rtol=1e-4)
        assert float((acts[POST] * statistics.scale).square().sum(1).mean()) == pytest.approx(16, rel=1e-4)
        assert statistics.tokens == len(acts[POST])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("block_tokens", [700, 5000, 10**6])
def test_a_pass_gives_every_token_once_and_passes_differ(model, documents, packing, block_tokens):
    tokenization = Tokenization(packing=packing)
    expected = collect(model, documents, EMBED, tokenization=tokenization)[EMBED]
    stream = ActivationStream(
        model, documents, EMBED, tokenization=tokenization, batch_size=512, block_tokens=block_tokens
    )
    n = len(expected)
    both = tokens_of(stream, 2 * n, EMBED)
    assert torch.equal(in_any_order(both[:n]), in_any_order(expected))
    assert torch.equal(in_any_order(both[n:]), in_any_order(expected))
    assert not torch.equal(both[:n], both[n:])
    assert stream.passes in (1, 2)
    assert stream.tokens == 512 * -(-2 * n // 512)


def test_prefetching_changes_nothing(model, documents):
    plain = ActivationStream(model, documents, [POST, MLP], block_tokens=900, batch_size=256, prefetch=False)
    ahead = ActivationStream(model, documents, [POST, MLP], block_tokens=900, batch_size=256, prefetch=True)
    for _ in range(80):
        a, b = next(plain), next(ahead)
        assert torch.equal(a[POST], b[POST])
        assert torch.equal(a[MLP], b[MLP])
    ahead.close()
    assert torch.equal(next(plain)[POST], next(ahead)[POST])
    ahead.close()


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumes_to_the_last_bit_at_any_batch(model, documents, prefetch, packing):
    def fresh():
        return ActivationStream(
            model, documents, POST, tokenization=Tokenization(packing=packing, context=32), block_tokens=800,
            batch_size=300, seed=3, prefetch=prefetch,
        )  # fmt: skip

    stream = fresh()
    states, batches = [stream.state_dict()], []
    for _ in range(60):
        batches.append(next(stream)[POST])
        states.append(json.loads(json.dumps(stream.state_dict())))
    stream.close()
    for at in (0, 1, 2, 3, 8, 29, 45, 46, 58):
        resumed = fresh()
        resumed.load_state_dict(states[at])
        assert torch.equal(next(resumed)[POST], batches[at])
        assert torch.equal(next(resumed)[POST], batches[at + 1])
        assert resumed.state_dict() == states[at + 2]
        resumed.close()


def test_a_state_of_another_stream_is_refused(model, documents):
    state = ActivationStream(model, documents, POST, seed=1).state_dict()
    for options, key in (({"seed": 2}, "seed"), ({"seed": 1, "batch_size": 5}, "batch_size")):
        with pytest.raises(CheckpointError, match=f"another {key}"):
            ActivationStream(model, documents, POST, **options).load_state_dict(state)
    with pytest.raises(CheckpointError, match="another documents"):
        ActivationStream(model, documents[:50], POST, seed=1).load_state_dict(state)


@pytest.mark.parametrize("block_tokens", [6000, 10**6])
def test_a_batch_mixes_like_a_full_shuffle_of_its_block(model, block_tokens):
    """Documents of one word each, so that an activation tells its document. The share of pairs of a batch
    that come from the same document is what drawing from the whole block without replacement gives; with
    everything in one block, successive batches are not correlated either."""
    words = [w for w in list(model.tokenizer.get_vocab())[10:] if w.strip().isalpha() and w.startswith(" ")][
        :300
    ]
    length = 40
    documents = load_documents([" ".join([word.strip()] * length) for word in words])
    stream = ActivationStream(model, documents, EMBED, batch_size=400, block_tokens=block_tokens)
    same, means = [], []
    for _ in range(30):
        batch = next(stream)[EMBED]
        _, counts = batch.unique(dim=0, return_counts=True)
        same.append(float((counts * (counts - 1)).sum()) / (400 * 399))
        means.append(batch[:, 0].double().mean())
    in_block = min(block_tokens, len(words) * length)
    ideal = (length - 1) / (in_block - 1)
    assert np.mean(same) == pytest.approx(ideal, rel=0.1)
    if block_tokens > len(words) * length:
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 3 / 30**0.5


def plant_sinks(model, factor):
    """A model whose embedding of the word ' red' is `factor` times as long."""
    table = model.model.get_input_embeddings().weight
    word = model.tokenizer(" red", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        table[word] *= factor / table[word].norm() * table.norm(dim=1).median()
    return word


def test_sinks_are_left_out_wherever_they_stand_and_only_they():
    model = tiny_llama()
    word = plant_sinks(model, 50)
    texts = ["The red ball is red.", "red ball", "The blue ball.", "blue ball blue ball"]
    acts = collect(model, texts, [EMBED, POST])
    everything = collect(model, texts, [EMBED, POST], drop_sinks=False)
    assert word not in acts.token_ids
    assert (everything.token_ids == word).sum() == 3
    assert len(acts.token_ids) == len(everything.token_ids) - 3
    assert everything.statistics[EMBED].sink_threshold is None
    stream = ActivationStream(model, texts, EMBED, batch_size=len(acts.token_ids))
    assert not is_sink(next(stream)[EMBED], stream.statistics(EMBED).sink_threshold).any()
    assert torch.equal(in_any_order(next(stream)[EMBED]), in_any_order(acts[EMBED]))


@pytest.mark.parametrize("site", [EMBED, MLP, POST, "blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"])
def test_a_model_without_sinks_loses_no_token(model, documents, site):
    n = len(collect(model, documents, site).token_ids)
    assert n == len(collect(model, documents, site, drop_sinks=False).token_ids)


def test_the_sink_threshold_is_ten_median_norms():
    assert sink_threshold(torch.tensor([1.0, 2.0, 3.0])) == 20
    assert is_sink(torch.tensor([[21.0], [19.0]]), 20).tolist() == [True, False]
    assert not is_sink(torch.tensor([[21.0], [19.0]]), None).any()


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_with_site_and_block(documents, prefetch, value):
    model = tiny_llama()
    stream = ActivationStream(model, documents, POST, block_tokens=800, batch_size=800, prefetch=prefetch)
    next(stream)
    stream.close()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[5:].fill_(value)
    with pytest.raises(
        NumericsError, match=rf"NaN or inf at {POST} in \d+ tokens of block \d+ \(documents \d+"
    ):
        collections.deque(stream, maxlen=0)
    stream.close()


def test_a_stream_without_tokens_or_with_dead_activations_says_so(documents):
    model = tiny_llama()
    with pytest.raises(InputError, match="not one token that counts"):
        next(ActivationStream(model, ["</s>", "", "</s>"], POST))
    with torch.no_grad():
        model.model.get_input_embeddings().weight.zero_()
    with pytest.raises(NumericsError, match=f"All activations at {EMBED} are zero"):
        next(ActivationStream(model, documents, EMBED))


def test_a_corpus_smaller_than_a_batch_goes_round_and_round(model):
    stream = ActivationStream(model, ["red ball", "blue"], POST, batch_size=100, prefetch=True)
    batch = next(stream)[POST]
    assert batch.shape == (100, 16)
    assert len(batch.unique(dim=0)) == 3
    stream.close()


def test_no_thread_and_no_hook_is_left(model, documents):
    before = threading.active_count()
    stream = ActivationStream(model, documents, POST, block_tokens=1500, batch_size=128, prefetch=True)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_ctrl_c_ends_a_program_that_waits_for_its_next_block():
    """The main thread can be interrupted while it waits, and the thread at work ends with it."""
    script = (
        "import signal, threading; from steerkit.activations import _Ahead; never = threading.Event(); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job inherits that it is ignored
        "ahead = _Ahead(lambda cancelled: [never.wait(0.01) for _ in iter(cancelled, True)]); "
        "print('waiting', flush=True); ahead.result()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert error.strip().endswith("KeyboardInterrupt")
