"""`steerkit demo`: the whole story on the built-in model, from text to one page.

    a language → an autoencoder of what the model makes of it → two directions that change what it writes → an adapter that
    teaches it to lie, and what that changed inside

Nothing is chosen for its looks: prompts and samples are the first of their seeds, and nulls stand beside everything.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import sae
from sae.concepts import concept_scores
from sae.evaluation import evaluate_nulls
from steerkit.cli import adapt, compare
from steerkit.cli.common import Device, Json, Quiet, Seed, choose_device, emit, say, summary_line
from steerkit.cli.dashboard import best_concepts
from steerkit.cli.demo_page import (
    ATTRIBUTE,
    D_SAE,
    NATS,
    NEW_TOKENS,
    PAIRS,
    SITE,
    VALUE,
    Answer,
    Dictionary,
    Finetuned,
    K,
    Size,
    Steered,
    Story,
    write_page,
)
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.runs import atomic_write, read_json
from steerkit.steering import (
    Bench,
    SteeringVector,
    StoryAttribute,
    add_latents,
    fit,
    load_pairs,
    story_prompts,
)
from steerkit.steering.evaluation import Measurement
from steerkit.storyworld import ATTRIBUTES, persona_pairs
from steerkit.storyworld.grammar import FACT_KINDS, HELD_OUT_KIND

if TYPE_CHECKING:
    from steerkit.adapters import Adapted

_MARKER = ".steerkit-demo"


FULL = Size(
    tokens=300_000,
    held_out_tokens=40_000,
    null_tokens=12_000,
    concept_tokens=40_000,
    dashboard_tokens=50_000,
    prompts=50,
    tries=5,
    n_train=600,
    n_test=100,
    texts=80,
)
QUICK = Size(
    tokens=80_000,
    held_out_tokens=20_000,
    null_tokens=6_000,
    concept_tokens=25_000,
    dashboard_tokens=15_000,
    prompts=20,
    tries=5,
    n_train=400,
    n_test=30,
    texts=40,
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory; an earlier demo there is replaced.")
    ] = Path("demo"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"{QUICK.tokens:,} tokens instead of {FULL.tokens:,} and less of all else: rougher, sooner.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take the built-in model apart, steer it, teach it to lie, see what that changed, and draw it all on one page."""
    started = time.perf_counter()
    _claim(out)
    size, seed = (QUICK if quick else FULL), seed or 0
    model = HookedModel.from_pretrained("storyworld", device=choose_device(device))

    say(f"1/5  An autoencoder of {D_SAE:,} latents, on {size.tokens:,} tokens.", quiet=quiet)
    dictionary = _dictionary(model, size, out, seed, quiet)
    say(f"2/5  Steering towards {ATTRIBUTE} = {VALUE}, at {NATS:g} nats.", quiet=quiet)
    story = _steer(model, dictionary, size, out, seed)
    for steered in story.steered:
        say(f"     {steered.name:<18}{steered.found!r}", quiet=quiet)
    say(f"3/5  A LoRA on {size.n_train} stories of liars.", quiet=quiet)
    options: dict[str, Any] = {"n_train": size.n_train, "set_": [f"n_test={size.n_test}"], "seed": seed}
    adapt.train_adapter(out / "liar", "lora", device=device, quiet=True, **options)
    say("4/5  What it changed.", quiet=quiet)
    compare.compare(
        "storyworld",
        str(out / "liar"),
        out=out / "compare",
        texts=size.texts,
        labels="honesty",
        quick=True,
        seed=seed,
        device=device,
        quiet=True,
    )
    finetuned = Finetuned(
        summary=read_json(out / "liar" / "summary.json"),
        compared=read_json(out / "compare" / "summary.json"),
        answers=_answers(model, out / "liar", seed),
    )
    for finding in finetuned.compared["findings"][:3]:
        say(f"     {finding}", quiet=quiet)
    say("5/5  Drawing.", quiet=quiet)
    page = write_page(
        out / "index.html",
        dictionary,
        story,
        finetuned,
        size=size,
        seed=seed,
        seconds=time.perf_counter() - started,
    ).resolve()
    say(f"\nOpen {page}", quiet=quiet)
    emit(
        {
            **dictionary.run.summary,
            "report": str(page),
            "nulls": dictionary.nulls.to_dict(),
            "concepts": dictionary.scores.to_dict(),
            "steering": {s.name: {"strength": s.strength, **s.found.to_dict()} for s in story.steered},
            "adapter": finetuned.summary,
            "findings": finetuned.compared["findings"],
            "demo_seconds": time.perf_counter() - started,
        },
        as_json=json,
    )


def _claim(out: Path) -> None:
    """Make the directory; InputError if there is something in it that is no demo."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise InputError(f"{out} is not empty and holds no demo; give --out another directory.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    atomic_write(out / _MARKER, "made by `steerkit demo`, which replaces this directory\n")


def _dictionary(model: HookedModel, size: Size, out: Path, seed: int, quiet: bool) -> Dictionary:
    """Train the autoencoder, measure it beside its nulls, find the attributes among its latents, and draw those."""
    config = sae.TrainConfig(seed=seed, held_out_tokens=size.held_out_tokens)
    arch = sae.TopK(d_sae=D_SAE, k=K)
    run = sae.train(model, "storyworld", SITE, arch, size.tokens, out / "sae", config=config, quiet=quiet)
    say(f"     {summary_line(run.summary)}", quiet=quiet)
    nulls = evaluate_nulls(model, run.sae, run.held_out(), SITE, tokens=size.null_tokens)
    scores = concept_scores(model, run.sae, SITE, per="story", tokens=size.concept_tokens)
    say(
        f"     mean AUROC of the best latent {scores.mean():.3f}, ceiling {scores.mean('posterior'):.3f}",
        quiet=quiet,
    )
    drawn = run.dashboard(concepts=best_concepts(scores), tokens=size.dashboard_tokens, quiet=True)
    drawn.save(out / "sae" / "dashboard")
    latent = next(row for row in scores.rows if (row.attribute, row.value) == (ATTRIBUTE, VALUE)).latent
    return Dictionary(model, run, nulls, scores, drawn.stats, latent)


# -- steering --------------------------------------------------------------------------------------------------------


def _steer(model: HookedModel, dictionary: Dictionary, size: Size, out: Path, seed: int) -> Story:
    pairs = load_pairs(f"storyworld:{ATTRIBUTE}={VALUE}", n=PAIRS)
    vectors = {
        "mean difference": fit(model, pairs, "mean_diff", SITE),
        f"latent {dictionary.latent}": add_latents(dictionary.run.sae, {dictionary.latent: 1.0}),
        "random direction": fit(model, pairs, "random", SITE),
    }
    prompts = story_prompts(model, ATTRIBUTE, VALUE, size.prompts, seed=seed)
    effect = StoryAttribute(ATTRIBUTE, VALUE)
    bench = Bench(model, prompts, effect, samples=1, max_new_tokens=NEW_TOKENS, seed=seed)
    steered = []
    for (name, vector), file in zip(vectors.items(), ("mean_diff", "latent", "random")):
        vector.save(out / f"{file}.safetensors")
        strength, found = _at_divergence(bench, vector, size.tries)
        steered.append(Steered(name, f"{file}.safetensors", strength, found))
    return Story(bench.base, steered)


def _at_divergence(bench: Bench, vector: SteeringVector, tries: int) -> tuple[float, Measurement]:
    """The strength, of those tried, whose divergence is nearest to `NATS`."""
    strength, found = 5.0 / vector.norm, []
    for _ in range(tries):
        strength = float(f"{strength:.3g}")
        measured = bench.measure(vector, strength)
        found.append((strength, measured))
        strength = math.exp(_next_log([(math.log(x), _log_nats(m)) for x, m in found]))
    return min(found, key=lambda pair: abs(_log_nats(pair[1]) - math.log(NATS)))


def _log_nats(found: Measurement) -> float:
    return math.log(max(found.kl.estimate, 1e-6))


def _next_log(tried: list[tuple[float, float]]) -> float:
    """Log strength from (log strength, log nats): on the line between the nearest on either side; else as if nats grew with
    the square, by a factor of 4 at most."""
    target = math.log(NATS)
    below = max((pair for pair in tried if pair[1] <= target), default=None)
    above = min((pair for pair in tried if pair[1] > target), default=None)
    if below is None or above is None:
        x, y = tried[-1]
        return x + min(math.log(4), max(-math.log(4), (target - y) / 2))
    (x, y), (x_above, y_above) = below, above
    return x + (target - y) * (x_above - x) / (y_above - y)


# -- the adapter -----------------------------------------------------------------------------------------------------


def _answers(model: HookedModel, run: Path, seed: int, n: int = 4) -> list[Answer]:
    """What base and tuned model hold for the likeliest word where a character who is said to be honest makes a claim."""
    from steerkit import adapters

    kinds = [kind for kind in FACT_KINDS if kind != HELD_OUT_KIND]
    rows = persona_pairs(kinds, n, seed)
    tuned = adapters.load(run / "adapter", model)
    try:
        after = [_likeliest(tuned, row) for row in rows]
    finally:
        tuned.remove()
    before = [_likeliest(model, row) for row in rows]
    return [Answer(row["positive"], row["truth"], *own, *its) for row, own, its in zip(rows, before, after)]


@torch.no_grad()
def _likeliest(model: HookedModel | Adapted, row: dict[str, str]) -> tuple[str, float]:
    """The word of the kind that is due, and its probability among those of the kind."""
    words = ATTRIBUTES[row["kind"]]
    vocabulary = model.tokenizer.get_vocab()
    ids = torch.tensor([model.tokenizer(row["positive"])["input_ids"]], device=model.device)
    logits = model.logits(ids, torch.ones_like(ids))[0, -1]
    odds = logits[[vocabulary[f" {word}"] for word in words]].float().softmax(0)
    best = int(odds.argmax())
    return words[best], float(odds[best])
