"""Memory stays flat: four times the tokens raise the peak of a process by no more than a tenth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import json, resource, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from steerkit import activation_cache
from steerkit.activations import ActivationStream
from steerkit.data import load_documents
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer

tokenizer = build_tokenizer()
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=256, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")
site, tokens, out = "blocks.0.hook_resid_pre", 60_000, {out!r}
stories = load_documents("storyworld")
documents = load_documents([stories[i] for i in range(600)] * 5)
peaks = []

def record():
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

STREAM = """
stream = ActivationStream(
    model, documents, site, batch_size=1024, block_tokens=8192, batch_tokens=2048, prefetch=True
)
for times in (1, 4):
    while stream.tokens < times * tokens:
        next(stream)
    record()
stream.close()
print(json.dumps(peaks))
"""

CACHE = """
activation_cache._MAPPED_BYTES = 8 * 2**20
for times in (1, 4):
    made = activation_cache.cache(
        model, documents, site, out + str(times), tokens=times * tokens, dtype="bfloat16", shard_tokens=8192,
        batch_tokens=2048,
    )
    record()
stream = made.stream(batch_size=1024)
while stream.tokens < 4 * tokens:
    next(stream)
record()
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("work", [STREAM, CACHE], ids=["stream", "cache"])
def test_four_times_the_tokens_need_no_more_memory(tmp_path, work):
    """Activations are 1 KB a token: those of the longer run alone, if they were kept, would be 240 MB."""
    script = SETUP.format(here=str(Path(__file__).parents[2]), out=str(tmp_path / "c")) + work
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, *later = json.loads(done.stdout.splitlines()[-1])
    assert max(later) <= 1.10 * once, f"{once:.0f} MB, then {later} MB"
