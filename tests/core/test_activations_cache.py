"""Caches: what is written, never by halves, and that reading gives it back in a global shuffle."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from steerkit import activation_cache
from steerkit.activation_cache import DTYPES, ActivationCache, cache
from steerkit.activations import Tokenization, collect
from steerkit.data import load_documents, split_held_out
from steerkit.errors import CheckpointError, InputError, NumericsError, SteerkitError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer

POST = "blocks.1.hook_resid_post"
MLP = "blocks.0.mlp.hook_post"


def tiny_llama() -> HookedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")


def stories(n):
    documents = load_documents("storyworld")
    return load_documents([documents[i] for i in range(n)])


def small_cache(out, **options):
    """A cache of 4,000 tokens in shards of 1,000 and a little."""
    settings = {"tokens": 4000, "shard_tokens": 1000, **options}
    return cache(tiny_llama(), stories(80), [POST, MLP], out, **settings)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_cache(tmp_path_factory.mktemp("cache") / "c")


def contents(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def stored(made, site):
    return torch.cat([shard[site].float() for shard in made.shards()])


def in_any_order(acts):
    return acts[acts.double().sum(1).sort().indices]


def test_the_shards_hold_the_activations_of_the_tokens_they_name(made, model):
    texts, n = 0, 0
    for shard in made.shards():
        n += len(shard.token_ids)
        for document in shard.document.unique().tolist():
            text = made.train[document]
            mine = shard.document == document
            alone = collect(model, [text], [POST, MLP], tokenization=Tokenization())
            if len(alone.token_ids) > int(mine.sum()):
                continue
            texts += 1
            assert torch.equal(shard.token_ids[mine], alone.token_ids)
            assert torch.equal(shard.position[mine], alone.position)
            torch.testing.assert_close(shard[POST][mine], alone[POST], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(shard[MLP][mine], alone[MLP], atol=1e-5, rtol=1e-5)
    assert texts > 20
    assert n == len(made) == made.tokens == 4000


def test_held_out_documents_are_there_and_none_of_their_tokens_are_cached(made):
    _, held_out = split_held_out(stories(80))
    assert list(made.held_out) == list(held_out)
    assert not set(made.train) & set(held_out)
    assert made.made_with["fingerprint"] == split_held_out(stories(80))[0].fingerprint()


def test_a_pass_of_the_stream_is_a_permutation_of_everything(made):
    stream = made.stream(batch_size=250, seed=5)
    passes = [torch.cat([next(stream)[POST] for _ in range(16)]) for _ in range(2)]
    assert stream.passes == 2
    for one in passes:
        assert torch.equal(in_any_order(one), in_any_order(stored(made, POST)))
    assert not torch.equal(*passes)
    other = made.stream(POST, batch_size=250, seed=6)
    assert not torch.equal(next(other)[POST], passes[0][:250])
    assert list(next(other)) == [POST]


def test_the_shuffle_is_global(made):
    """The share of pairs of a batch that are of the same document is what a full shuffle gives."""
    document = torch.cat([shard.document for shard in made.shards()])
    by_acts = {tuple(a): int(d) for a, d in zip(stored(made, POST).tolist(), document)}
    counts = torch.bincount(document)
    ideal = float((counts * (counts - 1)).sum()) / (4000 * 3999)
    stream = made.stream(POST, batch_size=400)
    same = []
    for _ in range(10):
        drawn = torch.bincount(torch.tensor([by_acts[tuple(row)] for row in next(stream)[POST].tolist()]))
        same.append(float((drawn * (drawn - 1)).sum()) / (400 * 399))
    assert np.mean(same) == pytest.approx(ideal, rel=0.08)


def test_sites_of_one_batch_are_of_the_same_tokens(made):
    rows = {tuple(a): b for a, b in zip(stored(made, POST).tolist(), stored(made, MLP))}
    batch = next(made.stream(batch_size=100))
    for post, mlp in zip(batch[POST].tolist(), batch[MLP]):
        assert torch.equal(rows[tuple(post)], mlp)


def test_a_stream_resumes_exactly_also_across_passes(made):
    stream = made.stream(batch_size=700, seed=1)
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(next(stream)[POST])
    for at in (0, 5, 11):
        resumed = made.stream(batch_size=700, seed=1)
        resumed.load_state_dict(states[at])
        assert torch.equal(next(resumed)[POST], batches[at])
    with pytest.raises(CheckpointError, match="another seed"):
        made.stream(batch_size=700, seed=2).load_state_dict(states[3])


def test_reading_keeps_little_mapped(made, monkeypatch):
    monkeypatch.setattr(activation_cache, "_MAPPED_BYTES", 50_000)
    stream = made.stream(batch_size=500)
    whole = torch.cat([next(stream)[POST] for _ in range(8)])
    assert made._resident <= 50_000
    assert torch.equal(in_any_order(whole), in_any_order(stored(made, POST)))


def test_the_statistics_are_those_of_the_first_shard(made):
    first = next(made.shards())
    statistics = made.stream().statistics(POST)
    torch.testing.assert_close(statistics.mean, first[POST].mean(0), atol=1e-5, rtol=1e-4)
    assert float((first[POST] * statistics.scale).square().sum(1).mean()) == pytest.approx(16, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 0.0), ("bfloat16", 1e-5), ("float16", 1e-7), ("int8", 2e-4)]
)
def test_dtypes_cost_little(tmp_path, made, dtype, bound):
    """FVU of what is read back against float32; shards of int8 are a quarter of the size."""
    other = small_cache(tmp_path / "c", dtype=dtype)
    for site in (POST, MLP):
        exact, found = stored(made, site), stored(other, site)
        fvu = float((exact - found).square().sum() / (exact - exact.mean(0)).square().sum())
        assert fvu <= bound
    assert next(other.stream(batch_size=9))[POST].dtype == torch.float32
    assert next(other.stream(batch_size=9, dtype=torch.bfloat16))[POST].dtype == torch.bfloat16


def test_int8_keeps_its_bound_with_outlying_channels_and_rows():
    torch.manual_seed(0)
    acts = torch.randn(500, 32)
    acts[:, 3] = 400 + 50 * acts[:, 3]
    acts[7] *= 30
    tensors = activation_cache._quantized("s", acts)
    read = torch.addcmul(
        tensors["s.mean"], tensors["s"].float() * tensors["s.step"][:, None], tensors["s.spread"]
    )
    bound = tensors["s.step"][:, None] * tensors["s.spread"] / 2
    assert ((read - acts).abs() <= bound * 1.01 + 1e-4).all()
    ordinary = torch.arange(500) != 7
    error = (read - acts)[ordinary].square().sum(0)
    spread = (acts[ordinary] - acts[ordinary].mean(0)).square().sum(0)
    assert (error / spread).max() < 5e-4
    constant = activation_cache._quantized("s", torch.full((3, 4), 2.5))
    assert torch.equal(constant["s.mean"], torch.full((4,), 2.5))


def test_values_that_do_not_fit_float16_are_refused(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1e6)
    with pytest.raises(NumericsError, match="do not fit float16: cache them as bfloat16"):
        cache(model, stories(40), POST, tmp_path / "c", tokens=500, dtype="float16")


def test_a_corpus_that_is_too_short_gives_all_it_has(tmp_path, model):
    made = cache(model, stories(60), POST, tmp_path / "c", tokens=10**6, shard_tokens=1000)
    train, _ = split_held_out(stories(60))
    assert len(made) == len(collect(model, train, POST).token_ids)
    assert sorted(made.train) == sorted(train)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from test_activations_cache import *
torch.set_num_threads(1)
cache(tiny_llama(), stories(260), [POST, MLP], {out!r}, tokens=20_000, shard_tokens=300)
"""


def test_a_killed_cache_is_resumed_to_the_same_bits(tmp_path, model):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = {"tokens": 20_000, "shard_tokens": 300}
        documents = stories(260)
        whole = cache(model, documents, [POST, MLP], tmp_path / "whole", **settings)
        out = tmp_path / "killed"
        script = KILLED.format(here=str(Path(__file__).parent), out=str(out))
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (out / "shard-00004.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        index = json.loads((out / "cache.json").read_text())
        assert not index["complete"]
        with pytest.raises(CheckpointError, match="unfinished cache"):
            ActivationCache.open(out)
        with pytest.raises(InputError, match="holds an unfinished cache"):
            cache(model, documents, [POST, MLP], out, **settings)
        with pytest.raises(InputError, match="another cache: its tokens is 20000, here it is 5"):
            cache(model, documents, [POST, MLP], out, **{**settings, "tokens": 5}, resume=True)
        cache(model, documents, [POST, MLP], out, **settings, resume=True)
    finally:
        torch.set_num_threads(threads)
    kept = {name: digest for name, digest in contents(out).items() if not name.endswith(".tmp")}
    assert kept == contents(whole.path)


def test_a_finished_cache_is_opened_by_resume_and_not_written_over(tmp_path, made):
    before = contents(made.path)
    assert len(small_cache(made.path, resume=True)) == 4000
    assert contents(made.path) == before
    with pytest.raises(InputError, match="holds a finished cache"):
        small_cache(made.path)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no cache"):
        small_cache(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001.safetensors", truncate, r"shard-00001\.safetensors is truncated"),
        ("shard-00001.safetensors", flip, r"shard-00001\.safetensors was edited or is damaged"),
        ("shard-00000.safetensors", Path.unlink, r"lacks .*shard-00000"),
        ("held_out.jsonl", flip, r"held_out\.jsonl was edited"),
        ("cache.json", flip, r"cache\.json"),
        ("cache.json", truncate, r"cache\.json is damaged"),
        ("cache.json", lambda path: path.write_text("{}"), "not of the format"),
        ("cache.json", Path.unlink, "no activation cache"),
    ],
)
def test_damaged_caches_are_recognised(tmp_path, made, file, damage, message):
    shutil.copytree(made.path, tmp_path / "c")
    damage(tmp_path / "c" / file)
    with pytest.raises(InputError, match=message) as caught:
        ActivationCache.open(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_bad_requests(tmp_path, made, model):
    with pytest.raises(InputError, match="dtype 'int4': choose one of float32"):
        cache(model, stories(40), POST, tmp_path / "c", tokens=10, dtype="int4")
    with pytest.raises(InputError, match=r"no activations at 'blocks\.9\.hook_resid_post'; it has"):
        made.stream("blocks.9.hook_resid_post")
    with pytest.raises(InputError, match="is an activation cache, not text"):
        load_documents(made.path)
    assert set(DTYPES) == {"float32", "bfloat16", "float16", "int8"}


def test_a_disk_that_is_too_small_is_found_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(SteerkitError, match=r"needs about 0.00 GB.*take fewer tokens"):
        small_cache(tmp_path / "c")


FULL = """
import shutil, sys
sys.path.insert(0, {here!r})
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 10**12)
from test_activations_cache import *
try:
    small_cache({out!r} + "/c", tokens=7000)
except SteerkitError as error:
    print(json.dumps([type(error).__name__, str(error), sorted(os.listdir({out!r} + "/c"))]))
    index = json.loads(open({out!r} + "/c/cache.json").read())
    for shard in index["shards"]:
        assert contents(Path({out!r} + "/c"))[shard["file"]] == shard["sha256"]
"""


def test_a_full_disk_is_one_line_and_leaves_only_whole_files(tmp_path):
    """On a real file system of 600 KB, in a mount name space of its own."""
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=600k tmpfs "{tmp_path}" && exec "$0" "$@"',
    ]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = FULL.format(here=str(Path(__file__).parent), out=str(tmp_path))
    done = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, message, files = json.loads(done.stdout.splitlines()[-1])
    assert kind == "SteerkitError"
    assert message.startswith("The disk is full: ")
    assert "\n" not in message
    assert "shard-00000.safetensors" in files
    assert not [name for name in files if name.startswith(".")]
