"""The page of a sweep: effect against divergence, what was chosen, doses, sites, side effects, and texts to read."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerkit.plots import page
from steerkit.steering.evaluation import binary_kl
from steerkit.steering.sweep import FEW_SHOT, OWN, PROMPTING, SHUFFLED, SweepResult, across_seeds, middle

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot")
_GREY = "rgb(128, 128, 128)"
_NULLS = ("random", "sides shuffled")
_QUIET = "color: var(--quiet)"
_WITHOUT_STRENGTH = (PROMPTING, FEW_SHOT)
Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Effect:
    name: str
    binary: bool


def write_report(result: SweepResult, path: str | Path) -> Path:
    """Write the page."""
    effect = _Effect(result.config["effect"], result.config["binary"])
    parts: list[Any] = [
        _introduction(result, effect),
        "<h2>Effect against divergence</h2>",
        "<p>Each method at its best site, at strengths that cost about the same, on test prompts. Up and to the left is better. "
        "Grey: nulls. "
        + (
            "The dotted line is the floor: no change of the model that moves the rate that far can cost less. "
            if effect.binary
            else ""
        )
        + "Bars are 95 % intervals over prompts.</p>",
        _front(result, effect),
        "<h2>The strength that was chosen</h2>",
        f"<p>Chosen on validation: {_chosen_told(result)}"
        + f". All figures are of test prompts. {_nulls_told(result)}</p>",
        _table(result, effect),
        "<h2>Dose and response</h2>",
        "<p>All strengths that were tried at each method's best site, on validation prompts.</p>",
        _doses(result),
    ]
    target = result.config["at"] or middle(result.config["kl_targets"])
    sites = _sites(result)
    if sites is not None:
        parts += [
            "<h2>Sites</h2>",
            f"<p>Effect on validation at the strength nearest to {target:g} nats a sequence.</p>",
            sites,
        ]
    if result.study:
        method = html.escape(result.study[0]["method"])
        parts += [
            "<h2>More sites, other positions, schedules</h2>",
            f"<p>What they buy <code>{method}</code> on test prompts, each at about {target:g} nats a sequence (strengths found on "
            "validation). Point at a cell for its divergence and grammar.</p>",
            _study(result, effect),
        ]
    if any(record.get("side_effects") for record in result.best.values()):
        parts += [
            "<h2>Side effects</h2>",
            "<p>How far the other attributes' values move at the best strength: total variation distance from the unsteered model, "
            "less what it would be if nothing had changed.</p>",
            _side_effects(result),
        ]
    parts += ["<h2>Texts</h2>", _texts(result)]
    return page(f"Steering: {effect.name}", parts, path)


def _introduction(result: SweepResult, effect: _Effect) -> str:
    base = result.base
    return (
        f"<p>Model <code>{html.escape(result.config['model'])}</code>, fitted on pairs of "
        f"<code>{html.escape(result.config['pairs'])}</code>; "
        f"effect <b>{html.escape(effect.name)}</b>: {_percent(base['effect'], effect)} "
        f"{_interval(base['effect_ci'], effect)} without steering, on {base['n_prompts']} test prompts with "
        f"{base['n'] // max(1, base['n_prompts'])} texts each. Divergence is KL(steered ‖ base) on the steered model's own texts, "
        "summed over the generated tokens: nats a sequence.</p>"
    )


def _chosen_told(result: SweepResult) -> str:
    """What the strength was chosen by."""
    config = result.config
    if config["at"] is not None:
        return f"the strength that costs nearest to {config['at']:g} nats a sequence"
    told = f"the greatest effect at no more than {config['kl_budget']:g} nats a sequence"
    if result.base["grammaticality"] is not None:
        told += f" and at most {100 * config['grammar_budget']:.0f} points of grammaticality lost"
    return told


def _nulls_told(result: SweepResult) -> str:
    """Which methods have a null of shuffled sides, and which have not."""
    methods = [
        name for name, r in result.best.items() if not name.endswith(SHUFFLED) and "site" in r and r["site"]
    ]
    without = [name for name in methods if name + SHUFFLED not in result.best and name != "random"]
    told = (
        "“Sides shuffled” is the same method fitted on pairs of which half have their sides exchanged, at the same site and about "
        "the same divergence."
    )
    if without:
        named = ", ".join(f"<code>{html.escape(name)}</code>" for name in without)
        told += (
            f" Not run here for {named} (<code>--quick</code> leaves it out for methods that are trained)."
        )
    return told


def _lines(result: SweepResult) -> dict[str, list[Record]]:
    """Method -> its test records at the targets, by divergence."""
    found: dict[str, list[Record]] = {}
    for record in result.results:
        told = record["kl"] is not None and record["effect"] is not None
        if told and not record["method"].endswith(SHUFFLED):
            found.setdefault(record["method"], []).append(record)
    return {
        name: sorted(records, key=lambda record: record["kl"])
        for name, records in sorted(found.items(), key=lambda item: _is_null(item[0]))
    }


def _is_null(method: str) -> bool:
    return any(null in method for null in _NULLS)


def _style(index: int, method: str) -> dict[str, Any]:
    line: dict[str, Any] = {"dash": _DASHES[index // 7 % len(_DASHES)], "width": 2}
    marker: dict[str, Any] = {"size": 8, "symbol": _SYMBOLS[index % len(_SYMBOLS)]}
    if _is_null(method):
        line["color"] = marker["color"] = _GREY
        line["width"] = 1
    return {"line": line, "marker": marker}


def _front(result: SweepResult, effect: _Effect) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    lines = _lines(result)
    for i, (name, records) in enumerate(lines.items()):
        figure.add_scatter(
            x=[record["kl"] for record in records],
            y=[record["effect"] for record in records],
            error_y=_bars(records),
            mode="lines+markers" if len(records) > 1 else "markers",
            name=name,
            text=[
                f"strength {record['strength']:.3g} at {html.escape(record['site'])}" for record in records
            ],
            hovertemplate=f"{html.escape(name)}, %{{text}}<br>%{{x:.3g}} nats: %{{y:.3f}}<extra></extra>",
            **_style(i, name),
        )
    nulls = [
        record for name, record in result.best.items() if name.endswith(SHUFFLED) and "reason" not in record
    ]
    if nulls := [record for record in nulls if None not in (record["kl"], record["effect"])]:
        figure.add_scatter(
            x=[record["kl"] for record in nulls],
            y=[record["effect"] for record in nulls],
            error_y=_bars(nulls),
            mode="markers",
            name="sides shuffled",
            text=[html.escape(record["method"]) for record in nulls],
            hovertemplate="%{text}<br>%{x:.3g} nats: %{y:.3f}<extra></extra>",
            marker={"size": 6, "symbol": "circle-open", "color": _GREY},
        )
    base, everything = result.base["effect"], [r["kl"] for records in lines.values() for r in records]
    if effect.binary and base is not None and everything and 0 < base < 1:
        rates = np.linspace(base, 1.0, 200)[1:]
        floor = result.base["known"] * binary_kl(rates, np.full_like(rates, base))
        shown = floor >= 0.5 * min(everything)
        figure.add_scatter(
            x=floor[shown].tolist(),
            y=rates[shown].tolist(),
            mode="lines",
            line={"color": _GREY, "dash": "dot", "width": 1.5},
            name="floor",
            hovertemplate="no less than %{x:.3g} nats for %{y:.2f}<extra></extra>",
        )
    if base is not None:
        figure.add_hline(y=base, line={"color": _GREY, "width": 1}, annotation={"text": "unsteered"})
    figure.update_layout(
        xaxis={"type": "log", "title": {"text": "KL(steered ‖ base), nats a sequence"}},
        yaxis={"title": {"text": effect.name}, **({"range": [-0.02, 1.04]} if effect.binary else {})},
        showlegend=True,
        height=460,
    )
    return figure


def _bars(records: Sequence[Record]) -> dict[str, Any]:
    ends = [record["effect_ci"] or [record["effect"]] * 2 for record in records]
    pairs = [
        (record["effect"] if low is None else low, record["effect"] if high is None else high)
        for record, (low, high) in zip(records, ends)
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - record["effect"] for record, (_, high) in zip(records, pairs)],
        "arrayminus": [record["effect"] - low for record, (low, _) in zip(records, pairs)],
        "thickness": 1,
        "width": 3,
    }


_COLUMNS = (
    ("kl", "KL, nats a sequence", "{:.3g}"),
    ("kl_per_token", "a token", "{:.2g}"),
    ("kl_p95", "95th percentile", "{:.2g}"),
    ("cost", "over the floor", "{:.3g}"),
    ("grammaticality", "grammatical", "{:.1%}"),
    ("perplexity_ratio", "perplexity, times base", "{:.2f}"),
    ("repetition", "repeated 4-grams", "{:.1%}"),
    ("distinct_2", "distinct 2-grams", "{:.2f}"),
)


def _table(result: SweepResult, effect: _Effect) -> str:
    columns = [c for c in _COLUMNS if any(record.get(c[0]) is not None for record in result.best.values())]
    head = "".join(f'<th class="number">{label}</th>' for _, label, _ in columns)
    shown = [record for name, record in result.best.items() if not name.endswith(SHUFFLED)]
    order = sorted(shown, key=lambda r: (-(r.get("effect") or -1.0), r["method"]))
    rows = [_row("unsteered", "", None, result.base, columns, effect, quiet=True)]
    for record in order:
        if "reason" in record:
            rows.append(
                f"<tr><td>{html.escape(record['method'])}</td><td>{_short(record.get('site', ''))}</td>"
                f'<td colspan="{len(columns) + 3}" style="{_QUIET}">{html.escape(record["reason"])}</td></tr>'
            )
            continue
        rows.append(
            _row(
                record["method"],
                record["site"],
                record["strength"],
                record,
                columns,
                effect,
                null=result.best.get(record["method"] + SHUFFLED),
                quiet=_is_null(record["method"]),
            )
        )
    return (
        '<div style="overflow-x: auto"><table><tr><th>method</th><th>site</th><th class="number">strength</th>'
        f'<th class="number">{html.escape(effect.name)}</th><th class="number">sides shuffled</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _row(
    name: str,
    site: str,
    strength: float | None,
    record: Record,
    columns: Sequence[tuple[str, str, str]],
    effect: _Effect,
    *,
    null: Record | None = None,
    quiet: bool,
) -> str:
    cells = "".join(
        f'<td class="number">{"–" if record.get(key) is None else digits.format(record[key])}</td>'
        for key, _, digits in columns
    )
    style = f' style="{_QUIET}"' if quiet else ""
    shown = "–" if strength is None or name in _WITHOUT_STRENGTH else f"{strength:.3g}"
    return (
        f"<tr{style}><td>{html.escape(name)}</td><td>{_short(site)}</td>"
        f'<td class="number">{shown}</td>'
        f"{_rate(record, effect)}{_rate(null, effect)}{cells}</tr>"
    )


def _rate(record: Record | None, effect: _Effect) -> str:
    """A cell with an effect and its interval."""
    if record is None or "reason" in record:
        return '<td class="number">–</td>'
    between = _interval(record["effect_ci"], effect)
    small = f'<br><small style="{_QUIET}; font-size: 11px; white-space: nowrap">{between}</small>'
    return f'<td class="number">{_percent(record["effect"], effect)}{small}</td>'


def _short(site: str) -> str:
    parts = site.split("+")
    name = parts[0] if len(parts) == 1 else f"{len(parts)} sites"
    return f'<span title="{html.escape(site)}">{html.escape(name)}</span>'


def _percent(value: float | None, effect: _Effect) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if effect.binary else f"{value:.3g}"


def _interval(ends: Sequence[float | None] | None, effect: _Effect) -> str:
    if not ends or any(end is None for end in ends):
        return ""
    return f"[{_percent(ends[0], effect)}, {_percent(ends[1], effect)}]"


def _doses(result: SweepResult) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for i, name in enumerate(_lines(result)):
        site = result.best.get(name, {}).get("site")
        records = sorted(
            (
                r
                for r in result.validation
                if r["method"] == name and r["site"] == site and r["effect"] is not None
            ),
            key=lambda r: r["strength"],
        )
        if not records:
            continue
        figure.add_scatter(
            x=[r["strength"] for r in records],
            y=[r["effect"] for r in records],
            error_y=_bars(records),
            mode="lines+markers",
            name=name,
            text=[
                f"{r['kl']:.3g} nats"
                + ("" if r["grammaticality"] is None else f", {r['grammaticality']:.0%} grammatical")
                for r in records
            ],
            hovertemplate=f"{html.escape(name)}, strength %{{x:.3g}}: %{{y:.3f}}<br>%{{text}}<extra></extra>",
            **_style(i, name),
        )
    figure.update_layout(
        xaxis={"type": "log", "title": {"text": "strength"}},
        yaxis={"title": {"text": "effect"}},
        showlegend=True,
        height=420,
    )
    return figure


def _sites(result: SweepResult) -> Any:
    """Methods by sites; None where only one site was tried."""
    from plotly import graph_objects as go

    target = result.config["at"] or middle(result.config["kl_targets"])
    nearest: dict[tuple[str, str], Record] = {}
    for record in result.validation:
        if record["kl"] is None or record["site"] == OWN or record["method"].endswith(SHUFFLED):
            continue
        key = record["method"], record["site"]
        if key not in nearest or _off(record, target) < _off(nearest[key], target):
            nearest[key] = record
    methods = list(dict.fromkeys(method for method, _ in nearest))
    sites = list(dict.fromkeys(site for _, site in nearest))
    if len(sites) < 2:
        return None
    cells = [[nearest.get((method, site)) for site in sites] for method in methods]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if cell is None else cell["effect"] for cell in row] for row in cells],
            x=[site if "+" not in site else f"{site.count('+') + 1} sites" for site in sites],
            y=methods,
            text=[
                ["" if cell is None or cell["effect"] is None else f"{cell['effect']:.2f}" for cell in row]
                for row in cells
            ],
            texttemplate="%{text}",
            colorscale="Cividis",
            hovertemplate="%{y} at %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_layout(height=140 + 26 * len(methods), margin={"l": 170})
    return figure


def _study(result: SweepResult, effect: _Effect) -> Any:
    """Positions and schedules by sites."""
    from plotly import graph_objects as go

    cells = {(f"{r['positions']}, {r['schedule']}", r["site"]): r for r in result.study}
    ways = list(dict.fromkeys(way for way, _ in cells))[::-1]
    sites = list(dict.fromkeys(site for _, site in cells))
    grid = [[cells[way, site] for site in sites] for way in ways]
    hover = [
        [
            f"{record['kl']:.3g} nats"
            + ("" if record["grammaticality"] is None else f", {record['grammaticality']:.1%} grammatical")
            if record["kl"] is not None
            else record["destroyed"]
            for record in row
        ]
        for row in grid
    ]
    figure = go.Figure(
        go.Heatmap(
            z=[[record["effect"] for record in row] for row in grid],
            x=[site if "+" not in site else f"{site.count('+') + 1} sites" for site in sites],
            y=ways,
            text=[
                [f"{_percent(r['effect'], effect)} {_interval(r['effect_ci'], effect)}" for r in row]
                for row in grid
            ],
            customdata=hover,
            texttemplate="%{text}",
            colorscale="Cividis",
            hovertemplate="%{y} at %{x}: %{z:.3f}<br>%{customdata}<extra></extra>",
        )
    )
    figure.update_layout(height=140 + 26 * len(ways), margin={"l": 240})
    return figure


def _off(record: Record, target: float) -> float:
    return abs(math.log(max(record["kl"], 1e-9) / target))


def _side_effects(result: SweepResult) -> Any:
    from plotly import graph_objects as go

    rows = [
        (name, r["side_effects"])
        for name, r in result.best.items()
        if r.get("side_effects") and not name.endswith(SHUFFLED)
    ]
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    values = [
        [
            None if found[name]["tv"] is None else max(0.0, found[name]["tv"] - (found[name]["null"] or 0.0))
            for name in names
        ]
        for _, found in rows
    ]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=[name for name, _ in rows],
            text=[["" if v is None else f"{v:.2f}" for v in row] for row in values],
            texttemplate="%{text}",
            colorscale="Cividis",
            zmin=0,
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_layout(height=140 + 26 * len(rows), margin={"l": 170})
    return figure


def _texts(result: SweepResult) -> str:
    """Unsteered beside every method at its strengths."""
    parts = [_sample_list("unsteered", result.base["texts"])]
    for name, records in _lines(result).items():
        blocks = [
            _sample_list(
                f"strength {record['strength']:.3g}, {record['kl']:.3g} nats"
                if name not in _WITHOUT_STRENGTH
                else f"{record['kl']:.3g} nats",
                record["texts"],
            )
            for record in records
        ]
        parts.append(f"<details><summary>{html.escape(name)}</summary>{''.join(blocks)}</details>")
    return "".join(parts)


def _sample_list(title: str, texts: Sequence[Sequence[str]]) -> str:
    rows = "".join(
        f'<li style="margin: 4px 0"><span style="{_QUIET}">{html.escape(prompt)}</span>{html.escape(text)}</li>'
        for prompt, text in texts
    )
    return f"<p><b>{html.escape(title)}</b></p><ul>{rows}</ul>"


_SPREAD = (
    ("effect", "effect", "{:.1%}"),
    ("null", "sides shuffled", "{:.1%}"),
    ("kl", "KL, nats a sequence", "{:.3g}"),
    ("grammaticality", "grammatical", "{:.1%}"),
    ("perplexity_ratio", "perplexity, times base", "{:.2f}"),
)


def write_seeds_report(results: Mapping[int, SweepResult], path: str | Path) -> Path:
    """Write the page of several seeds' sweeps, whose own pages are in `seed-<n>` beside it: means and standard deviations."""
    first = next(iter(results.values()))
    effect = _Effect(first.config["effect"], first.config["binary"])
    found = across_seeds(list(results.values()))
    for name, record in found.items():
        null = found.get(name + SHUFFLED, {})
        record |= {"null": null.get("effect"), "null_sd": null.get("effect_sd")}
    order = sorted(
        (record for name, record in found.items() if not name.endswith(SHUFFLED)),
        key=lambda record: -(record["effect"] if record["effect"] is not None else -1.0),
    )
    columns = [c for c in _SPREAD if any(record[c[0]] is not None for record in order)]
    if not effect.binary:
        columns = [
            (key, label, "{:.3g}" if key in ("effect", "null") else digits) for key, label, digits in columns
        ]
    head = "".join(f'<th class="number">{label}</th>' for _, label, _ in columns)
    rows = "".join(
        f"<tr><td>{html.escape(record['method'])}</td>"
        + "".join(
            f'<td class="number">{_mean_and_sd(record, key, digits)}</td>' for key, _, digits in columns
        )
        + f'<td class="number">{record["seeds"]} of {len(results)}</td></tr>'
        for record in order
    )
    links = ", ".join(f'<a href="seed-{seed}/report.html">{seed}</a>' for seed in results)
    bases = [result.base["effect"] for result in results.values() if result.base["effect"] is not None]
    told = f" {_percent(sum(bases) / len(bases), effect)} without steering." if bases else ""
    parts = [
        f"<p>Effect <b>{html.escape(effect.name)}</b>:{told} Mean ± standard deviation over {len(results)} seeds, each with "
        "training, prompts and draws of its own, of the strength chosen on validation and told on test; the last column says in "
        f"how many a strength was within the budgets. Pages of the seeds: {links}.</p>",
        f'<div style="overflow-x: auto"><table><tr><th>method</th>{head}<th class="number">seeds</th></tr>{rows}</table></div>',
    ]
    return page(f"Steering: {effect.name}, {len(results)} seeds", parts, path)


def _mean_and_sd(record: Record, key: str, digits: str) -> str:
    if record[key] is None:
        return "–"
    sd = record.get(f"{key}_sd")
    return digits.format(record[key]) + ("" if sd is None else f" ± {digits.format(sd)}")
