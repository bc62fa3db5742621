"""Removing the lowest activations of a trained sparse autoencoder.

    pruned = prune(sae, acts, quantile=0.3)              # each latent loses the weakest 30 % of its
    activations pruned = prune(sae, absolute=0.5)                    # one cut for all latents
    sparser = keep_top(sae, 8)                           # the 8 strongest latents of each token
    curve = prune_curve(model, sae, held_out, site)      # cross-entropy and FVU against L0, along a grid

What a sparsity penalty leaves over are many weak activations that explain little. A pruned SAE is a JumpReLU
SAE, f = z · 1[z > threshold] with z = ReLU(pre-activation), as it is saved. For ReLU latents nothing else
changes; of a gated SAE the gate becomes part of the threshold (z is its magnitude, and z > b_mag - exp(r_mag)
b_gate is what the gate asks); a TopK SAE gives up its limit of k latents a token for thresholds that keep the
densities of its latents. The curve says what each step costs.

Riggs & Brinkmann 2024, “Improving SAEs by Sqrt-ing L1 & Removing Lowest Activating Features”.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures import L1, SAE, SqrtL1, TopK, Transcoder
from sae.evaluation import Evaluation, check_fits, evaluate_all
from sae.formats import as_jumprelu
from sae.thresholds import strongest, strongest_of_each
from steerkit.activations import Tokenization, collect
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.plots import PALETTE
from steerkit.runs import write_json

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of each latent's activations that a curve removes."""


@torch.no_grad()
def prune(
    sae: SAE,
    acts: Float[Tensor, "n d_in"] | None = None,
    *,
    quantile: float | None = None,
    absolute: float | None = None,
) -> SAE:
    """A copy, as a JumpReLU SAE (a transcoder or a crosscoder stays one), whose latents lose their lowest activations.

    `quantile`, from 0 to 1: the share of its activations on `acts` (held-out tokens, not those it is then
    measured on) that each latent loses. `absolute`: every activation up to that value, in the SAE's own
    units. Raises InputError unless exactly one of them is given, and for a quantile without `acts`.
    """
    if (quantile is None) == (absolute is None):
        raise InputError("Give either a quantile or an absolute cut to prune by.")
    if absolute is not None:
        if not absolute >= 0:
            raise InputError(f"The cut is {absolute}: activations lie above 0, so give 0 or more.")
        cut = torch.full((sae.d_sae,), absolute, device=sae.device, dtype=sae.dtype)
        if sae.threshold is not None:
            cut = torch.maximum(cut, sae.threshold)
        elif isinstance(sae.config, TopK):
            if acts is None:
                raise InputError("A TopK SAE needs activations to be pruned: give some of held-out text.")
            cut = torch.maximum(cut, strongest(sae, acts, 1.0))
    else:
        assert quantile is not None
        if not 0 <= quantile <= 1:
            raise InputError(f"quantile is {quantile}: it is a share, from 0 to 1.")
        if acts is None or not len(acts):
            raise InputError("A quantile needs activations to be measured on: give some of held-out text.")
        return _pruned(sae, strongest(sae, acts, 1 - quantile), quantile=quantile)
    return _pruned(sae, cut, absolute=absolute)


def _pruned(sae: SAE, threshold: Tensor, **how: float | None) -> SAE:
    """A copy with these thresholds."""
    found = copy.deepcopy(sae).requires_grad_(False)
    found.threshold = threshold
    found.metadata = {**sae.metadata, "pruned": {"quantile": None, "absolute": None, **how}}
    return found if found.config.own_thresholds else as_jumprelu(found)


def keep_top(sae: SAE, k: int) -> SAE:
    """A copy that keeps the k strongest latents of each token.

    Of a ReLU or TopK SAE that is a TopK SAE, and saved as one; of another (gated, or with thresholds) it is
    one that works here and in evaluations, but that no file format has. Raises InputError for an impossible
    k.
    """
    if not 0 < k <= sae.d_sae:
        raise InputError(f"k is {k}; it lies between 1 and d_sae = {sae.d_sae}.")
    found: SAE
    if sae.threshold is None and isinstance(sae.config, (L1, SqrtL1, TopK)):
        limit = sae.config.k if isinstance(sae.config, TopK) else sae.d_sae
        k = min(k, limit)
        config = replace(sae.config, k=k) if isinstance(sae.config, Transcoder) else TopK(sae.d_sae, k=k)
        found = config.build(sae.d_in)
        found.load_state_dict(sae.state_dict())
        found = found.to(sae.device, sae.dtype)
    else:
        found = _TopLatents(sae, k)
    found.metadata = {**sae.metadata, "pruned": {"top": k}}
    return found.requires_grad_(False).eval()


class _TopLatents(SAE):
    """An SAE of which each token keeps its k strongest latents."""

    def __init__(self, sae: SAE, k: int) -> None:
        nn.Module.__init__(self)
        self.inner, self.k = copy.deepcopy(sae), k
        self.config, self.d_in, self.d_sae = sae.config, sae.d_in, sae.d_sae
        self.W_enc, self.W_dec, self.b_dec = self.inner.W_enc, self.inner.W_dec, self.inner.b_dec
        self.register_buffer("threshold", None)

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        latents = self.inner.encode(x)
        values, indices = latents.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(latents).scatter_(-1, indices, values)

    def save(self, path: Any) -> None:
        raise InputError(
            f"No format has a {self.inner.arch} SAE that keeps {self.k} latents a token: save the SAE itself, or "
            "prune it by a quantile."
        )


@dataclass(frozen=True)
class PrunePoint:
    """One SAE of the curve. None where the model has no language-model head."""

    kind: str
    """`original`, `quantile` or `top`."""
    value: float | None
    """The share of activations lost, or the latents kept a token."""
    l0: float
    fvu: float
    dead_fraction: float
    delta_ce: float | None
    ce_recovered: float | None
    kl: float | None
    final_cosine: float


@dataclass(frozen=True, repr=False)
class PruneCurve:
    """What removing low activations costs: the SAE as it is first, then along the grid."""

    points: tuple[PrunePoint, ...]
    evaluations: tuple[Evaluation, ...]

    def of(self, kind: str) -> list[PrunePoint]:
        """The points of one kind, the SAE as it is in front."""
        return [point for point in self.points if point.kind in ("original", kind)]

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(point) for point in self.points]

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def figure(self) -> Any:
        """Plotly figure: rise of the cross-entropy (without a head: cosine of the final states) and FVU
        against L0."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        has_ce = self.points[0].delta_ce is not None
        titles = (
            "Rise of the cross-entropy" if has_ce else "Cosine of the final states",
            "Variance unexplained",
        )
        made = make_subplots(rows=1, cols=2, subplot_titles=titles)
        quantities = ("delta_ce" if has_ce else "final_cosine", "fvu")
        colours = {"quantile": PALETTE[0], "top": PALETTE[1]}
        names = {"quantile": "weakest of each latent", "top": "all but the strongest of each token"}
        for column, quantity in enumerate(quantities, start=1):
            for kind, colour in colours.items():
                points = self.of(kind)
                if len(points) < 2:
                    continue
                trace = go.Scatter(
                    x=[p.l0 for p in points],
                    y=[getattr(p, quantity) for p in points],
                    text=["as trained" if p.value is None else f"{p.kind} {p.value:g}" for p in points],
                    hovertemplate="%{text}<br>L0 %{x:.2f}<br>%{y:.4f}<extra></extra>",
                    mode="lines+markers",
                    name=names[kind],
                    legendgroup=kind,
                    showlegend=column == 1,
                    line={"color": colour},
                )
                made.add_trace(trace, row=1, col=column)
        made.update_xaxes(title_text="L0, active latents a token")
        made.update_yaxes(title_text="nats a token" if has_ce else "cosine", row=1, col=1)
        made.update_yaxes(title_text="FVU", row=1, col=2)
        made.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.25})
        return made

    def __repr__(self) -> str:
        names = ("l0", "fvu", "delta_ce", "ce_recovered", "kl", "final_cosine", "dead_fraction")
        lines = [f"{'removed':<16}" + "".join(f"{name:>14}" for name in names)]
        for point in self.points:
            values = (getattr(point, name) for name in names)
            cells = "".join("–".rjust(14) if v is None else f"{v:>14.4g}" for v in values)
            label = "nothing" if point.value is None else f"{point.kind} {point.value:g}"
            lines.append(f"{label:<16}{cells}")
        return "\n".join(lines)


def prune_curve(
    model: HookedModel,
    sae: SAE,
    documents: Documents | Sequence[str],
    site: str,
    *,
    quantiles: Sequence[float] = QUANTILES,
    top: Sequence[int] = (),
    calibration_tokens: int = 65_536,
    tokens: int = 100_000,
    tokenization: Tokenization | None = None,
    sink_threshold: float | None = None,
    quiet: bool = True,
) -> PruneCurve:
    """Evaluate the SAE as it is and with activations removed: per latent for each of `quantiles`, per token
    for each of `top`.

    Of the held-out `documents`, the first third serves to measure thresholds on, the others to evaluate on.
    Raises InputError for fewer than two documents.
    """
    documents = load_documents(documents)
    check_fits(model, sae, site)
    if len(documents) < 2:
        raise InputError(
            f"{documents.name} holds one document: a curve needs two or more, to calibrate on others."
        )
    cut = max(1, len(documents) // 3)
    calibration = collect(
        model, documents[:cut], site, tokenization=tokenization, max_tokens=calibration_tokens
    )[site]
    kinds: list[tuple[str, float | None]] = [("original", None)]
    saes = {"original": sae}
    shares = list(dict.fromkeys(quantiles))
    for quantile, threshold in zip(shares, strongest_of_each(sae, calibration, [1 - q for q in shares])):
        kinds.append(("quantile", quantile))
        saes[f"quantile {quantile}"] = _pruned(sae, threshold, quantile=quantile)
    for k in dict.fromkeys(top):
        kinds.append(("top", k))
        saes[f"top {k}"] = keep_top(sae, k)
    found = evaluate_all(
        model,
        saes,
        documents[cut:],
        site,
        tokenization=tokenization,
        tokens=tokens,
        sink_threshold=sink_threshold,
        quiet=quiet,
    )
    measured = ("l0", "fvu", "dead_fraction", "delta_ce", "ce_recovered", "kl", "final_cosine")
    evaluations = tuple(found.values())
    points = [
        PrunePoint(kind, value, *(getattr(evaluation, name) for name in measured))
        for (kind, value), evaluation in zip(kinds, evaluations, strict=True)
    ]
    return PruneCurve(tuple(points), evaluations)
