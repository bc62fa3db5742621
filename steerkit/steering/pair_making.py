"""Pairs made from templates, and by the model itself.

template_pairs("The {} fox", ["happy", "glad"], ["sad", "grim"], suffixes=["went out.", "sat down."])
generated_pairs(model, "She was very happy.", "She was very sad.", openings, keep=Words({"happy", "smiled"}))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.effects import Effect, apply_effect
from steerkit.steering.pairs import Pair, Pairs, join
from steerkit.steering.sampling import encode_prompts, sample, unchanged


def template_pairs(
    template: str, positive: Sequence[str], negative: Sequence[str], suffixes: Sequence[str] = ("",)
) -> Pairs:
    """One pair for each word of one list, its partner in the other, and each suffix; `template` has one `{}` for the word.

    Raises InputError for lists of different lengths, or a template without a place for the word.
    """
    if template.count("{}") != 1:
        raise InputError(f"The template {template!r} needs one {{}} for the word.")
    if len(positive) != len(negative) or not positive:
        raise InputError(
            f"{len(positive)} positive and {len(negative)} negative words: give as many of each, one or more."
        )
    pairs = [
        Pair(*(join(template.format(word), suffix) for word in words))
        for words, suffix in itertools.product(zip(positive, negative), suffixes)
    ]
    return Pairs(pairs, f"template {template!r}")


def generated_pairs(
    model: HookedModel,
    positive: str,
    negative: str,
    openings: Sequence[str],
    *,
    keep: Effect | None = None,
    samples: int = 1,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> Pairs:
    """Continuations of each opening that the model writes after one text and after its opposite; the texts themselves are left out.

    With `keep`, only pairs whose positive side has the effect (above a half) and whose negative side has it not. Raises InputError
    when no pair is left.
    """
    sides = []
    for prefix in (positive, negative):
        drawn = sample(
            model,
            encode_prompts(model, [join(prefix, opening) for opening in openings]),
            unchanged,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        after = [openings[i] for i in drawn.prompt_index]
        decoded = (model.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in drawn.new)
        sides.append(([join(opening, text)[len(opening) :] for opening, text in zip(after, decoded)], after))
    (ups, prompts), (downs, _) = sides
    fine = [bool(up.strip()) and bool(down.strip()) and up != down for up, down in zip(ups, downs)]
    if keep is not None:
        up_effect, down_effect = (apply_effect(keep, prompts, texts) for texts in (ups, downs))
        fine = [ok and bool(a > 0.5) and bool(b < 0.5) for ok, a, b in zip(fine, up_effect, down_effect)]
    pairs = [
        Pair(up.strip(), down.strip(), prompt)
        for up, down, prompt, ok in zip(ups, downs, prompts, fine)
        if ok
    ]
    if not pairs:
        raise InputError(
            f"None of {len(prompts)} pairs that {model.name} wrote is left"
            + (f" after the filter {keep.name!r}" if keep is not None else "")
            + ": give other texts or openings, or more samples."
        )
    return Pairs(pairs, f"written by {model.name}")
