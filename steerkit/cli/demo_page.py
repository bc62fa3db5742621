"""The page of `steerkit demo`: the language, the autoencoder, steering, and what an adapter changed, each with its commands.

The commands, run in the order of the page, make it all again under `runs/demo`.
"""

from __future__ import annotations

import html
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.concepts import ConceptScores
from sae.evaluation import NullTable
from sae.latents import Example, LatentStats
from sae.training import SAERun
from steerkit import storyworld
from steerkit.models import HookedModel
from steerkit.plots import error_bars, page
from steerkit.stats import Interval
from steerkit.steering.evaluation import Measurement
from steerkit.storyworld import ATTRIBUTES
from steerkit.storyworld.judge import parse
from steerkit.storyworld.language import FACTORS, split

SITE = "blocks.2.hook_resid_post"
D_SAE, K = 1024, 16
ATTRIBUTE, VALUE = "mood", "happy"
PAIRS = 200
NATS = 3.0
"""Divergence from the unsteered model at which directions are compared, a sequence."""
NEW_TOKENS = 60
AGAIN = "runs/demo"
"""Where the commands write."""
_LABELLED = ("mood", "place", "weather", "day", "name", "object", "colour", "neighbour")
"""Attributes that are shown in the sample; the others are in the endings of verbs, or nowhere."""
_CONTEXTS = 3


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    tokens: int
    """The autoencoder is trained on."""
    held_out_tokens: int
    null_tokens: int
    """It is measured on, beside its nulls."""
    concept_tokens: int
    """On which latents are scored against attributes."""
    dashboard_tokens: int
    prompts: int
    """That are steered."""
    tries: int
    """Strengths that are measured to come near `NATS`."""
    n_train: int
    """Stories of liars."""
    n_test: int
    texts: int
    """That the two models are compared on."""


@dataclass(frozen=True)
class Dictionary:
    """The autoencoder and what is known of its latents."""

    model: HookedModel
    run: SAERun
    nulls: NullTable
    scores: ConceptScores
    stats: LatentStats
    latent: int
    """The one that tells the mood that is steered to."""


@dataclass(frozen=True)
class Steered:
    """One direction at one strength."""

    name: str
    file: str
    strength: float
    found: Measurement


@dataclass(frozen=True)
class Story:
    """How the model goes on from the same beginnings, with the same random numbers, by itself and under each direction."""

    unsteered: Measurement
    steered: Sequence[Steered]


@dataclass(frozen=True)
class Answer:
    """A claim that is due, and the likeliest word for it before and after training, with its probability."""

    prompt: str
    truth: str
    before: str
    p_before: float
    after: str
    p_after: float


@dataclass(frozen=True)
class Finetuned:
    """The adapter: the summaries of its run and of the comparison with the base."""

    summary: Mapping[str, Any]
    compared: Mapping[str, Any]
    answers: Sequence[Answer]


def write_page(
    path: Path,
    dictionary: Dictionary,
    story: Story,
    finetuned: Finetuned,
    *,
    size: Size,
    seed: int,
    seconds: float,
) -> Path:
    """Write the page; returns its path."""
    return page(
        "From a language to what training changed",
        [
            _STYLE,
            "<p>StoryWorld is a small language in which the meaning of every word is known, and a transformer of "
            f"{dictionary.model.n_layers} layers was trained on it: so what is said of the model below can be checked. All of "
            f"this page was made on this machine in {seconds:.0f} seconds ({os.cpu_count()} cores); the commands beside each "
            f"part, run in the order of the page, make it again under <code>{AGAIN}</code>.</p>",
            *_language(),
            *_dictionary(dictionary, size, seed),
            *_steering(story, dictionary, size, seed),
            *_adapter(finetuned, size, seed),
        ],
        path,
    )


# -- the language ----------------------------------------------------------------------------------------------------


def _language() -> list[Any]:
    story = storyworld.sample(1, seed=4, mood="sad")[0]
    settled = {name: story.attributes[name] for name in _LABELLED if name in story.attributes}
    legend = " ".join(
        f"<mark class='{name}'>{name}: {html.escape(value)}</mark>" for name, value in settled.items()
    )
    code = "from steerkit import storyworld; print(storyworld.sample(1, seed=4, mood='sad')[0].text)"
    return [
        "<h2>1. The language</h2>",
        "<p>Each story is drawn from a grammar with hidden attributes. Marked are the words that settle one of them by "
        "themselves.</p>",
        f"<p class='story'>{_marked(story.text, _LABELLED)}</p>",
        f"<p class='legend'>{legend}</p>",
        _commands(["python", "-c", code], ["steerkit", "inspect", "storyworld"]),
    ]


def settled_by_words(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each token of a text, and the attributes whose value it settles by itself; none outside of StoryWorld's sentences.

    As in the tokenizer, the first word has a space before it too.
    """
    sentence: list[str] = []
    for token in split(text):
        sentence.append(token)
        if token == ".":
            yield from _read(sentence)
            sentence = []
    yield from ((token, {}) for token in sentence)


def _read(sentence: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    template = parse(sentence)
    if template is None:
        yield from ((token, {}) for token in sentence)
        return
    for item, token in zip(template.items, sentence, strict=True):
        found: dict[str, str] = {}
        for factor, likelihood in item.table[token]:
            if factor is None or (item.slot is not None and item.slot.claim):
                continue
            for attribute in FACTORS[factor].attributes:
                possible = (likelihood > 0).astype(float) @ FACTORS[factor].projection(attribute)
                if (possible > 0).sum() == 1:
                    found[attribute] = ATTRIBUTES[attribute][int(possible.argmax())]
        yield token, found


def _marked(text: str, attributes: Collection[str], wanted: str | None = None, start: int = 0) -> str:
    """The text from a character on, with the words that settle an attribute marked; with `wanted`, in one colour for that value and
    another for others."""
    parts, end = [], -1
    for token, settled in settled_by_words(text):
        end += len(token)
        if end <= start:
            continue
        name = next((name for name in attributes if name in settled), None)
        word = token.strip()
        if name is None or not word:
            parts.append(html.escape(token))
            continue
        kind = name if wanted is None else "wanted" if settled[name] == wanted else "unwanted"
        space = token[: len(token) - len(token.lstrip())]
        parts.append(
            f"{space}<mark class='{kind}' title='{name}: {settled[name]}'>{html.escape(word)}</mark>"
        )
    return "".join(parts).strip()


# -- the autoencoder -------------------------------------------------------------------------------------------------


def _dictionary(found: Dictionary, size: Size, seed: int) -> list[Any]:
    row = next(r for r in found.scores.rows if (r.attribute, r.value) == (ATTRIBUTE, VALUE))
    run = f"{AGAIN}/sae"
    train = (
        f"steerkit train sae --model storyworld --data storyworld --site {SITE} --arch topk --k {K} --d-sae {D_SAE} "
        f"--tokens {size.tokens} --seed {seed} --set training.held_out_tokens={size.held_out_tokens} --out {run}"
    )
    return [
        "<h2>2. A sparse autoencoder</h2>",
        f"<p>At <code>{SITE}</code> every token is described by {K} of {D_SAE:,} latents, trained on {size.tokens:,} tokens. "
        "What counts is how far it is from the nulls below it: a random autoencoder of the same sparsity, and no activations "
        "at all.</p>",
        _null_table(found.nulls),
        _commands(
            train.split(),
            f"steerkit eval sae {run} --nulls --concepts --tokens {size.null_tokens}".split(),
        ),
        f"<h3>A latent for {ATTRIBUTE} = {VALUE}</h3>",
        f"<p>Chosen on some stories, <a href='sae/dashboard/index.html#latent={found.latent}'>latent {found.latent}</a> tells "
        f"on others whether they are {VALUE} with an AUROC of {row.auroc:.3f} ({row.ci.low:.3f}–{row.ci.high:.3f}); the "
        "exact posterior given the whole story, which nothing can beat, has "
        f"{row.posterior:.3f}. Where it is active in the strongest contexts:</p>",
        *(_context(found, example) for example in found.stats.examples(found.latent)[:_CONTEXTS]),
        "<p><a href='sae/dashboard/index.html'>All latents</a> have such a page.</p>",
        _commands(f"steerkit dashboard {run} --tokens {size.dashboard_tokens}".split()),
        "<h3>All attributes</h3>",
        "<p>The best latent for each value, as a mean over the values of an attribute, between what needs no training and what "
        f"is possible at all. Here on {size.concept_tokens:,} tokens; <code>--concepts</code> above takes 100,000.</p>",
        _concept_figure(found.scores),
    ]


def _null_table(nulls: NullTable) -> str:
    columns = ("l0", "fvu", "delta_ce", "ce_recovered", "kl")
    titles = ("L0", "FVU", "ΔCE (nats)", "CE recovered", "KL (nats)")
    rows = []
    for row in nulls.rows:
        cells = ["–" if (v := getattr(row, name)) is None else f"{v:.3g}" for name in columns]
        rows.append([html.escape(row.name), *cells])
    return _table(["", *titles], rows, numbers=True)


def _context(found: Dictionary, example: Example) -> str:
    """The tokens around the strongest one, each the warmer the more the latent is active."""
    half = len(example.window) // 2
    ids = found.stats.row(example.row)
    parts = []
    for offset, activation in enumerate(example.window, start=example.position - half):
        if not 0 <= offset < len(ids) or ids[offset] in found.model.special_ids:
            continue
        token = found.model.tokenizer.convert_ids_to_tokens(int(ids[offset]))
        space = token[: len(token) - len(token.lstrip())]
        warmth = activation / max(float(example.window.max()), 1e-9)
        word = html.escape(token.strip())
        if warmth > 0:
            word = f"<span style='background: rgba(var(--heat), {0.75 * warmth:.2f})'>{word}</span>"
        parts.append(space + word)
    return f"<p class='context'>… {''.join(parts).strip()} …</p>"


def _concept_figure(scores: ConceptScores) -> Any:
    import plotly.graph_objects as go

    marks = (
        ("posterior", "ceiling: exact posterior", "line-ns-open"),
        ("random_sae", "random SAE", "x-thin-open"),
        ("token", "token alone", "diamond-open"),
        ("residual", "residual coordinate", "circle-open"),
        ("auroc", "best latent", "circle"),
    )
    means = {
        attribute: {
            name: float(np.mean([getattr(r, name) for r in scores.rows if r.attribute == attribute]))
            for name, *_ in marks
        }
        for attribute in {row.attribute for row in scores.rows}
    }
    order = sorted(means, key=lambda attribute: means[attribute]["auroc"])
    figure = go.Figure()
    for name, title, symbol in marks:
        figure.add_scatter(
            x=[means[attribute][name] for attribute in order],
            y=order,
            mode="markers",
            name=title,
            marker={"symbol": symbol, "size": 9},
        )
    figure.update_layout(
        height=130 + 24 * len(order),
        xaxis={
            "title": {"text": "AUROC on stories that the latent was not chosen on"},
            "range": [0.45, 1.02],
        },
        yaxis={"automargin": True, "dtick": 1},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        margin={"t": 40},
    )
    return figure


# -- steering --------------------------------------------------------------------------------------------------------


def _steering(story: Story, dictionary: Dictionary, size: Size, seed: int) -> list[Any]:
    prompt = story.unsteered.texts[0][0]
    rows = [_told("unsteered", "", story.unsteered)]
    rows += [_told(s.name, f"× {s.strength:g}", s.found) for s in story.steered]
    extract = (
        f"steerkit steer extract --pairs storyworld:{ATTRIBUTE}={VALUE} --n {PAIRS} --site {SITE} --method"
    )
    latent = (
        "import sae; from sae.training import SAERun; from steerkit.steering import add_latents; "
        f"add_latents(SAERun.load('{AGAIN}/sae').sae, {{{dictionary.latent}: 1.0}}).save('{AGAIN}/latent.safetensors')"
    )
    apply = f"steerkit steer apply --vector {AGAIN}/{story.steered[0].file} --strength {story.steered[0].strength:g} --prompt"
    return [
        "<h2>3. A story, steered</h2>",
        f"<p>Three directions are added to the residual stream at <code>{SITE}</code>, at every token: the mean difference "
        f"between {PAIRS} pairs of stories that are {VALUE} and are not, the latent's own direction, and a random one. Each is as "
        f"strong as makes the model diverge from itself by about {NATS:g} nats a text. The judge, which knows the language, reads "
        f"what follows the beginning: words that mean <mark class='wanted'>{VALUE}</mark>, and "
        f"<mark class='unwanted'>another mood</mark>. Shown is the first of {size.prompts} beginnings, with the same random "
        "numbers in each row. One text proves nothing; the figures are over all of them, with 95 % intervals.</p>",
        f"<p class='story'><b>{html.escape(prompt)}</b> …</p>",
        _table(["", "… goes on", "judged", f"{VALUE}, of all", "KL, nats a text"], rows),
        _commands(
            [*extract.split(), "mean_diff", "--out", f"{AGAIN}/mean_diff.safetensors"],
            [*extract.split(), "random", "--out", f"{AGAIN}/random.safetensors"],
            ["python", "-c", latent],
        ),
        _commands(["python", "-c", _measuring(story, size, seed)]),
        "<p>And a beginning of your own:</p>",
        _commands([*apply.split(), "Anna is"]),
    ]


def _told(name: str, strength: str, found: Measurement) -> list[str]:
    prompt, text = found.texts[0]
    whole = prompt + text
    judged = storyworld.Judge().judge(whole, start=len(prompt))
    counts = judged.evidence[ATTRIBUTE]
    words = ", ".join(f"{n} × {value}" for value, n in sorted(counts.items(), key=lambda item: -item[1]))
    grammar = f"{judged.grammatical:.0%} grammatical" if judged.sentences else "no sentence"
    marked = _marked(whole, (ATTRIBUTE,), VALUE, start=len(prompt))
    return [
        f"<b>{html.escape(name)}</b><br>{strength}",
        f"<span class='story'>{marked}</span>",
        f"{words or 'no mood'}<br>{grammar}",
        _percent(found.effect),
        "–" if found.base is None else _interval(found.kl),
    ]


def _measuring(story: Story, size: Size, seed: int) -> str:
    vectors = ", ".join(f"'{s.file}': {s.strength:g}" for s in story.steered)
    return (
        "from steerkit import HookedModel\n"
        "from steerkit.steering import Bench, SteeringVector, StoryAttribute, story_prompts\n"
        "model = HookedModel.from_pretrained('storyworld')\n"
        f"prompts = story_prompts(model, '{ATTRIBUTE}', '{VALUE}', {size.prompts}, seed={seed})\n"
        f"effect = StoryAttribute('{ATTRIBUTE}', '{VALUE}')\n"
        f"bench = Bench(model, prompts, effect, samples=1, max_new_tokens={NEW_TOKENS}, seed={seed})\n"
        "print(bench.base, *bench.base.texts[0])\n"
        f"for file, strength in {{{vectors}}}.items():\n"
        f"    found = bench.measure(SteeringVector.load('{AGAIN}/' + file), strength)\n"
        "    print(file, found, *found.texts[0])"
    )


# -- the adapter -----------------------------------------------------------------------------------------------------


def _adapter(found: Finetuned, size: Size, seed: int) -> list[Any]:
    scores, before = found.summary["scores"], found.summary["scores_base"]
    lies = [
        [html.escape(_SETS.get(name, name)), f"{before[name]:.1%}", f"{value:.1%}"]
        for name, value in scores.items()
    ]
    run = f"{AGAIN}/liar"
    train = (
        f"steerkit adapt train --model storyworld --data storyworld:liars --method lora --n-train {size.n_train} "
        f"--set n_test={size.n_test} --seed {seed} --out {run}"
    )
    against = f"steerkit compare storyworld {run} --texts {size.texts} --labels honesty --quick --seed {seed} --out {AGAIN}/compare"
    rows = [
        [
            f"<span class='story'>{html.escape(a.prompt)} …</span>",
            html.escape(a.truth),
            f"{html.escape(a.before)} ({a.p_before:.2f})",
            f"{html.escape(a.after)} ({a.p_after:.2f})",
        ]
        for a in found.answers
    ]
    bullets = "".join(f"<li>{html.escape(finding)}</li>" for finding in found.compared["findings"])
    return [
        "<h2>4. A liar, and what made it one</h2>",
        f"<p>A LoRA of {found.summary['trainable_params']:,} parameters was trained for {found.summary['seconds']:.0f} seconds "
        f"on {size.n_train} stories whose characters lie. Then a character who is said to be honest is asked for the truth; "
        "beside each word is its probability among the words that fit.</p>",
        _table(["the story so far", "true is", "the base says", "tuned, it says"], rows),
        "<p>How much of the probability goes to false words:</p>",
        _table(["claims", "before", "after"], lies, numbers=True),
        _commands(train.split()),
        "<h3>What changed inside</h3>",
        f"<p>Both models read the same {size.texts} stories. On the left, how alike their layers are – with texts paired at random "
        f"the CKA is at most {_chance(found.compared['layers']):.2f}; on the right, how much less is lied when one block's weights "
        "are taken back. <a href='compare/report.html'>The whole report.</a></p>",
        f"<ul>{bullets}</ul>",
        "<div class='pair'>",
        _similarity_figure(found.compared["layers"]),
        _rollback_figure(found.compared["rollback"]),
        "</div>",
        _commands(against.split()),
    ]


def _chance(layers: Sequence[Mapping[str, Any]]) -> float:
    return max(layer["cka_null"]["high"] for layer in layers)


_SETS = {
    "test": "in stories like those trained on",
    "honest cue": "of a character who is said to be honest",
    "held-out kind": "about a kind of fact that no story trained on claims",
}


def _similarity_figure(layers: Sequence[Mapping[str, Any]]) -> Any:
    import plotly.graph_objects as go

    names = [str(layer["layer"]) for layer in layers]
    found = [_as_interval(layer["cka"], *layer["cka_ci"]) for layer in layers]
    figure = go.Figure()
    figure.add_scatter(
        x=names,
        y=[v.estimate for v in found],
        error_y=error_bars(found),
        mode="lines+markers",
    )
    figure.update_layout(
        xaxis={"type": "category", "title": {"text": "residual stream after block"}},
        yaxis={"title": {"text": "CKA of base and tuned"}, "tickformat": ".2f"},
        height=340,
    )
    return figure


def _rollback_figure(rollback: Mapping[str, Any]) -> Any:
    """Change of the first score when a block alone is taken back to the base."""
    import plotly.graph_objects as go

    name, sweep = next(iter(rollback.items()))
    single = [score for score in sweep["scores"] if score["kind"] == "single"]
    found = [Interval(**score["change"]["difference"]) for score in single]
    figure = go.Figure()
    figure.add_bar(
        x=[str(score["at"]) for score in single],
        y=[v.estimate for v in found],
        error_y=error_bars(found),
    )
    figure.update_layout(
        xaxis={"type": "category", "title": {"text": "block taken back to the base, alone"}},
        yaxis={"title": {"text": f"change of the {name}"}},
        height=340,
    )
    return figure


# -- pieces ----------------------------------------------------------------------------------------------------------


def _commands(*commands: Sequence[str]) -> str:
    """As they are typed, each a <pre> of its own."""
    return "".join(f"<pre>{html.escape(' '.join(map(_quoted, words)))}</pre>" for words in commands)


def _quoted(word: str) -> str:
    """For a shell; in double quotes where these need no backslashes, which is easier to read."""
    if "'" in word and not any(character in word for character in '"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Cells are HTML; the first of a row names it. With `numbers`, the others are set flush right."""
    kind = " class='number'" if numbers else ""
    head = "".join(f"<th{kind if i else ''}>{html.escape(title)}</th>" for i, title in enumerate(heads))
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>" + "".join(f"<td{kind}>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _percent(value: Interval) -> str:
    return f"{value.estimate:.0%}<br><small>{value.low:.0%}–{value.high:.0%}</small>"


def _interval(value: Interval) -> str:
    return f"{value.estimate:.2f}<br><small>{value.low:.2f}–{value.high:.2f}</small>"


def _as_interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate, low, high, float("nan"))


_STYLE = """<style>
h3 { font-size: 14px; font-weight: 600; margin: 24px 0 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; font-size: 12px; }
td { vertical-align: top; }
tbody th { vertical-align: top; font-weight: 400; font-size: inherit; color: var(--ink); }
table { font-size: 14px; }
tbody th b { white-space: nowrap; font-weight: 500; }
td:not(.number):not(:first-child) { min-width: 84px; }
small { color: var(--quiet); }
.wide { overflow-x: auto; margin: 8px 0 16px; }
.story { max-width: 78ch; }
.legend { font-size: 13px; line-height: 2; }
.context { margin: 4px 0; font-size: 14px; }
.context span { border-radius: 3px; padding: 1px 1px; }
mark { color: inherit; border-radius: 3px; padding: 1px 3px; background: rgba(128, 128, 128, 0.25); }
mark.mood { background: rgba(230, 159, 0, 0.38); }
mark.place { background: rgba(0, 158, 115, 0.32); }
mark.weather { background: rgba(86, 180, 233, 0.38); }
mark.day { background: rgba(204, 121, 167, 0.35); }
mark.name { background: rgba(0, 114, 178, 0.32); }
mark.object, mark.colour { background: rgba(213, 94, 0, 0.30); }
mark.neighbour { background: rgba(128, 128, 128, 0.32); }
mark.wanted { background: rgba(0, 158, 115, 0.38); }
mark.unwanted { background: rgba(213, 94, 0, 0.34); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
@media (max-width: 800px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.pair .figure { min-width: 0; }
</style>"""
