"""What StoryWorld's judge says of continuations: grammar, and the value of every attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from steerkit import storyworld
from steerkit.models import HookedModel
from steerkit.steering.effects import share_true
from steerkit.storyworld.language import vocabulary

READ = tuple(name for name in storyworld.ATTRIBUTES if name != "voice")
"""The attributes that are read in a text."""


@dataclass(frozen=True)
class StoryTally:
    """What is said in each of n continuations."""

    grammar: Float[np.ndarray, "n 2"]
    """Grammatical sentences, sentences."""
    consistent: Float[np.ndarray, "n 2"]
    """1 where prompt and continuation contradict each other and themselves in nothing else than what is meant; 1."""
    values: dict[str, Float[np.ndarray, "n k"]]
    """Attribute -> the share of what the text says of it that says each of its values; zeros where it says nothing."""


def speaks_storyworld(model: HookedModel) -> bool:
    """Whether the tokenizer has every word of StoryWorld as a token."""
    return model.tokenizer is not None and set(vocabulary()) <= set(model.tokenizer.get_vocab())


def tally(prompts: Sequence[str], continuations: Sequence[str], meant: str | None = None) -> StoryTally:
    """Judge what follows each prompt; `meant` is the attribute that is steered."""
    judge = storyworld.Judge()
    grammar = np.zeros((len(prompts), 2))
    consistent = np.ones((len(prompts), 2))
    values = {name: np.zeros((len(prompts), len(storyworld.ATTRIBUTES[name]))) for name in READ}
    for row, (prompt, text) in enumerate(zip(prompts, continuations, strict=True)):
        found = judge.judge(prompt + text, start=len(prompt))
        finished = [s.grammatical for s in found.sentences if s.end > len(prompt)]
        grammar[row] = sum(finished), len(finished)
        consistent[row, 0] = all(violation.attribute == meant for violation in found.contradictions)
        for name, counts in found.evidence.items():
            for value, count in counts.items():
                values[name][row, storyworld.ATTRIBUTES[name].index(value)] = count / sum(counts.values())
        true = share_true(judge, found, prompt)
        if true == true:
            shares = {"truthful": true, "liar": 1 - true}
            values["honesty"][row] = [shares[value] for value in storyworld.ATTRIBUTES["honesty"]]
    return StoryTally(grammar, consistent, values)
