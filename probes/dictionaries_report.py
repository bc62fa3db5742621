"""The page of two dictionaries: how near latents have a like one, and what those that appeared, vanished or turned fire on."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.dictionaries import DictionaryComparison, Match
from steerkit.plots import page

_SHOWN = 20
_MEANINGS = {
    "kept": "the same direction (cosine 0.9 and more)",
    "rotated": "each other's nearest, of a lower cosine",
    "split": "near to one that is nearer to another",
    "vanished": "only in the first",
    "appeared": "only in the second",
}


def write_dictionaries(found: DictionaryComparison, names: tuple[str, str], path: str | Path) -> Path:
    """Write the page; `names` are those of the two dictionaries."""
    rows = "".join(
        f'<tr><td>{kind}</td><td>{_MEANINGS[kind]}</td><td class="number">{n}</td></tr>'
        for kind, n in found.counts.items()
    )
    parts: list[Any] = [
        f"<p>First: <code>{html.escape(names[0])}</code>, {found.living_base} living latents. Second: "
        f"<code>{html.escape(names[1])}</code>, {found.living_tuned}. On {found.rows:,} tokens, the same in both.</p>"
        f"<p>A cosine up to {found.chance:.2f} is chance: below it lie 99 % of the nearest cosines to random directions of the "
        "same covariance. Two SAEs of one model, trained apart, differ as well: a second run on the first model with "
        "another seed says how much of this is not training.</p>",
        f'<table><tr><th></th><th></th><th class="number">latents</th></tr>{rows}</table>',
        "<h2>The nearest latent of the other dictionary</h2>",
        "<p>Cosine of decoder directions, for the first dictionary's latents.</p>",
        _nearest(found),
    ]
    for kind in ("appeared", "vanished", "rotated"):
        own = sorted(found.of_kind(kind), key=lambda match: match.cosine)
        if own:
            of = f", the {_SHOWN} of lowest cosine" if len(own) > _SHOWN else ""
            parts += [f"<h2>{kind.capitalize()}{of}</h2>", _table(own[:_SHOWN], found.examples)]
    return page("Two dictionaries", parts, path)


def _nearest(found: DictionaryComparison) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    bins = {"start": -0.2, "end": 1.001, "size": 0.04}
    figure.add_histogram(x=found.nearest_base.tolist(), xbins=bins, name="the other dictionary")
    figure.add_histogram(x=found.nearest_null.tolist(), xbins=bins, name="random directions", opacity=0.6)
    figure.update_layout(
        height=340,
        barmode="overlay",
        showlegend=True,
        xaxis={"title": {"text": "cosine"}},
        yaxis={"title": {"text": "latents"}},
    )
    return figure


def _table(matches: Sequence[Match], examples: Mapping[tuple[str, int], Sequence[str]]) -> str:
    rows = []
    for match in matches:
        cells = []
        for side, index in (("base", match.base), ("tuned", match.tuned)):
            tokens = (
                "" if index is None else ", ".join(html.escape(t) for t in examples.get((side, index), ()))
            )
            cells.append(f'<td class="number">{"–" if index is None else index}</td><td>{tokens}</td>')
        correlation = "–" if math.isnan(match.correlation) else f"{match.correlation:.2f}"
        rows.append(
            f'<tr>{"".join(cells)}<td class="number">{match.cosine:.2f}</td><td class="number">{correlation}</td></tr>'
        )
    head = (
        '<th class="number">first</th><th>fires most on</th><th class="number">second</th><th>fires most on</th>'
        '<th class="number">cosine</th><th class="number">correlation</th>'
    )
    return f'<div style="overflow-x: auto"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
