"""Effects: what steering is to bring about, as a number for each text, without a judge model.

    StoryAttribute("mood", "happy")                     exact, on the built-in language
    Words({"wedding", "weddings"})                      whether a text has one of the words
    Scored("toxicity", classifier, binary=False)        any function of prompts and continuations
    Rated("AxBench", judge)                             the harmonic mean of a judge's ratings

An effect is any object with these attributes and this call; `Propensity` (propensity.py) needs no sampled text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Float

from steerkit.errors import InputError, did_you_mean
from steerkit.storyworld import ATTRIBUTES, Judge, Judgement


class Effect(Protocol):
    """A number for each continuation of a prompt."""

    @property
    def name(self) -> str: ...
    @property
    def binary(self) -> bool:
        """Whether it lies between 0 and 1 and says how far a text is a success: then its mean is a success rate, and no model has a
        success rate q, from a base rate p, at less divergence than kl(q‖p)."""
        ...

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Float[np.ndarray, " n"]:
        """NaN where it can't be known."""
        ...


@dataclass(frozen=True)
class StoryAttribute:
    """Whether what StoryWorld's judge reads in a continuation has the value; only what follows the prompt counts.

    For an attribute that is narrated: 1 if more than half of the words that can only mean one of its values mean this one, else 0 –
    also where nothing is said of it, or nothing grammatical, so that a model that falls silent has no success. For `honesty`: the
    share of the claims whose truth is known that are true (`truthful`) or false (`liar`); NaN without such a claim.
    """

    attribute: str
    value: str
    binary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        values = ATTRIBUTES.get(self.attribute)
        if values is None or self.attribute == "voice":
            known = [name for name in ATTRIBUTES if name != "voice"]
            raise InputError(
                f"StoryWorld's judge reads no attribute {self.attribute!r} of a text.{did_you_mean(self.attribute, known)} "
                f"There are {', '.join(known)}."
            )
        if self.value not in values:
            raise InputError(
                f"{self.attribute} has no value {self.value!r}.{did_you_mean(self.value, values)} It has {', '.join(values)}."
            )

    @property
    def name(self) -> str:
        return f"{self.attribute}={self.value}"

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Float[np.ndarray, " n"]:
        judge = Judge()
        return np.array(
            [self._of(judge, prompt, text) for prompt, text in zip(prompts, continuations, strict=True)]
        )

    def _of(self, judge: Judge, prompt: str, continuation: str) -> float:
        found = judge.judge(prompt + continuation, start=len(prompt))
        if self.attribute == "honesty":
            share = share_true(judge, found, prompt)
            return share if self.value == "truthful" else 1.0 - share
        return float(found.share(self.attribute, self.value) > 0.5)


def share_true(judge: Judge, found: Judgement, prompt: str) -> float:
    """Of a judged text's claims after the prompt whose truth is known, the share that is true; NaN without one."""
    before = len(judge.judge(prompt).claims) if found.claims else 0
    known = [claim.true for claim in found.claims[before:] if claim.true is not None]
    return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Words:
    """Whether a continuation has at least one of the words (or phrases): whole words, in any case."""

    words: Collection[str]
    binary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words or not all(word.strip() for word in self.words):
            raise InputError(
                f"The words are {self.words!r}; give a set of at least one word, none of them blank."
            )

    @property
    def name(self) -> str:
        return f"words: {', '.join(sorted(self.words))}"

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Float[np.ndarray, " n"]:
        either = "|".join(re.escape(word.strip()) for word in sorted(self.words))
        pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)
        return np.array([float(pattern.search(text) is not None) for text in continuations])


@dataclass(frozen=True)
class Scored:
    """Any function of (prompts, continuations) that gives a number for each, NaN for unknown: a classifier, say."""

    name: str
    function: Callable[[Sequence[str], Sequence[str]], Any]
    binary: bool = False
    """Whether its numbers lie between 0 and 1 and their mean is a success rate."""

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Float[np.ndarray, " n"]:
        return np.asarray(self.function(prompts, continuations), dtype=np.float64)


@dataclass(frozen=True)
class Rated:
    """A judge's ratings – of concept, instruction and fluency, say – as their harmonic mean: AxBench's steering score, 0 to 2."""

    name: str
    judge: Callable[[Sequence[str], Sequence[str]], Any]
    """(prompts, continuations) -> (n, k) ratings from 0 to 2, NaN for unknown: a model, or people."""
    binary: ClassVar[bool] = False

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Float[np.ndarray, " n"]:
        return harmonic_mean(self.judge(prompts, continuations))


def harmonic_mean(scores: Any) -> Float[np.ndarray, " n"]:
    """Of each row of ratings (n, k); 0 where one of them is 0. Raises InputError for ratings outside of 0 to 2.

    Wu et al. 2025, AxBench, https://arxiv.org/abs/2501.17148.
    """
    ratings = np.asarray(scores, dtype=np.float64)
    if ratings.ndim != 2 or not ratings.shape[1]:
        raise InputError(
            f"The ratings are {ratings.shape}; a row for each text and a column for each question are needed."
        )
    if ((ratings < 0) | (ratings > 2)).any():
        raise InputError("The ratings go beyond 0 to 2: rescale them.")
    with np.errstate(divide="ignore"):
        return ratings.shape[1] / (1.0 / ratings).sum(1)


def apply_effect(
    effect: Effect, prompts: Sequence[str], continuations: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """The effect's numbers. Raises InputError unless there is one for each text, and between 0 and 1 where it says so."""
    found = np.asarray(effect(prompts, continuations), dtype=np.float64)
    if found.shape != (len(continuations),):
        raise InputError(
            f"The effect {effect.name!r} gave {found.shape} numbers for {len(continuations)} texts: one for each is needed."
        )
    if effect.binary and ((found < 0) | (found > 1)).any():
        raise InputError(f"The effect {effect.name!r} says binary=True and gave numbers outside of 0 to 1.")
    return found
