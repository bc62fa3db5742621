"""What several tests of SAEs stand on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny_llama():
    """A function that makes a random Llama over StoryWorld's words, the same each time."""

    def made(width=24, n_layers=2, d_mlp=48, context=512):
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=d_mlp,
            num_hidden_layers=n_layers,
            num_attention_heads=2,
            initializer_range=0.3,
            max_position_embeddings=context,
        )
        return HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)

    return made
