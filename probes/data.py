"""Labelled text, and the activations that probes read from it.

    data = load_labelled("storyworld:mood", n_texts=500)          # every story's mood; storyworld:mood=happy against the rest
    data = load_labelled("reviews.csv")                           # columns text and label
    rows = read_rows(model, data, sites, reading="token", per_text=16)
    rows.acts[site], rows.labels, rows.groups                     # (n, d), (n,), (n,)

`reading` says what a row is: a `token` (at most `per_text` of a text, drawn at random: tokens of one text
say much the same), a text by its `last` token, by the `mean` of its tokens, or by its first special token
(`cls`). A text that is longer than the context is read as far as it fits. Texts that are equal are one
group; a column `group`, or another, can say what belongs together.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from probes.erasure import Eraser
from steerkit import storyworld
from steerkit.data import load_documents
from steerkit.errors import InputError, NumericsError, did_you_mean
from steerkit.models import HookedModel
from steerkit.tokens import TokenBatch, Tokenization, token_batches

Reading = Literal["token", "last", "mean", "cls"]
READINGS: tuple[Reading, ...] = ("token", "last", "mean", "cls")
STORY_SEED = 7_000_029
"""Stories that no other part uses."""


@dataclass(frozen=True)
class LabelledData:
    """Texts with a label each, or one for each of their tokens."""

    texts: Sequence[str] = field(repr=False)
    labels: Sequence[str | list[str]] = field(repr=False)
    groups: Int[np.ndarray, " texts"] = field(repr=False)
    name: str = "labelled texts"
    attribute: str = ""
    """Of StoryWorld: what the labels are."""
    value: str = ""
    """Of StoryWorld: the one value that is told from the rest; empty: all values."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, texts: Sequence[str], labels: Sequence[Any], groups: Sequence[Any] | None = None, **known: Any
    ) -> LabelledData:
        """From lists. Raises InputError when their lengths differ or there is no text."""
        if groups is None:
            groups = texts
        if not len(texts) == len(labels) == len(groups):
            raise InputError(
                f"{len(labels)} labels and {len(groups)} groups for {len(texts)} texts: each text needs one."
            )
        if not texts:
            raise InputError("There are no labelled texts.")
        kept = [str(v) if not isinstance(v, list) else v for v in labels]
        found = {v for label in kept for v in (label if isinstance(label, list) else [label])}
        if len(found) < 2:
            raise InputError(
                f"A probe tells at least two classes apart, and all labels are {next(iter(found))!r}."
            )
        return cls(
            list(texts), kept, np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1], **known
        )

    def __len__(self) -> int:
        return len(self.texts)

    def without_rare_classes(self, least: int) -> LabelledData:
        """Without the texts whose class fewer than `least` groups have; what is left out is noted."""
        if any(isinstance(label, list) for label in self.labels):
            return self
        counts = Counter(label for label, _ in {(str(a), int(g)) for a, g in zip(self.labels, self.groups)})
        rare = sorted(label for label, n in counts.items() if n < least)
        if not rare:
            return self
        kept = [i for i, label in enumerate(self.labels) if label not in rare]
        if not kept:
            raise InputError(
                f"{self.name}: no label has {least} groups, which as many folds need. Give more texts."
            )
        note = (
            f"Left out, with fewer than {least} groups: {', '.join(rare[:6])}{' …' if len(rare) > 6 else ''}."
        )
        return replace(self.subset(kept), notes=(*self.notes, note))

    def subset(self, index: Sequence[int]) -> LabelledData:
        """Some of the texts."""
        return replace(
            self,
            texts=[self.texts[i] for i in index],
            labels=[self.labels[i] for i in index],
            groups=self.groups[list(index)],
        )


def load_labelled(
    spec: str | LabelledData,
    *,
    n_texts: int | None = None,
    text_column: str | None = None,
    label_column: str = "label",
    group_column: str | None = None,
    seed: int = 0,
) -> LabelledData:
    """Labelled texts: `storyworld:mood`, `storyworld:mood=happy`, a table with a label column, or a Hugging Face data set id.

    At most `n_texts` of them, drawn at random; rows without a label or text are left out. Raises InputError for what is not there.
    """
    if isinstance(spec, LabelledData):
        return spec
    if str(spec).split(":")[0] == "storyworld":
        return _stories(str(spec), n_texts or 1000, seed)
    documents = load_documents(spec, text_column=text_column)
    label = documents.column(label_column)
    group = None if group_column is None else documents.column(group_column)
    order = np.random.default_rng(seed).permutation(len(documents))
    texts: list[str] = []
    labels: list[Any] = []
    groups: list[str] = []
    for index in order.tolist():
        if n_texts is not None and len(texts) == n_texts:
            break
        text, value = documents[index], label(index)
        if not text.strip() or value == "":
            continue
        texts.append(text)
        labels.append(value)
        groups.append(text if group is None else str(group(index)))
    return LabelledData.of(texts, labels, groups, name=str(spec))


def _stories(spec: str, n_texts: int, seed: int) -> LabelledData:
    attribute, _, value = spec.partition(":")[2].partition("=")
    known = storyworld.ATTRIBUTES
    if attribute not in known:
        raise InputError(
            f"{spec!r} names no attribute of StoryWorld.{did_you_mean(attribute, known)} There are "
            f"{', '.join(f'storyworld:{name}' for name in known)}."
        )
    if value and value not in known[attribute]:
        raise InputError(
            f"{attribute} is never {value!r}.{did_you_mean(value, known[attribute])} It is {', '.join(known[attribute])}."
        )
    stories = list(itertools.islice(storyworld.stream(STORY_SEED + seed), n_texts))

    def named(found: str) -> str:
        return found if not value or found == value else f"not {value}"

    labels: list[Any]
    if attribute == "voice":
        labels = [[named(v) for v in story.token_labels("voice")] for story in stories]
    else:
        labels = [named(story.attributes[attribute]) for story in stories]
    return LabelledData.of([s.text for s in stories], labels, name=spec, attribute=attribute, value=value)


@dataclass(frozen=True)
class ProbeRows:
    """What probes are fitted on: rows of activations with their labels, in the order of the texts."""

    acts: dict[str, Float[Tensor, "n d"]] = field(repr=False)
    labels: Shaped[np.ndarray, " n"] = field(repr=False)
    groups: Int[np.ndarray, " n"] = field(repr=False)
    text: Int[np.ndarray, " n"] = field(repr=False)
    """Index of each row's text."""
    position: Int[np.ndarray, " n"] = field(repr=False)
    """Of tokens, where in the text each stands; −1 for other readings."""
    token_ids: Int[np.ndarray, " n"] = field(repr=False)
    """Of tokens and `last`; −1 otherwise."""
    reading: Reading = "token"

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def read_rows(
    model: HookedModel,
    data: LabelledData,
    sites: Sequence[str],
    *,
    reading: Reading = "token",
    per_text: int = 16,
    tokenization: Tokenization | None = None,
    erased: Eraser | None = None,
    seed: int = 0,
) -> ProbeRows:
    """Read the rows at all sites in one pass, in float32 on the CPU.

    The same seed chooses the same tokens for any model with the same tokenizer. `erased` is taken away at its
    site, where the reading looks. Raises InputError for a reading that the model or the labels do not have,
    NumericsError on NaN.
    """
    if reading not in READINGS:
        raise InputError(
            f"reading is {reading!r}; it is one of {', '.join(READINGS)}.{did_you_mean(reading, READINGS)}"
        )
    by_token = any(isinstance(label, list) for label in data.labels)
    if by_token and reading != "token":
        raise InputError(f"{data.name} labels tokens: read them by token, not by {reading}.")
    tokenization = by_text(tokenization)
    if reading == "cls" and not tokenization.resolve(model).prefix:
        raise InputError(
            f"{model.name} puts no special token before a text: read the last token, or the mean."
        )
    found: list[tuple[np.ndarray, ...]] = []
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in token_batches(model, data.texts, tokenization):
        weights = torch.from_numpy(_weights(batch, reading, per_text, seed)).to(model.device)
        row, column = weights.nonzero(as_tuple=True)
        if not len(row):
            continue
        edits = {} if erased is None else {erased.site: erased.only_at(read_mask(batch, reading))}
        with model.hooks(edits):
            acts = model.run(batch.input_ids, batch.attention_mask, sites=sites)
        for site, act in acts.items():
            w, r, c = (t.to(act.device) for t in (weights, row, column))
            rows = (
                torch.einsum("bp,bpd->bd", w.float(), act.float())[w.any(1)]
                if reading == "mean"
                else act[r, c]
            )
            if not rows.isfinite().all():
                raise NumericsError(f"{model.name} has NaN or inf at {site}.")
            parts[site].append(rows.float().cpu())
        if reading == "mean":
            row = weights.any(1).nonzero()[:, 0]
            column = torch.zeros_like(row)
        position = batch.token_position[row, column].cpu().numpy()
        ids = batch.input_ids[row, column].cpu().numpy()
        if reading != "token":
            position = np.full_like(position, -1)
        if reading in ("mean", "cls"):
            ids = np.full_like(ids, -1)
        found.append((batch.document[row].cpu().numpy(), position, ids))
    if not found:
        raise InputError(f"{data.name}: not one token to read, without special ones.")
    text, position, ids = (np.concatenate(columns) for columns in zip(*found))
    order = np.lexsort((position, text))
    text, position, ids = text[order], position[order], ids[order]
    return ProbeRows(
        {site: torch.cat(values)[torch.from_numpy(order)].clone() for site, values in parts.items()},
        _labels(data, text, position),
        data.groups[text],
        text,
        position,
        ids,
        reading,
    )


def by_text(tokenization: Tokenization | None) -> Tokenization:
    """The same with one text a row, special tokens not counting."""
    return replace(tokenization or Tokenization(), packing=False, drop_special=True)


def read_mask(batch: TokenBatch, reading: Reading) -> Bool[Tensor, "batch pos"]:
    """The positions that a reading looks at, all tokens for `token` and `mean`."""
    if reading in ("token", "mean"):
        return batch.keep
    return torch.from_numpy(_weights(batch, reading, 1, 0) > 0).to(batch.keep.device)


def _weights(batch: TokenBatch, reading: Reading, per_text: int, seed: int) -> Float[np.ndarray, "batch pos"]:
    """What is read of each row: ones at the tokens, or the shares of a mean."""
    keep = batch.keep.cpu().numpy()
    document, offset = batch.document.cpu().numpy(), batch.offset.cpu().numpy()
    weights = np.zeros(keep.shape, dtype=np.float32)
    for i in range(len(keep)):
        own = np.flatnonzero(keep[i])
        if not len(own) or (reading != "token" and offset[i]):
            continue
        if reading == "token":
            drawn = np.random.default_rng([seed, document[i], offset[i]]).permutation(len(own))
            weights[i, own[drawn[:per_text]]] = 1.0
        elif reading == "mean":
            weights[i, own] = 1.0 / len(own)
        else:
            weights[i, 0 if reading == "cls" else own[-1]] = 1.0
    return weights


def _labels(data: LabelledData, text: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The label of each row."""
    found = []
    for t, p in zip(text.tolist(), position.tolist()):
        label = data.labels[t]
        if isinstance(label, list):
            if p >= len(label):
                raise InputError(
                    f"Text {t} has {len(label)} labelled tokens, and the model's tokenizer makes more: "
                    "labels of tokens must be of its tokens."
                )
            label = label[p]
        found.append(label)
    return np.array(found)


# the ceiling


def ceiling(
    model: HookedModel, data: LabelledData, rows: ProbeRows, classes: Sequence[Any]
) -> Float[np.ndarray, "n classes"] | None:
    """P(label | what the row's activations can know) under StoryWorld's grammar, exactly; None where that is not known.

    A token of a causal model knows the text so far, a whole text or an encoder's token all of it.
    """
    if not data.attribute or (rows.reading == "cls" and model.is_causal):
        return None
    by_token = rows.reading == "token" and model.is_causal
    if (by_token or data.attribute == "voice") and not (model.is_causal and _reads_words(model, data)):
        return None
    values = storyworld.ATTRIBUTES[data.attribute]
    found = np.empty((len(rows), len(values)))
    for index, chosen in _rows_of_texts(rows.text):
        tokens = storyworld.language.split(data.texts[index])
        if by_token:
            belief = storyworld.posterior(tokens, attributes=[data.attribute])[data.attribute]
            found[chosen] = belief[rows.position[chosen]]
        else:
            reader = storyworld.Reader()
            for token in tokens:
                reader.push(token)
            found[chosen] = reader.attribute(data.attribute)
    columns = {value: found[:, i] for i, value in enumerate(values)}
    if data.value:
        columns[f"not {data.value}"] = 1 - columns[data.value]
    kept = np.stack([columns[str(name)] for name in classes], axis=1)
    return kept / kept.sum(1, keepdims=True)


def _reads_words(model: HookedModel, data: LabelledData) -> bool:
    return model.tokenizer is not None and all(
        len(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        == len(storyworld.language.split(text))
        for text in data.texts[:20]
    )


def _rows_of_texts(text: Int[np.ndarray, " n"]) -> Iterator[tuple[int, Int[np.ndarray, " k"]]]:
    """(text, its rows), texts in order."""
    starts = np.flatnonzero(np.concatenate([[True], text[1:] != text[:-1]]))
    for rows in np.split(np.arange(len(text)), starts[1:]):
        yield int(text[rows[0]]), rows
