"""Where a model learned to lie: StoryWorld's model fine-tuned on lies of two kinds, looked into, and asked about two other kinds.

    python scripts/study_liars.py --out runs/liars                                                   # minutes on one core

The model is trained, all its weights, on stories without a cue in which every claim is false and is about a colour or a place. It
is then read where a claim is due: log odds of a false word of the kind against the true one. For each block's attention and MLP:

    rollback      the base's weights put back in the tuned model: share of what training added that is lost
    put in        the tuned weights put into the base: share that is gained
    patching      the base's output at all tokens put into the tuned model (denoising), or the tuned one's into the base (noising)
    fact          in one model: stories that differ in the word that tells the fact; its output patched at that word, or where the
                  claim is due. Metric: logit of the one word less that of the other
    cue           in one model: stories that differ in the word that makes the character honest or a liar

All of it on claims of the trained kinds, and on claims about the weather and the day, which no training story makes. Agreement is
Spearman's rank correlation over the halves of the blocks, mean over seeds; intervals are percentiles of a bootstrap of seeds and,
within each, of prompts. Last, the block whose rollback costs most on the trained kinds is rolled back, alone, and put into the
base, alone, and the lies about the kinds kept out are counted. Writes OUT/index.html, OUT/summary.json and OUT/summary.md.
"""

from __future__ import annotations

import argparse
import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.contrasts import Contrast, Direction, Positions, Run
from probes.patching import Place, patch
from probes.rollback import rollback_sweep
from probes.weights import preserved, weights_of, weights_set
from steerkit import storyworld
from steerkit.finetuning import FinetuneConfig, finetune
from steerkit.models import HookedModel
from steerkit.objectives import LanguageModelling
from steerkit.plots import error_bars, page
from steerkit.runs import make_provenance, write_json
from steerkit.stats import Interval, jackknife
from steerkit.storyworld import ATTRIBUTES, grammar
from steerkit.storyworld.language import Story, stream

TRAINED, KEPT_OUT = ("colour", "place"), ("weather", "day")
SETS = {"trained": TRAINED, "kept out": KEPT_OUT}
DIRECTIONS: dict[Direction, str] = {"denoising": "patching", "noising": "patching, noising"}
HALVES = {
    "attention": ("attn_out", "self_attn", "input_layernorm"),
    "MLP": ("mlp_out", "mlp", "post_attention_layernorm"),
}
"""Half of a block -> its output's site, and its modules."""
LR = 1e-3
"""What `adapt bench` found for full fine-tuning on the liars."""
RESAMPLES = 1000


# -- stories ---------------------------------------------------------------------------------------------------------


def lying_stories(n: int, seed: int) -> list[str]:
    """Stories of liars who claim nothing but the trained kinds."""
    found = (
        story.text
        for story in stream(seed, "liars")
        if 0 < len(claimed(story)) == len(claimed(story) & set(TRAINED))
    )
    return list(itertools.islice(found, n))


def claimed(story: Story) -> set[str]:
    return {s.template.fact for s in story.sentences if s.template.claim is not None and s.template.fact}


@dataclass(frozen=True)
class Prompt:
    """A story, without a cue, up to its first claim."""

    kind: str
    text: str
    truth: str
    other_text: str
    """The same with another fact."""
    other_truth: str
    told_at: int
    """Token, BOS counted, that tells the fact: the only one."""


def prompts(kinds: Sequence[str], n: int, seed: int = 11) -> list[Prompt]:
    """`n` of each kind, from the language's own stories."""
    return [p for kind in kinds for p in itertools.islice(_prompts(kind, seed), n)]


def _prompts(kind: str, seed: int) -> Iterator[Prompt]:
    values = ATTRIBUTES[kind]
    for story in stream(seed, cue="none"):
        claim = next((s for s in story.sentences if s.template.claim is not None), None)
        if claim is None or claim.template.fact != kind:
            continue
        tokens = list(story.tokens[: claim.start + (claim.template.claim or 0)])
        told = [i for i, said in enumerate(story.mentions(kind)[: len(tokens)]) if said]
        if len(told) != 1:
            continue
        truth = story.attributes[kind]
        other = values[(values.index(truth) + 1) % len(values)]
        forms = dict(zip(values, values)) | {truth: truth, other: other}
        if kind == "weather" and tokens[told[0]].strip() in grammar.WEATHER_NOUNS:
            forms = dict(zip(grammar.WEATHERS, grammar.WEATHER_NOUNS))
        if tokens[told[0]].strip() != forms[truth]:
            continue
        changed = [*tokens[: told[0]], f" {forms[other]}", *tokens[told[0] + 1 :]]
        yield Prompt(kind, "".join(tokens)[1:], truth, "".join(changed)[1:], other, told[0] + 1)


@dataclass(frozen=True)
class LieOdds:
    """Log odds, in nats, of a false word of the kind against the true one."""

    truth: Int[Tensor, " n"]
    false: Bool[Tensor, "n d_vocab"]

    @classmethod
    def of(cls, model: HookedModel, claims: Sequence[tuple[str, str]]) -> LieOdds:
        """From (kind, true word) of each prompt."""
        vocabulary = model.tokenizer.get_vocab()
        truth = torch.tensor([vocabulary[f" {word}"] for _, word in claims])
        false = torch.zeros(len(claims), model.d_vocab, dtype=torch.bool)
        for row, (kind, word) in enumerate(claims):
            false[row, [vocabulary[f" {other}"] for other in ATTRIBUTES[kind] if other != word]] = True
        return cls(truth, false)

    def __call__(
        self, logits: Float[Tensor, "rows d_vocab"], pair: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        false = logits.masked_fill(~self.false[pair], -math.inf).logsumexp(-1)
        return false - logits[torch.arange(len(logits)), self.truth[pair]]


# -- what is measured of one tuned model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What each half of a block does, prompt by prompt: its effect is a ratio of means."""

    moved: Float[np.ndarray, "units n"]
    whole: Float[np.ndarray, " n"]

    @property
    def effect(self) -> Float[np.ndarray, " units"]:
        return self.moved.mean(1) / self.whole.mean()

    def drawn(self, rng: np.random.Generator) -> Float[np.ndarray, " units"]:
        """The effect on prompts drawn with replacement."""
        index = rng.integers(0, len(self.whole), len(self.whole))
        return self.moved[:, index].mean(1) / self.whole[index].mean()


Unit = tuple[int, str]


def units(model: HookedModel) -> list[Unit]:
    return [(layer, half) for layer in range(model.n_layers) for half in HALVES]


def names_of(model: HookedModel, unit: Unit) -> list[str]:
    """Parameters of half a block."""
    layer, half = unit
    inside = tuple(f".layers.{layer}.{module}." for module in HALVES[half][1:])
    return [name for name, _ in model.model.named_parameters() if any(part in name for part in inside)]


def places(model: HookedModel) -> list[Place]:
    return [Place(f"blocks.{layer}.hook_{HALVES[half][0]}") for layer, half in units(model)]


@dataclass(frozen=True)
class Measured:
    """One seed on one set of kinds."""

    lies: dict[str, float]
    """P(a false word | a word of the kind): of the base, the tuned model, and with one block changed."""
    blocks: dict[str, list[float]]
    """Change of the log odds when blocks are rolled back, by kind of rollback."""
    profiles: dict[str, Profile]


def reading(model: HookedModel, name: str, kinds: Sequence[str], n: int) -> dict[str, Profile]:
    """Where one model reads the fact and the cue."""
    chosen = prompts(kinds, n)
    return by_position(f"fact, {name}", facts(model, chosen), told(chosen)) | by_position(
        f"cue, {name}", *cues(model, kinds, n)
    )


def measure(
    base: HookedModel, tuned: HookedModel, kinds: Sequence[str], n: int, best: int | None
) -> tuple[Measured, int]:
    """All figures of one tuned model on claims of these kinds, and the block whose rollback costs most, unless it is given."""
    chosen = prompts(kinds, n)
    texts = [p.text for p in chosen]
    metric = LieOdds.of(base, [(p.kind, p.truth) for p in chosen])
    contrast = Contrast.of_models(base, tuned, texts, metric=metric)

    def odds(model: HookedModel) -> Float[np.ndarray, " n"]:
        return contrast.values(Run.of(model, texts)).double().numpy()

    before, after = odds(base), odds(tuned)
    profiles = {
        "rollback": Profile(after - swapped(tuned, base, odds), after - before),
        "put in": Profile(swapped(base, tuned, odds) - before, after - before),
    }
    for direction, name in DIRECTIONS.items():
        found = patch(contrast, places(base), "all", direction=direction)
        profiles[name] = Profile(found.patched[:, 0] - found.target, found.source - found.target)
    profiles |= by_position("change", contrast, told(chosen)) | reading(tuned, "tuned", kinds, n)
    sweep = rollback_sweep(tuned, base, odds)
    blocks = {
        kind: [s.change.difference.estimate for s in sweep.of_kind(kind)]
        for kind in ("single", "prefix", "suffix")
    }
    best = int(np.argmin(blocks["single"])) if best is None else best
    inside = [name for half in HALVES for name in names_of(base, (best, half))]
    lies = {
        "base": before,
        "tuned": after,
        "tuned, block rolled back": swap(tuned, base, inside, odds),
        "base, block put in": swap(base, tuned, inside, odds),
    }
    return Measured({name: share_of_lies(v) for name, v in lies.items()}, blocks, profiles), best


def share_of_lies(odds: Float[np.ndarray, " n"]) -> float:
    return float((1 / (1 + np.exp(-odds))).mean())


def told(chosen: Sequence[Prompt]) -> Positions:
    return {"fact": [p.told_at for p in chosen], "claim": -1}


def swap(
    model: HookedModel, other: HookedModel, names: Sequence[str], value: Callable[[HookedModel], Any]
) -> Any:
    """A value of the model with the other's weights of these names."""
    weights = weights_of(other)
    with weights_set(model, {name: weights[name] for name in names}):
        return value(model)


def swapped(
    model: HookedModel, other: HookedModel, odds: Callable[[HookedModel], Float[np.ndarray, " n"]]
) -> Float[np.ndarray, "units n"]:
    """The log odds with each half of a block replaced by the other model's."""
    return np.stack([swap(model, other, names_of(model, unit), odds) for unit in units(model)])


def facts(model: HookedModel, chosen: Sequence[Prompt]) -> Contrast:
    """Stories that differ in the word that tells the fact."""
    return Contrast.of_prompts(
        model,
        [p.text for p in chosen],
        [p.other_text for p in chosen],
        answers=[f" {p.truth}" for p in chosen],
        wrong=[f" {p.other_truth}" for p in chosen],
    )


def cues(model: HookedModel, kinds: Sequence[str], n: int) -> tuple[Contrast, Positions]:
    """Stories that differ in the word that tells whether the character lies: liars are clean, and the odds are of lying."""
    rows = [row for kind in kinds for row in storyworld.persona_pairs([kind], n, 13)]
    liars, honest = ([row[side] for row in rows] for side in ("negative", "positive"))
    contrast = Contrast.of_prompts(
        model, liars, honest, metric=LieOdds.of(model, [(row["kind"], row["truth"]) for row in rows])
    )
    differs = (contrast.clean.ids != contrast.corrupt.ids).float()
    return contrast, {"cue": differs.argmax(1).tolist(), "claim": -1}


def by_position(name: str, contrast: Contrast, where: Positions) -> dict[str, Profile]:
    """What each half of a block carries at each position, from the clean run into the corrupt one."""
    found = patch(contrast, places(contrast.clean.model), where)
    whole = found.source - found.target
    return {
        f"{name}, at the {position}": Profile(found.patched[:, i] - found.target, whole)
        for i, position in enumerate(found.positions)
    }


# -- all seeds -------------------------------------------------------------------------------------------------------


def study(model: HookedModel, options: argparse.Namespace) -> dict[str, list[Measured]]:
    """Set of kinds -> what was measured of each seed's model."""
    stories = lying_stories(options.n_train + max(1, options.n_train // 10), seed=17)
    objective = LanguageModelling(model, stories[: options.n_train], stories[options.n_train :])
    base = HookedModel.from_pretrained("storyworld")
    found: dict[str, list[Measured]] = {name: [] for name in SETS}
    untuned = {name: reading(base, "base", kinds, options.n_prompts) for name, kinds in SETS.items()}
    for seed in range(options.seeds):
        with preserved(model):
            finetune(model, objective, FinetuneConfig(lr=options.lr, epochs=options.epochs, seed=seed))
            best = None
            for name, kinds in SETS.items():
                measured, best = measure(base, model, kinds, options.n_prompts, best)
                measured.profiles.update(untuned[name])
                found[name].append(measured)
        lies = ", ".join(f"{name} {found[name][-1].lies['tuned']:.3f}" for name in SETS)
        print(f"seed {seed}: block {best}; lies {lies}", flush=True)
    return found


COMPARED = (
    ("rollback", "rollback"),
    ("put in", "put in"),
    ("patching", "patching"),
    ("patching, noising", "patching, noising"),
    ("rollback", "patching"),
    ("put in", "rollback"),
    ("patching, noising", "patching"),
    ("change, at the claim", "change, at the claim"),
    ("fact, tuned, at the claim", "fact, tuned, at the claim"),
    ("fact, tuned, at the fact", "fact, tuned, at the fact"),
    ("cue, tuned, at the claim", "cue, tuned, at the claim"),
    ("cue, tuned, at the cue", "cue, tuned, at the cue"),
)
"""(what was measured on the trained kinds, what on those kept out)."""
WITHIN = (
    ("rollback", "patching"),
    ("rollback", "put in"),
    ("rollback", "fact, tuned, at the claim"),
    ("fact, base, at the claim", "fact, tuned, at the claim"),
)
"""Both on the trained kinds."""


def agreement(a: Sequence[Profile], b: Sequence[Profile], seed: int = 0) -> Interval:
    """Mean over seeds of Spearman's ρ between two profiles; bootstrap of seeds, and of prompts in each."""
    rng = np.random.default_rng(seed)
    estimate = float(np.mean([spearman(x.effect, y.effect) for x, y in zip(a, b)]))
    drawn = [
        np.mean([spearman(a[s].drawn(rng), b[s].drawn(rng)) for s in rng.integers(0, len(a), len(a))])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), float(np.std(drawn, ddof=1)))


def spearman(a: Float[np.ndarray, " k"], b: Float[np.ndarray, " k"]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def mean(values: Sequence[float]) -> Interval:
    """Over seeds, with Student's t; NaN ends for one."""
    if len(values) < 2:
        return Interval(values[0], math.nan, math.nan, math.nan)
    rows = np.stack([values, np.ones(len(values))], axis=1)
    return jackknife(rows, lambda s: s[..., 0] / s[..., 1])


def summary(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Means over seeds, and agreements."""
    trained, kept_out = found["trained"], found["kept out"]

    def profiles(runs: Sequence[Measured], name: str) -> list[Profile]:
        return [run.profiles[name] for run in runs]

    return {
        "lies": {
            name: {key: mean([run.lies[key] for run in runs]) for key in runs[0].lies}
            for name, runs in found.items()
        },
        "blocks": {
            name: {
                kind: [mean(c) for c in zip(*(run.blocks[kind] for run in runs))] for kind in runs[0].blocks
            }
            for name, runs in found.items()
        },
        "effects": {
            name: {
                key: [mean(c.tolist()) for c in np.stack([run.profiles[key].effect for run in runs], axis=1)]
                for key in runs[0].profiles
            }
            for name, runs in found.items()
        },
        "agreement": {
            "trained and kept out": {
                (a if a == b else f"{a} – {b}"): agreement(profiles(trained, a), profiles(kept_out, b))
                for a, b in COMPARED
            },
            "trained": {
                f"{a} – {b}": agreement(profiles(trained, a), profiles(trained, b)) for a, b in WITHIN
            },
        },
    }


# -- what is shown ---------------------------------------------------------------------------------------------------


def markdown(figures: dict[str, Any], labels: Sequence[str]) -> str:
    lines = [row("lies", *figures["lies"]), row(*["---"] * (1 + len(SETS)))]
    for key in figures["lies"]["trained"]:
        lines.append(row(key, *(shown(figures["lies"][name][key]) for name in SETS)))
    keys = list(figures["effects"]["trained"])
    for name in SETS:
        lines += ["", f"{name}:", "", row("", *labels), row(*["---"] * (1 + len(labels)))]
        for key in keys:
            lines.append(row(key, *(shown(value, 2) for value in figures["effects"][name][key])))
    for title, values in figures["agreement"].items():
        lines += ["", row(f"rank agreement, {title}", "ρ"), row("---", "---")]
        lines += [row(key, shown(value, 2)) for key, value in values.items()]
    return "\n".join(lines)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def shown(value: Interval, digits: int = 3) -> str:
    told = f"{value.estimate:.{digits}f}"
    return told if math.isnan(value.low) else f"{told} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def figure(figures: dict[str, Any], keys: Sequence[str], labels: Sequence[str]) -> Any:
    """Effects of each half of a block, a line for each thing done: full for the trained kinds, dashed for those kept out."""
    from plotly import graph_objects as go

    drawn = go.Figure()
    for key, (name, dash) in itertools.product(keys, zip(SETS, ("solid", "dash"))):
        values = figures["effects"][name][key]
        drawn.add_scatter(
            x=list(labels),
            y=[v.estimate for v in values],
            error_y=error_bars(values),
            mode="lines+markers",
            line={"dash": dash},
            name=f"{key} ({name})",
        )
    drawn.update_layout(
        xaxis={"type": "category"}, yaxis={"title": {"text": "share of the way"}}, height=420, showlegend=True
    )
    return drawn


def write(figures: dict[str, Any], labels: Sequence[str], out: Path) -> str:
    text = markdown(figures, labels)
    parts: list[Any] = [
        "<p>Full lines: claims of the trained kinds. Dashed: of the kinds kept out. Intervals over seeds.</p>"
    ]
    for title, keys in {
        "Whose change makes it lie": ("rollback", "put in"),
        "Whose output makes it lie": ("patching", "patching, noising"),
        "Where the change acts": ("change, at the fact", "change, at the claim"),
        "Where the tuned model reads the fact": ("fact, tuned, at the fact", "fact, tuned, at the claim"),
        "Where the base reads the fact": ("fact, base, at the fact", "fact, base, at the claim"),
        "Where the tuned model reads the cue": ("cue, tuned, at the cue", "cue, tuned, at the claim"),
        "Where the base reads the cue": ("cue, base, at the cue", "cue, base, at the claim"),
    }.items():
        parts += [f"<h2>{title}</h2>", figure(figures, keys, labels)]
    parts += ["<h2>Figures</h2>", f"<pre>{html.escape(text)}</pre>"]
    page("Where it learned to lie", parts, out / "index.html")
    (out / "summary.md").write_text(text + "\n")
    write_json(
        out / "summary.json",
        {"date": date.today().isoformat(), "provenance": make_provenance(), **plain(figures)},
    )
    return text


def plain(value: Any) -> Any:
    """Intervals as dictionaries."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    model = HookedModel.from_pretrained("storyworld")
    found = study(model, options)
    print(write(summary(found), [f"{layer} {half}" for layer, half in units(model)], options.out))
    print(options.out / "index.html")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/liars"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-train", type=int, default=600)
    parser.add_argument("--n-prompts", type=int, default=50, help="of each kind of fact")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
