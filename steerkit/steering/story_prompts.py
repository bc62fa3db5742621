"""Prompts for steering on StoryWorld: beginnings of stories after which the model seldom says by itself what it is to say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from steerkit import storyworld
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.effects import StoryAttribute
from steerkit.steering.evaluation import Bench
from steerkit.steering.story import speaks_storyworld
from steerkit.storyworld.language import Story

MAX_TRIED = 50
"""Beginnings that are looked at for every one that is wanted."""


def story_prompts(
    model: HookedModel, attribute: str, value: str, n: int, max_base_rate: float = 0.35, seed: int = 0
) -> list[str]:
    """`n` different beginnings of StoryWorld's stories after which the attribute seldom has the value, by itself.

    Each ends before the attribute is first told, and the grammar's own P(value | beginning) is at most `max_base_rate` and not 0:
    the value can still come. For `honesty`, which the cue settles, they are stories of a liar for `truthful` and stories without a
    cue, whose characters tell the truth, for `liar`; they end before the first claim. Then the model itself is sampled: InputError
    if its rate of the value is above `max_base_rate`, as a tuned model's may be, or if there are not enough such beginnings.
    """
    effect = StoryAttribute(attribute, value)
    if attribute == "cue":
        raise InputError("The cue is said before all else: take honesty, which it is about.")
    if not speaks_storyworld(model):
        raise InputError(f"{model.name} does not speak StoryWorld: give prompts of your own.")
    if n < 1 or not 0 < max_base_rate <= 1:
        raise InputError(f"n is {n} and max_base_rate {max_base_rate}: at least 1, and above 0 up to 1.")
    found: dict[str, None] = {}
    for text in itertools.islice(_beginnings(attribute, value, seed), MAX_TRIED * n):
        if text not in found and (
            attribute == "honesty" or 0 < _rate(text, attribute, value) <= max_base_rate
        ):
            found[text] = None
        if len(found) == n:
            break
    if len(found) < n:
        raise InputError(
            f"StoryWorld has {len(found)} beginnings among {MAX_TRIED * n} after which {effect.name} has a chance of at most "
            f"{max_base_rate:g}; {n} are wanted: allow a larger max_base_rate, or take another value."
        )
    prompts = list(found)
    rate = Bench(model, prompts[:100], effect, samples=2, seed=seed).base.effect.estimate
    if rate > max_base_rate:
        raise InputError(
            f"{model.name} continues these beginnings with {effect.name} in {rate:.0%} of the texts, more than "
            f"{max_base_rate:.0%}: it has learned to; allow a larger max_base_rate."
        )
    return prompts


def _beginnings(attribute: str, value: str, seed: int) -> Iterator[str]:
    fixed = {"cue": "liar" if value == "truthful" else "none"} if attribute == "honesty" else {}
    for story in storyworld.stream(seed, None, 0, **fixed):
        if story.sentences[0].template.kind in ("instruction", "persona"):
            continue
        first = _first_claim(story) if fixed else _first(story.mentions(attribute))
        if first:
            yield "".join(story.tokens[:first])[1:]


def _first(marks: Sequence[bool]) -> int | None:
    return marks.index(True) if True in marks else None


def _first_claim(story: Story) -> int | None:
    """The index of the first word that a character claims."""
    for sentence in story.sentences:
        for position, item in enumerate(sentence.template.items, sentence.start):
            if item.slot is not None and item.slot.claim:
                return position
    return None


def _rate(text: str, attribute: str, value: str) -> float:
    """P(value | the text so far) under the grammar."""
    return float(storyworld.posterior(text)[attribute][-1][storyworld.ATTRIBUTES[attribute].index(value)])
