"""The page of a comparison of adapters: scores, what they cost, and how the learning rates were chosen."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.adapters.bench import BenchResult
from steerkit.plots import page

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross", "triangle-down")
_GREY = "rgb(128, 128, 128)"
_QUIET = "color: var(--quiet)"
Row = Mapping[str, Any]


def write_report(result: BenchResult, path: str | Path) -> Path:
    """Write the page."""
    task = result.config["task"]
    better = "Higher" if _higher(result) else "Lower"
    parts: list[Any] = [
        _introduction(result),
        f"<h2>{html.escape(task['metric'].capitalize())} on test examples</h2>",
        f"<p>Mean over {result.config['seeds']} seeds with its 95 % interval (Student's t); small marks are single seeds. "
        f"{better} is better. Dotted, where it is near: the model as it is.</p>",
        _scores(result),
        "<h2>What it costs</h2>",
        "<p>The grey line joins the methods that no other one beats in both.</p>",
        _front(result, "trainable_params", "trained parameters", log=True),
    ]
    if any(row["forgetting"] is not None for row in result.rows):
        parts.append(
            _front(result, "forgetting", "forgetting: rise of the loss on unrelated text, nats a token")
        )
    if any(_is_number(row["peak_memory_mb"]) for row in result.rows):
        parts.append(_front(result, "peak_memory_mb", "peak memory while training, MB"))
    parts += [
        "<h2>Table</h2>",
        f"<p>“Against {html.escape(result.config['baseline'])}” is the difference of scores, seed by seed, with its 95 % interval, "
        "to the one nearest in size. “Merge error” is the greatest change of the final states when the adapter is put into the "
        "weights, as a share of the greatest state.</p>",
        _table(result),
        _left_out(result),
        "<h2>Learning rates</h2>",
        "<p>Validation loss of one seed, which is not among those reported, at every rate that was tried; the circle is the one "
        "that was taken. A grid is drawn out, so often as is asked for, while its best lies on its edge; where it still "
        "does, the table says “edge”.</p>",
        _rates(result),
    ]
    return page(f"Adapters: {task['name']}", parts, path)


def _higher(result: BenchResult) -> bool:
    return bool(result.config["task"]["higher_is_better"])


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _introduction(result: BenchResult) -> str:
    config, base = result.config, result.base
    scores = ", ".join(f"{html.escape(name)} {value:.3g}" for name, value in base["scores"].items())
    budget = ""
    if config["budgets"]:
        budgets = ", ".join(f"{budget:,}" for budget in config["budgets"])
        budget = (
            f"Budget: {budgets} trained parameters, which each method's size is set to come near; a method without a size has what "
            "it has. "
        )
    sizes = config["task"]["objective"]["examples"]
    loss = (
        "" if base["unrelated"] is None else f"; loss on unrelated text {base['unrelated']:.4f} nats a token"
    )
    return (
        f"<p>Model <code>{html.escape(config['model'])}</code> on <code>{html.escape(config['task']['name'])}</code>: "
        f"{sizes['train']:,} training examples, {config['epochs']:g} epochs in batches of {config['batch_size']}. "
        f"{budget}Without an adapter: {html.escape(config['task']['metric'])} {scores}{loss}.</p>"
    )


def _labels(result: BenchResult) -> dict[int, str]:
    """Row number -> its name; with the budget where there are several."""
    several = len(result.config["budgets"]) > 1
    return {
        i: f"{row['method']} · {row['trainable_params']:,}" if several and row["budget"] else row["method"]
        for i, row in enumerate(result.rows)
    }


def _scores(result: BenchResult) -> Any:
    from plotly import graph_objects as go

    labels = _labels(result)
    sign = 1 if _higher(result) else -1
    order = sorted(range(len(result.rows)), key=lambda i: sign * result.rows[i]["metric_mean"])
    rows = [result.rows[i] for i in order]
    names = [labels[i] for i in order]
    figure = go.Figure()
    figure.add_scatter(
        x=[value for row in rows for value in row["by_seed"]],
        y=[name for name, row in zip(names, rows) for _ in row["by_seed"]],
        mode="markers",
        marker={"size": 5, "color": _GREY, "symbol": "line-ns-open"},
        hovertemplate="%{y}, one seed: %{x:.4g}<extra></extra>",
    )
    figure.add_scatter(
        x=[row["metric_mean"] for row in rows],
        y=names,
        mode="markers",
        marker={"size": 9},
        error_x={
            "type": "data",
            "array": [
                0 if row["metric_ci"] is None else row["metric_ci"][1] - row["metric_mean"] for row in rows
            ],
            "thickness": 1.5,
        },
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )
    values, base = [v for row in rows for v in row["by_seed"]], result.base["scores"]["test"]
    if min(abs(v - base) for v in values) < max(values) - min(
        values
    ):  # else it would press the others together
        figure.add_vline(x=base, line={"color": _GREY, "dash": "dot", "width": 1.5})
    figure.update_layout(
        height=120 + 24 * len(rows),
        showlegend=False,
        xaxis={"title": {"text": result.config["task"]["metric"]}},
        margin={"l": 130},
    )
    return figure


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices, from left to right, of the points (cost, score) for which no other costs less and scores better."""
    sign = -1 if higher else 1
    best, found = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[i][1] < best:
            best = sign * points[i][1]
            found.append(i)
    return found


def _front(result: BenchResult, key: str, title: str, *, log: bool = False) -> Any:
    from plotly import graph_objects as go

    labels = _labels(result)
    chosen = [(i, row) for i, row in enumerate(result.rows) if _is_number(row[key])]
    front = pareto([(row[key], row["metric_mean"]) for _, row in chosen], _higher(result))
    figure = go.Figure()
    figure.add_scatter(
        x=[chosen[i][1][key] for i in front],
        y=[chosen[i][1]["metric_mean"] for i in front],
        mode="lines",
        line={"color": _GREY, "width": 1, "shape": "hv"},
        hoverinfo="skip",
        showlegend=False,
    )
    families = sorted({row["family"] for row in result.rows})
    for number, family in enumerate(families):
        of_it = [(i, row) for i, row in chosen if row["family"] == family]
        figure.add_scatter(
            x=[row[key] for _, row in of_it],
            y=[row["metric_mean"] for _, row in of_it],
            error_y={
                "type": "data",
                "array": [
                    0 if row["metric_ci"] is None else row["metric_ci"][1] - row["metric_mean"]
                    for _, row in of_it
                ],
                "thickness": 1,
                "width": 3,
            },
            mode="markers+text",
            text=[html.escape(labels[i]) for i, _ in of_it],
            textposition="top center",
            textfont={"size": 10},
            marker={"size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            name=family,
            hovertemplate="%{text}: %{y:.4g} at %{x:.4g}<extra></extra>",
        )
    figure.update_layout(
        height=420,
        showlegend=True,
        xaxis={"title": {"text": title}, **({"type": "log"} if log else {})},
        yaxis={"title": {"text": result.config["task"]["metric"]}},
    )
    return figure


def _number(digits: str) -> Callable[[Any], str]:
    return lambda value: digits.format(value) if _is_number(value) else "–"


def _with_spread(value: float | None, spread: float | None, digits: str = ".3g") -> str:
    if not _is_number(value):
        return "–"
    return f"{value:{digits}}" + (f" ± {spread:.2g}" if _is_number(spread) else "")


def _table(result: BenchResult) -> str:
    others = sorted({name for row in result.rows for name in row["ood"]})
    sign = -1 if _higher(result) else 1
    head = [
        "method",
        "family",
        "size",
        "parameters",
        "rate",
        result.config["task"]["metric"],
        f"against {result.config['baseline']}",
    ]
    head += [*others, "forgetting", "ms a step", "peak MB", "file MB", "merge error"]
    rows = []
    for row in sorted(result.rows, key=lambda r: sign * r["metric_mean"]):
        size = {k: v for k, v in row["settings"].items() if k in ("rank", "block", "n_frequency", "size")}
        cells = [
            f"<td>{html.escape(row['method'])}</td><td style='{_QUIET}'>{html.escape(row['family'])}</td>",
            f"<td class='number'>{html.escape(', '.join(str(v) for v in size.values())) or '–'}</td>",
            *(
                f"<td class='number'>{text}</td>"
                for text in (
                    f"{row['trainable_params']:,}",
                    f"{row['lr']:.2g}" + (" (edge)" if _on_edge(row) else ""),
                    _with_spread(row["metric_mean"], row["metric_sd"]) + _failed(row),
                    _against(row["difference"]),
                    *(
                        _with_spread(row["ood"].get(n, {}).get("mean"), row["ood"].get(n, {}).get("sd"))
                        for n in others
                    ),
                    _with_spread(row["forgetting"], row["forgetting_sd"], ".3f"),
                    _number("{:.1f}")(row["step_seconds"] and 1e3 * row["step_seconds"]),
                    _number("{:.0f}")(row["peak_memory_mb"]),
                    _number("{:.2f}")(row["size_mb"]),
                    _number("{:.1e}")(row["merge_error"]),
                )
            ),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(
        f"<th{'' if i < 2 else ' class=number'}>{html.escape(title)}</th>" for i, title in enumerate(head)
    )
    return f'<div style="overflow-x: auto; white-space: nowrap"><table><tr>{titles}</tr>{"".join(rows)}</table></div>'


def _left_out(result: BenchResult) -> str:
    items = "".join(
        f"<li><code>{html.escape(entry['method'])}</code>: {html.escape(entry['reason'])}</li>"
        for entry in result.skipped
    )
    return f"<p>Left out:</p><ul style='{_QUIET}'>{items}</ul>" if items else ""


def _on_edge(row: Row) -> bool:
    """Whether a rate beyond those that were tried might have been better."""
    return len(row["tried"]) > 1 and row["lr"] in (row["tried"][0][0], row["tried"][-1][0])


def _failed(row: Row) -> str:
    return (
        f"<br><small style='{_QUIET}'>diverged: seed {', '.join(map(str, row['diverged']))}</small>"
        if row["diverged"]
        else ""
    )


def _against(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    between = (
        ""
        if difference["ci"] is None
        else "<br><small style='{}; white-space: nowrap'>[{:+.2g}, {:+.2g}]</small>".format(
            _QUIET, *difference["ci"]
        )
    )
    return f"{difference['mean']:+.3g}{between}"


def _rates(result: BenchResult) -> Any:
    from plotly import graph_objects as go

    labels = _labels(result)
    figure = go.Figure()
    for i, row in enumerate(result.rows):
        tried = [(rate, loss) for rate, loss in row["tried"] if _is_number(loss)]
        marks = ["circle" if rate == row["lr"] else "line-ew-open" for rate, _ in tried]
        figure.add_scatter(
            x=[rate for rate, _ in tried],
            y=[loss for _, loss in tried],
            mode="lines+markers",
            marker={"symbol": marks, "size": 9},
            line={"width": 1.5, "dash": ("solid", "dash", "dot", "dashdot")[i // 7 % 4]},
            name=labels[i],
            hovertemplate=f"{html.escape(labels[i])}, rate %{{x:.2g}}: %{{y:.4f}}<extra></extra>",
        )
    figure.update_layout(
        height=420,
        showlegend=True,
        xaxis={"type": "log", "title": {"text": "learning rate"}},
        yaxis={"title": {"text": "validation loss"}},
    )
    return figure
