"""Adapters as hypotheses: what each structural claim predicts, and what was measured.

    write_hypotheses("runs/adapters")        # reads */results.json of `bench`; writes hypotheses.html and hypotheses.md

A claim is tested by pairs of methods that differ in it alone, or nearly: one that embodies it and a control of about as many
parameters. In each study (a model and its data) the difference of their scores is taken seed by seed and averaged over the claim's
pairs, in units of the spread s between all methods of the study. A credence p is then moved by

    odds ← odds · B,   B = T(z) / T(-z),    z = d̂ / σ̂ · 1/√(1 + σ̂²/s²)       (d̂, σ̂: the mean difference and its standard error)

the posterior odds of d > 0 against d < 0 when d ~ N(0, s²) at first (T: Student's t over the seeds), held between 1/10 and 10: no
single model and data set can say more. A claim is headlined only where two models agree and both intervals exclude zero.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerkit.adapters.base import METHODS
from steerkit.errors import InputError
from steerkit.plots import page
from steerkit.runs import atomic_write, read_json
from steerkit.stats import Interval, mean_interval

MOST_EVIDENCE = 10.0
_QUIET = "color: var(--quiet)"


@dataclass(frozen=True)
class Claim:
    """One statement about how pretrained models want to be changed."""

    name: str
    statement: str
    pairs: tuple[tuple[str, str], ...]
    """(method that embodies it, control)."""
    prior: float
    """Credence before the measurements here: a judgement, from what has been published."""


CLAIMS = (
    Claim(
        "low rank", "A change of low rank does what a change of all weights does.", (("lora", "full"),), 0.6
    ),
    Claim(
        "singular basis",
        "The directions that matter are the weight's own singular vectors.",
        (("pissa", "lora"), ("svft", "shira")),
        0.6,
    ),
    Claim(
        "orthogonality",
        "To rotate neurons is better than to add to them.",
        (("oft", "lora"), ("hra", "lora"), ("goft", "ia3"), ("ssvd", "svft")),
        0.5,
    ),
    Claim(
        "decoupling",
        "Magnitude and direction want to be learned apart.",
        (("dora", "lora"), ("delora", "lora")),
        0.5,
    ),
    Claim(
        "gain control",
        "To rescale what is there is enough.",
        (("ia3", "lora(rank=1)"), ("ln_tuning", "bitfit")),
        0.4,
    ),
    Claim(
        "rank, not basis",
        "Full rank in an arbitrary basis is better than low rank in a learned one.",
        (("randlora", "lora"), ("c3a", "lora"), ("miss", "lora"), ("fourierft", "lora")),
        0.4,
    ),
    Claim(
        "activation intervention",
        "To edit activations, nonlinearly or at a few tokens, is better than to edit weights.",
        (("loreft", "lora(rank=1)"), ("houlsby", "lora"), ("parallel", "lora")),
        0.4,
    ),
    Claim(
        "shared structure",
        "Layers can share most of what they learn.",
        (("vera", "lora(rank=1)"), ("tied_lora", "lora")),
        0.4,
    ),
)


@dataclass(frozen=True)
class Evidence:
    """What one study says of a claim. Differences are of scores, so signed that positive speaks for it."""

    study: str
    model: str
    pairs: dict[tuple[str, str], float]
    """Mean difference of each pair that was run."""
    difference: float
    interval: tuple[float, float]
    """95 %, Student's t over seeds."""
    factor: float
    """B."""
    forgetting: tuple[float, float, float] | None
    """How much more is forgotten than by the controls, nats a token: (difference, its 95 % interval). It moves no credence."""

    @property
    def decided(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        return 1 if self.interval[0] > 0 else -1 if self.interval[1] < 0 else 0


def weigh(claim: Claim, study: str, result: Mapping[str, Any]) -> Evidence | None:
    """The evidence of one study's results; None where no pair of the claim was run with two seeds or more."""
    from scipy.stats import t

    sign = 1 if result["config"]["task"]["higher_is_better"] else -1
    rows = {row["method"]: row for row in result["rows"]}
    pairs = [pair for pair in claim.pairs if pair[0] in rows and pair[1] in rows]
    scores = {name: sign * np.array(row["by_seed"]) for name, row in rows.items()}
    if not pairs or len(scores[pairs[0][0]]) < 2:
        return None
    found = _mean_difference(scores, pairs)
    mean, error = found.estimate, max(found.standard_error, 1e-12)
    spread = max(float(np.std([row["metric_mean"] for row in rows.values()], ddof=1)), 1e-12)
    z = mean / error / math.sqrt(1 + (error / spread) ** 2)
    freedom = len(scores[pairs[0][0]]) - 1
    log_factor = float(t.logcdf(z, freedom) - t.logcdf(-z, freedom))
    factor = math.exp(min(max(log_factor, -math.log(MOST_EVIDENCE)), math.log(MOST_EVIDENCE)))
    forgotten = {
        name: np.array(
            [run["forgetting"] for run in result["runs"] if run["method"] == name and run["final"]],
            dtype=float,
        )
        for name in rows
    }
    forgetting = None
    if all(np.isfinite(forgotten[name]).all() for pair in pairs for name in pair):
        more = _mean_difference(forgotten, pairs)
        forgetting = (more.estimate, more.low, more.high)
    told = {(a, b): float((scores[a] - scores[b]).mean()) for a, b in pairs}
    return Evidence(study, result["config"]["model"], told, mean, (found.low, found.high), factor, forgetting)


def _mean_difference(values: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]) -> Interval:
    """Over pairs and seeds, with its error over seeds."""
    return mean_interval(np.mean([values[a] - values[b] for a, b in pairs], axis=0))


def posterior(claim: Claim, evidence: Sequence[Evidence]) -> float:
    """The credence after the evidence."""
    odds = claim.prior / (1 - claim.prior) * math.prod(e.factor for e in evidence)
    return odds / (1 + odds)


def headline(claim: Claim, evidence: Sequence[Evidence]) -> str:
    """What may be said in a line."""
    for way, word in ((1, "holds"), (-1, "does not hold")):
        models = {e.model for e in evidence if e.decided == way}
        against = {e.model for e in evidence if e.decided == -way}
        if len(models) >= 2 and not against:
            return f"{word} on {len(models)} models"
    if not evidence:
        return "not measured"
    models = {e.model for e in evidence}
    return "undecided" if len(models) > 1 else "one model only"


def write_hypotheses(folder: str | Path) -> Path:
    """Read the studies under `folder` and write the page and the text. Raises InputError when there is none."""
    folder = Path(folder)
    studies = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/results.json"))}
    studies = {name: result for name, result in studies.items() if "placement" not in name}
    if not studies:
        raise InputError(
            f"There is no */results.json under {folder}: run `steerkit adapt bench` into directories there."
        )
    weighed = {
        claim: [e for name, result in studies.items() if (e := weigh(claim, name, result)) is not None]
        for claim in CLAIMS
    }
    atomic_write(folder / "hypotheses.md", _markdown(weighed))
    return page("Adapters as hypotheses", _page(weighed, studies), folder / "hypotheses.html")


def _markdown(weighed: Mapping[Claim, Sequence[Evidence]]) -> str:
    lines = [
        "| claim | pairs | study | difference [95 %] | forgetting [95 %] | B | credence | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim, evidence in weighed.items():
        moved = f"{claim.prior:.2f} → {posterior(claim, evidence):.2f}"
        for i, e in enumerate(evidence):
            pairs = ", ".join(f"{a} − {b} {d:+.3g}" for (a, b), d in e.pairs.items())
            first = (claim.name, moved, headline(claim, evidence)) if i == 0 else ("", "", "")
            between = f"{e.difference:+.3g} [{e.interval[0]:+.3g}, {e.interval[1]:+.3g}]"
            cells = (first[0], pairs, e.study, between, _forgetting(e), f"{e.factor:.2g}", *first[1:])
            lines.append(f"| {' | '.join(cells)} |")
        if not evidence:
            lines.append(f"| {claim.name} | – | – | – | – | – | {moved} | not measured |")
    return "\n".join(lines) + "\n"


def _forgetting(e: Evidence) -> str:
    return "–" if e.forgetting is None else "{:+.2g} [{:+.2g}, {:+.2g}]".format(*e.forgetting)


def _page(weighed: Mapping[Claim, Sequence[Evidence]], studies: Mapping[str, Any]) -> list[Any]:
    told = ", ".join(
        f"<b>{html.escape(name)}</b> ({html.escape(str(r['config']['model']))}, {r['config']['seeds']} seeds)"
        for name, r in studies.items()
    )
    parts: list[Any] = [
        f"<p>Studies: {told}. A claim is tested by pairs of methods that differ in little else, at about the same number "
        "of parameters; "
        "positive differences speak for it. Credences begin with a judgement from the literature, and one study moves "
        "their odds by at "
        "most ten. Only where two models agree, both intervals excluding zero, is a claim said to hold or not to hold.</p>",
        _figure(weighed),
    ]
    for claim, evidence in weighed.items():
        parts.append(
            f"<h2>{html.escape(claim.name.capitalize())}: {html.escape(headline(claim, evidence))}</h2>"
            f"<p>{html.escape(claim.statement)} Credence {claim.prior:.2f} → <b>{posterior(claim, evidence):.2f}</b>.</p>"
            + _table(evidence)
            + _said(claim)
        )
    return parts


def _figure(weighed: Mapping[Claim, Sequence[Evidence]]) -> Any:
    from plotly import graph_objects as go

    names = [claim.name for claim in weighed][::-1]
    priors = [claim.prior for claim in weighed][::-1]
    after = [posterior(claim, evidence) for claim, evidence in weighed.items()][::-1]
    figure = go.Figure()
    for name, before, now in zip(names, priors, after):
        figure.add_scatter(
            x=[before, now],
            y=[name, name],
            mode="lines",
            line={"color": "rgb(128, 128, 128)", "width": 1.5},
            showlegend=False,
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=priors, y=names, mode="markers", name="before", marker={"symbol": "circle-open", "size": 9}
    )
    figure.add_scatter(
        x=after, y=names, mode="markers", name="after", marker={"symbol": "circle", "size": 10}
    )
    figure.update_layout(
        height=130 + 28 * len(names),
        xaxis={"range": [0, 1], "title": {"text": "credence"}},
        margin={"l": 160},
        showlegend=True,
    )
    return figure


def _table(evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return f"<p style='{_QUIET}'>Not measured.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(e.study)}</td>"
        f"<td>{'<br>'.join(f'{html.escape(a)} − {html.escape(b)}: {d:+.3g}' for (a, b), d in e.pairs.items())}</td>"
        f"<td class='number'>{e.difference:+.3g} [{e.interval[0]:+.3g}, {e.interval[1]:+.3g}]</td>"
        f"<td class='number'>{e.factor:.2g}</td><td class='number'>{_forgetting(e)}</td></tr>"
        for e in evidence
    )
    return (
        "<table><tr><th>study</th><th>pairs</th><th class='number'>difference [95 %]</th>"
        "<th class='number'>factor of the odds</th><th class='number'>forgotten besides, nats a token</th></tr>"
        f"{rows}</table>"
    )


def _said(claim: Claim) -> str:
    """What the methods themselves claim."""
    names = dict.fromkeys(method.partition("(")[0] for method, _ in claim.pairs)
    told = [METHODS[name] for name in names if name in METHODS]
    items = "".join(
        f"<li><code>{html.escape(m.name)}</code> {html.escape(m.equation)} – {html.escape(m.hypothesis)}</li>"
        for m in told
    )
    return f"<ul style='{_QUIET}'>{items}</ul>"
