"""Direct logit attribution: an answer's logit as a sum of what every part of the model adds to the stream.

    h_L = embedding + Σ_l (Σ_h head_lh + attention bias_l + mlp_l)        the last stream
    m   = v · h_L / s + constant                 v: (W_U[:, answer] - W_U[:, wrong]) through the final norm's gain

    found = direct_attribution(model, prompts, answers="red", wrong="blue")
    found.heads.mean(-1), found.to_dict(); found.figure()

Elhage et al. 2021, https://transformer-circuits.pub/2021/framework. `s`, what the final norm divides by, is that of the
whole stream and held fixed, so that the parts add up exactly; a part's share says what it writes in the direction of
the answer, not what would be missing without it (patching tells that). Every premise is checked on the
prompts themselves: a model for which the sum is not exact is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.contrasts import Answers, LogitDifference, Prompt, Run, answer_ids
from probes.lens import final_norm
from sae.latents import through_final_norm
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import ActivationHook, evaluating


@dataclass(frozen=True)
class DirectAttribution:
    """Logit contributions, prompt by prompt."""

    embedding: Float[np.ndarray, " n"] = field(repr=False)
    """Of what enters the first block: tokens, and positions where they are added."""
    heads: Float[np.ndarray, "layers heads n"] = field(repr=False)
    attention_bias: Float[np.ndarray, "layers n"] = field(repr=False)
    mlps: Float[np.ndarray, "layers n"] = field(repr=False)
    constant: Float[np.ndarray, " n"] = field(repr=False)
    """Of the final norm's and the unembedding's biases."""
    total: Float[np.ndarray, " n"] = field(repr=False)
    """The logit (difference) that the model gives; all others add up to it."""

    def parts(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Name -> contribution, in the order of the forward pass."""
        found = {"embedding": self.embedding}
        for i, (heads, bias, mlp) in enumerate(zip(self.heads, self.attention_bias, self.mlps)):
            found |= {f"head {i}.{h}": value for h, value in enumerate(heads)}
            found |= {f"attention bias {i}": bias, f"mlp {i}": mlp}
        return found | {"constant": self.constant}

    def to_dict(self) -> dict[str, Any]:
        parts = {name: float(value.mean()) for name, value in self.parts().items()}
        return {"total": float(self.total.mean()), "prompts": len(self.total), "parts": parts}

    def __repr__(self) -> str:
        parts = sorted(self.to_dict()["parts"].items(), key=lambda part: -abs(part[1]))
        lines = [
            f"logit of the answer {self.total.mean():+.4g} (mean of {len(self.total)} prompts), of which"
        ]
        return "\n".join([*lines, *(f"  {value:+.3f}  {name}" for name, value in parts[:8])])

    def figure(self) -> Any:
        """Mean contribution of every part."""
        from plotly import graph_objects as go

        parts = self.to_dict()["parts"]
        figure = go.Figure(go.Bar(x=list(parts), y=list(parts.values())))
        figure.update_layout(yaxis={"title": {"text": "logit"}}, height=400)
        return figure


@torch.no_grad()
def direct_attribution(
    model: HookedModel,
    prompts: Sequence[Prompt],
    *,
    answers: Answers,
    wrong: Answers | None = None,
) -> DirectAttribution:
    """The logit of the answer, less that of a wrong one if given, part by part.

    Raises InputError for models whose logits are no such sum, naming why; NumericsError on NaN.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{model.name} is in {model.dtype}: load it with dtype='float32' for an exact sum.")
    run = Run.of(model, prompts)
    right = answer_ids(model, answers, len(run))
    other = None if wrong is None else answer_ids(model, wrong, len(run))
    with evaluating(model.model):
        stream = _Stream(run)
        u, unembedding_bias = _unembedding(model, right, other)
        scale, norm_bias = _frozen_norm(model, stream.last, stream.final)
        direction = _gain_direction(model, u)
    parts = torch.cat(
        [stream.embedding[None], stream.heads.flatten(0, 1), stream.attention_bias, stream.mlps]
    )
    values = (parts * direction).sum(-1) / scale
    constant = (u * norm_bias).sum(-1) + unembedding_bias
    logits = run.logits(stream.final[:, None].expand(-1, run.ids.shape[1], -1), slice(0, len(run)))
    rows = torch.arange(len(run), device=logits.device)
    total = logits[rows, right] if other is None else LogitDifference(right, other)(logits, rows)
    layers, n = model.n_layers, len(run)
    heads = values[1 : 1 + layers * model.n_heads].view(layers, model.n_heads, n)
    bias, mlps = values[1 + layers * model.n_heads :].view(2, layers, n)
    return DirectAttribution(
        *(t.double().cpu().numpy() for t in (values[0], heads, bias, mlps, constant, total))
    )


class _Stream:
    """What every part adds to the stream where the answer is read, (…, n, d_model); checked to add up."""

    def __init__(self, run: Run) -> None:
        model, self.run = run.model, run
        layers = range(model.n_layers)
        names = {
            kind: [model.site(f"blocks.{i}.{kind}").name for i in layers]
            for kind in ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
        }
        acts = model.run(run.ids, run.mask, sites=[name for group in names.values() for name in group])
        self.embedding = self._read(acts[names["hook_resid_pre"][0]])
        self.mlps = torch.stack([self._read(acts[name]) for name in names["hook_mlp_out"]])
        self.last = self._read(acts[names["hook_resid_post"][-1]])
        self.final = self._read(model.final(run.ids, run.mask))
        if not bool(self.final.isfinite().all()):
            raise NumericsError(f"The final states of {model.name} are NaN or inf.")
        attention = torch.stack([self._read(acts[name]) for name in names["hook_attn_out"]])
        self.heads, self.attention_bias = self._split(acts, names["attn.hook_z"], names["hook_attn_out"])
        for i, (whole, split) in enumerate(zip(attention, self.heads.sum(1) + self.attention_bias)):
            if not _close(split, whole):
                raise InputError(
                    f"Attention of block {i} of {model.name} is not the sum of its heads: "
                    "a norm stands between them and the stream, and no head has a share of its own."
                )
        if not _close(self.embedding + attention.sum(0) + self.mlps.sum(0), self.last):
            raise InputError(
                f"The last stream of {model.name} is not the sum of what its blocks add: "
                "norms stand in the stream itself (post-norm), and no part has a share of its own."
            )

    def _read(self, act: Float[Tensor, "copies*n pos d"]) -> Float[Tensor, "copies*n d"]:
        read = self.run.read.repeat(len(act) // len(self.run))
        return act[torch.arange(len(act), device=act.device), read.to(act.device)].to(self.run.model.device)

    def _split(
        self, acts: dict[str, Tensor], z_sites: Sequence[str], out_sites: Sequence[str]
    ) -> tuple[Float[Tensor, "layers heads n d"], Float[Tensor, "layers n d"]]:
        """Each head's output alone and what attention adds without any, from one forward of n_heads + 1 copies.

        No weights are read, so that adapters and quantised layers are right too.
        """
        model, copies = self.run.model, self.run.model.n_heads + 1

        def alone(z: Tensor) -> ActivationHook:
            size = z.shape[-1] // model.n_heads
            parts = torch.zeros(copies, *z.shape, device=z.device, dtype=z.dtype)
            for head in range(model.n_heads):
                columns = slice(head * size, (head + 1) * size)
                parts[head, ..., columns] = z[..., columns]
            return lambda act: parts.flatten(0, 1)

        ids, mask = (tensor.repeat(copies, 1) for tensor in (self.run.ids, self.run.mask))
        with model.hooks({site: alone(acts[site]) for site in z_sites}):
            outs = model.run(ids, mask, sites=list(out_sites))
        found = torch.stack([self._read(outs[site]).view(copies, len(self.run), -1) for site in out_sites])
        bias = found[:, -1]
        return found[:, :-1] - bias[:, None], bias


def _unembedding(
    model: HookedModel, right: Tensor, other: Tensor | None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """(direction in final states, bias) of the logit. InputError where logits are not affine in final states."""
    rows = torch.arange(len(right), device=right.device)

    def logit(x: Tensor) -> Tensor:
        logits = model.unembed(x)
        return logits[rows, right] - (0 if other is None else logits[rows, other])

    zero = torch.zeros(len(right), model.d_model, device=right.device, dtype=model.dtype)
    with torch.enable_grad():
        x = zero.clone().requires_grad_()
        (u,) = torch.autograd.grad(logit(x).sum(), x)
    probe = 10 * u / u.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30)
    bias = logit(zero)
    if not _close(logit(probe) - bias, (probe * u).sum(-1)):
        raise InputError(
            f"The logits of {model.name} are not linear in its final states (a soft cap, or a transform before the "
            "unembedding): no part has a share of its own."
        )
    return u, bias


def _frozen_norm(
    model: HookedModel, last: Float[Tensor, "n d"], final: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " d"]]:
    """(what the final norm divides by, its bias). InputError where it is none of the usual norms."""
    bias = final_norm(model)(torch.zeros_like(last)[:1, None])[0, 0]
    linear = through_final_norm(model, last)
    scale = linear.square().sum(-1) / (linear * (final - bias)).sum(-1)
    if not _close(linear / scale[:, None] + bias, final):
        raise InputError(
            f"The final states of {model.name} are not a LayerNorm or RMSNorm of its last stream: "
            "they cannot be split into parts."
        )
    return scale, bias


def _gain_direction(model: HookedModel, u: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """v with v · x = u · (gain and centring of the final norm applied to x)."""
    basis = through_final_norm(model, torch.eye(model.d_model, device=u.device, dtype=u.dtype))
    return u @ basis.T


def _close(found: Tensor, true: Tensor) -> bool:
    return bool((found - true).abs().max() <= 1e-4 * (1e-3 + float(true.abs().max())))
