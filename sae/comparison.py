"""One page for several SAEs: what they cost, what they keep, what their latents tell.

    comparison_page([read_json(run / "evaluation.json") for run in runs], "comparison/comparison.html")

Takes what `steerkit eval sae` found of each run. A run has one colour on the whole page, an architecture one
symbol; nothing is told by colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import InputError
from steerkit.plots import page

Result = Mapping[str, Any]
"""The figures of one run, as in its evaluation.json."""

_CURVES = (
    (
        "delta_ce",
        "ΔCE, nats a token",
        "Lower is better: what splicing in the reconstruction costs the model.",
    ),
    ("ce_recovered", "CE recovered", "1 is a perfect stand-in, 0 is no better than zeros."),
    ("fvu", "FVU", "Fraction of variance unexplained; lower is better."),
)
_COLUMNS = (
    ("l0", "L0", "{:.3g}"),
    ("fvu", "FVU", "{:.3g}"),
    ("delta_ce", "ΔCE", "{:.2g}"),
    ("ce_recovered", "CE recovered", "{:.4f}"),
    ("ce_recovered_mean", "against mean", "{:.4f}"),
    ("kl", "KL", "{:.2g}"),
    ("final_cosine", "final cosine", "{:.4f}"),
    ("dead_fraction", "dead", "{:.1%}"),
)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_GREY = "rgba(128, 128, 128, 0.55)"
_GREY_ROW = ' style="color: var(--quiet)"'
_NULL = "random SAE"
_ABLATIONS = ("mean ablation", "zero")
_GREYS = {_NULL: "line-ew-open", "token identity": "square-open", "posterior": "diamond-open"}
"""What stands beside the runs in figures -> its symbol."""


def comparison_page(results: Sequence[Result], path: str | Path, *, title: str = "SAEs compared") -> Path:
    """Write the page. Raises InputError without results, or with one run twice."""
    if not results:
        raise InputError("There is nothing to compare: give at least one evaluated run.")
    names = run_names([str(result["run"]) for result in results])
    runs = list(zip(names, results))
    parts: list[Any] = [_introduction(runs), "<h2>Runs</h2>", _table(runs)]
    parts += [
        f"<p><b>{html.escape(name)}</b>: {html.escape(str(result['caution']))}</p>"
        for name, result in runs
        if result.get("caution")
    ]
    for key, label, caption in _CURVES:
        if any(result.get(key) is not None for _, result in runs):
            parts += [
                f"<h2>{label} against L0</h2>",
                f"<p>{caption} Bars are 95 % intervals, jackknifed over documents.</p>",
                _curve(runs, key, label),
            ]
    parts += [
        "<h2>How often latents are active</h2>",
        "<p>Latents by the share of tokens on which they are active; silent ones are in none of the bins.</p>",
        _densities(runs),
    ]
    pruned = [(name, result) for name, result in runs if result.get("prune_curve")]
    if pruned:
        parts += _pruning(pruned)
    judged = [(name, result) for name, result in runs if result.get("judgement")]
    if judged:
        parts += _judging(judged)
    return page(title, parts, path)


def run_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises InputError if one is there twice."""
    split = [Path(path).resolve().parts for path in paths]
    if len(set(split)) < len(split):
        raise InputError("One run is given twice.")
    for depth in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-depth:]) for parts in split]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths differ somewhere")


def _introduction(runs: Sequence[tuple[str, Result]]) -> str:
    told = []
    for key, word in (("model", "model"), ("site", "site"), ("data", "text")):
        values = list(dict.fromkeys(str(result[key]) for _, result in runs if result.get(key) is not None))
        if len(values) == 1:
            told.append(f"{word} <code>{html.escape(values[0])}</code>")
        elif values:
            listed = ", ".join(f"<code>{html.escape(value)}</code>" for value in values)
            told.append(f"<b>different {word}s</b> ({listed}), so that figures are not of the same thing")
    tokens = [f"{result['tokens']:,}" for _, result in runs if result.get("tokens") is not None]
    told.append(f"measured on {', '.join(dict.fromkeys(tokens))} held-out tokens")
    return f"<p>{len(runs)} SAE{'s' * (len(runs) != 1)}: {'; '.join(told)}.</p>"


def _table(runs: Sequence[tuple[str, Result]]) -> str:
    columns = [column for column in _COLUMNS if any(result.get(column[0]) is not None for _, result in runs)]
    head = "".join(f'<th class="number">{label}</th>' for _, label, _ in columns)
    rows = []
    for name, result in runs:
        intervals = result.get("intervals") or {}
        cells = "".join(_cell(result.get(key), intervals.get(key), digits) for key, _, digits in columns)
        width = result.get("d_sae")
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(result.get('arch', '')))}</td>"
            f'<td class="number">{"" if width is None else f"{width:,}"}</td>{cells}</tr>'
        )
    for name, null in _nulls(runs):
        cells = "".join(_cell(null.get(key), None, digits) for key, _, digits in columns)
        rows.append(f"<tr{_GREY_ROW}><td>{html.escape(name)}</td><td></td><td></td>{cells}</tr>")
    return _scrolling(
        f'<table><tr><th>run</th><th>architecture</th><th class="number">latents</th>{head}</tr>{"".join(rows)}</table>'
    )


def _nulls(runs: Sequence[tuple[str, Result]]) -> list[tuple[str, Result]]:
    """What the runs stand beside; ablations, which do not depend on the SAE, once."""
    found: list[tuple[str, Result]] = []
    for run, result in runs:
        for null in result.get("nulls") or []:
            own = null["name"] not in _ABLATIONS and len(runs) > 1
            if null["name"] != "trained" and all(null != other for _, other in found):
                found.append((f"{null['name']} · {run}" if own else null["name"], null))
    return sorted(found, key=lambda named: named[1]["name"] in _ABLATIONS)


def _cell(value: float | None, interval: Mapping[str, float] | None, digits: str) -> str:
    if value is None or not math.isfinite(value):
        return '<td class="number">–</td>'
    shown = digits.format(value)
    if interval and interval.get("low") is not None:
        between = " to " if interval["low"] < 0 else "–"
        ends = between.join(digits.format(interval[end]) for end in ("low", "high"))
        shown += (
            f'<br><small style="color: var(--quiet); font-size: 11px; white-space: nowrap">{ends}</small>'
        )
    return f'<td class="number">{shown}</td>'


def _scrolling(table: str) -> str:
    return f'<div style="overflow-x: auto">{table}</div>'


def _symbols(runs: Sequence[tuple[str, Result]]) -> dict[str, str]:
    archs = list(dict.fromkeys(str(result.get("arch")) for _, result in runs))
    return {arch: _SYMBOLS[i % len(_SYMBOLS)] for i, arch in enumerate(archs)}


def _curve(runs: Sequence[tuple[str, Result]], key: str, label: str) -> Any:
    from plotly import graph_objects as go

    symbols, figure = _symbols(runs), go.Figure()
    for name, result in runs:
        value = result.get(key)
        figure.add_scatter(
            x=[result["l0"]],
            y=[value],
            error_x=_error(result, "l0"),
            error_y=_error(result, key),
            mode="markers",
            marker={"size": 10, "symbol": symbols[str(result.get("arch"))]},
            name=name if name == result.get("arch") else f"{name} · {result.get('arch')}",
            hovertemplate=f"{html.escape(name)}<br>L0 %{{x:.4g}}<br>{label} %{{y:.4g}}<extra></extra>",
        )
    # What is one architecture is joined, in a colour that no run has; last, so that runs keep theirs.
    for arch in symbols:
        points = sorted(
            (result["l0"], result[key])
            for _, result in runs
            if str(result.get("arch")) == arch and result.get(key) is not None
        )
        if len(points) > 1:
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                mode="lines",
                line={"color": _GREY, "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
    values = [result[key] for _, result in runs if result.get(key) is not None]
    apart = key != "ce_recovered" and min(values) > 0 and max(values) > 10 * min(values)
    figure.update_layout(
        xaxis={"title": {"text": "L0, active latents a token"}},
        yaxis={"title": {"text": label}, **({"type": "log", "dtick": "D2"} if apart else {})},
        showlegend=True,
        height=380,
    )
    return figure


def _error(result: Result, key: str) -> dict[str, Any] | None:
    interval = (result.get("intervals") or {}).get(key)
    if not interval or result.get(key) is None or interval.get("low") is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval["high"] - result[key]],
        "arrayminus": [result[key] - interval["low"]],
        "thickness": 1,
        "width": 3,
    }


def _densities(runs: Sequence[tuple[str, Result]]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for i, (name, result) in enumerate(runs):
        histogram = result["density_histogram"]
        edges, counts = histogram["log10_edges"], histogram["counts"]
        share = [count / max(sum(counts), 1) for count in counts]
        figure.add_scatter(
            x=edges,
            y=[*share, share[-1]],
            mode="lines",
            line={"shape": "hv", "width": 2, "dash": _DASHES[i % len(_DASHES)]},
            name=name,
            hovertemplate=f"{html.escape(name)}<br>from 10^%{{x}}: %{{y:.1%}} of its living latents<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "log10 of the share of tokens"}},
        yaxis={"title": {"text": "share of the living latents"}, "tickformat": ".0%"},
        showlegend=True,
        height=340,
    )
    return figure


def _pruning(runs: Sequence[tuple[str, Result]]) -> list[Any]:
    """Curves of what is left without the lowest activations."""
    has_ce = all(point["delta_ce"] is not None for _, result in runs for point in result["prune_curve"])
    first = ("delta_ce", "ΔCE, nats a token") if has_ce else ("final_cosine", "final cosine")
    return [
        "<h2>Without the lowest activations</h2>",
        "<p>Each latent loses the weakest 10 %, 20 % … 90 % of its activations, cut off at thresholds that were measured on other "
        "documents. From right to left; the first point of a curve is the SAE as it is.</p>",
        *(_prune_curves(runs, key, label) for key, label in (first, ("fvu", "FVU"))),
    ]


def _prune_curves(runs: Sequence[tuple[str, Result]], key: str, label: str) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for i, (name, result) in enumerate(runs):
        points = [point for point in result["prune_curve"] if point["kind"] in ("original", "quantile")]
        figure.add_scatter(
            x=[point["l0"] for point in points],
            y=[point[key] for point in points],
            text=[
                "as it is" if point["value"] is None else f"without {point['value']:.0%}" for point in points
            ],
            mode="lines+markers",
            marker={"size": 7, "symbol": _SYMBOLS[i % len(_SYMBOLS)]},
            line={"dash": _DASHES[i % len(_DASHES)]},
            name=name,
            hovertemplate=f"{html.escape(name)}, %{{text}}<br>L0 %{{x:.4g}}<br>{label} %{{y:.4g}}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "L0, active latents a token"}, "rangemode": "tozero"},
        yaxis={"title": {"text": label}},
        showlegend=True,
        height=320,
    )
    return figure


# judging


def _judging(runs: Sequence[tuple[str, Result]]) -> list[Any]:
    judgements = [(name, result["judgement"]) for name, result in runs]
    basis = list(dict.fromkeys(judgement["examples"] for _, judgement in judgements))
    parts: list[Any] = [
        "<h2>Judged by labels</h2>",
        "<p>Held-out balanced accuracy of the best 1, 2 and 5 latents (chance 0.5); monosemanticity FMS (0.25 for latents "
        "that know nothing); share of tokens whose concept is absorbed by a more specific latent; SCR and TPP, what "
        "ablating five latents does to probes (0 for nothing). Bars are 95 % intervals, clustered by document; grey is "
        f"what they stand beside. {html.escape('; '.join(basis))}.</p>",
        _dots(judgements),
        _judged_table(judgements),
    ]
    for key, label in (("scr", "SCR"), ("tpp", "TPP")):
        if any(row[key] for _, judgement in judgements for row in judgement["rows"]):
            parts += [
                f"<h2>{label} by the number of latents ablated</h2>",
                _by_number(judgements, key, label),
            ]
    notes = list(dict.fromkeys(note for _, judgement in judgements for note in judgement["notes"]))
    if notes:
        parts.append(f"<p>{html.escape('. '.join(notes))}.</p>")
    concepts = list(dict.fromkeys(name for _, judgement in judgements for name in judgement["concepts"]))
    listed = html.escape(", ".join(concepts))
    parts.append(f"<details><summary>{len(concepts)} concepts</summary><p>{listed}</p></details>")
    return parts


def _lines(judgements: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> list[tuple[str, Any, bool]]:
    """(name, entry of `key`, whether it is a run's SAE): those of the runs, then of what they stand beside.

    Baselines that are the same for several runs, as they do not depend on the SAE, are there once.
    """
    found = [(name, judgement[key][0], True) for name, judgement in judgements]
    beside: dict[str, list[tuple[str, Any]]] = {}
    for run, judgement in judgements:
        for row in judgement[key][1:]:
            known = beside.setdefault(row["name"], [])
            if all(row != other for _, other in known):
                known.append((run, row))
    for name, rows in beside.items():
        for run, row in rows:
            owner = f" · {run}" if len(judgements) > 1 and (len(rows) > 1 or "SAE" in name) else ""
            found.append((name + owner, row, False))
    return found


def _dots(judgements: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    lines = _lines(judgements, "table")
    measures = [key for key in lines[0][1] if key not in ("name", "size")]
    beside = dict.fromkeys(_GREYS)
    shown = []
    for name, row, is_run in lines:
        if is_run:
            shown.append((name, row, ""))
        elif row["name"] in beside:
            beside.pop(row["name"])
            shown.append((name, row, _GREYS[row["name"]]))
    for i, (name, row, grey_symbol) in enumerate(shown):
        found = [row[measure] for measure in measures]
        marker: dict[str, Any] = {"size": 9, "symbol": grey_symbol or _SYMBOLS[i % len(_SYMBOLS)]}
        if grey_symbol:
            marker["color"] = "rgb(128, 128, 128)"
        figure.add_scatter(
            x=measures,
            y=[cell and cell["estimate"] for cell in found],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [cell["high"] - cell["estimate"] if cell else 0 for cell in found],
                "arrayminus": [cell["estimate"] - cell["low"] if cell else 0 for cell in found],
                "thickness": 1,
                "width": 2,
            },
            mode="markers",
            marker=marker,
            cliponaxis=False,
            name=name,
            offsetgroup=str(i),
        )
    figure.update_layout(scattermode="group", scattergap=0.3, showlegend=True, height=400)
    figure.update_layout(yaxis={"title": {"text": "score"}})
    return figure


def _by_number(judgements: Sequence[tuple[str, Mapping[str, Any]]], key: str, label: str) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    seen = set()
    for i, (name, row, is_run) in enumerate(_lines(judgements, "rows")):
        measure = row[key]
        if not measure or not (is_run or row["name"] == _NULL) or (row["name"] in seen):
            continue
        if not is_run:
            seen.add(row["name"])
        numbers = [int(n) for n in measure["score"]]
        intervals = list(measure["score"].values())
        figure.add_scatter(
            x=numbers,
            y=[interval["estimate"] for interval in intervals],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [interval["high"] - interval["estimate"] for interval in intervals],
                "arrayminus": [interval["estimate"] - interval["low"] for interval in intervals],
                "thickness": 1,
                "width": 2,
            },
            mode="lines+markers",
            marker={"size": 8, "symbol": _SYMBOLS[i % len(_SYMBOLS)] if is_run else _GREYS[_NULL]},
            line={"dash": _DASHES[i % len(_DASHES)], **({} if is_run else {"color": "rgb(128, 128, 128)"})},
            name=name,
        )
    ticks = sorted({int(n) for trace in figure.data for n in trace.x})
    figure.update_layout(
        xaxis={"title": {"text": "latents ablated"}, "type": "log", "tickvals": ticks, "ticktext": ticks},
        yaxis={"title": {"text": label}},
        showlegend=True,
        height=320,
    )
    return figure


def _judged_table(judgements: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = _lines(judgements, "table")
    measures = [key for key in lines[0][1] if key not in ("name", "size")]
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in measures)
    rows = "".join(
        f'<tr{"" if is_run else _GREY_ROW}><td>{html.escape(name)}</td><td class="number">{row["size"]:,}</td>'
        + "".join(_cell(row[key] and row[key]["estimate"], row[key], "{:.3f}") for key in measures)
        + "</tr>"
        for name, row, is_run in lines
    )
    return _scrolling(f'<table><tr><th></th><th class="number">candidates</th>{head}</tr>{rows}</table>')
