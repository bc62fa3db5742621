"""MLP neurons as key–value memories: what makes a neuron fire, and which words its value row speaks for.

    mlp(x) = Σ_j key_j(x) value_j         key_j(x): hook_post;  value_j: a row of the MLP's output projection

    found = neuron_memories(model, texts, layer=2, neurons=[5, 17])
    found.values[5].tokens, found.keys[5][0].text, found.agreement

Geva et al. 2021, https://arxiv.org/abs/2012.14913. A value row goes straight to the unembedding, through the final
norm's centring and gain, as though no later layer changed it: logits up to the norm's scale. A key's contexts
are those of its greatest activations, one a text, ending in the token at which it fires. The agreement is the paper's: how
often the next token of such a context is the value's first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.latents import has_linear_head, through_final_norm
from steerkit.data import Documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import evaluating, is_projection
from steerkit.tokens import TokenBatch, Tokenization, token_batches

_ROWS = 1024
"""Value rows read at a time."""


@dataclass(frozen=True)
class Value:
    """The tokens that a value row speaks for most, with their logits up to the final norm's scale."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """Where a neuron fired: the text up to that token, and the token that followed (-1 at a text's end)."""

    text: str
    activation: float
    document: int
    next_id: int


@dataclass(frozen=True)
class NeuronMemories:
    """Keys and values of neurons of one layer."""

    layer: int
    values: dict[int, Value] = field(repr=False)
    keys: dict[int, tuple[Context, ...]] = field(repr=False)

    @property
    def agreement(self) -> float:
        """Share of contexts whose next token is the first of the value's; NaN without contexts."""
        hits = [
            context.next_id == self.values[neuron].ids[0]
            for neuron, contexts in self.keys.items()
            for context in contexts
            if context.next_id >= 0
        ]
        return sum(hits) / len(hits) if hits else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "agreement": self.agreement,
            "values": {str(neuron): list(value.tokens) for neuron, value in self.values.items()},
            "keys": {str(n): [vars(context) for context in contexts] for n, contexts in self.keys.items()},
        }

    def __repr__(self) -> str:
        lines = [
            f"{len(self.values)} neurons of layer {self.layer}; agreement of keys and values {self.agreement:.3g}"
        ]
        for neuron, value in list(self.values.items())[:8]:
            first = f"; fires at …{self.keys[neuron][0].text[-40:]!r}" if self.keys.get(neuron) else ""
            lines.append(f"  {neuron}: speaks for {', '.join(value.tokens[:5])}{first}")
        return "\n".join(lines)


def neuron_memories(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    layer: int,
    neurons: Iterable[int] | None = None,
    *,
    n_contexts: int = 10,
    n_tokens: int = 10,
    window: int = 15,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = 50_000,
) -> NeuronMemories:
    """Values and keys of neurons of a layer, all of them by default.

    Raises InputError as `value_tokens` does, NumericsError on NaN.
    """
    chosen = _chosen(model, layer, neurons)
    values = value_tokens(model, layer, chosen, n_tokens=n_tokens)
    keys = key_contexts(
        model, texts, layer, chosen,
        n_contexts=n_contexts, window=window, tokenization=tokenization, max_tokens=max_tokens,
    )  # fmt: skip
    return NeuronMemories(layer, values, keys)


@torch.no_grad()
def value_rows(
    model: HookedModel, layer: int, neurons: Iterable[int] | None = None
) -> Float[Tensor, "n d_model"]:
    """What each neuron adds to the MLP's output at activation 1, adapters included.

    Raises InputError where the output projection is not a module of its own (TransformerLens models).
    """
    chosen = _chosen(model, layer, neurons)
    site = model.site(f"blocks.{layer}.mlp.hook_post")
    module = model.model.get_submodule(site.path)
    if not is_projection(module):
        raise InputError(
            f"The MLP's output projection of {model.name} is no module of its own: load the model from Hugging Face."
        )
    post = model.site(f"blocks.{layer}.hook_mlp_out")
    nothing = torch.zeros(1, site.width, device=model.device, dtype=model.dtype)
    offset = module(nothing)
    if offset.shape[-1] != post.width:
        raise InputError(f"The value rows of {model.name} are not as wide as {post.name}.")
    found = []
    for part in torch.tensor(chosen).split(_ROWS):
        one_hot = nothing.repeat(len(part), 1)
        one_hot[torch.arange(len(part)), part] = 1.0
        found.append(module(one_hot) - offset)
    return torch.cat(found)


@torch.no_grad()
def value_tokens(
    model: HookedModel, layer: int, neurons: Iterable[int] | None = None, *, n_tokens: int = 10
) -> dict[int, Value]:
    """Neuron -> the tokens that its value row speaks for.

    Raises InputError for neurons and layers that do not exist, and for a model without a linear unembedding.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
    chosen = _chosen(model, layer, neurons)
    if not has_linear_head(model):
        raise InputError(
            f"{model.name} has no unembedding that is a matrix: a value row speaks for no tokens by itself."
        )
    rows = through_final_norm(model, value_rows(model, layer, chosen).float())
    W_U = model.W_U.detach().float()
    found = {}
    for part in torch.arange(len(chosen)).split(max(1, 2**25 // W_U.shape[1])):
        top = (rows[part].to(W_U) @ W_U).topk(min(n_tokens, W_U.shape[1]), dim=1)
        for i, ids, logits in zip(part.tolist(), top.indices.tolist(), top.values.tolist()):
            tokens = tuple(model.tokenizer.convert_ids_to_tokens(ids))
            found[chosen[i]] = Value(tokens, tuple(ids), tuple(logits))
    return found


@torch.no_grad()
def key_contexts(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    layer: int,
    neurons: Iterable[int] | None = None,
    *,
    n_contexts: int = 10,
    window: int = 15,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = 50_000,
) -> dict[int, tuple[Context, ...]]:
    """Neuron -> the contexts of its greatest activations, the greatest first; those at 0 or below are left out."""
    chosen = _chosen(model, layer, neurons)
    site = model.site(f"blocks.{layer}.mlp.hook_post").name
    best = _Best(chosen, n_contexts)
    with evaluating(model.model):
        for batch in token_batches(model, texts, tokenization, max_tokens=max_tokens):
            acts = model.run(batch.input_ids, batch.attention_mask, sites=[site])[site]
            if not bool(acts[batch.keep.to(acts.device)].isfinite().all()):
                raise NumericsError(f"Activations at {site} of {model.name} are NaN or inf.")
            best.add(acts[..., chosen].float().to(model.device), batch)
    return best.contexts(model, window)


class _Best:
    """The rows in which each neuron fired most, each by its strongest token."""

    def __init__(self, neurons: Sequence[int], n: int) -> None:
        self.neurons, self.n = neurons, n
        self.values = torch.zeros(0, len(neurons))
        self.places = torch.zeros(0, len(neurons), 2, dtype=torch.int64)
        self.rows: list[tuple[list[int], list[bool], int]] = []

    def add(self, acts: Float[Tensor, "batch pos n"], batch: TokenBatch) -> None:
        strongest, position = acts.masked_fill(~batch.keep[..., None], -torch.inf).max(1)
        row = torch.arange(len(acts))[:, None].expand(-1, len(self.neurons)) + len(self.rows)
        self.rows += zip(batch.input_ids.tolist(), batch.keep.tolist(), batch.document.tolist())
        self.values = torch.cat([self.values, strongest.cpu()])
        self.places = torch.cat([self.places, torch.stack([row, position.cpu()], -1)])
        order = self.values.topk(min(self.n, len(self.values)), dim=0)
        self.values = order.values
        self.places = self.places.gather(0, order.indices[..., None].expand(-1, -1, 2))

    def contexts(self, model: HookedModel, window: int) -> dict[int, tuple[Context, ...]]:
        found = {}
        for column, neuron in enumerate(self.neurons):
            own = []
            for value, (row, position) in zip(
                self.values[:, column].tolist(), self.places[:, column].tolist()
            ):
                if value <= 0:
                    continue
                ids, keep, document = self.rows[row]
                shown = [i for i, k in zip(ids[: position + 1], keep) if k][-window - 1 :]
                more = position + 1 < len(ids) and keep[position + 1]
                text = model.tokenizer.decode(shown)
                own.append(Context(text, value, document, ids[position + 1] if more else -1))
            found[neuron] = tuple(own)
        return found


def _chosen(model: HookedModel, layer: int, neurons: Iterable[int] | None) -> list[int]:
    width = model.site(f"blocks.{layer}.mlp.hook_post").width
    chosen = list(range(width) if neurons is None else neurons)
    if not chosen:
        raise InputError("There are no neurons to look at: give at least one.")
    for neuron in chosen:
        if not 0 <= neuron < width:
            raise InputError(f"There is no neuron {neuron} in layer {layer}: {model.name} has 0–{width - 1}.")
    return chosen
