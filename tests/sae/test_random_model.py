"""The SAE of the random model: trained alike, on other activations, once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sae
from sae.evaluation import evaluate_nulls
from sae.random_model import train_on_random_model
from steerkit import storyworld
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer

SITE = "blocks.0.hook_resid_post"
SETTINGS = {"batch_size": 256, "block_tokens": 1024, "held_out_tokens": 300}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tokenizer = build_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    model = HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    out = tmp_path_factory.mktemp("runs") / "r"
    texts = [story.text for story in storyworld.sample(40, seed=0)]
    return sae.train(model, texts, SITE, sae.TopK(32, k=4), 2048, out, quiet=True, **SETTINGS), texts


def test_it_is_trained_alike_on_the_random_model(run):
    trained, texts = run
    before = {name: value.clone() for name, value in trained.hooked().model.state_dict().items()}
    null = train_on_random_model(trained, data=texts, quiet=True)
    assert null.path == trained.path / "random-model"
    assert null.config["training"] == trained.config["training"]
    assert null.config["arch"] == trained.config["arch"]
    assert "random weights" in null.config["model"]
    assert not torch.equal(null.sae.W_dec, trained.sae.W_dec)
    after = trained.hooked().model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = train_on_random_model(trained, data=texts, quiet=True)
    assert torch.equal(again.sae.W_dec, null.sae.W_dec)
    table = evaluate_nulls(trained.hooked(), trained.sae, texts[:4], SITE, random_model_sae=null.sae)
    assert table["the same, on the random model"].fvu < table["SAE of the random model"].fvu


def test_text_without_a_name_has_to_be_given(run):
    with pytest.raises(InputError, match="40 texts"):
        train_on_random_model(run[0], out=run[0].path / "other", quiet=True)
