"""Where heads look, and which rotary frequencies they look with.

    reading = read_attention(model, "Tom carries a red ball. The ball is")
    reading.weights                      (layers, heads, pos, pos), reading.figure(layer=1, head=3)
    scores = attention_scores(model, texts)           # entropy, first token, previous token, induction, by head
    usage = rotary_usage(model, texts)                # share of each rotary frequency in q·k, by head

Weights are the model's own, from its eager attention. The induction score is the weight on the token after the last
occurrence of the present one, in random tokens said twice (Olsson et al. 2022, https://arxiv.org/abs/2209.11895).

A rotary head's logit is a sum over frequencies, q·k = Σ_f q_f·k_f with q_f, k_f the rotated pairs of coordinates.
Softmax takes no notice of what all keys share, so that a frequency's share is of the variance over keys,

    share_f = E_q Cov_k(q·k_f, q·k) / E_q Var_k(q·k)          Σ_f share_f = 1, negative where f works against the rest

beside the mean of |q_f||k_f|, which bounds what it can do (Barbero et al. 2024, “Round and round we go!”,
https://arxiv.org/abs/2410.06205). Coordinates that are not rotated come last, at frequency 0.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.contrasts import Prompt, prompt_ids
from steerkit.data import Documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import evaluating, leaving_no_hooks
from steerkit.stats import Interval, group_sums, jackknife
from steerkit.tokens import Tokenization, token_batches

_RECORDING = "steerkit_recording"
"""The name under which transformers knows our attention function while it records."""
SCORES = ("entropy", "first_token", "previous_token", "induction")


@dataclass(frozen=True)
class AttentionReading:
    """The weights of every head on one text."""

    tokens: tuple[str, ...]
    weights: Float[np.ndarray, "layers heads pos pos"] = field(repr=False)
    """From the position of the third axis to that of the fourth; rows sum to 1."""

    def __repr__(self) -> str:
        layers, heads, n, _ = self.weights.shape
        return f"AttentionReading({layers} layers, {heads} heads, {n} tokens)"

    def figure(self, layer: int, head: int) -> Any:
        """A head's weights: rows look at columns. InputError for a head that does not exist."""
        from plotly import graph_objects as go

        layers, heads = self.weights.shape[:2]
        if not (0 <= layer < layers and 0 <= head < heads):
            raise InputError(
                f"There is no head {layer}.{head}: layers go to {layers - 1}, heads to {heads - 1}."
            )
        labels = [f"{i} {token}" for i, token in enumerate(self.tokens)]
        figure = go.Figure(
            go.Heatmap(
                z=self.weights[layer, head],
                x=labels,
                y=labels,
                colorscale="Blues",
                zmin=0,
                zmax=1,
                hovertemplate="%{y} looks at %{x}: %{z:.3f}<extra></extra>",
            )
        )
        figure.update_layout(yaxis={"autorange": "reversed"}, height=max(400, 14 * len(labels) + 120))
        return figure


@dataclass(frozen=True)
class AttentionScores:
    """What heads look at on average; sums by document, so that intervals are over documents."""

    sums: dict[str, Float[np.ndarray, "layers heads documents"]] = field(repr=False)
    counts: dict[str, Float[np.ndarray, " documents"]] = field(repr=False)

    def __getitem__(self, score: str) -> Float[np.ndarray, "layers heads"]:
        """Mean over tokens: entropy in nats; weights of the others from 0 to 1."""
        self._check(score)
        return self.sums[score].sum(-1) / self.counts[score].sum()

    def interval(self, score: str, layer: int, head: int) -> Interval:
        """A score with its interval over documents (induction: over random sequences)."""
        self._check(score)
        return jackknife(
            np.stack([self.sums[score][layer, head], self.counts[score]], 1), lambda s: s[..., 0] / s[..., 1]
        )

    def _check(self, score: str) -> None:
        if score not in self.sums:
            raise InputError(f"There is no score {score!r}: there are {', '.join(self.sums)}.")

    def to_dict(self) -> dict[str, Any]:
        return {score: self[score].tolist() for score in self.sums}

    def __repr__(self) -> str:
        lines = ["Attention of heads (layer.head, the three highest):"]
        for score in self.sums:
            values = self[score]
            order = np.argsort(-values, axis=None, kind="stable")[:3]
            top = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, values.shape))]
            lines.append(f"  {score}: " + ", ".join(f"{i}.{j} {values[i, j]:.3g}" for i, j in top))
        return "\n".join(lines)

    def figure(self) -> Any:
        """Layers by heads, a map for each score."""
        from plotly.subplots import make_subplots

        figure = make_subplots(rows=1, cols=len(self.sums), subplot_titles=list(self.sums))
        for column, score in enumerate(self.sums, 1):
            figure.add_heatmap(
                z=self[score], colorscale="Blues", showscale=False, row=1, col=column,
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
            )  # fmt: skip
        figure.update_layout(height=360)
        return figure


@dataclass(frozen=True)
class RotaryUsage:
    """How much each rotary frequency contributes to heads' logits."""

    frequencies: Float[np.ndarray, " f"]
    """Radians a token, highest first; a last 0 for coordinates that are not rotated, if there are any."""
    share: Float[np.ndarray, "layers heads f"] = field(repr=False)
    """Of the logits' variance over keys; sums to 1, but is 0 for a head whose logits are all the same."""
    norm: Float[np.ndarray, "layers heads f"] = field(repr=False)
    """Mean of |q_f||k_f| over the pairs of tokens, times the attention's scaling."""

    @property
    def mean_frequency(self) -> Float[np.ndarray, "layers heads"]:
        """Frequencies averaged by their share of the norms: high for heads that use position."""
        return (self.norm * self.frequencies).sum(-1) / self.norm.sum(-1)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("frequencies", "share", "norm")}

    def __repr__(self) -> str:
        mean = self.mean_frequency
        order = np.argsort(-mean, axis=None, kind="stable")[:4]
        top = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, mean.shape))]
        heads = ", ".join(f"{i}.{j} {mean[i, j]:.3g}" for i, j in top)
        return f"RotaryUsage({len(self.frequencies)} frequencies; highest mean frequency of heads: {heads})"

    def figure(self) -> Any:
        """Heads by frequencies."""
        from plotly import graph_objects as go

        layers, heads, _ = self.share.shape
        bound = float(np.abs(self.share).max())
        figure = go.Figure(
            go.Heatmap(
                z=self.share.reshape(layers * heads, -1),
                x=[f"{frequency:.3g}" for frequency in self.frequencies],
                y=[f"{i}.{j}" for i in range(layers) for j in range(heads)],
                colorscale="RdBu",
                zmin=-bound,
                zmax=bound,
                hovertemplate="head %{y}, %{x} radians a token: %{z:.3f}<extra></extra>",
            )
        )
        figure.update_layout(
            xaxis={"title": {"text": "radians a token"}, "type": "category"},
            yaxis={"title": {"text": "layer.head"}, "type": "category", "autorange": "reversed"},
            height=max(360, 16 * layers * heads + 120),
        )
        return figure


@torch.no_grad()
def read_attention(model: HookedModel, prompt: Prompt) -> AttentionReading:
    """The weights of every head on one text, special tokens included.

    Raises InputError for models whose attention cannot be read, NumericsError on NaN.
    """
    ids = torch.tensor([prompt_ids(model, prompt)], device=model.device)
    calls = _record(model, ids, None)
    tokens = [str(i) for i in ids[0].tolist()]
    if model.tokenizer is not None:
        tokens = model.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    return AttentionReading(tuple(tokens), torch.stack([call.weights[0] for call in calls]).cpu().numpy())


@torch.no_grad()
def attention_scores(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    *,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = 8192,
    batch_tokens: int = 2048,
    n_random: int = 8,
    random_length: int = 24,
    seed: int = 0,
) -> AttentionScores:
    """Entropy, weight on the row's first token and on the previous token, at every token of texts but a row's
    first; and for causal models induction, on `n_random` rows of `random_length` random tokens said twice.

    Raises InputError for models whose attention cannot be read, NumericsError on NaN.
    """
    found: dict[str, list[np.ndarray]] = {score: [] for score in SCORES[:3]}
    documents = []
    for batch in token_batches(model, texts, tokenization, batch_tokens=batch_tokens, max_tokens=max_tokens):
        keep = batch.keep.clone()
        keep[:, 0] = False
        calls = _record(model, batch.input_ids, batch.attention_mask)
        for score, values in _scores(calls).items():
            found[score].append(values.permute(1, 3, 0, 2)[keep].flatten(1).cpu().numpy())
        documents.append(batch.token_document[keep].cpu().numpy())
    document = np.concatenate(documents)
    shape = (model.n_layers, model.n_heads, -1)
    if not len(document):
        raise InputError("No text has two tokens: there is nothing that heads could look back at.")
    counts = group_sums(np.ones((len(document), 1)), document)[:, 0]
    sums = {s: group_sums(np.concatenate(v), document).T.reshape(shape) for s, v in found.items()}
    all_counts = dict.fromkeys(sums, counts)
    if model.is_causal:
        induction = _induction(model, n_random, min(random_length, (model.context - 1) // 2), seed)
        sums["induction"], all_counts["induction"] = induction, np.ones(n_random)
    return AttentionScores(sums, all_counts)


@torch.no_grad()
def rotary_usage(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    *,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = 4096,
    batch_tokens: int = 1024,
) -> RotaryUsage:
    """Shares of rotary frequencies in every head's logits between the tokens of texts that count.

    Raises InputError for models without rotary embeddings, or whose attention cannot be read.
    """
    rotary = _Rotary.of(model)
    sums: dict[int, Tensor] = {}
    n_pairs = 0
    for batch in token_batches(model, texts, tokenization, batch_tokens=batch_tokens, max_tokens=max_tokens):
        seen = batch.keep[:, :, None] & batch.keep[:, None, :]
        if model.is_causal:
            seen = seen.tril()
        for layer, call in enumerate(_record(model, batch.input_ids, batch.attention_mask)):
            sums[layer] = sums.get(layer, 0) + rotary.sums(call, seen[:, None])
        n_pairs += int(seen.sum())
    covariance, variance, norm = torch.stack([sums[layer] for layer in sorted(sums)]).cpu().unbind(1)
    if not bool((variance > 0).any()):
        raise InputError("No query sees two different tokens: give longer texts.")
    share = torch.where(variance > 0, covariance / variance, 0.0)
    speeds = np.append(rotary.frequencies, np.zeros(share.shape[-1] - len(rotary.frequencies)))
    return RotaryUsage(speeds, share.numpy(), (norm / n_pairs).numpy())


@dataclass
class _Call:
    """One layer's attention: queries and keys as they are multiplied, keys one for each head."""

    weights: Float[Tensor, "batch heads pos pos"]
    q: Float[Tensor, "batch heads pos d"]
    k: Float[Tensor, "batch heads pos d"]
    scaling: float


_records = threading.local()


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The model's own eager attention, remembered."""
    eager = _beside(module, "eager_attention_forward")
    output, weights = eager(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    calls = getattr(_records, "calls", None)
    if calls is not None:  # else a forward of another thread
        calls.append(_Call(weights, query, key, scaling))
    return output, weights


def _beside(module: nn.Module, name: str) -> Any:
    """A function in the file that defines the module's class; None if it has none of that name."""
    return getattr(sys.modules[type(module).__module__], name, None)


def _record(model: HookedModel, ids: Int[Tensor, "batch pos"], mask: Tensor | None) -> list[_Call]:
    """Every layer's attention in one forward, which is otherwise as always."""
    hugging_face = getattr(model.model, "get_base_model", lambda: model.model)()
    if not hasattr(hugging_face, "set_attn_implementation"):
        raise InputError(f"Attention of {model.name} cannot be read: load the model from Hugging Face.")
    if any(name.startswith("encoder.") for name in model.sites):
        raise InputError(f"{model.name} has two stacks of attention: only models with one can be read.")
    _records.calls = []
    try:
        with evaluating(model.model), leaving_no_hooks(model.model), _attending(hugging_face):
            model.final(ids, mask)
        calls: list[_Call] = _records.calls
    finally:
        del _records.calls
    if len(calls) != model.n_layers or any(
        c.weights is None or c.weights.shape[1] != model.n_heads for c in calls
    ):
        raise InputError(
            f"Attention of {model.name} cannot be read: its layers do not go through transformers' attention interface."
        )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for layer, call in enumerate(calls):
        call.weights = call.weights.float()
        if not bool(call.weights.transpose(1, 2)[real.to(call.weights.device)].isfinite().all()):
            raise NumericsError(f"Attention weights of layer {layer} of {model.name} are NaN or inf.")
    return calls


@contextmanager
def _attending(model: Any) -> Iterator[None]:
    """The model with our attention function; its own afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_RECORDING, _recording_attention)
    AttentionMaskInterface.register(_RECORDING, eager_mask)
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation_internal")
    }
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = _RECORDING
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def _scores(calls: Sequence[_Call]) -> dict[str, Float[Tensor, "layers batch heads pos"]]:
    found: dict[str, list[Tensor]] = {score: [] for score in SCORES[:3]}
    for call in calls:
        w = call.weights
        found["entropy"].append(-(w * w.clamp_min(1e-30).log()).sum(-1))
        found["first_token"].append(w[..., 0])
        previous = torch.zeros_like(w[..., 0])
        previous[..., 1:] = w.diagonal(-1, dim1=-2, dim2=-1)
        found["previous_token"].append(previous)
    return {score: torch.stack(values) for score, values in found.items()}


def _induction(model: HookedModel, n: int, length: int, seed: int) -> Float[np.ndarray, "layers heads n"]:
    """Weight from a token's second occurrence on the token after its first, a mean for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    usual = [i for i in range(model.d_vocab) if i not in model.special_ids]
    length = min(length, len(usual))
    order = torch.stack([torch.randperm(len(usual), generator=generator)[:length] for _ in range(n)])
    once = torch.tensor(usual)[order]
    ids = torch.cat([once, once], 1)
    bos = 0
    if model.bos_id is not None:
        ids, bos = torch.cat([torch.full((n, 1), model.bos_id), ids], 1), 1
    calls = _record(model, ids.to(model.device), None)
    here = torch.arange(length, 2 * length) + bos
    looked = torch.stack([call.weights[:, :, here, here - length + 1].mean(-1) for call in calls])
    return looked.permute(0, 2, 1).double().cpu().numpy()


@dataclass(frozen=True)
class _Rotary:
    """Which coordinates of q and k turn together, and how fast."""

    frequencies: Float[np.ndarray, " f"]
    pair: Int[Tensor, " rotated"]
    """The number of the frequency of each rotated coordinate."""

    @classmethod
    def of(cls, model: HookedModel) -> _Rotary:
        modules = list(model.model.modules())
        tables = [t for m in modules if isinstance(t := getattr(m, "inv_freq", None), Tensor)]
        rotate = next((found for m in modules if (found := _beside(m, "rotate_half"))), None)
        if len(tables) != 1 or rotate is None:
            raise InputError(
                f"{model.name} has no rotary embedding that can be read (one table of frequencies for all layers)."
            )
        speeds = tables[0].float().cpu()
        rotated = 2 * len(speeds)
        partner = rotate(torch.arange(1.0, rotated + 1)).abs().long() - 1
        first = torch.minimum(partner, torch.arange(rotated))
        _, pair = first.unique(return_inverse=True)
        return cls(speeds.numpy(), pair)

    def split(self, x: Float[Tensor, "batch heads pos d"]) -> list[Tensor]:
        """Coordinates by frequency; those that are not rotated last, if there are any."""
        turned, rest = x[..., : len(self.pair)], x[..., len(self.pair) :]
        parts = [turned[..., self.pair == f] for f in range(len(self.frequencies))]
        return [*parts, rest] if rest.shape[-1] else parts

    def sums(self, call: _Call, seen: Bool[Tensor, "batch 1 pos pos"]) -> Float[Tensor, "3 heads f"]:
        """Over queries: covariance over keys of each frequency's part with the logit; the logit's variance. Over pairs: norms."""
        q, k = call.q.double(), call.k.double()
        deviation = _centred(q @ k.transpose(-1, -2), seen)
        keys = seen.sum(-1, keepdim=True).clamp_min(1)
        variance = (deviation.square() / keys).sum((0, 2, 3))
        found = []
        for q_f, k_f in zip(self.split(q), self.split(k)):
            part = q_f @ k_f.transpose(-1, -2)
            norm = q_f.norm(dim=-1)[..., :, None] * k_f.norm(dim=-1)[..., None, :] * call.scaling
            covariance = (part * deviation / keys).sum((0, 2, 3))
            found.append(torch.stack([covariance, variance, (norm * seen).sum((0, 2, 3))]))
        return torch.stack(found, -1)


def _centred(
    logits: Float[Tensor, "batch heads pos pos"], seen: Tensor
) -> Float[Tensor, "batch heads pos pos"]:
    """Logits less their mean over the keys that each query sees; 0 elsewhere."""
    mean = (logits * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    return (logits - mean) * seen
