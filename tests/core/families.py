"""Tiny random models of every family, built from configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
T5 = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "n_positions": 40,
}  # fmt: skip
OPT = {
    "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40, "word_embed_proj_dim": 32, "init_std": 0.3,
}  # fmt: skip

GPT2 = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 40,
    "initializer_range": 0.3,
}  # fmt: skip
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
GATED_T5 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "neox-sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SMALL, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED),
    "phi": ("PhiConfig", "PhiForCausalLM", SMALL),
    "opt": ("OPTConfig", "OPTForCausalLM", OPT),
    "opt-post-norm": ("OPTConfig", "OPTForCausalLM", {**OPT, **POST_NORM}),
    "bert": ("BertConfig", "BertForMaskedLM", SMALL),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 42}),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", DISTIL),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "t5-gated": ("T5Config", "T5ForConditionalGeneration", {**T5, **GATED_T5}),
}
CAUSAL = [f for f in FAMILIES if not f.startswith(("bert", "roberta", "distilbert", "t5"))]


def build(family: str, seed: int = 0) -> Any:
    """A tiny model of the family with random weights, biases and norm gains, in evaluation mode."""
    import transformers

    config_class, model_class, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
