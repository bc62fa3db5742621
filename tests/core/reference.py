"""Transformer blocks computed by hand: what a block does, spelt out per family, with every site open to a function.

An independent statement of where the sites are. `substituted` puts such a computation in the place of one block's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[str, Tensor], Tensor]
"""Gets the kind of a site and its value, returns what to compute on with."""


@dataclass(frozen=True)
class Layout:
    """Where a family's block keeps its parts."""

    blocks: str
    attn: str
    o: str
    down: str
    mlp: str = ""
    ln1: str = ""
    ln2: str = ""
    attn_post: str = ""
    mlp_post: str = ""
    kind: str = "pre"


LLAMA = Layout(
    "model.layers",
    "self_attn",
    "self_attn.o_proj",
    "mlp.down_proj",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
)
GEMMA = Layout(
    "model.layers", "self_attn", "self_attn.o_proj", "mlp.down_proj", "mlp", "input_layernorm",
    "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
NEOX = Layout(
    "gpt_neox.layers", "attention", "attention.dense", "mlp.dense_4h_to_h", "mlp", "input_layernorm",
    "post_attention_layernorm", kind="parallel",
)  # fmt: skip
OPT = Layout(
    "model.decoder.layers",
    "self_attn",
    "self_attn.out_proj",
    "fc2",
    "",
    "self_attn_layer_norm",
    "final_layer_norm",
)
BERT = Layout(
    "bert.encoder.layer", "attention.self", "attention.output.dense", "output.dense", "",
    "attention.output.LayerNorm", "output.LayerNorm", kind="post",
)  # fmt: skip
LAYOUTS = {
    "gpt2": Layout("transformer.h", "attn", "attn.c_proj", "mlp.c_proj", "mlp", "ln_1", "ln_2"),
    "neox": NEOX,
    "neox-sequential": Layout(**{**vars(NEOX), "kind": "pre"}),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    "phi": Layout(
        "model.layers", "self_attn", "self_attn.dense", "mlp.fc2", "mlp", "input_layernorm", "input_layernorm",
        kind="parallel",
    ),
    "opt": OPT,
    "opt-post-norm": Layout(**{**vars(OPT), "kind": "post"}),
    "bert": BERT,
    "roberta": Layout(**{**vars(BERT), "blocks": "roberta.encoder.layer"}),
    "distilbert": Layout(
        "distilbert.transformer.layer", "attention", "attention.out_lin", "ffn.lin2", "ffn", "sa_layer_norm",
        "output_layer_norm", kind="post",
    ),
}  # fmt: skip


@contextmanager
def edited_input(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A linear map that first applies `edit` to its input; by replacing its forward, not by a hook."""
    original = module.forward
    module.forward = lambda x: original(edit(x))
    try:
        yield
    finally:
        del module.forward


def block_forward(family: str, block: nn.Module, edit: Edit) -> Callable[..., Any]:
    """The forward of one block, by hand."""
    if family.startswith("t5"):
        return t5_block_forward(block, edit)
    layout = LAYOUTS[family]

    def part(name: str) -> nn.Module:
        return block.get_submodule(name) if name else nn.Identity()

    def attention(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        with edited_input(part(layout.o), lambda z: edit("attn.hook_z", z)):
            if layout.attn == "attention.self":
                return part(layout.o)(part(layout.attn)(x, **kwargs)[0])
            if layout.attn == "self_attn":
                return part(layout.attn)(hidden_states=x, **kwargs)[0]
            return part(layout.attn)(x, **kwargs)[0]

    def mlp(x: Tensor) -> Tensor:
        def post(neurons: Tensor) -> Tensor:
            return edit("mlp.hook_post", neurons.view(*x.shape[:2], -1)).reshape(neurons.shape)

        with edited_input(part(layout.down), post):
            if layout.mlp:
                return part(layout.mlp)(x)
            if layout.attn == "attention.self":
                return part(layout.down)(block.intermediate(x))
            return block.fc2(torch.relu(block.fc1(x)))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            kwargs["attention_mask"] = args[0]
        x = edit("hook_resid_pre", x)
        a = attention(x if layout.kind == "post" else part(layout.ln1)(x), kwargs)
        a = edit("hook_attn_out", part(layout.attn_post)(a))
        if layout.kind == "parallel":
            mid, branch = x, x
        else:
            mid = edit("hook_resid_mid", part(layout.ln1)(x + a) if layout.kind == "post" else x + a)
            branch, a = mid, torch.zeros_like(a)
        m = mlp(branch if layout.kind == "post" else part(layout.ln2)(branch))
        m = edit("hook_mlp_out", part(layout.mlp_post)(m))
        out = mid + a + m
        return edit("hook_resid_post", part(layout.ln2)(out) if layout.kind == "post" else out)

    return forward


def t5_block_forward(block: nn.Module, edit: Edit) -> Callable[..., Any]:
    """A T5 block: layer.0 is self-attention, layer.1 of the decoder cross-attention, the last the MLP."""

    def attention(layer: nn.Module, inner: nn.Module, z: str, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        with edited_input(inner.o, lambda value: edit(z, value)):
            out, bias, _ = inner(layer.layer_norm(x), **kwargs)
        return out, bias

    def forward(
        x: Tensor,
        attention_mask: Any = None,
        position_bias: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        encoder_decoder_position_bias: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        x = edit("hook_resid_pre", x)
        first = block.layer[0]
        a, bias = attention(
            first, first.SelfAttention, "attn.hook_z", x, mask=attention_mask, position_bias=position_bias
        )
        mid, cross_bias = edit("hook_resid_mid", x + edit("hook_attn_out", a)), None
        if len(block.layer) == 3:
            cross = block.layer[1]
            c, cross_bias = attention(
                cross, cross.EncDecAttention, "cross_attn.hook_z", mid, mask=encoder_attention_mask,
                key_value_states=encoder_hidden_states, position_bias=encoder_decoder_position_bias,
            )  # fmt: skip
            mid = edit("hook_resid_mid_cross", mid + edit("hook_cross_attn_out", c))
        last = block.layer[-1]
        with edited_input(last.DenseReluDense.wo, lambda n: edit("mlp.hook_post", n)):
            m = edit("hook_mlp_out", last.DenseReluDense(last.layer_norm(mid)))
        return edit("hook_resid_post", mid + m), bias, cross_bias

    return forward


@contextmanager
def substituted(family: str, model: nn.Module, layer: int, edit: Edit, stack: str = "") -> Iterator[None]:
    """Compute one block by hand, in the model."""
    path = f"{stack}.block" if family.startswith("t5") else LAYOUTS[family].blocks
    block = model.get_submodule(f"{path}.{layer}")
    block.forward = block_forward(family, block, edit)
    try:
        yield
    finally:
        del block.forward
