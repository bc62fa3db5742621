"""Latents in a notebook: a dashboard's as a list to unfold, or one by itself. HTML without scripts that needs no network.

dashboard = run.dashboard();  dashboard;  dashboard.latent(17)          # in the last line of a cell
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.dashboard.pieces import context_texts, shown_tokens
from sae.latents import WINDOW, Example, LatentStats
from steerkit.plots import notebook_frame

N_LATENTS = 12
"""Latents of a dashboard that are shown: the most active."""
N_CONTEXTS = 8


@dataclass(frozen=True)
class LatentView:
    """One latent as it is shown."""

    stats: LatentStats = field(repr=False)
    tokenizer: Any = field(repr=False)
    latent: int
    name: str
    concept: tuple[str, float] | None = None

    def _repr_html_(self) -> str:
        head = f"<h1>{_text(self.name)} <small>{_text(self.stats.info['site'])}</small></h1>"
        return notebook_frame(f"{head}{_facts(self)}{body(self)}", _CSS, height=430)


def overview(title: str, site: str, views: Sequence[LatentView], n_alive: int) -> str:
    """A frame with a line for each latent, which unfolds."""
    lines = "".join(
        f"<details><summary><b>{_text(view.name)}</b>{_top_tokens(view)}{_facts(view)}</summary>{body(view)}</details>"
        for view in views
    )
    note = (
        f" · {len(views)} of {n_alive:,} living latents, the most active first"
        if len(views) < n_alive
        else ""
    )
    return notebook_frame(
        f"<h1>{_text(title)} <small>{_text(site + note)}</small></h1>{lines}", _CSS, height=480
    )


def body(view: LatentView) -> str:
    """What is known of a latent, but for its facts: histogram, logits, contexts."""
    stats, i = view.stats, view.latent
    examples = stats.examples(i)
    strongest = [e for e in examples if e.interval == 0][:N_CONTEXTS]
    weaker = [
        next(e for e in examples if e.interval == k)
        for k in (5, 4, 3, 2, 1)
        if k in {e.interval for e in examples}
    ]
    parts = [
        f'<div class="side">{_histogram(stats.histogram[i])}{_logits(view)}</div>',
        '<div class="contexts">',
    ]
    parts += [_context(view, e) for e in strongest]
    if weaker:
        parts.append("<h2>one of each fifth of the others, from strong to weak</h2>")
        parts += [_context(view, e) for e in weaker]
    return f'<div class="latent">{"".join(parts)}</div></div>'


def _facts(view: LatentView) -> str:
    stats, i = view.stats, view.latent
    facts = [f"active on {stats.density[i]:.2%}", f"max {stats.maximum[i]:.3g}", f"mean {stats.mean[i]:.3g}"]
    if view.concept is not None:
        facts.append(f"{view.concept[0]}, AUROC {view.concept[1]:.3f}")
    return f'<span class="facts">{_text(" · ".join(facts))}</span>'


def _top_tokens(view: LatentView) -> str:
    ids = [int(token) for token in view.stats.token_ids[view.latent, :4] if token >= 0]
    return "".join(f"<code>{_text(text.strip())}</code>" for text in shown_tokens(view.tokenizer, ids))


def _logits(view: LatentView) -> str:
    ids, values = view.stats.logit_ids, view.stats.logit_values
    if ids is None or values is None:
        return ""
    words = shown_tokens(view.tokenizer, ids[view.latent].tolist())
    half = len(words) // 2
    columns = []
    for chosen, kind in ((range(6), "for"), (range(len(words) - 1, len(words) - 7, -1), "against")):
        lines = (
            f"<tr><td><code>{_text(words[k].strip())}</code></td><td>{_number(values[view.latent, k])}</td></tr>"
            for k in chosen
            if 0 <= k < len(words) and (k < half) == (kind == "for")
        )
        columns.append(f'<table class="{kind}"><caption>logits {kind}</caption>{"".join(lines)}</table>')
    return f'<div class="logits">{"".join(columns)}</div>'


def _histogram(counts: np.ndarray) -> str:
    """Tokens by activation, both on logarithmic scales."""
    used = np.flatnonzero(counts)
    if not len(used):
        return ""
    shown = counts[used[0] : used[-1] + 1]
    most = math.log1p(float(shown.max()))
    width = 240 / max(12, len(shown))
    bars = "".join(
        f'<rect x="{k * width:.1f}" y="{60 - 56 * math.log1p(n) / most:.1f}" width="{0.9 * width:.1f}" '
        f'height="{56 * math.log1p(n) / most:.1f}"><title>{int(n):,} tokens</title></rect>'
        for k, n in enumerate(shown)
    )
    return f'<svg viewBox="0 0 240 61" role="img" aria-label="Histogram of activations">{bars}</svg>'


def _context(view: LatentView, example: Example) -> str:
    row = view.stats.row(example.row)
    first, end = max(0, example.position - WINDOW), min(len(row), example.position + WINDOW + 1)
    texts = context_texts(view.tokenizer, row[first:end].tolist())
    spans = []
    for at, text in enumerate(texts, first):
        act = example.window[at - example.position + WINDOW]
        shade = 0.1 + 0.72 * min(1.0, act / max(float(view.stats.maximum[view.latent]), 1e-30))
        style = f' style="background:rgba(var(--heat),{shade:.2f})" title="{act:.3g}"' if act > 0 else ""
        peak = ' class="peak"' if at == example.position else ""
        word = text.removeprefix(" ") or text
        space = text[: len(text) - len(word)]
        spans.append(f"{space}<span{peak}{style}>{_text(word)}</span>" if style or peak else _text(text))
    before, after = "… " * (first > 0), " …" * (end < len(row))
    return f"<p><i>{example.activation:.2f}</i><q>{before}{''.join(spans)}{after}</q></p>"


def _number(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _text(text: str) -> str:
    """Escaped for text and attributes."""
    return html.escape(text, quote=True)


_CSS = """
summary { cursor: pointer; padding: 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; overflow: hidden; }
summary b { display: inline-block; min-width: 92px; font-weight: 500; }
code { font: 12px var(--mono); background: var(--sunken); border-radius: 4px; padding: 1px 5px; margin-right: 5px; }
.facts { color: var(--quiet); font-size: 12px; margin-left: 6px; }
.latent { display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 24px; padding: 10px 0 16px; }
.logits { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 8px; }
.logits table { border-collapse: collapse; width: 100%; font-size: 12px; table-layout: fixed; }
.logits caption { text-align: left; color: var(--faint); }
.logits td { padding: 1px 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.logits td + td { text-align: right; width: 46px; }
.for td + td { color: var(--accent); } .against td + td { color: var(--against); }
svg { width: 100%; fill: var(--accent); opacity: .75; border-bottom: 1px solid var(--line); }
.contexts p { display: grid; grid-template-columns: 44px minmax(0, 1fr); gap: 10px; margin: 0; padding: 3px 0; line-height: 1.6; }
.contexts i { font-style: normal; text-align: right; color: var(--quiet); font-size: 12px; }
.contexts q { quotes: none; white-space: pre-wrap; overflow-wrap: anywhere; }
.contexts span { border-radius: 3px; } .peak { box-shadow: inset 0 -2px 0 rgba(var(--heat), 1); }
@media (max-width: 640px) { .latent { grid-template-columns: minmax(0, 1fr); } }
"""
