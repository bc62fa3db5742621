"""The page of a comparison, and what its figures say in plain words: both made of what summary.json holds.

A difference is told only where its interval, or Holm's correction of its p-values over the layers, supports it; of two layers whose
intervals overlap neither is said to have moved more.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.plots import page

Figures = Mapping[str, Any]
_GREY = "rgb(128, 128, 128)"
_QUIET = "color: var(--quiet)"
_ALPHA = 0.05
_SHARE = 0.9
"""Of the way from the head alone to all blocks."""


# -- in words --------------------------------------------------------------------------------------------------------


def findings(figures: Figures) -> tuple[str, ...]:
    """Sentences, each supported by intervals at 95 % or by p-values corrected over layers (Holm 1979)."""
    return (
        *_of_scores(figures["scores"]),
        *_of_drift(figures["layers"]),
        *_of_similarity(figures["layers"]),
        *(line for probe in figures["probes"].values() for line in _of_probes(probe, figures["layers"])),
        *(line for name, sweep in figures["rollback"].items() for line in _of_rollback(name, sweep)),
        *([] if figures["freezing"] is None else [_of_freezing(figures["freezing"])]),
        *_of_weights(figures["weights"]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method; NaN stays NaN and does not count.

    The i-th smallest of m (from 0) becomes the greatest of (m - j) p_j over j ≤ i, at most 1.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    found, greatest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        greatest = max(greatest, min(1.0, (len(order) - rank) * p_values[i]))
        found[i] = greatest
    return found


def _of_scores(scores: Figures) -> Iterator[str]:
    for name, found in scores.items():
        change = found["change"]["difference"]
        values = f"from {found['base']['estimate']:.4g} to {found['tuned']['estimate']:.4g}"
        if change["estimate"] == 0 and change["low"] == change["high"]:
            yield f"{_title(name)} is the same in both models."
        elif _excludes_zero(change):
            went = "rose" if change["estimate"] > 0 else "fell"
            yield f"{_title(name)} {went} {values}: by {_signed(change)}."
        else:
            yield f"{_title(name)} cannot be told to have changed: {_signed(change)}."


def _title(name: str) -> str:
    return "The loss on this text (nats a token)" if name == "loss" else f"“{name}”"


def _of_drift(layers: Sequence[Figures]) -> Iterator[str]:
    moved = [(row, row["drift"]["relative_change"]) for row in layers if row["drift"]]
    still = [row for row, change in moved if change["estimate"] == 0]
    if still:
        yield f"Activations are the same, bit for bit, at {_listed(_named(row['layer']) for row in still)}."
    if len(still) == len(moved):
        return
    most, change = max(moved, key=lambda item: item[1]["estimate"])
    told = f"Activations moved most at {_named(most['layer'])}: by {change['estimate']:.3g} {_ends(change)} of their size"
    alike = [row["layer"] for row, other in moved if row is not most and _overlap(other, change)]
    yield told + (f"; {_listed(map(_named, alike))} cannot be told from it." if alike else ".")


def _of_similarity(layers: Sequence[Figures]) -> Iterator[str]:
    least = min(layers, key=lambda row: row["cka"])
    alike = [
        row["layer"] for row in layers if row is not least and _pairs_overlap(row["cka_ci"], least["cka_ci"])
    ]
    told = f"By CKA the models are least alike at {_named(least['layer'])}: {least['cka']:.3f} {_between(least['cka_ci'], 3)}"
    if len(alike) == len(layers) - 1:
        told = f"By CKA no layer is less alike than another: the least, at {_named(least['layer'])}, is {least['cka']:.3f}"
    elif alike:
        told += f", where {_listed(map(_named, alike))} cannot be told from it"
    yield told + "."
    with_null = [row for row in layers if row["cka_null"]]
    below = [row["layer"] for row in with_null if not row["cka_ci"][0] > row["cka_null"]["high"]]
    if below:
        yield f"At {_listed(map(_named, below))} the CKA is not above that of texts paired at random."
    elif with_null:
        yield "At every layer the CKA is above that of texts paired at random."


def _of_probes(probe: Figures, layers: Sequence[Figures]) -> Iterator[str]:
    changes = {row["layer"]: probe["change"][row["site"]] for row in layers}
    corrected = dict(zip(changes, holm([c["p_value"] for c in changes.values()])))
    label = probe["label"]
    sure = [
        (layer, c["difference"])
        for layer, c in changes.items()
        if corrected[layer] < _ALPHA and _excludes_zero(c["difference"])
    ]
    for more, word in ((True, "better"), (False, "worse")):
        told = [f"{_named(layer)} ({_signed(d)})" for layer, d in sure if (d["estimate"] > 0) is more]
        if told:
            yield f"Probes read {label} {word} after training at {_listed(told)}: accuracy, corrected for {len(changes)} layers."
    if not sure:
        yield f"At no layer can the accuracy of probes for {label} be told to have changed (corrected for {len(changes)} layers)."


def _of_rollback(name: str, sweep: Figures) -> Iterator[str]:
    alone = [s for s in sweep["scores"] if s["kind"] == "single" and s["alpha"] == 0]
    corrected = holm([s["change"]["p_value"] for s in alone])
    sure = [s for s, p in zip(alone, corrected) if p < _ALPHA and _excludes_zero(s["change"]["difference"])]
    if not sure:
        yield f"{_title(name)}: rolling back any single block makes no difference that can be told."
        return
    most = max(sure, key=lambda s: abs(s["change"]["difference"]["estimate"]))
    change = most["change"]["difference"]
    rivals = [
        s["at"]
        for s in alone
        if s is not most and _overlap(_magnitude(s["change"]["difference"]), _magnitude(change))
    ]
    told = f"{_title(name)} changes when one of blocks {_runs([s['at'] for s in sure])} alone is rolled back"
    if len(sure) == 1:
        told = f"{_title(name)} changes when block {most['at']} alone, and no other, is rolled back: by {_signed(change)}"
    else:
        told += f", most at block {most['at']}: by {_signed(change)}"
    told += f" – {_listed(map(_named, rivals))} cannot be told from it" if rivals else ""
    whole = sweep["base"]["change"]["difference"]
    yield f"{told}. Rolling everything back changes it by {whole['estimate']:+.3g}."


def _of_freezing(sweep: Figures) -> str:
    what, results = f"{sweep['score_name']} of the base trained again", sweep["results"]
    if not sweep["gain"]["low"] > 0:
        return (
            f"Freezing: the {what} cannot be told to be better with all blocks than with the head alone "
            f"({_signed(sweep['gain'])}), so that no share of the way is known."
        )
    reached = next(r for r in results if r["normalised"]["estimate"] >= _SHARE or r is results[-1])
    surely = next(r for r in results if r["normalised"]["low"] >= _SHARE or r is results[-1])
    told = f"Freezing: for the {what}, {_SHARE:.0%} of the way from the head alone to all blocks takes {_trained(reached, sweep)}"
    return f"{told}, and beyond doubt {_trained(surely, sweep)}."


def _trained(result: Figures, sweep: Figures) -> str:
    if result is sweep["results"][-1]:
        return f"all {result['k']}"
    return f"the {sweep['side']} {result['k']} ({_shares(result['normalised'])})"


def _shares(interval: Figures) -> str:
    return f"{interval['estimate']:.2f} {_between((interval['low'], interval['high']), 2)}"


def _of_weights(weights: Sequence[Figures]) -> Iterator[str]:
    if not weights:
        return
    moved = [w for w in weights if w["norm"] > 0]
    if not moved:
        yield "No weight has changed."
        return
    most = max(moved, key=lambda w: -1.0 if math.isnan(w["relative"]) else w["relative"])
    layers = sorted({w["layer"] for w in moved if w["layer"] is not None})
    where = f"in block{'s' * (len(layers) > 1)} {_runs(layers)}" if layers else "outside of the blocks"
    yield (
        f"{len(moved)} of {len(weights)} weight tensors changed, {where}; relative to its size most of all "
        f"{most['name']} ({_number(most['relative'])})."
    )


def _magnitude(interval: Figures) -> Figures:
    """The interval of |x|, for x whose sign is known."""
    if interval["estimate"] >= 0:
        return interval
    return {"estimate": -interval["estimate"], "low": -interval["high"], "high": -interval["low"]}


def _excludes_zero(interval: Figures) -> bool:
    return interval["low"] > 0 or interval["high"] < 0


def _overlap(a: Figures, b: Figures) -> bool:
    return _pairs_overlap((a["low"], a["high"]), (b["low"], b["high"]))


def _pairs_overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Also true where an end is NaN: what is not known is not told apart."""
    return not (a[0] > b[1] or b[0] > a[1])


def _named(layer: Any) -> str:
    return f"block {layer}" if isinstance(layer, int) else "the embedding" if layer == "embed" else str(layer)


def _listed(items: Any) -> str:
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _runs(layers: Sequence[int]) -> str:
    """0–3, 5"""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found)


# -- the page --------------------------------------------------------------------------------------------------------


def write_report(figures: Figures, path: str | Path) -> Path:
    """Write the page."""
    parts: list[Any] = [_introduction(figures), *_similarity(figures), *_movement(figures)]
    for probe in figures["probes"].values():
        parts += _probes(probe, figures["layers"])
    for name, sweep in figures["rollback"].items():
        parts += _rollback(name, sweep)
    if figures["freezing"] is not None:
        parts += _freezing(figures["freezing"])
    if any(w["norm"] > 0 for w in figures["weights"]):
        parts += _weights(figures["weights"])
    parts += ["<h2>Layer by layer</h2>", _table(figures)]
    return page(f"{figures['base']} and {figures['tuned']}", parts, path)


def _introduction(figures: Figures) -> str:
    what = {
        "token": "tokens",
        "mean": "texts (mean of their tokens)",
        "last": "texts (last token)",
        "cls": "texts",
    }
    told = (
        f"<p>Before: <code>{html.escape(figures['base'])}</code>. After: <code>{html.escape(figures['tuned'])}</code>. "
        f"{figures['rows']:,} {what[figures['reading']]} of {figures['texts']:,} texts of "
        f"<code>{html.escape(figures['data'])}</code>, the same in both; seed {figures['seed']}. "
        "Intervals are at 95 %, over texts.</p><h2>In words</h2><ul>"
    )
    told += "".join(f"<li>{html.escape(line)}</li>" for line in figures["findings"]) + "</ul>"
    if figures["left_out"]:
        told += "<p>Left out or otherwise than usual:</p><ul>"
        told += "".join(f"<li>{html.escape(line)}</li>" for line in figures["left_out"]) + "</ul>"
    return told + "".join(f'<p style="{_QUIET}">{html.escape(note)}</p>' for note in figures["notes"])


def _similarity(figures: Figures) -> list[Any]:
    from plotly import graph_objects as go

    cka = figures["cka"]
    found = {(p["a"], p["b"]): p for p in cka["pairs"]}
    cells = [[found[a, b]["estimate"] for b in cka["tuned"]] for a in cka["base"]]
    told = [
        [_between((found[a, b]["low"], found[a, b]["high"]), 3) for b in cka["tuned"]] for a in cka["base"]
    ]
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=[_short(site) for site in cka["tuned"]],
            y=[_short(site) for site in cka["base"]],
            customdata=told,
            colorscale="Cividis",
            zmax=1,
            zmin=min(0.0, min(map(min, cells))),
            texttemplate="%{z:.2f}" if len(cells) * len(cells[0]) <= 200 else None,
            hovertemplate="before %{y}, after %{x}: %{z:.4f} %{customdata}<extra></extra>",
        )
    )
    figure.update_layout(
        height=160 + 34 * len(cells),
        xaxis={"type": "category", "title": {"text": "after"}},
        yaxis={"type": "category", "title": {"text": "before"}, "autorange": "reversed"},
    )
    return [
        "<h2>Every layer with every other</h2>",
        "<p>Debiased linear CKA: 1 for layers that are the same up to rotation and scale, about 0 for unrelated ones.</p>",
        figure,
        "<h2>Like layers</h2>",
        "<p>CKA, the cosine after the best rotation (Procrustes, on texts it was not fitted on) and the correlation of the cosines "
        f"between rows (RSA).{_null_told(figures)}</p>",
        _alike(figures["layers"]),
    ]


def _null_told(figures: Figures) -> str:
    """What texts paired at random have: too far below to stand in the figure."""
    nulls = [row["cka_null"]["high"] for row in figures["layers"] if row["cka_null"]]
    if not nulls:
        return ""
    return f" Of texts paired at random, {figures['permutations']} times, 95 % have a CKA below {max(nulls):.3f} at any layer."


def _alike(layers: Sequence[Figures]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    x = [_short(row["site"]) for row in layers]
    for key, name in (("cka", "CKA"), ("procrustes", "Procrustes"), ("rsa", "RSA")):
        _line(figure, name, x, [_interval(row, key) for row in layers])
    figure.update_layout(
        height=380, showlegend=True, xaxis={"type": "category"}, yaxis={"title": {"text": "similarity"}}
    )
    return figure


def _movement(figures: Figures) -> list[Any]:
    from plotly import graph_objects as go

    layers = [row for row in figures["layers"] if row["drift"]]
    if not layers:
        return []
    figure = go.Figure()
    x = [_short(row["site"]) for row in layers]
    drift = {
        key: [row["drift"][key] for row in layers] for key in ("relative_change", "cosine", "centred_cosine")
    }
    _line(figure, "relative change", x, drift["relative_change"])
    for key, name in (("cosine", "1 − cosine"), ("centred_cosine", "1 − cosine about the mean")):
        _line(figure, name, x, [_from_one(value) for value in drift[key]])
    figure.update_layout(
        height=380, showlegend=True, xaxis={"type": "category"}, yaxis={"title": {"text": "change"}}
    )
    return [
        "<h2>How far each layer moved</h2>",
        "<p>The same neurons at the same tokens: size of the difference as a share of the base's activations, and how far "
        "directions turned.</p>",
        figure,
    ]


def _from_one(interval: Figures) -> Figures:
    return {"estimate": 1 - interval["estimate"], "low": 1 - interval["high"], "high": 1 - interval["low"]}


def _probes(probe: Figures, layers: Sequence[Figures]) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    for side, name in (("base", "before"), ("tuned", "after")):
        _line(
            figure,
            name,
            [_short(site) for site in probe[side]],
            [s["accuracy"] for s in probe[side].values()],
        )
    for found, name in ((probe["majority"], "class frequencies"), (probe["ceiling"], "exact posterior")):
        if found is not None:
            figure.add_hline(
                y=found["estimate"], line={"color": _GREY, "width": 1}, annotation={"text": name}
            )
    figure.update_layout(
        height=380, showlegend=True, xaxis={"type": "category"}, yaxis={"title": {"text": "accuracy"}}
    )
    changes = [probe["change"][row["site"]] for row in layers]
    corrected = holm([c["p_value"] for c in changes])
    rows = "".join(
        f'<tr><td>{_short(row["site"])}</td><td class="number">{_shown(probe["base"][row["site"]]["accuracy"])}</td>'
        f'<td class="number">{_shown(probe["tuned"][row["site"]]["accuracy"])}</td>'
        f'<td class="number">{_signed_cell(c["difference"])}</td><td class="number">{c["p_value"]:.3g}</td>'
        f'<td class="number">{p:.3g}</td></tr>'
        for row, c, p in zip(layers, changes, corrected)
    )
    heads = ("before", "after", "change", "p", "p, Holm")
    head = "".join(f'<th class="number">{name}</th>' for name in heads)
    label, classes = html.escape(probe["label"]), ", ".join(html.escape(str(c)) for c in probe["classes"][:8])
    return [
        f"<h2>Probes of {label}</h2>",
        f"<p>Logistic probes for {classes}{' …' if len(probe['classes']) > 8 else ''}, on the same {probe['rows']:,} rows "
        "and the same folds, which never split a text. Changes are tested in pairs; "
        "the last column is corrected for the number of layers.</p>",
        figure,
        f'<div style="overflow-x: auto"><table><tr><th>layer</th>{head}</tr>{rows}</table></div>',
    ]


def _rollback(name: str, sweep: Figures) -> list[Any]:
    from plotly import graph_objects as go

    figure = go.Figure()
    told = {
        "single": "one block",
        "prefix": "up to the block",
        "suffix": "from the block on",
        "part": "other parts",
    }
    for kind, line in told.items():
        own = [s for s in sweep["scores"] if s["kind"] == kind and s["alpha"] == 0]
        if kind == "part":
            own = [s for s in own if sweep["relative_change"][s["at"]] > 0]
        if own:
            mode = "markers" if kind == "part" else "lines+markers"
            values = [s["change"]["difference"] for s in own]
            _line(figure, line, [str(s["at"]) for s in own], values, mode)
    whole = sweep["base"]["change"]["difference"]["estimate"]
    for value, label in ((whole, "all rolled back"), (0.0, "tuned")):
        figure.add_hline(y=value, line={"color": _GREY, "width": 1}, annotation={"text": label})
    figure.update_layout(
        height=420,
        showlegend=True,
        xaxis={"type": "category", "categoryorder": "array", "categoryarray": list(sweep["relative_change"])},
        yaxis={"title": {"text": f"{'nats a token' if name == 'loss' else name}, rolled back − tuned"}},
    )
    title = "loss on this text" if name == "loss" else name
    return [
        f"<h2>Rollback: {html.escape(title)}</h2>",
        "<p>The tuned model with the base's weights put back in some blocks, nothing trained again: change of the score, in "
        "pairs on the same examples.</p>",
        figure,
    ]


def _freezing(sweep: Figures) -> list[Any]:
    from plotly import graph_objects as go

    results = sweep["results"]
    rows = "".join(
        f'<tr><td>{r["k"]}</td><td class="number">{"–" if r["lr"] is None else format(r["lr"], ".2g")}'
        f'{" (edge of its grid)" if r["at_edge"] else ""}</td><td class="number">{_shown(r["score"])}</td>'
        f'<td class="number">{_shown(r["normalised"])}</td></tr>'
        for r in results
    )
    heads = "".join(
        f'<th class="number">{name}</th>'
        for name in ("learning rate", html.escape(sweep["score_name"]), "way")
    )
    parts: list[Any] = [
        "<h2>Freezing</h2>",
        f"<p>The base trained again, the {sweep['side']} k blocks of it and the others as they were: how far it comes from the "
        "head alone (0) to all blocks, embeddings and final norm (1). Every k has the learning rate that is best on "
        "validation.</p>",
    ]
    if sweep["gain"]["low"] > 0:
        figure = go.Figure()
        _line(figure, "way", [str(r["k"]) for r in results], [r["normalised"] for r in results])
        figure.add_hline(y=_SHARE, line={"color": _GREY, "width": 1, "dash": "dot"})
        figure.update_layout(
            height=380,
            xaxis={"type": "category", "title": {"text": f"blocks trained, from the {sweep['side']}"}},
            yaxis={"title": {"text": "share of the way"}},
        )
        parts.append(figure)
    return [*parts, f"<table><tr><th>k</th>{heads}</tr>{rows}</table>"]


def _weights(weights: Sequence[Figures]) -> list[Any]:
    from plotly import graph_objects as go

    inside = [w for w in weights if w["layer"] is not None]
    layers = sorted({w["layer"] for w in inside})
    cells: dict[str, dict[int, Figures]] = {}
    for w in inside:
        cells.setdefault(_module(w["name"], w["layer"]), {})[w["layer"]] = w
    parts: list[Any] = [
        "<h2>How far the weights went</h2>",
        "<p>‖tuned − base‖ / ‖base‖ of each weight, an adapter's effective change included.</p>",
    ]
    moved = {module: row for module, row in cells.items() if any(w["norm"] > 0 for w in row.values())}
    if moved:
        of = [[row.get(layer, None) for layer in layers] for row in moved.values()]
        figure = go.Figure(
            go.Heatmap(
                z=[
                    [None if w is None or math.isnan(w["relative"]) else w["relative"] for w in row]
                    for row in of
                ],
                customdata=[[None if w is None else w["norm"] for w in row] for row in of],
                x=[f"block {layer}" for layer in layers],
                y=list(moved),
                colorscale="Cividis",
                zmin=0,
                hovertemplate="%{y}, %{x}: %{z:.3g} (norm %{customdata:.3g})<extra></extra>",
            )
        )
        figure.update_layout(height=160 + 24 * len(moved), yaxis={"autorange": "reversed"})
        parts.append(figure)
    others = [w for w in weights if w["layer"] is None and w["norm"] > 0]
    if others:
        rows = "".join(
            f'<tr><td>{html.escape(w["name"])}</td><td class="number">{_number(w["relative"])}</td>'
            f'<td class="number">{w["norm"]:.3g}</td></tr>'
            for w in others
        )
        head = '<th>outside of the blocks</th><th class="number">relative</th><th class="number">norm</th>'
        parts.append(f"<table><tr>{head}</tr>{rows}</table>")
    return parts


def _module(name: str, layer: int) -> str:
    """The parameter's name inside its block."""
    return name.partition(f".{layer}.")[2] or name


def _table(figures: Figures) -> str:
    heads = (
        "CKA",
        "at random",
        "Procrustes",
        "RSA",
        "relative change",
        "cosine",
        "at random",
        "overlap",
        "by chance",
    )
    rows = []
    for row in figures["layers"]:
        drift, null, cosine = row["drift"], row["cka_null"], row["cosine_null"]
        cells = [
            _shown(_interval(row, "cka")),
            "–" if null is None else f"&lt; {null['high']:.3f}",
            _shown(_interval(row, "procrustes")),
            _shown(_interval(row, "rsa")),
            "–" if drift is None else _shown(drift["relative_change"]),
            "–" if drift is None else _shown(drift["cosine"]),
            "–" if cosine is None else f"{cosine['expected']:.3f}",
            "–" if drift is None else _shown(drift["subspace_overlap"]),
            "–" if drift is None else f"{drift['chance_overlap']:.3f}",
        ]
        told = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{_short(row['site'])}</td>{told}</tr>")
    head = "".join(f'<th class="number">{name}</th>' for name in heads)
    return (
        "<p>“At random”: texts paired at random – what 95 % of CKAs lie below, and the cosine that the mean which all rows share "
        "gives. “Overlap”: mean squared cosine of the angles between the ten leading principal directions of both.</p>"
        f'<div style="overflow-x: auto; font-size: 13px"><table><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _interval(row: Figures, key: str) -> Figures:
    return {"estimate": row[key], "low": row[f"{key}_ci"][0], "high": row[f"{key}_ci"][1]}


def _line(
    figure: Any, name: str, x: list[str], values: Sequence[Figures], mode: str = "lines+markers"
) -> None:
    def lengths(end: str) -> list[float]:
        return [0.0 if math.isnan(v[end]) else abs(v[end] - v["estimate"]) for v in values]

    error = {"type": "data", "symmetric": False, "array": lengths("high"), "arrayminus": lengths("low")}
    figure.add_scatter(
        x=x,
        y=[v["estimate"] for v in values],
        error_y={**error, "thickness": 1, "width": 3},
        mode=mode,
        name=name,
        line={"width": 2},
        marker={"size": 7},
        hovertemplate=f"{html.escape(name)}, %{{x}}: %{{y:.4g}}<extra></extra>",
    )


def _short(site: str) -> str:
    """blocks.3.hook_resid_post -> 3"""
    if site == "hook_embed":
        return "embed"
    inner = site.removeprefix("blocks.").removesuffix(".hook_resid_post")
    return html.escape(inner)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def _between(ends: Sequence[float], digits: int) -> str:
    return "" if any(map(math.isnan, ends)) else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _ends(interval: Figures) -> str:
    return f"[{interval['low']:.3g}, {interval['high']:.3g}]"


def _signed(interval: Figures) -> str:
    return f"{interval['estimate']:+.3g} [{interval['low']:+.3g}, {interval['high']:+.3g}]"


def _shown(interval: Figures) -> str:
    ends = _between((interval["low"], interval["high"]), 3)
    told = f'<br><small style="{_QUIET}; white-space: nowrap">{ends}</small>' if ends else ""
    return f"{interval['estimate']:.3f}{told}"


def _signed_cell(interval: Figures) -> str:
    ends = f"[{interval['low']:+.3f}, {interval['high']:+.3f}]"
    return f'{interval["estimate"]:+.3f}<br><small style="{_QUIET}; white-space: nowrap">{ends}</small>'
