"""The page of a concept: one table, effect against divergence, detection beside steering, texts side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.plots import page
from steerkit.steering.concept import NULL, ConceptStudy, label_of

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot")
_GREY = "rgb(128, 128, 128)"
_ROOM = 24
"""Letters of an effect's name that fit a column."""
_QUIET = "color: var(--quiet)"
Row = Mapping[str, Any]


def write_report(study: ConceptStudy, path: str | Path) -> Path:
    """Write the page."""
    config = study.config
    at = f"{config['at']:g} nats"
    parts: list[Any] = [
        _introduction(study),
        _warned(study),
        "<h2>All methods</h2>",
        f"<p>At the strength whose divergence is nearest to {at} on validation prompts; figures are of test prompts and "
        "held-out pairs. "
        f"{_spread_told(config)} Click a column to sort by it.</p>",
        _table(study),
        _detection_told(study),
        "<h2>Effect against divergence</h2>",
        "<p>Up and to the left is better. Grey: nulls. A prompt has no strength, and stands where it stands.</p>",
        _doses(study),
        "<h2>Detecting and steering</h2>",
        "<p>What tells a concept best need not bring it about best. Dotted: chance, and the unsteered model.</p>",
        _both(study),
        "<h2>Texts</h2>",
        f"<p>The same draws for all, at about {at}{' (seed ' + str(config['seed']) + ')' if config['seeds'] > 1 else ''}.</p>",
        _texts(study),
        _SORTING,
    ]
    return page(f"Concept: {config['pairs']}", parts, path)


def _introduction(study: ConceptStudy) -> str:
    config, base = study.config, study.base
    sae = study.autoencoder
    origin = ""
    if sae is not None:
        size = f"{sae['d_sae']:,} latents ({html.escape(sae['arch'])}) at <code>{html.escape(sae['site'])}</code>"
        trained = (
            f", trained on {sae['tokens']:,} tokens of unlabelled text, FVU {sae['fvu']:.3f}"
            if "fvu" in sae
            else ""
        )
        origin = f" The SAE: {size}{trained}; {html.escape(_origin(sae))}."
    return (
        f"<p>Model <code>{html.escape(config['model'])}</code>. Every method learns from the same {base['n_pairs']} pairs of "
        f"<code>{html.escape(config['pairs'])}</code>; {base['n_held_out']} more are held out to detect in, {base['n_prompts']} "
        f"test prompts, {config['samples']} text{'s' * (config['samples'] != 1)} each, to steer on. "
        f"Effect <b>{html.escape(config['effect'])}</b>: "
        f"{_effect(base['effect'], config)} {_ends(base['effect_ci'], config)} without steering. Divergence is KL(steered ‖ base) "
        f"in nats a sequence of {config['max_new_tokens']} tokens, from the full next-token distributions.{origin}</p>"
    )


def _named(config: Mapping[str, Any]) -> str:
    """The effect's name where there is little room."""
    return config["effect"] if len(config["effect"]) <= _ROOM else "effect"


def _origin(sae: Mapping[str, Any]) -> str:
    return sae["from"] if "fvu" in sae else f"from {sae['from']}"


def _warned(study: ConceptStudy) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in study.warnings)
    return f'<div role="note"><b>Mind</b><ul>{items}</ul></div>' if items else ""


def _spread_told(config: Mapping[str, Any]) -> str:
    if config["seeds"] == 1:
        return "In brackets: 95 % intervals over prompts, and over pairs."
    return f"Means over {config['seeds']} seeds; in brackets their 95 % intervals (Student's t)."


def _detection_told(study: ConceptStudy) -> str:
    return (
        f"<p style='{_QUIET}'>AUROC: how often a held-out positive side scores above a negative one. Scores: <i>projection</i> on "
        "what the method adds, of the mean over a side's tokens; the <i>latent</i>'s activation, likewise; <i>likelihood</i>, "
        "log p(text | changed model) − log p(text | base). Fluency: "
        f"{study.base['fluency_is']} ({study.base['fluency']:.3g} unsteered). Side effects: how far the other attributes' values "
        "move (total variation, less what chance moves), mean over the attributes that enough texts tell. Parameters: numbers "
        "that the pairs decided.</p>"
    )


def _table(study: ConceptStudy) -> str:
    config = study.config
    heads = (
        ("method", False),
        ("kind", False),
        ("AUROC", True),
        ("by", False),
        (_named(config), True),
        ("side effects", True),
        ("fluency", True),
        ("KL", True),
        ("parameters", True),
        ("fit, s", True),
    )
    head = "".join(
        f'<th{" class=number" if number else ""} aria-sort="none"><button data-sort="{i}">{html.escape(name)}</button></th>'
        for i, (name, number) in enumerate(heads)
    )
    return (
        f'<div style="overflow-x: auto"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(_row(row, config) for row in study.results)}</tbody></table></div>"
    )


def _row(row: Row, config: Mapping[str, Any]) -> str:
    quiet = f' style="{_QUIET}"' if row["kind"] == NULL else ""
    name = (
        f'<td data-value="{html.escape(row["label"])}">{html.escape(row["label"])}</td><td>{row["kind"]}</td>'
    )
    if row["effect"] is None:
        return (
            f'<tr{quiet}>{name}<td colspan="8" style="{_QUIET}">{html.escape(row["reason"] or "")}</td></tr>'
        )
    cells = (
        _cell(row["auroc"], f"{_number(row['auroc'], '.3f')}", _ends(row["auroc_ci"], None)),
        f"<td>{row['detected_by'] or '–'}</td>",
        _cell(row["effect"], _effect(row["effect"], config), _ends(row["effect_ci"], config)),
        _cell(row["side_effect"], _number(row["side_effect"], ".3f")),
        _cell(row["fluency"], _number(row["fluency"], ".2f" if row["grammaticality"] is None else ".1%")),
        _cell(row["kl"], _number(row["kl"], ".2f"), _plain_ends(row["kl_ci"])),
        _cell(row["params"], _number(row["params"], ",d")),
        _cell(row["seconds"], _number(row["seconds"], ".1f")),
    )
    return f"<tr{quiet}>{name}{''.join(cells)}</tr>"


def _cell(value: float | None, text: str, small: str = "") -> str:
    below = (
        f'<br><small style="{_QUIET}; font-size: 11px; white-space: nowrap">{small}</small>' if small else ""
    )
    return f'<td class="number" data-value="{"" if value is None else value}">{text}{below}</td>'


def _number(value: float | None, digits: str) -> str:
    return "–" if value is None else format(value, digits)


def _effect(value: float | None, config: Mapping[str, Any]) -> str:
    return _number(value, ".1%" if config["binary"] else ".3g")


def _ends(ends: Sequence[float] | None, config: Mapping[str, Any] | None) -> str:
    """An interval, of the effect or (without `config`) of an AUROC."""
    if not ends or None in ends:
        return ""
    digits = ".3f" if config is None else (".0%" if config["binary"] else ".3g")
    return f"[{ends[0]:{digits}}, {ends[1]:{digits}}]"


def _plain_ends(ends: Sequence[float] | None) -> str:
    return "" if not ends or None in ends else f"[{ends[0]:.1f}, {ends[1]:.1f}]"


def _style(index: int, method: str) -> dict[str, Any]:
    line: dict[str, Any] = {"dash": _DASHES[index // 7 % len(_DASHES)], "width": 2}
    marker: dict[str, Any] = {"size": 9, "symbol": _SYMBOLS[index % len(_SYMBOLS)]}
    if label_of(method)[1] == NULL:
        line["color"] = marker["color"] = _GREY
        line["width"] = 1
        marker["symbol"] += "-open"
    return {"line": line, "marker": marker}


def _doses(study: ConceptStudy) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for i, row in enumerate(study.results):
        doses = [
            d for d in study.doses if d["method"] == row["method"] and None not in (d["kl"], d["effect"])
        ]
        if not doses:
            continue
        label = html.escape(row["label"])
        figure.add_scatter(
            x=[d["kl"] for d in doses],
            y=[d["effect"] for d in doses],
            error_y=_bars([d["effect"] for d in doses], [d["effect_ci"] for d in doses]),
            mode="lines+markers" if len(doses) > 1 else "markers",
            name=label,
            hovertemplate=f"{label}<br>%{{x:.3g}} nats: %{{y:.3f}}<extra></extra>",
            **_style(i, row["method"]),
        )
    figure.add_vline(x=study.config["at"], line={"color": _GREY, "dash": "dot", "width": 1})
    figure.add_hline(
        y=study.base["effect"], line={"color": _GREY, "width": 1}, annotation={"text": "unsteered"}
    )
    figure.update_layout(
        xaxis={"type": "log", "title": {"text": "KL(steered ‖ base), nats a sequence"}},
        yaxis={
            "title": {"text": _named(study.config)},
            **({"range": [-0.02, 1.04]} if study.config["binary"] else {}),
        },
        showlegend=True,
        height=480,
    )
    return figure


def _bars(values: Sequence[float], ends: Sequence[Sequence[float] | None], axis: str = "y") -> dict[str, Any]:
    known = [
        (value, value) if not pair or None in pair else (pair[0], pair[1])
        for value, pair in zip(values, ends)
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, known)],
        "arrayminus": [value - low for value, (low, _) in zip(values, known)],
        "thickness": 1.5 if axis == "x" else 1,
        "width": 3,
    }


def _both(study: ConceptStudy) -> Any:
    """Two panels with the same rows: AUROC and effect."""
    from plotly.subplots import make_subplots

    rows = [row for row in reversed(study.results) if row["effect"] is not None]
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    for column, (key, symbol) in enumerate((("auroc", "circle"), ("effect", "diamond")), start=1):
        for null in (False, True):
            own = [row for row in rows if row[key] is not None and (row["kind"] == NULL) == null]
            figure.add_scatter(
                x=[row[key] for row in own],
                y=[html.escape(row["label"]) for row in own],
                error_x=_bars([row[key] for row in own], [row[f"{key}_ci"] for row in own], "x"),
                mode="markers",
                marker={"size": 9, "symbol": symbol + "-open" * null, **({"color": _GREY} if null else {})},
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
                showlegend=False,
                row=1,
                col=column,
            )
    figure.add_vline(x=0.5, line={"color": _GREY, "dash": "dot", "width": 1}, row=1, col=1)
    figure.add_vline(x=study.base["effect"], line={"color": _GREY, "dash": "dot", "width": 1}, row=1, col=2)
    figure.update_layout(
        height=110 + 28 * len(rows),
        margin={"l": 210},
        xaxis={"range": [-0.02, 1.02], "title": {"text": "AUROC on held-out pairs"}},
        xaxis2={
            "title": {"text": f"{_named(study.config)}, steered"},
            **({"range": [-0.02, 1.02]} if study.config["binary"] else {}),
        },
        yaxis={
            "categoryorder": "array",
            "categoryarray": [html.escape(row["label"]) for row in rows],
            "dtick": 1,
        },
    )
    return figure


def _texts(study: ConceptStudy) -> str:
    """For each of the first prompts, what every method makes of it."""
    n = max(len(sample["texts"]) for sample in study.samples)
    parts = []
    for i in range(n):
        prompt = study.samples[0]["texts"][i][0]
        rows = "".join(
            f'<tr><td style="white-space: nowrap; vertical-align: top">{html.escape(_name(sample["method"]))}</td>'
            f"<td>{html.escape(sample['texts'][i][1])}</td></tr>"
            for sample in study.samples
            if i < len(sample["texts"])
        )
        opened = " open" if i == 0 else ""
        parts.append(
            f"<details{opened}><summary>{html.escape(prompt)} …</summary><table>{rows}</table></details>"
        )
    return "".join(parts)


def _name(method: str) -> str:
    return label_of(method)[0]


_SORTING = """<style>
table.sortable th { white-space: nowrap; }
table.sortable th button { border: none; padding: 0; font-weight: 500; }
table.sortable th[aria-sort=ascending] button::after { content: " ↑"; }
table.sortable th[aria-sort=descending] button::after { content: " ↓"; }
table.sortable td { vertical-align: top; }
table.sortable td:first-child { white-space: nowrap; }
details { margin: 8px 0; } summary { cursor: pointer; }
[role=note] { background: var(--raised); border-left: 3px solid var(--against); padding: 8px 16px; margin: 16px 0; }
[role=note] ul { margin: 4px 0; padding-left: 20px; }
</style>
<script>
for (const button of document.querySelectorAll("table.sortable [data-sort]")) button.onclick = () => {
  const head = button.parentElement, column = Number(button.dataset.sort), body = head.closest("table").tBodies[0];
  const down = head.aria_down = !head.aria_down;
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column]?.dataset.value ?? row.cells[column]?.textContent ?? "";
  const known = (row) => row.cells.length > column && value(row) !== "" && value(row) !== "–";
  const numbers = head.classList.contains("number");
  const order = (a, b) => {
    if (known(a) !== known(b)) return known(a) ? -1 : 1;
    const way = numbers ? value(a) - value(b) : value(b).localeCompare(value(a));
    return down ? -way : way;
  };
  body.append(...[...body.rows].sort(order));
};
</script>"""
