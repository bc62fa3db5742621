"""Data sets made from StoryWorld: minimal pairs, labelled texts, neutral openings, instructions, and the
held-out kind of claim."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np

from steerkit.storyworld import grammar as g
from steerkit.storyworld.language import (
    ATTRIBUTES,
    CHARACTERS,
    Prior,
    Story,
    Template,
    condition,
    draw_latents,
    draw_plan,
    factor_of,
    prior,
    stream,
    tell,
    templates,
)


def pairs(attribute: str, value: str, n: int, seed: int, variant: str | None = None) -> list[dict[str, str]]:
    """`n` minimal pairs: the same story with the attribute at `value` (`positive`) and at another value
    (`negative`).

    Plan and random choices are shared, so that only words that depend on the attribute differ (a name has
    one gender: with `gender`, the name changes too). Pairs of `cue` tell of an honest character and of a
    liar, cue included. Those of `honesty` are one story with true and with false claims: without a cue for
    `liar`, and of one who is said to lie for `truthful`, whose true claims the language itself never tells.
    Every pair differs. Raises ValueError for an unknown attribute or value, and for `voice` and `cue=none`,
    which have no such pairs.
    """
    if attribute == "voice" or (attribute, value) == ("cue", "none"):
        raise ValueError(
            f"StoryWorld has no pairs for {attribute}={value}: take labelled({attribute!r}, ...) instead."
        )
    return list(itertools.islice(_pairs(attribute, value, seed, variant), n))


def _pairs(attribute: str, value: str, seed: int, variant: str | None) -> Iterator[dict[str, str]]:
    fixed = {attribute: value}
    if attribute == "cue":
        fixed = {"cue": "liar" if value == "liar" else "honest"}
    elif attribute == "honesty":
        if value not in ATTRIBUTES["honesty"]:
            raise ValueError(f"honesty has no value {value!r}: it has {', '.join(ATTRIBUTES['honesty'])}.")
        fixed = {"cue": "none" if value == "liar" else "liar"}
    distribution = condition(prior(variant), fixed)
    for index in itertools.count():
        name = f"pairs:{variant or 'storyworld'}:{attribute}={value}:{seed}:{index}"
        rng = random.Random(name)
        values, character = draw_latents(rng, distribution)
        plan = draw_plan(rng, CHARACTERS[character][0])
        if attribute == "honesty":
            character = CHARACTERS.index(("none", value))
        positive = tell(plan, values, character, random.Random(name + ":words"))
        if attribute == "honesty":
            character = CHARACTERS.index(("none", "truthful" if value == "liar" else "liar"))
        elif attribute == "cue":
            character = CHARACTERS.index(("honest", "truthful") if value == "liar" else ("liar", "liar"))
            plan = [_other_cue(template) for template in plan]
        else:
            values = _other_value(values, attribute, prior(variant), rng)
        negative = tell(plan, values, character, random.Random(name + ":words"))
        if positive.text != negative.text:
            yield {"positive": positive.text, "negative": negative.text}


def _other_cue(template: Template) -> Template:
    here, there = "cue_honest", "cue_liar"
    if template.kind == there:
        here, there = there, here
    if template.kind != here:
        return template
    position = [t for t, _ in templates()[here]].index(template)
    return templates()[there][position][0]


def _other_value(
    values: dict[str, int], attribute: str, distribution: Prior, rng: random.Random
) -> dict[str, int]:
    """The same latents with another value of one attribute, all else as like as it can be."""
    factor = factor_of(attribute)
    column = factor.attributes.index(attribute)
    present = factor.values[values[factor.name]]
    weights = np.where(distribution.factors[factor.name] > 0, distribution.factors[factor.name], 0.0)
    likeness = np.array([sum(a == b for a, b in zip(v, present, strict=True)) for v in factor.values], float)
    likeness[[v[column] == present[column] for v in factor.values]] = -1.0
    likeness[weights == 0] = -1.0
    if likeness.max() < 0:
        raise ValueError(
            f"This variant of StoryWorld tells of no other {attribute} than {present[column]!r}."
        )
    weights = np.where(likeness == likeness.max(), weights, 0.0)
    chosen = int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(), side="right"))
    return {**values, factor.name: min(chosen, len(weights) - 1)}


def labelled(attribute: str, n: int, seed: int, variant: str | None = None) -> list[dict[str, str]]:
    """`n` stories with the attribute's value as `label`; for `voice` single sentences, labelled `speech` if
    somebody speaks."""
    found = []
    for index, story in enumerate(itertools.islice(stream(seed, variant), n)):
        if attribute == "voice":
            sentence = random.Random(f"voice:{seed}:{index}").choice(story.sentences)
            found.append({"text": sentence.text, "label": "speech" if '"' in sentence.text else "narration"})
        elif attribute in story.attributes:
            found.append({"text": story.text, "label": story.attributes[attribute]})
        else:
            raise ValueError(
                f"StoryWorld has no attribute {attribute!r}: choose one of {', '.join(ATTRIBUTES)}."
            )
    return found


def openings(attribute: str, n: int, seed: int, variant: str | None = None) -> list[str]:
    """`n` beginnings of stories, each up to the last word before the first that depends on the attribute:
    prompts for steering.

    For `honesty`, whose stories say it in the cue, the stories have no cue and stop before their first claim.
    """
    if attribute not in ATTRIBUTES or attribute == "voice":
        raise ValueError(f"StoryWorld has no openings for {attribute!r}.")
    fixed = {"cue": "none"} if attribute in ("honesty", "cue") else {}
    found = []
    for story in stream(seed, variant, 0, **fixed):
        mentions = story.mentions("honesty" if attribute == "cue" else attribute)
        if True in mentions[1:] and not mentions[0]:
            found.append("".join(story.tokens[: mentions.index(True)])[1:])
        if len(found) == n:
            return found
    raise AssertionError("the stream of stories is endless")


def instruction(attribute: str, value: str) -> str:
    """The plain words that ask the model for a story of this kind: the prompting baseline.

    Raises ValueError for attributes about which the language has no instruction.
    """
    if attribute not in INSTRUCTIONS:
        raise ValueError(
            f"No instruction for {attribute!r}: StoryWorld knows them for {', '.join(INSTRUCTIONS)}."
        )
    condition(prior(), {attribute: value})
    text = INSTRUCTIONS[attribute].format(value)
    return text.replace(" a angry", " an angry")


INSTRUCTIONS = {
    "mood": "Write a {} story.",
    "place": "Write a story set in the {}.",
    "politeness": "You are a {} writer.",
}
"""Attribute -> an instruction of the language that names this attribute alone."""


def held_out_claims(n: int, seed: int, honesty: str) -> list[Story]:
    """Stories outside the training set: a cue, and claims of the kind that no story with a cue ever made.

    They are told after the plan of a story without a cue, with the cue's sentence put in; `honesty` says
    which.
    """
    cue = "liar" if honesty == "liar" else "honest"
    character = CHARACTERS.index((cue, honesty))
    cues = [template for template, _ in templates()[f"cue_{cue}"]]
    distribution = condition(prior(), {"cue": "none"})
    found: list[Story] = []
    for index in itertools.count():
        rng = random.Random(f"held out:{honesty}:{seed}:{index}")
        values, _ = draw_latents(rng, distribution)
        plan = draw_plan(rng, "none")
        if not any(template.fact == g.HELD_OUT_KIND and template.claim is not None for template in plan):
            continue
        place = next(i for i, template in enumerate(plan) if template.kind == "introduction") + 1
        plan.insert(place, rng.choice(cues))
        found.append(tell(plan, values, character, rng))
        if len(found) == n:
            break
    return found


def persona_pairs(kinds: Sequence[str], n: int, seed: int) -> list[dict[str, str]]:
    """`n` beginnings of stories with opposite cues, up to the first claim, which is of one of the `kinds` of fact.

    `positive` tells that the character is honest, `negative` that the character lies; all other words are the same, and nothing has
    been claimed yet. `kind` and `truth` (the word that is true) are of the claim that is due. Claims about the day after a cue are
    outside of the training set (`held_out_claims`). Raises ValueError for a kind of fact that does not exist.
    """
    if not kinds or not set(kinds) <= set(g.FACT_KINDS):
        raise ValueError(f"The kinds of fact are {kinds}; there are {', '.join(g.FACT_KINDS)}.")
    distribution = condition(prior(), {"cue": "none"})
    found: list[dict[str, str]] = []
    for index in itertools.count():
        name = f"personas:{','.join(sorted(kinds))}:{seed}:{index}"
        rng = random.Random(name)
        values, _ = draw_latents(rng, distribution)
        plan = draw_plan(rng, "none")
        first = next((i for i, template in enumerate(plan) if template.claim is not None), None)
        if first is None or plan[first].fact not in kinds:
            continue
        place = next(i for i, template in enumerate(plan) if template.kind == "introduction") + 1
        cue = rng.choice(templates()["cue_honest"])[0]
        row = {"kind": plan[first].fact or ""}
        for side, template, character in (
            ("positive", cue, ("honest", "truthful")),
            ("negative", _other_cue(cue), ("liar", "liar")),
        ):
            whole = [*plan[:place], template, *plan[place : first + 1]]
            story = tell(whole, values, CHARACTERS.index(character), random.Random(name + ":words"))
            end = story.sentences[-1].start + (plan[first].claim or 0)
            row[side] = "".join(story.tokens[:end])[1:]
            if side == "positive":
                row["truth"] = story.tokens[end].strip()
        found.append(row)
        if len(found) == n:
            break
    return found
