"""Figures of weight changes: spectra, energy in the base's directions, magnitude against direction; and a page of them.

    report({"LoRA": changes, "full": others}, "runs/x/inside.html")        # each a mapping of module paths to changes

Colours and their light and dark forms are those of every page (`steerkit.plots`); kinds of module differ by symbol and dash too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.adapters.inside import (
    Change,
    base_energy,
    coupling,
    layer_and_kind,
    magnitude_direction,
    spectrum,
    summarise,
)
from steerkit.errors import InputError
from steerkit.plots import page

Changes = Mapping[str, Change]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLUMNS = {
    "path": "module",
    "relative_norm": "‖dW‖/‖W‖",
    "stable_rank": "stable rank",
    "rank_90": "rank at 90 %",
    "energy_both": "in W's top directions",
    "null_both": "random",
    "intruders": "intruders",
    "magnitude": "ΔM",
    "direction": "ΔD",
    "rotation_explained": "is rotation",
    "rotation_null": "random",
    "neuron_angle": "turned by °",
}


def spectra(changes: Changes) -> Any:
    """Singular values of each dW beside its largest, one colour a kind of module; what is zero is left out."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for i, (kind, members) in enumerate(_by_kind(changes).items()):
        xs: list[int | None] = []
        ys: list[float | None] = []
        for _, change in members:
            values = spectrum(change).values
            shown = (values[values > 1e-6 * values[0]] / values[0]).tolist()
            xs += [*range(1, len(shown) + 1), None]
            ys += [*shown, None]
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            name=html.escape(kind),
            line={"width": 1.5, "dash": _DASHES[i % len(_DASHES)]},
            hovertemplate=f"{html.escape(kind)}<br>σ<sub>%{{x}}</sub>/σ<sub>1</sub> = %{{y:.3g}}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "singular value"}, "type": "log"},
        yaxis={"title": {"text": "σ / σ₁ of dW"}, "type": "log", "exponentformat": "power"},
        showlegend=True,
        height=400,
    )
    return figure


def energy_heatmap(changes: Changes, k: int = 10, side: str = "both") -> Any:
    """Layers by kinds of module: how many times as much of dW is in W's k top directions (`left`, `right` or `both`) as of a random
    change, since that differs with the shape; the share itself when pointed at. Raises InputError for two stacks of layers.
    """
    from plotly import graph_objects as go

    shares = {
        layer_and_kind(path): getattr(base_energy(change, min(k, *change.base.shape)).top, side)
        for path, change in changes.items()
    }
    if len(shares) < len(changes):
        raise InputError("Two modules have the same layer and kind: draw an encoder and a decoder apart.")
    layers = sorted({layer for layer, _ in shares}, key=lambda layer: (layer is None, layer))
    kinds = list(dict.fromkeys(kind for _, kind in shares))
    cells = [[shares.get((layer, kind)) for layer in layers] for kind in kinds]
    times = [[None if cell is None else _finite(cell.value / cell.null) for cell in row] for row in cells]
    figure = go.Figure(
        go.Heatmap(
            z=times,
            x=["–" if layer is None else str(layer) for layer in layers],
            y=[html.escape(kind) for kind in kinds],
            customdata=[["" if cell is None else repr(cell) for cell in row] for row in cells],
            text=[["" if value is None else f"{value:.2g}" for value in row] for row in times],
            texttemplate="%{text}",
            colorscale="Cividis",
            zmin=0,
            zmax=max((value for row in times for value in row if value is not None), default=1),
            hovertemplate="layer %{x}, %{y}: %{z:.3g} times random<br>share %{customdata}<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "layer"}, "type": "category"},
        height=140 + 26 * len(kinds),
        margin={"l": 170},
    )
    return figure


def magnitude_direction_figure(changes: Changes) -> Any:
    """ΔM against ΔD, one point a module, and their correlation."""
    from plotly import graph_objects as go

    figure = go.Figure()
    points = []
    for i, (kind, members) in enumerate(_by_kind(changes).items()):
        found = [magnitude_direction(change) for _, change in members]
        points += found
        figure.add_scatter(
            x=[_finite(point.direction) for point in found],
            y=[_finite(point.magnitude) for point in found],
            text=[html.escape(path) for path, _ in members],
            mode="markers",
            name=html.escape(kind),
            marker={"size": 9, "symbol": _SYMBOLS[i % len(_SYMBOLS)]},
            hovertemplate="%{text}<br>ΔD %{x:.3g}, ΔM %{y:.3g}<extra></extra>",
        )
    correlation = coupling(points)
    said = "" if math.isnan(correlation) else f", correlation {correlation:.2f}"
    figure.update_layout(
        xaxis={"title": {"text": f"ΔD, change of direction{said}"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "ΔM, change of magnitude"}, "rangemode": "tozero"},
        showlegend=True,
        height=400,
    )
    return figure


def report(
    changes: Mapping[str, Changes], out: str | Path, *, k: int = 10, title: str = "Inside the changes"
) -> Path:
    """Write the page: for each name (a method, a seed) its figures and a row per module."""
    parts: list[Any] = []
    for name, members in changes.items():
        parts += [
            f"<h2>{html.escape(name)}</h2><p>Spectra of dW, beside the largest singular value.</p>",
            spectra(members),
            f"<p>How many times as much of dW as of a random change is in W's {k} top singular directions of both sides.</p>",
            energy_heatmap(members, k),
            "<p>DoRA's view: change of the neurons' norms against change of their directions.</p>",
            magnitude_direction_figure(members),
            _table(summarise(members, k)),
        ]
    return page(title, parts, out)


def _by_kind(changes: Changes) -> dict[str, list[tuple[str, Change]]]:
    found: dict[str, list[tuple[str, Change]]] = {}
    for path, change in changes.items():
        found.setdefault(layer_and_kind(path)[1], []).append((path, change))
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row[name])}</td>' for name in _COLUMNS)}</tr>" for row in rows)
    return f'<div style="overflow-x: auto"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
