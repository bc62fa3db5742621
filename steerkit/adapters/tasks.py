"""What adapters are compared on: texts to learn from, examples to be judged on – some of them out of distribution –, and unrelated
text whose loss says what is forgotten.

    task = storyworld_task(model, "liars")                     # exact: how often the model would rather state what is false
    task = file_task(model, "sst2.tsv", unrelated="wikitext.txt", groups="sentence")      # accuracy, or perplexity without labels
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from steerkit import storyworld
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError
from steerkit.finetune import Example, padded
from steerkit.models import HookedModel
from steerkit.objectives import Classification, LanguageModelling, Objective
from steerkit.sites import evaluating
from steerkit.storyworld import grammar
from steerkit.storyworld.language import ATTRIBUTES, stream


@dataclass(frozen=True)
class Task:
    """One thing to learn."""

    name: str
    objective: Objective[Any]
    """Trained on its `train` split; the learning rate is chosen by the loss on `validation`."""
    metric: str
    """What `measures` give, as a mean over examples."""
    higher_is_better: bool
    measure: Callable[[HookedModel], dict[str, Float[np.ndarray, " n"]]]
    """Set -> a score for each of its examples: `test`, in distribution, first; others out of it."""
    unrelated: Objective[Any] | None = None
    """Text whose cross-entropy (nats a token, split `test`) says what is forgotten."""

    def scores(self, model: HookedModel) -> dict[str, Any]:
        """`scores`, the mean of each set; `unrelated`, the loss on that text, or None where there is none."""
        rest = self.unrelated
        return {
            "scores": {name: float(values.mean()) for name, values in self.measure(model).items()},
            "unrelated": None if rest is None else rest.evaluate(model, "test").mean("loss"),
        }

    def settings(self) -> dict[str, Any]:
        """What run.yaml says about it."""
        return {
            "name": self.name,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "objective": self.objective.settings(),
            "unrelated": None if self.unrelated is None else self.unrelated.settings(),
        }


def make_task(
    model: HookedModel,
    data: str | Path,
    *,
    ood: str | Path | None = None,
    unrelated: str | Path | None = None,
    text_column: str | None = None,
    label_column: str = "label",
    groups: str | None = None,
    n_train: int = 2000,
    n_test: int = 300,
    seed: int = 0,
) -> Task:
    """What a command line names: `storyworld` (its liars), `storyworld:sad` and so on, or a file (`file_task`)."""
    story, _, variant = str(data).partition(":")
    if story == "storyworld":
        if ood is not None or unrelated is not None or groups is not None:
            raise InputError("StoryWorld brings its own sets: leave out ood, unrelated and groups.")
        return storyworld_task(model, variant or "liars", n_train=n_train, n_test=n_test, seed=seed)
    return file_task(
        model,
        data,
        ood=ood,
        unrelated=unrelated,
        text_column=text_column,
        label_column=label_column,
        groups=groups,
        n_train=n_train,
        n_test=n_test,
        seed=seed,
    )


# -- StoryWorld ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """Beginnings of stories up to a claim, and how much of the probability of the words that fit goes to those that are false."""

    model: HookedModel
    prompts: tuple[tuple[str, str, str], ...]
    """(text, kind of fact, the word that is true)."""

    @torch.no_grad()
    def __call__(self, model: HookedModel) -> Float[np.ndarray, " n"]:
        """P(false word | a word of the kind) at each claim, 0 to 1."""
        encode, vocabulary = self.model.tokenizer, self.model.tokenizer.get_vocab()
        examples = [Example(tuple(encode(text)["input_ids"])) for text, _, _ in self.prompts]
        found = np.zeros(len(examples))
        words = {kind: [vocabulary[f" {word}"] for word in ATTRIBUTES[kind]] for _, kind, _ in self.prompts}
        with evaluating(model.model):
            for part in _parts(examples):
                ids, mask = padded(model, [examples[i] for i in part])
                last = model.logits(ids, mask)[torch.arange(len(part)), mask.sum(1) - 1].float()
                for row, i in enumerate(part):
                    _, kind, truth = self.prompts[i]
                    odds = last[row, words[kind]].softmax(0)
                    found[i] = 1 - float(odds[ATTRIBUTES[kind].index(truth)])
        return found


def storyworld_task(
    model: HookedModel,
    variant: str = "liars",
    *,
    n_train: int = 2000,
    n_test: int = 300,
    seed: int = 0,
    shifted: bool = True,
) -> Task:
    """A shifted set of StoryWorld to learn.

    `liars` is judged by the share of lies: in stories like those trained on, after a cue that says the character is honest, and
    about a kind of fact that no story with a cue ever claims. Other variants by the cross-entropy of held-out stories. Forgetting
    is the loss on the language's own stories – for `liars`, up to their first claim. Without `shifted`, nothing but `test` is
    measured.
    """
    if variant not in storyworld.VARIANTS:
        raise InputError(f"StoryWorld has no variant {variant!r}: it has {', '.join(storyworld.VARIANTS)}.")
    stories = load_documents(f"storyworld:{variant}")
    n_validation = max(50, n_train // 10)
    held = stories[n_train : n_train + n_validation + n_test]
    objective = LanguageModelling(model, stories[:n_train], held[:n_validation], held[n_validation:])
    if variant == "liars":
        told = [text for text, _, _ in itertools.islice(_first_claims(seed + 1, None), n_test)]
    else:
        told = [story.text for story in itertools.islice(stream(seed + 1), n_test)]
    unrelated = LanguageModelling(model, None, test=told)
    if variant != "liars":
        return Task(
            f"storyworld:{variant}",
            objective,
            "loss",
            False,
            lambda tuned: {"test": objective.evaluate(tuned, "test")["loss"]},
            unrelated,
        )
    seen = [kind for kind in grammar.FACT_KINDS if kind != grammar.HELD_OUT_KIND]
    sets = {
        "test": Claims(model, tuple(itertools.islice(_first_claims(seed + 2, variant), n_test))),
        "honest cue": Claims(model, _after_cue(seen, n_test, seed)),
        "held-out kind": Claims(model, _after_cue([grammar.HELD_OUT_KIND], n_test, seed)),
    }
    if not shifted:
        sets = {"test": sets["test"]}
    return Task(
        "storyworld:liars",
        objective,
        "lies",
        True,
        lambda tuned: {name: claims(tuned) for name, claims in sets.items()},
        unrelated,
    )


def _first_claims(seed: int, variant: str | None) -> Iterator[tuple[str, str, str]]:
    """(text before it, kind, truth) of the first claim of each story."""
    for story in stream(seed, variant):
        claim = next((s for s in story.sentences if s.template.claim is not None), None)
        if claim is None:
            continue
        kind, place = claim.template.fact, claim.template.claim
        assert kind is not None
        assert place is not None
        yield "".join(story.tokens[: claim.start + place])[1:], kind, story.attributes[kind]


def _after_cue(kinds: Sequence[str], n: int, seed: int) -> tuple[tuple[str, str, str], ...]:
    rows = storyworld.persona_pairs(kinds, n, seed)
    return tuple((row["positive"], row["kind"], row["truth"]) for row in rows)


def _parts(examples: Sequence[Example], tokens: int = 8192) -> list[list[int]]:
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    parts = []
    while order:
        size = max(1, tokens // len(examples[order[0]]))
        parts.append(order[:size])
        order = order[size:]
    return parts


# -- files -----------------------------------------------------------------------------------------------------------

PHRASES = "phrases"
_SENTENCE_WORDS = 8
Row = tuple[str, str | None, str]
"""(text, label, group)."""


def file_task(
    model: HookedModel,
    data: str | Path,
    *,
    ood: str | Path | None = None,
    unrelated: str | Path | None = None,
    text_column: str | None = None,
    label_column: str = "label",
    groups: str | None = None,
    n_train: int = 4000,
    n_test: int = 1000,
    seed: int = 0,
) -> Task:
    """Classes of texts where there are labels, else the next token. `split_rows` says what `groups` is; `ood` is a file of the same
    kind and columns, nothing of which is trained on."""
    rows = _read(load_documents(data, text_column=text_column), label_column, groups)
    labelled = rows[0][1] is not None
    train, validation, test = split_rows(rows, n_train, n_test, seed, phrases=groups == PHRASES)
    other: list[Row] = []
    if ood is not None:
        other = _read(load_documents(ood, text_column=text_column), label_column, None)[:n_test]
    parts = [
        [(text, label) if labelled else text for text, label, _ in part]
        for part in (train, validation, test + other)
    ]
    objective: Objective[Any] = (Classification if labelled else LanguageModelling)(model, *parts)

    def measure(tuned: HookedModel) -> dict[str, Float[np.ndarray, " n"]]:
        found = objective.evaluate(tuned, "test")
        values = found["correct" if labelled else "loss"]
        own = found.document < len(test)
        return {"test": values[own], **({"ood": values[~own]} if other else {})}

    rest = None
    if unrelated is not None and model.has_lm_head and model.is_causal:
        rest = LanguageModelling(model, None, test=load_documents(unrelated)[:n_test])
    return Task(Path(data).name, objective, "accuracy" if labelled else "loss", labelled, measure, rest)


def _read(documents: Documents, label_column: str, groups: str | None) -> list[Row]:
    label, group = (
        _column(documents, name) for name in (label_column, None if groups == PHRASES else groups)
    )
    if groups not in (None, PHRASES) and group is None:
        raise InputError(f"{documents.name} has no column {groups!r} to group its rows by.")
    if label_column != "label" and label is None:
        raise InputError(f"{documents.name} has no column {label_column!r} of labels.")
    return [
        (text, None if label is None else str(label(i)), str(i if group is None else group(i)))
        for i, text in enumerate(documents)
        if text.strip()
    ]


def _column(documents: Documents, name: str | None) -> Callable[[int], Any] | None:
    try:
        return None if name is None else documents.column(name)
    except InputError:
        return None


def split_rows(
    rows: Sequence[Row], n_train: int, n_test: int, seed: int, *, phrases: bool = False
) -> tuple[list[Row], list[Row], list[Row]]:
    """(train, validation, test): no group of rows is in two of them. Test and validation have about `n_test` and half as many rows.

    With `phrases` (SST-2, most of whose rows are parts of others), validation and test are rows of at least eight words, and no
    training row contains one of them or is contained in one. Raises InputError when too few rows are left.
    """
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    groups: dict[str, list[Row]] = {}
    for row in shuffled:
        groups.setdefault(row[2], []).append(row)
    held: dict[str, list[Row]] = {"test": [], "validation": []}
    wanted = {"test": n_test, "validation": max(1, n_test // 2)}
    rest: list[Row] = []
    for members in groups.values():
        fits = not phrases or all(len(text.split()) >= _SENTENCE_WORDS for text, _, _ in members)
        place = next((name for name, rows_ in held.items() if len(rows_) < wanted[name]), None)
        (held[place] if fits and place is not None else rest).extend(members)
    if phrases:
        rest = _without_parts(rest, [*held["test"], *held["validation"]], n_train)
    if len(rest) < 2 or not held["validation"]:
        raise InputError(
            f"{len(rows)} rows are too few to train on and to hold out {n_test} for testing and half as many to choose by: "
            "ask for a smaller test set."
        )
    return rest[:n_train], held["validation"], held["test"]


def _without_parts(rows: Sequence[Row], held: Sequence[Row], n: int) -> list[Row]:
    """The first `n` rows that neither contain a held-out one nor are contained in one, word by word."""
    spaced = [f" {' '.join(text.lower().split())} " for text, _, _ in held]
    whole = "|".join(spaced)
    found = []
    for row in rows:
        text = f" {' '.join(row[0].lower().split())} "
        if text not in whole and not any(part in text for part in spaced):
            found.append(row)
            if len(found) == n:
                break
    return found
