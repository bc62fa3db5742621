"""`steerkit demo`: the whole story on the built-in model, from text to one page."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import sae
from sae.concepts import ConceptScores, concept_scores
from sae.evaluation import NullTable, evaluate_nulls
from steerkit import storyworld
from steerkit.cli.common import Device, Json, Quiet, Seed, choose_device, emit, say, summary_line
from steerkit.cli.dashboard import best_concepts
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.plots import page
from steerkit.runs import atomic_write

SITE = "blocks.2.hook_resid_post"
TOKENS, QUICK_TOKENS = 400_000, 150_000
D_SAE, K = 1024, 16
HELD_OUT_TOKENS = 40_000
_MARKER = ".steerkit-demo"


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory; an earlier demo there is replaced.")
    ] = Path("demo"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"{QUICK_TOKENS:,} tokens instead of {TOKENS:,}: rougher latents, sooner."
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an SAE on the built-in model, evaluate it beside its nulls, find the attributes, and draw it all."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise InputError(f"{out} is not empty and holds no demo; give --out another directory.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    atomic_write(out / _MARKER, "made by `steerkit demo`, which replaces this directory\n")

    model = HookedModel.from_pretrained("storyworld", device=choose_device(device))
    say(f"1/4  Training a TopK SAE of {D_SAE:,} latents at {SITE}.", quiet=quiet)
    arch = sae.TopK(d_sae=D_SAE, k=K)
    tokens = QUICK_TOKENS if quick else TOKENS
    config = sae.TrainConfig(seed=seed or 0, held_out_tokens=HELD_OUT_TOKENS)
    run = sae.train(model, "storyworld", SITE, arch, tokens, out / "run", config=config, quiet=quiet)
    say(f"     {summary_line(run.summary)}", quiet=quiet)

    say("2/4  What it has to beat.", quiet=quiet)
    nulls = evaluate_nulls(model, run.sae, run.held_out(), SITE, tokens=20_000)
    say(repr(nulls), quiet=quiet)

    say("3/4  Which latents tell StoryWorld's attributes.", quiet=quiet)
    scores = concept_scores(model, run.sae, SITE, per="story", tokens=50_000)
    say(
        f"     mean AUROC of the best latent {scores.mean():.3f}, ceiling {scores.mean('posterior'):.3f}",
        quiet=quiet,
    )

    say("4/4  Drawing.", quiet=quiet)
    run.dashboard(concepts=best_concepts(scores), tokens=60_000, quiet=True).save(out / "dashboard")
    report = page("steerkit demo", _story(model, run, nulls, scores), out / "index.html").resolve()
    say(f"\nOpen {report}", quiet=quiet)
    emit(
        {**run.summary, "report": str(report), "nulls": nulls.to_dict(), "concepts": scores.to_dict()},
        as_json=json,
    )


def _story(model: HookedModel, run: sae.SAERun, nulls: NullTable, scores: ConceptScores) -> list[Any]:
    story = storyworld.sample(1, seed=4, mood="sad")[0]
    prompt = story.sentences[0].text
    written = model.generate(prompt, max_new_tokens=60, do_sample=False)
    best = max((row for row in scores.rows if row.attribute == "mood"), key=lambda row: row.auroc)
    settings = f"--arch topk --k {K} --d-sae {D_SAE} --tokens {run.config['tokens']}"
    train = (
        f"steerkit train sae --model storyworld --data storyworld --site {SITE} {settings} --out runs/demo"
    )
    return [
        "<h1>From text to latents</h1>",
        "<p>StoryWorld is a small language whose every token is labelled. A transformer was trained on it; here a sparse "
        "autoencoder takes that transformer's residual stream apart.</p>",
        "<h2>The language</h2>",
        f"<p><b>{html.escape(prompt)}</b> {html.escape(written.strip())}</p>",
        _command("steerkit inspect storyworld"),
        "<h2>The autoencoder, and what it has to beat</h2>",
        _table(nulls),
        _command(train) + _command("steerkit eval sae runs/demo --nulls"),
        "<h2>The attributes, found</h2>",
        f"<p>The latent that best tells <i>{best.attribute} = {best.value}</i> is "
        f"<a href='dashboard/index.html#latent={best.latent}'>latent {best.latent}</a> (AUROC {best.auroc:.3f}). Its score "
        "for a story is its maximum over the story's tokens; it was chosen on some stories and scored on others. The "
        "ceiling is the exact "
        "posterior given the whole story.</p>",
        _figure(scores),
        _command("steerkit eval sae runs/demo --concepts"),
        "<h2>Every latent</h2>",
        "<p><a href='dashboard/index.html'>Open the dashboard</a>.</p>",
        _command("steerkit dashboard runs/demo"),
    ]


def _command(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _table(nulls: NullTable) -> str:
    columns = ("l0", "fvu", "delta_ce", "ce_recovered", "kl")
    titles = ("L0", "FVU", "ΔCE (nats)", "CE recovered", "KL (nats)")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = []
    for row in nulls.rows:
        cells = ("–" if (v := getattr(row, name)) is None else f"{v:.4g}" for name in columns)
        rows.append(
            f"<tr><th scope='row'>{html.escape(row.name)}</th>"
            + "".join(f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(scores: ConceptScores) -> Any:
    import plotly.graph_objects as go

    order = sorted(scores.rows, key=lambda row: (row.attribute, row.auroc))
    labels = [f"{row.attribute} = {row.value}" for row in order]
    figure = go.Figure()
    marks = (
        ("posterior", "ceiling: exact posterior", "line-ns-open"),
        ("random_sae", "random SAE", "x-thin-open"),
        ("token", "token alone", "diamond-open"),
        ("residual", "residual coordinate", "circle-open"),
        ("auroc", "best latent", "circle"),
    )
    for name, title, symbol in marks:
        values = [getattr(row, name) for row in order]
        figure.add_scatter(
            x=values, y=labels, mode="markers", name=title, marker={"symbol": symbol, "size": 9}
        )
    figure.update_layout(
        height=120 + 15 * len(order),
        xaxis={"title": "AUROC on stories that the latent was not chosen on", "range": [0.45, 1.02]},
        yaxis={"automargin": True, "dtick": 1, "tickfont": {"size": 10}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        margin={"t": 60},
    )
    return figure
