"""The page of a study: scores by site beside baselines, null and ceiling; code lengths, selectivity, heads, erasure."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probes.linear import save_probes
from probes.methods import MassMean
from probes.study import SiteResult, Study
from steerkit.plots import error_bars, page
from steerkit.runs import write_json
from steerkit.stats import Interval

_GREY = "rgb(128, 128, 128)"
_QUIET = "color: var(--quiet)"


def save_study(study: Study, out: str | Path) -> Path:
    """Write probes.safetensors, report.html and, last, summary.json into a directory; returns the page."""
    out = Path(out)
    save_probes(study.probes, out / "probes.safetensors")
    page = write_report(study, out / "report.html")
    write_json(out / "summary.json", study.to_dict())
    return page


def write_report(study: Study, path: str | Path) -> Path:
    """Write the page."""
    first = study.of_method(study.config.methods[0])
    parts: list[Any] = [
        _introduction(study),
        "<h2>Accuracy by site</h2>",
        "<p>On groups that the probe was not fitted on; bars are 95 % intervals over groups.</p>",
        _by_site(study, lambda s: s.accuracy, "accuracy"),
        "<h2>Cross-entropy by site</h2>",
        "<p>Nats a row; lower is better, and the class frequencies are what knowing nothing costs.</p>",
        _by_site(study, lambda s: s.cross_entropy, "nats a row", methods=(study.config.methods[0],)),
        "<h2>All figures</h2>",
        _table(study),
    ]
    if first[0].mdl is not None:
        parts += [
            "<h2>Description length</h2>",
            "<p>How many times shorter the labels are with a probe of the activations than with the uniform code, "
            "the probe and the rows it needs paid for (online code). Labels that say nothing have about 1 or less.</p>",
            _bars([r.site for r in first], [r.mdl.compression for r in first if r.mdl], "compression", 1.0),
        ]
    if first[0].selectivity is not None:
        parts += [
            "<h2>Selectivity</h2>",
            "<p>Accuracy less that on a control task, in which every word has one label at random: "
            "low where the probe may have learned words by heart.</p>",
            _selectivity(first),
        ]
    heads = [r for r in study.results if r.head is not None]
    if heads:
        parts += ["<h2>Heads</h2>", "<p>Accuracy of each head's output alone.</p>", _heads(heads)]
    if study.latents is not None:
        rows = "".join(
            f'<tr><td>{k}</td><td class="number">{_shown(v)}</td></tr>'
            for k, v in study.latents.accuracy.items()
        )
        parts += [
            "<h2>SAE latents</h2>",
            "<p>Balanced accuracy of the best k latents, each label against the rest; chance is 0.5.</p>",
            f'<table><tr><th>k</th><th class="number">balanced accuracy</th></tr>{rows}</table>',
        ]
    if study.causal is not None:
        parts += ["<h2>Without the concept</h2>", *_causal(study)]
    return page(f"Probes: {study.data}", parts, path)


def _introduction(study: Study) -> str:
    classes = ", ".join(html.escape(str(c)) for c in study.classes[:12]) + (
        " …" if len(study.classes) > 12 else ""
    )
    best = study.best
    told = (
        f"<p>Model <code>{html.escape(study.model)}</code>; {study.rows:,} rows (reading: {study.reading}) "
        f"of {study.groups:,} groups; {len(study.classes)} classes: {classes}. Seed {study.config.seed}, "
        f"{study.config.n_folds} folds that never split a group.</p>"
        f"<p>The {html.escape(best.method)} probe does best at <code>{html.escape(best.site)}</code>: accuracy "
        f"<b>{_shown(best.scores.accuracy)}</b>, where the class frequencies reach {_shown(study.majority.accuracy)}"
        + (f" and the exact posterior {_shown(study.ceiling.accuracy)}" if study.ceiling else "")
        + f". The site is the best of {len(study.of_method(best.method))} on these very rows.</p><ul>"
    )
    for what, found in (
        ("embedding", best.above_embedding),
        ("same site of the random model", best.above_random_model),
    ):
        if found is not None:
            told += f"<li>{_judged(found.difference)} the {what}: {_signed(found.difference)} (p = {found.p_value:.3g})</li>"
    told += "</ul>"
    return told + "".join(f'<p style="{_QUIET}">{html.escape(note)}</p>' for note in study.notes)


def _judged(found: Interval) -> str:
    if found.low > 0:
        return "More accurate than"
    return "Less accurate than" if found.high < 0 else "Not told apart from"


def _by_site(
    study: Study, of: Callable[[Any], Interval], label: str, methods: Sequence[str] | None = None
) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for name in methods or study.config.methods:
        own = study.of_method(name)
        _line(figure, name, [r.site for r in own], [of(r.scores) for r in own])
    first = study.of_method(study.config.methods[0])
    sites = [r.site for r in first]
    for title, scores in (
        ("random model", [r.random_model for r in first]),
        ("labels shuffled", [r.shuffled for r in first]),
    ):
        if all(s is not None for s in scores):
            dash = "dot" if title == "labels shuffled" else "dash"
            _line(figure, title, sites, [of(s) for s in scores], color=_GREY, dash=dash)
    for title, found in (("class frequencies", study.majority), ("exact posterior", study.ceiling)):
        if found is not None:
            figure.add_hline(
                y=of(found).estimate, line={"color": _GREY, "width": 1}, annotation={"text": title}
            )
    figure.update_layout(yaxis={"title": {"text": label}}, showlegend=True, height=440)
    return figure


def _line(
    figure: Any,
    name: str,
    sites: list[str],
    values: list[Interval],
    color: str | None = None,
    dash: str = "solid",
) -> None:
    style: dict[str, Any] = {} if color is None else {"color": color}
    figure.add_scatter(
        x=sites,
        y=[v.estimate for v in values],
        error_y=error_bars(values),
        mode="lines+markers",
        name=name,
        line={**style, "dash": dash, "width": 2 if color is None else 1.5},
        marker={**style, "size": 7},
        hovertemplate=f"{html.escape(name)}, %{{x}}: %{{y:.4f}}<extra></extra>",
    )


def _bars(sites: list[str], values: list[float], label: str, reference: float) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure(go.Bar(x=sites, y=values, hovertemplate="%{x}: %{y:.3f}<extra></extra>"))
    figure.add_hline(y=reference, line={"color": _GREY, "width": 1})
    figure.update_layout(yaxis={"title": {"text": label}}, height=340)
    return figure


def _selectivity(results: Sequence[SiteResult]) -> Any:
    from plotly import graph_objects as go

    values = [r.selectivity.difference for r in results if r.selectivity]
    figure = go.Figure()
    _line(figure, "selectivity", [r.site for r in results], values)
    figure.add_hline(y=0, line={"color": _GREY, "width": 1})
    figure.update_layout(yaxis={"title": {"text": "accuracy − control accuracy"}}, height=340)
    return figure


def _heads(results: Sequence[SiteResult]) -> Any:
    from plotly import graph_objects as go

    layers = sorted({r.layer for r in results if r.layer is not None})
    n_heads = 1 + max(r.head or 0 for r in results)
    cells: list[list[float | None]] = [[None] * n_heads for _ in layers]
    for r in results:
        if r.layer is not None and r.head is not None:
            cells[layers.index(r.layer)][r.head] = r.scores.accuracy.estimate
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=[f"head {h}" for h in range(n_heads)],
            y=[f"block {layer}" for layer in layers],
            colorscale="Cividis",
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_layout(height=140 + 26 * len(layers))
    return figure


def _table(study: Study) -> str:
    head = "".join(
        f'<th class="number">{name}</th>'
        for name in ("accuracy", "AUROC", "nats a row", "calibration error", "bits of code")
    )
    rows = [_row("class frequencies", "", study.majority, None)]
    rows += [
        _row(r.site, r.method, r.scores, r) for name in study.config.methods for r in study.of_method(name)
    ]
    if study.ceiling is not None:
        rows.append(_row("exact posterior", "", study.ceiling, None))
    return (
        '<div style="overflow-x: auto"><table><tr><th>site</th><th>probe</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _row(site: str, method: str, scores: Any, result: SiteResult | None) -> str:
    figures = [
        _shown(scores.accuracy),
        _shown(scores.auroc),
        _shown(scores.cross_entropy),
        _shown(scores.ece),
    ]
    if method == MassMean.name:  # its probabilities have no scale
        figures[2:] = ["–", "–"]
    cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
    code = "–" if result is None or result.mdl is None else f"{result.mdl.bits:,.0f}"
    style = f' style="{_QUIET}"' if result is None else ""
    return f'<tr{style}><td>{html.escape(site)}</td><td>{html.escape(method)}</td>{cells}<td class="number">{code}</td></tr>'


def _causal(study: Study) -> list[str]:
    found = study.causal
    assert found is not None
    told = [
        f"<p>The labels erased at <code>{html.escape(found.site)}</code> in the running model (LEACE, "
        f"rank {found.eraser.rank}, fitted on other groups), measured on {found.texts:,} texts; "
        "beside it as many random directions.</p>"
    ]
    figures = (
        ("KL of the predictions, nats a token", found.kl, found.random_kl),
        ("rise of the loss, nats a token", found.delta_ce, found.random_delta_ce),
    )
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{_shown(a)}</td><td class="number">{_shown(b)}</td></tr>'
        for name, a, b in figures
        if a is not None and b is not None
    )
    if rows:
        told.append(
            '<table><tr><th></th><th class="number">concept erased</th>'
            f'<th class="number">random directions</th></tr>{rows}</table>'
        )
    rows = "".join(
        f'<tr><td>{html.escape(site)}</td><td class="number">{_shown(p.before)}</td><td class="number">{_shown(p.after)}</td>'
        f'<td class="number">{_signed(p.change.difference)}</td></tr>'
        for site, p in found.probes.items()
    )
    told.append(
        '<table style="margin-top: 16px"><tr><th>new probe at</th><th class="number">without erasure</th>'
        f'<th class="number">with it</th><th class="number">change</th></tr>{rows}</table>'
    )
    return told


def _shown(value: Interval) -> str:
    if value.estimate != value.estimate:
        return "–"
    ends = (
        ""
        if value.low != value.low
        else f' <small style="{_QUIET}">[{value.low:.3f}, {value.high:.3f}]</small>'
    )
    return f"{value.estimate:.3f}{ends}"


def _signed(value: Interval) -> str:
    return f'{value.estimate:+.3f} <small style="{_QUIET}">[{value.low:+.3f}, {value.high:+.3f}]</small>'
