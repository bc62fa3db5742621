"""How much the model loses without each attention head, or would lose by the slope of its loss.

    ablation     I_lh = L(z_lh <- 0, or its mean over tokens) - L                 nats a token
    gradient     I_lh = E_x |z_lh · ∂L(x)/∂z_lh|                                  nats a token; Michel et al. 2019

    found = head_importance(model, texts, method="mean", max_tokens=8192)
    found.scores, found.interval(1, 3), found.figure()

Michel, Levy & Neubig 2019, “Are sixteen heads really better than one?”, https://arxiv.org/abs/1905.10650 (eq. 2: the slope
of the loss in a mask of the head; `normalized` is their division by each layer's L2 norm). Zeros are nothing that
a model has seen, the head's mean over the same texts is milder. L is the next token's cross-entropy; for a
masked language model, KL(whole ‖ without the head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from probes.lens import next_tokens
from steerkit.data import Documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.replay import Replay
from steerkit.sites import ActivationHook, evaluating
from steerkit.stats import Interval, group_sums, jackknife
from steerkit.tokens import TokenBatch, Tokenization, token_batches

Method = Literal["zero", "mean", "gradient"]
_LOGITS = 2**25


@dataclass(frozen=True)
class HeadImportance:
    """Importance of every head; sums by document, so that intervals are over documents."""

    method: Method
    sums: Float[np.ndarray, "layers heads documents"] = field(repr=False)
    """Summed over each document's tokens (for `gradient`: over its rows)."""
    counts: Float[np.ndarray, " documents"] = field(repr=False)
    """Tokens, or rows."""

    @property
    def scores(self) -> Float[np.ndarray, "layers heads"]:
        """Nats a token that the head is worth."""
        return self.sums.sum(-1) / self.counts.sum()

    @property
    def normalized(self) -> Float[np.ndarray, "layers heads"]:
        """Scores over the L2 norm of their layer's."""
        norms = np.linalg.norm(self.scores, axis=1, keepdims=True)
        return self.scores / np.where(norms > 0, norms, 1.0)

    def interval(self, layer: int, head: int) -> Interval:
        """A score with its interval over documents, of which it takes at least two."""
        return jackknife(
            np.stack([self.sums[layer, head], self.counts], 1), lambda sums: sums[..., 0] / sums[..., 1]
        )

    def ranking(self) -> list[tuple[int, int, float]]:
        """(layer, head, score), the most important first."""
        scores = self.scores
        order = np.argsort(-scores, axis=None, kind="stable")
        return [(int(i), int(j), float(scores[i, j])) for i, j in zip(*np.unravel_index(order, scores.shape))]

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "documents": len(self.counts), "scores": self.scores.tolist()}

    def __repr__(self) -> str:
        first = ", ".join(f"{layer}.{head} {score:.3g}" for layer, head, score in self.ranking()[:6])
        return f"Head importance ({self.method}, {len(self.counts)} documents), nats a token: {first} …"

    def figure(self) -> Any:
        """Layers by heads."""
        from plotly import graph_objects as go

        figure = go.Figure(
            go.Heatmap(
                z=self.scores,
                colorscale="Oranges",
                colorbar={"title": {"text": "nats a token"}},
                hovertemplate="layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
            )
        )
        figure.update_layout(
            xaxis={"title": {"text": "head"}}, yaxis={"title": {"text": "layer"}}, height=400
        )
        return figure


def head_importance(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    method: Method = "mean",
    *,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = 8192,
    batch_tokens: int = 2048,
) -> HeadImportance:
    """Importance of every head for the model's predictions on texts.

    Raises InputError for a model without LM head, and for `gradient` on one that does not predict the next
    token; SiteError where heads' outputs are not to be had; NumericsError on NaN.
    """
    if method not in ("zero", "mean", "gradient"):
        raise InputError(f"The method is {method!r}: choose zero, mean or gradient.")
    if not model.has_lm_head:
        raise InputError(f"{model.name} has no language-model head: there is no loss that a head is worth.")
    if method == "gradient" and not model.is_causal:
        raise InputError(f"{model.name} does not predict the next token: choose method='zero' or 'mean'.")
    sites = [model.site(f"blocks.{i}.attn.hook_z").name for i in range(model.n_layers)]
    batches = list(
        token_batches(model, texts, tokenization, batch_tokens=batch_tokens, max_tokens=max_tokens)
    )
    if not any(bool(_counted(model, batch).any()) for batch in batches):
        raise InputError("No token of the texts is followed by another: give longer ones.")
    with evaluating(model.model):
        found = _by_gradient(model, sites, batches) if method == "gradient" else _by_ablation(
            model, sites, batches, mean=method == "mean"
        )  # fmt: skip
    if not np.isfinite(found.sums).all():
        raise NumericsError(f"The loss of {model.name} is NaN or inf.")
    return found


@torch.no_grad()
def _by_ablation(
    model: HookedModel, sites: Sequence[str], batches: Sequence[TokenBatch], *, mean: bool
) -> HeadImportance:
    stand_ins = _means(model, sites, batches) if mean else {}
    documents = np.concatenate([_documents(model, batch) for batch in batches])
    sums = []
    for site in sites:
        replay = Replay(model, site)
        columns = []
        for batch in batches:
            z, final = replay.run(batch.input_ids, batch.attention_mask)
            value = stand_ins.get(site, torch.zeros(z.shape[-1])).to(z)
            whole = _losses(model, final, final, batch)
            columns.append(
                torch.stack(
                    [
                        _losses(model, replay.again(_ablation(head, value, model.n_heads)), final, batch)
                        - whole
                        for head in range(model.n_heads)
                    ],
                    1,
                )
            )
        sums.append(group_sums(torch.cat(columns).double().cpu().numpy(), documents).T)
    counts = group_sums(np.ones((len(documents), 1)), documents)[:, 0]
    return HeadImportance("mean" if mean else "zero", np.stack(sums), counts)


def _ablation(head: int, value: Float[Tensor, " width"], n_heads: int) -> ActivationHook:
    size = len(value) // n_heads
    columns = slice(head * size, (head + 1) * size)

    def ablate(z: Tensor) -> Tensor:
        new = z.clone()
        new[..., columns] = value[columns]
        return new

    return ablate


def _means(
    model: HookedModel, sites: Sequence[str], batches: Sequence[TokenBatch]
) -> dict[str, Float[Tensor, " width"]]:
    """Mean of each head's output over the tokens that count."""
    totals: dict[str, Tensor] = {}
    for batch in batches:
        for site, act in model.run(batch.input_ids, batch.attention_mask, sites=sites).items():
            totals[site] = totals.get(site, 0) + act[batch.keep.to(act.device)].double().sum(0)
    n = sum(int(batch.keep.sum()) for batch in batches)
    return {site: (total / n).float() for site, total in totals.items()}


def _counted(model: HookedModel, batch: TokenBatch) -> Tensor:
    return next_tokens(batch)[0] if model.is_causal else batch.keep


def _documents(model: HookedModel, batch: TokenBatch) -> np.ndarray:
    return batch.token_document[_counted(model, batch)].cpu().numpy()


def _losses(model: HookedModel, final: Tensor, whole: Tensor, batch: TokenBatch) -> Float[Tensor, " n"]:
    """Cross-entropy of the next token, or KL(whole ‖ this), at every token that counts."""
    counted = _counted(model, batch)
    states, reference, following = final[counted], whole[counted], next_tokens(batch)[1][counted]
    found = []
    for part in torch.arange(len(states)).split(max(1, _LOGITS // model.d_vocab)):
        here = model.unembed(states[part]).float().log_softmax(-1)
        if model.is_causal:
            found.append(-here.gather(-1, following[part][:, None])[:, 0])
        else:
            target = model.unembed(reference[part]).float().log_softmax(-1)
            found.append(F.kl_div(here, target, reduction="none", log_target=True).sum(-1))
    return torch.cat(found)


def _by_gradient(model: HookedModel, sites: Sequence[str], batches: Sequence[TokenBatch]) -> HeadImportance:
    scores, documents = [], []
    for batch in batches:
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def probe(site: str) -> ActivationHook:
            def hook(z: Tensor) -> Tensor:
                zeros = torch.zeros_like(z, requires_grad=True)
                kept[site] = (z.detach(), zeros)  # noqa: B023
                return z + zeros

            return hook

        followed, following = next_tokens(batch)
        with torch.enable_grad(), model.hooks({site: probe(site) for site in sites}):
            logits = model.logits(batch.input_ids, batch.attention_mask).float()
            losses = F.cross_entropy(logits.transpose(1, 2), following, reduction="none") * followed
            example = losses.sum(1) / followed.sum(1).clamp_min(1)
            slopes = torch.autograd.grad(example.sum(), [kept[site][1] for site in sites])
        whole = (followed.sum(1) > 0).cpu()
        products = [(kept[site][0] * slope).sum(1).float() for site, slope in zip(sites, slopes)]
        by_head = torch.stack([p.view(len(p), model.n_heads, -1).sum(-1).abs().cpu() for p in products], 1)
        scores.append(by_head.flatten(1)[whole].double().numpy())
        documents.append(batch.document.cpu()[whole].numpy())
    document = np.concatenate(documents)
    sums = group_sums(np.concatenate(scores), document)
    counts = group_sums(np.ones((len(document), 1)), document)[:, 0]
    return HeadImportance("gradient", sums.T.reshape(len(sites), model.n_heads, -1), counts)
