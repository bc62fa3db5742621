"""Few-shot prompting: examples of the positive side before the prompt, and no word of what is wanted.

A baseline beside the instruction: what the model makes of the same texts that steering methods are fitted on, without any change
of the model. Brown et al. 2020, https://arxiv.org/abs/2005.14165.
"""

from __future__ import annotations

from collections.abc import Sequence

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.pairs import Pairs, join
from steerkit.steering.story import speaks_storyworld
from steerkit.storyworld import Judge

ASKING = ("instruction", "persona")
"""Kinds of StoryWorld's sentences that say what is wanted."""


def few_shot(
    model: HookedModel, pairs: Pairs, prompts: Sequence[str], max_new_tokens: int, k: int = 4
) -> str:
    """The first positive sides, at most `k`, that fit the context together with each prompt and the new tokens.

    A blank line stands after each, or a space where the tokenizer has no line break. Sentences of StoryWorld that ask for something
    are left out. Raises InputError when not even one fits.
    """
    between = "\n\n" if _knows(model, "\n\n") else " "
    longest = max(prompts, key=lambda prompt: _length(model, prompt))
    chosen = ""
    n = 0
    for pair in pairs:
        text = pair.texts()[0]
        example = _without_instruction(text) if speaks_storyworld(model) else text
        longer = chosen + example.strip() + between
        if not example or _length(model, join(longer, longest)) + max_new_tokens > model.context:
            continue
        chosen, n = longer, n + 1
        if n == k:
            break
    if not n:
        raise InputError(
            f"No positive side of {pairs.name} fits into the context of {model.name} ({model.context} tokens) with a prompt and "
            f"{max_new_tokens} new tokens."
        )
    return chosen


def _knows(model: HookedModel, text: str) -> bool:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and model.tokenizer.unk_token_id not in ids


def _length(model: HookedModel, text: str) -> int:
    return len(model.tokenizer(text)["input_ids"])


def _without_instruction(story: str) -> str:
    first = next((s for s in Judge().judge(story).sentences if s.kind not in ASKING), None)
    return "" if first is None else story[first.start :]
