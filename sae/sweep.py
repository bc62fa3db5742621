"""Many SAEs beside each other: what the jobs of one pass are called, and what came of them over seeds.

    runs = sae.train_many(model, data, [Job(site, sae.TopK(1024, k=k), seed=s) for k in (8, 32) for s in (0, 1, 2)], tokens, out)

`out/summary.json` then has `results`, a line for each SAE, and `groups`, a line for each setting: means over seeds, their spread,
and 95 % intervals – Student's t over the seeds where there are two or more, else the evaluation's own, jackknifed over documents.
`out/report.html` draws the groups as Pareto curves.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.architectures import Config
from steerkit.errors import InputError
from steerkit.plots import page
from steerkit.stats import mean_interval

MEASURES = (
    "l0",
    "fvu",
    "ce_recovered",
    "ce_recovered_mean",
    "delta_ce",
    "kl",
    "final_cosine",
    "dead_fraction",
)
"""The figures of a summary that are compared."""

_CURVES = (
    ("ce_recovered", "CE recovered", "1 is a perfect stand-in, 0 is no better than zeros; higher is better."),
    (
        "delta_ce",
        "ΔCE, nats a token",
        "What splicing in the reconstruction costs the model; lower is better.",
    ),
    ("fvu", "FVU", "Fraction of variance unexplained; lower is better."),
)
_COLUMNS = (
    ("l0", "L0"),
    ("fvu", "FVU"),
    ("ce_recovered", "CE recovered"),
    ("delta_ce", "ΔCE"),
    ("final_cosine", "final cosine"),
    ("dead_fraction", "dead"),
)
_GREY = "rgba(128, 128, 128, 0.8)"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")


@dataclass(frozen=True)
class Job:
    """One SAE of those that are trained in one pass."""

    site: str
    arch: Config
    seed: int | None = None
    """Sets initial weights; None: the pass's own seed, from which the order of the data follows for all."""
    name: str | None = None
    """What its directory is called; by default what tells it from the other jobs."""


def job_names(jobs: Sequence[Job]) -> list[str]:
    """A directory name for each job: its own, or the architecture and whatever differs among the jobs that have it.

    Raises InputError without jobs, for jobs that are the same, and for a name that is no plain directory name.
    """
    if not jobs:
        raise InputError("There is nothing to train: give at least one job.")
    described = [{"site": job.site, **job.arch.to_dict(), "seed": job.seed} for job in jobs]
    names = []
    for job, own in zip(jobs, described):
        alike = [other for other in described if other["name"] == own["name"]]
        differing = [
            key
            for key in own
            if key != "name"
            and any(other.get(key, own[key]) != own[key] for other in (described if key == "site" else alike))
        ]
        parts = [own["name"], *(_part(key, own[key]) for key in differing)]
        name = job.name or "-".join(parts)
        if job.name is not None and (Path(name).name != name or name in (".", "..", "checkpoint")):
            raise InputError(f"A job cannot be called {name!r}: give it the name of a directory.")
        names.append(name)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two jobs are the same, or have the same name: {twice}.")
    return names


def _part(key: str, value: Any) -> str:
    if key == "site":
        return str(value).replace("/", "_")
    short = {"target_l0": "l0_", "d_sae": "d"}.get(key, key)
    shown = (
        f"{value:g}"
        if isinstance(value, float)
        else "_".join(map(str, value))
        if isinstance(value, list)
        else value
    )
    return f"{short}{shown}".replace("/", "_").replace(" ", "")


def summarise(found: Mapping[str, tuple[Job, Mapping[str, Any]]]) -> dict[str, Any]:
    """`results` and `groups` of finished jobs: name -> (job, the run's summary)."""
    results = [_result(name, job, summary) for name, (job, summary) in found.items()]
    settings = list(dict.fromkeys((job.site, job.arch) for job, _ in found.values()))
    groups = []
    for site, arch in settings:
        of_group = [
            result
            for result, (job, _) in zip(results, found.values())
            if (job.site, job.arch) == (site, arch)
        ]
        groups.append(_group(of_group))
    for group in groups:
        group["pareto"] = not any(_beats(other, group) for other in groups if other["site"] == group["site"])
    return {"results": results, "groups": groups}


def _result(name: str, job: Job, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": name,
        "site": job.site,
        "arch": job.arch.name,
        "d_sae": job.arch.d_sae,
        "sparsity": sparsity(job.arch),
        "seed": job.seed,
        **{key: summary.get(key) for key in MEASURES},
        "intervals": summary.get("intervals") or {},
        "settings": job.arch.to_dict(),
        "tokens": summary["tokens"],
    }


def sparsity(arch: Config) -> str:
    """What sets the sparsity of an architecture, in words: `k 16`, `L0 16`, `l1 0.5`."""
    if getattr(arch, "k", None) is not None:
        return f"k {arch.k}"  # type: ignore[attr-defined]
    if getattr(arch, "l1", None) is not None:
        return f"l1 {arch.l1:g}"  # type: ignore[attr-defined]
    target = getattr(arch, "target_l0", None)
    return "" if target is None else f"L0 {target:g}"


def _group(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = results[0]
    group = {key: first[key] for key in ("site", "arch", "d_sae", "sparsity", "settings")}
    group |= {"runs": [result["run"] for result in results], "seeds": [result["seed"] for result in results]}
    for key in MEASURES:
        values = [result[key] for result in results]
        group[key] = None if None in values else _spread(values, first["intervals"].get(key))
    return group


def _spread(values: Sequence[float], of_one: Mapping[str, float] | None) -> dict[str, Any]:
    """Mean over seeds, standard deviation, and a 95 % interval with what it is over."""
    if len(values) > 1:
        interval = mean_interval(values)
        return {
            "mean": interval.estimate,
            "sd": statistics.stdev(values),
            "low": interval.low,
            "high": interval.high,
            "over": "seeds",
        }
    low, high = (None, None) if of_one is None else (of_one["low"], of_one["high"])
    return {"mean": values[0], "sd": None, "low": low, "high": high, "over": "documents"}


def _beats(other: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether `other` has fewer active latents and recovers more (or leaves less unexplained, without cross-entropies)."""
    if group["ce_recovered"] is not None:
        gain = other["ce_recovered"]["mean"] - group["ce_recovered"]["mean"]
    else:
        gain = group["fvu"]["mean"] - other["fvu"]["mean"]
    saved = group["l0"]["mean"] - other["l0"]["mean"]
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def sweep_page(summary: Mapping[str, Any], path: str | Path, *, title: str = "SAE sweep") -> Path:
    """Draw what `summarise` gave: for each site CE recovered, ΔCE and FVU against L0, and a table."""
    groups, results = summary["groups"], summary["results"]
    sites = list(dict.fromkeys(group["site"] for group in groups))
    n_seeds = max(len(group["seeds"]) for group in groups)
    seeded = (
        f"means of {n_seeds} seeds with 95 % intervals over them (Student's t), grey ones single seeds"
        if n_seeds > 1
        else "one seed each, with 95 % intervals over held-out documents"
    )
    parts: list[Any] = [
        f"<p>{len(results)} SAEs of {len(sites)} site{'s' * (len(sites) != 1)}, trained in one pass over "
        f"{results[0]['tokens']:,} tokens. Points are {seeded}; figures are of held-out text.</p>"
    ]
    for site in sites:
        here = [group for group in groups if group["site"] == site]
        parts.append(f"<h2>{html.escape(site)}</h2>")
        for key, label, caption in _CURVES:
            if any(group[key] is not None for group in here):
                single = [result for result in results if result["site"] == site and n_seeds > 1]
                parts += [f"<h3>{label} against L0</h3><p>{caption}</p>", _curve(here, single, key, label)]
        parts += ["<h3>All settings</h3>", _table(here)]
    return page(title, parts, path)


def _curve(
    groups: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, Any]], key: str, label: str
) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    shown = [group for group in groups if group[key] is not None]
    for i, (name, members) in enumerate(_families(shown).items()):
        members = sorted(members, key=lambda group: group["l0"]["mean"])
        figure.add_scatter(
            x=[group["l0"]["mean"] for group in members],
            y=[group[key]["mean"] for group in members],
            error_x=_bars([group["l0"] for group in members]),
            error_y=_bars([group[key] for group in members]),
            text=[f"{name}, {group['sparsity']}" for group in members],
            mode="lines+markers",
            marker={"size": 8, "symbol": _SYMBOLS[i % len(_SYMBOLS)]},
            line={"width": 1.5},
            name=name,
            hovertemplate=f"%{{text}}<br>L0 %{{x:.4g}}<br>{label} %{{y:.4g}}<extra></extra>",
        )
    if single:
        figure.add_scatter(
            x=[result["l0"] for result in single],
            y=[result[key] for result in single],
            text=[html.escape(result["run"]) for result in single],
            mode="markers",
            marker={"size": 5, "symbol": "circle-open", "color": _GREY},
            name="single seeds",
            hovertemplate=f"%{{text}}<br>L0 %{{x:.4g}}<br>{label} %{{y:.4g}}<extra></extra>",
        )
    means, l0s = [group[key]["mean"] for group in shown], [group["l0"]["mean"] for group in shown]
    figure.update_layout(
        xaxis={"title": {"text": "L0, active latents a token"}, "type": _scale(l0s, 8)},
        yaxis={"title": {"text": label}, "type": "linear" if key == "ce_recovered" else _scale(means, 10)},
        showlegend=True,
        height=380,
    )
    return figure


def _families(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The groups that one curve joins: of an architecture and width, and alike in all but their sparsity."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for group in groups:
        rest = {k: v for k, v in group["settings"].items() if k not in ("k", "l1", "target_l0", "budgets")}
        found.setdefault(f"{group['arch']}, {group['d_sae']:,} latents", {}).setdefault(
            repr(rest), []
        ).append(group)
    named = {}
    for name, variants in found.items():
        for number, members in enumerate(variants.values(), 1):
            named[name if len(variants) == 1 else f"{name} ({number})"] = members
    return named


def _scale(values: Sequence[float], factor: float) -> str:
    return "log" if min(values) > 0 and max(values) > factor * min(values) else "linear"


def _bars(spreads: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if any(spread["low"] is None for spread in spreads):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [spread["high"] - spread["mean"] for spread in spreads],
        "arrayminus": [spread["mean"] - spread["low"] for spread in spreads],
        "thickness": 1,
        "width": 3,
    }


def _table(groups: Sequence[Mapping[str, Any]]) -> str:
    columns = [(key, label) for key, label in _COLUMNS if any(group[key] is not None for group in groups)]
    head = "".join(f'<th class="number">{label}</th>' for _, label in columns)
    rows = "".join(
        f'<tr><td>{html.escape(group["arch"])}</td><td class="number">{group["d_sae"]:,}</td>'
        f'<td>{html.escape(group["sparsity"])}</td><td class="number">{len(group["seeds"])}</td>'
        f"{''.join(_cell(group[key]) for key, _ in columns)}<td>{'●' if group['pareto'] else ''}</td></tr>"
        for group in groups
    )
    return (
        '<div style="overflow-x: auto"><table><tr><th>architecture</th><th class="number">latents</th><th>sparsity</th>'
        f'<th class="number">seeds</th>{head}<th title="no other has fewer active latents and recovers more">Pareto</th></tr>'
        f"{rows}</table></div>"
    )


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return '<td class="number">–</td>'
    shown = f"{spread['mean']:.4g}"
    if spread["low"] is not None:
        ends = f"{spread['low']:.4g} – {spread['high']:.4g}"
        shown += f'<br><small style="color: var(--quiet); white-space: nowrap">{ends}</small>'
    return f'<td class="number">{shown}</td>'
