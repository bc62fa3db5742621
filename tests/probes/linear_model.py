"""A language model that is linear from end to end: what first-order methods say of it is exact."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class LinearConfig(PretrainedConfig):
    model_type = "linear-toy"

    def __init__(self, hidden_size=12, vocab_size=23, num_hidden_layers=3, num_attention_heads=3, **kwargs):
        super().__init__(**kwargs)
        self.pad_token_id = self.bos_token_id = self.eos_token_id = None
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = 32


class Attention(nn.Module):
    """The mean over what came before: attention that never chooses."""

    def __init__(self, d):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, hidden_states, attention_mask=None):
        v = self.v_proj(hidden_states)
        before = torch.arange(1, v.shape[1] + 1, dtype=v.dtype)[:, None]
        return self.o_proj(v.cumsum(1) / before)


class Mlp(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return self.down_proj(self.up_proj(x))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn, self.mlp = Attention(d), Mlp(d)

    def forward(self, hidden_states):
        mid = hidden_states + self.attn(hidden_states)
        return mid + self.mlp(mid)


class LinearModel(PreTrainedModel):
    config_class = LinearConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, return_dict=True):
        states = [self.embed(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return BaseModelOutput(states[-1], hidden_states=tuple(states) if output_hidden_states else None)


class LinearLM(PreTrainedModel):
    config_class = LinearConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, return_dict=True):
        out = self.model(input_ids, attention_mask, output_hidden_states)
        return CausalLMOutput(logits=self.lm_head(out[0]), hidden_states=out.hidden_states)


def build_linear(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearLM(LinearConfig())
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
