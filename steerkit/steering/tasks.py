"""What a steering method is to bring about: pairs to learn from, prompts to try it on, and what counts as success.

task = make_task(model, "storyworld:mood=happy")
task = make_task(model, "pairs.jsonl", effect="words:happy,glad,joyful", prompts="prompts.txt")
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerkit import storyworld
from steerkit.data import load_documents
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.effects import Effect, StoryAttribute, Words
from steerkit.steering.pairs import Pairs, load_pairs
from steerkit.steering.story_prompts import story_prompts
from steerkit.storyworld.tasks import INSTRUCTIONS

N_WORDS = 20
_VALIDATION = 1 / 3


@dataclass(frozen=True)
class Task:
    """One concept to steer."""

    pairs: Pairs
    effect: Effect
    validation: tuple[str, ...]
    """Prompts to choose by."""
    test: tuple[str, ...]
    """Prompts to report."""
    instruction: str | None = None
    """Plain words that ask for it, for prompting."""


def make_task(
    model: HookedModel,
    pairs: str | Path | Pairs,
    *,
    effect: str | Effect | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    n_prompts: int = 150,
    seed: int = 0,
) -> Task:
    """Pairs, effect and prompts from what a command line says.

    Without `effect` StoryWorld's judge decides on `storyworld:…` pairs; on others the words that tell the positive sides from the
    negative ones. Without `prompts` they are StoryWorld's beginnings, or the pairs' own prompts. Raises InputError where none of
    that is there.
    """
    loaded = pairs if isinstance(pairs, Pairs) else load_pairs(pairs)
    story, _, target = loaded.name.partition(":")
    attribute, _, value = target.partition("=")
    instruction = None
    if story == "storyworld":
        if attribute in INSTRUCTIONS:
            instruction = storyworld.instruction(attribute, value)
        effect = effect or StoryAttribute(*_judged(attribute, value))
    if effect is None:
        effect = telling_words(loaded)
    elif isinstance(effect, str):
        kind, _, listed = effect.partition(":")
        if kind != "words" or not listed.strip():
            raise InputError(f"The effect is {effect!r}; give words:happy,glad and so on.")
        effect = Words({word.strip() for word in listed.split(",") if word.strip()})
    if prompts is None and story == "storyworld":
        found = story_prompts(model, *_judged(attribute, value), n_prompts, seed=seed)
    elif prompts is None:
        found = list(dict.fromkeys(pair.prompt for pair in loaded if pair.prompt))
    elif isinstance(prompts, (str, Path)):
        found = list(dict.fromkeys(load_documents(prompts)))
    else:
        found = list(dict.fromkeys(prompts))
    if len(found) < 2:
        raise InputError(
            f"{loaded.name} brings {'one prompt' if found else 'no prompts'}: give a file with a prompt a line (--prompts)."
        )
    random.Random(seed).shuffle(found)
    found = found[:n_prompts]
    cut = max(1, round(_VALIDATION * len(found)))
    return Task(loaded, effect, tuple(found[:cut]), tuple(found[cut:]), instruction)


def _judged(attribute: str, value: str) -> tuple[str, str]:
    """What the judge reads: who is said to lie is told by what is said."""
    if attribute == "cue":
        return "honesty", "liar" if value == "liar" else "truthful"
    return attribute, value


def telling_words(pairs: Pairs, n: int = N_WORDS) -> Words:
    """The words that most tell the positive sides from the negative ones: greatest log-odds of the shares of sides that have them,
    half a side added everywhere. Raises InputError when there are none."""
    counts: list[Counter[str]] = [Counter(), Counter()]
    for pair in pairs:
        for count, side in zip(counts, (pair.positive, pair.negative)):
            count.update(set(re.findall(r"\w+", side.lower())))
    positive, negative = counts
    scores = {}
    for word in positive:
        a, b = positive[word] + 0.5, negative[word] + 0.5
        error = math.sqrt(1 / a + 1 / b)
        scores[word] = (math.log(a / b)) / error
    best = sorted((word for word in scores if scores[word] > 2.0), key=lambda word: -scores[word])[:n]
    if not best:
        raise InputError(
            f"No word tells the positive sides of {pairs.name} from the negative ones: say what counts (--effect words:…)."
        )
    return Words(set(best))
