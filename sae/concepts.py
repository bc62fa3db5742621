"""Which latents know what: on StoryWorld, how well one latent tells each value of each attribute from the
rest.

    scores = concept_scores(model, run.sae, "blocks.2.hook_resid_post")
    scores["mood", "happy"].auroc, scores["mood", "happy"].posterior

For every value the latent with the best AUROC is chosen on some stories and scored on others; its interval is
clustered by story. What is told apart are

    per="token"   tokens, each labelled with what its story (for `voice`: it itself) is about, whether or not
    the
                  text has said so yet. A latent that fires on the few words of its value says nothing about
                  the other tokens: sparse latents lie near 0.5 here, however pure they are.
    per="story"   stories, by the strongest activation on any of their tokens: whether the latent fires at
    all.

The ceiling is the AUROC of the exact P(value | text so far), or of P(value | story). Beside it stand what
needs no learned dictionary: the best latent of a random SAE and of an SAE trained on the randomly initialised
model, the token alone (rates by token, from the stories of the choice), and the best coordinate of the
activations with either sign; per story the strongest of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures import SAE
from sae.evaluation import check_fits, random_sae
from sae.thresholds import encoded
from steerkit import storyworld
from steerkit.activations import Tokenization, collect
from steerkit.errors import InputError, NumericsError, did_you_mean
from steerkit.models import HookedModel
from steerkit.runs import progress, write_json
from steerkit.stats import Interval, auroc, auroc_interval, midranks

if TYPE_CHECKING:
    from scipy.sparse import csr_array

STORY_SEED = 7_000_003
"""Stories that no other part uses."""

Concept = tuple[str, str]
"""(attribute, value)."""
Per = Literal["token", "story"]


@dataclass(frozen=True)
class ConceptScore:
    """One value of one attribute. AUROCs on the stories that the latent was not chosen on."""

    attribute: str
    value: str
    latent: int
    """The best latent of the SAE."""
    auroc: float
    ci: Interval
    """95 %, jackknifed over stories."""
    posterior: float | None
    """The ceiling: the exact probability of the value given the text so far."""
    random_sae: float
    random_model: float | None
    """The best latent of the random model's SAE."""
    token: float
    residual: float
    """The best coordinate of the activations, with either sign."""
    stories: int
    """Scored stories with the value (for `voice`: in which it occurs)."""


@dataclass(frozen=True, repr=False)
class ConceptScores:
    """A score for every value that enough stories have."""

    rows: tuple[ConceptScore, ...]
    per: Per
    """What is told apart."""
    tokens: int
    """Tokens that were scored."""
    stories: int
    selection: Float[Tensor, "d_sae concepts"] = field(repr=False)
    """AUROC of every latent for every row's value, on the stories of the choice."""

    def __getitem__(self, concept: Concept) -> ConceptScore:
        for row in self.rows:
            if (row.attribute, row.value) == tuple(concept):
                return row
        raise KeyError(concept)

    def mean(self, name: str = "auroc") -> float | None:
        """Mean over the values of one of the columns; None if it was not measured."""
        values = [getattr(row, name) for row in self.rows]
        return None if None in values else float(np.mean(values))

    def best_concept(self, latent: int) -> tuple[str, str, float]:
        """(attribute, value, AUROC on the stories of the choice) that a latent tells best."""
        best = int(self.selection[latent].argmax())
        row = self.rows[best]
        return row.attribute, row.value, float(self.selection[latent, best])

    def to_dict(self) -> dict[str, Any]:
        means = {name: self.mean(name) for name in _COLUMNS}
        rows = [asdict(row) for row in self.rows]
        return {
            "per": self.per,
            "tokens": self.tokens,
            "stories": self.stories,
            "mean": means,
            "rows": rows,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        columns = [name for name in _COLUMNS if self.mean(name) is not None]
        lines = [f"{'value':<22}{'latent':>7}{'95 %':>16}" + "".join(f"{name:>14}" for name in columns)]
        for row in self.rows:
            cells = "".join(f"{getattr(row, name):>14.3f}" for name in columns)
            interval = f"{row.ci.low:.3f}–{row.ci.high:.3f}"
            lines.append(f"{row.attribute + '=' + row.value:<22}{row.latent:>7}{interval:>16}{cells}")
        lines.append(f"{'mean':<45}" + "".join(f"{self.mean(name):>14.3f}" for name in columns))
        lines.append(f"AUROC per {self.per}, on {self.tokens:,} tokens of {self.stories:,} stories")
        return "\n".join(lines)


_COLUMNS = ("auroc", "posterior", "random_sae", "random_model", "token", "residual")


@torch.no_grad()
def concept_scores(
    model: HookedModel,
    sae: SAE,
    site: str,
    *,
    per: Per = "token",
    tokens: int = 100_000,
    chosen_on: float = 0.6,
    min_stories: int = 20,
    attributes: Sequence[str] | None = None,
    random_model_sae: SAE | None = None,
    random_model_seed: int = 0,
    posterior: bool = True,
    tokenization: Tokenization | None = None,
    seed: int = STORY_SEED,
    quiet: bool = True,
) -> ConceptScores:
    """Score every value that at least `min_stories` stories have, and as many have not, on both sides.

    `chosen_on` is the share of the about `tokens` tokens on which latents are chosen. `random_model_sae` is
    an SAE trained on `model.randomized(random_model_seed)`. Raises InputError for a model whose tokens are
    not StoryWorld's words, an SAE that does not fit, or too few stories.
    """
    check_fits(model, sae, site)
    names = _attributes(attributes, per)
    stories = _stories(model, tokens, seed)
    n_chosen = int(chosen_on * len(stories))
    concepts = _populated(stories[:n_chosen], stories[n_chosen:], names, min_stories)

    def read(model: HookedModel) -> _Items:
        return _Items(_words(model, site, stories, n_chosen, concepts, tokenization), per)

    items = read(model)
    latents = _Best.of(sae, items)
    null = random_sae(sae, items.words.acts[items.words.document < n_chosen])
    random_scores = _Best.of(null, items).scores
    of_random_model = None
    if random_model_sae is not None:
        random_model = model.randomized(random_model_seed)
        check_fits(random_model, random_model_sae, site, "of the random model")
        of_random_model = _Best.of(random_model_sae, read(random_model)).scores
    ceiling = _ceilings(stories, concepts, items, quiet) if posterior else None
    by_token, by_coordinate = _token_scores(items), _residual_scores(items)
    groups, labels = items.story[items.scored], items.labels[items.scored]
    rows = []
    for c, (attribute, value) in enumerate(concepts):
        rows.append(
            ConceptScore(
                attribute,
                value,
                int(latents.latent[c]),
                float(latents.scores[c]),
                auroc_interval(latents.values[c], labels[:, c], groups),
                None if ceiling is None else float(ceiling[c]),
                float(random_scores[c]),
                None if of_random_model is None else float(of_random_model[c]),
                float(by_token[c]),
                float(by_coordinate[c]),
                len(np.unique(groups[labels[:, c]])),
            )
        )
    n_scored = int((items.words.document >= n_chosen).sum())
    selection = torch.from_numpy(latents.selection)
    return ConceptScores(tuple(rows), per, n_scored, len(np.unique(groups)), selection)


# AUROCs of many columns at once


def latent_aurocs(
    latents: csr_array, labels: Bool[np.ndarray, "n concepts"]
) -> Float[np.ndarray, "d_sae concepts"]:
    """AUROC of every non-negative column of the (n, d_sae) `latents` for every label, exactly, ties counting
    half; NaN where a label has one class only.

    Only what is not zero is sorted: the zeros of a column share one rank, so that the sum of the ranks of the
    positives is a product of a sparse matrix with the labels.
    """
    from scipy.sparse import csc_array, csr_array

    columns = csc_array(latents)
    (n, d_sae), first = columns.shape, columns.indptr
    active = np.diff(first)
    silent = n - active
    latent = np.repeat(np.arange(d_sae), active)
    order = np.lexsort((columns.data, latent))
    values, token = columns.data[order], columns.indices[order]
    # Runs of equal values of one latent share their mean place.
    new = np.ones(len(values), dtype=bool)
    new[1:] = (values[1:] != values[:-1]) | (latent[1:] != latent[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(values))
    place = np.repeat((starts + 1 + ends) / 2, ends - starts)
    rank = place - first[latent] + silent[latent]
    zero_rank = (silent + 1) / 2
    above_zero = csr_array((rank - zero_rank[latent], token, first), shape=(d_sae, n))
    n_positive = labels.sum(0, dtype=np.float64)
    rank_sums = above_zero @ labels.astype(np.float64) + zero_rank[:, None] * n_positive
    return _areas(rank_sums, n_positive, n)


def column_aurocs(
    columns: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n concepts"]
) -> Float[np.ndarray, "d concepts"]:
    """The same for columns that are dense and of any sign."""
    ranks = np.stack([midranks(column) for column in columns.T])
    n_positive = labels.sum(0, dtype=np.float64)
    return _areas(ranks @ labels.astype(np.float64), n_positive, len(columns))


def _areas(rank_sums: np.ndarray, n_positive: np.ndarray, n: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (rank_sums - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive))


# stories


def _attributes(names: Sequence[str] | None, per: Per) -> list[str]:
    if per not in ("token", "story"):
        raise InputError(f"per is {per!r}: concepts are scored per token or per story.")
    known = [name for name in storyworld.ATTRIBUTES if per == "token" or name != "voice"]
    for name in names or ():
        if name not in known:
            alone = " Score it per token." if name == "voice" else did_you_mean(name, known)
            raise InputError(f"No story has an attribute {name!r}; there are {', '.join(known)}.{alone}")
    return known if names is None else list(names)


def _stories(model: HookedModel, tokens: int, seed: int) -> list[storyworld.Story]:
    """Whole stories with about so many tokens, that the model reads word by word."""
    found: list[storyworld.Story] = []
    n = 0
    for story in storyworld.stream(seed):
        if n >= tokens:
            break
        found.append(story)
        n += len(story.tokens)
    if model.tokenizer is None or any(
        len(model.tokenizer(story.text, add_special_tokens=False)["input_ids"]) != len(story.tokens)
        for story in found[:20]
    ):
        raise InputError(
            f"{model.name} does not read StoryWorld word by word: concept scores need a model with its tokenizer."
        )
    return found


def _populated(
    chosen_on: Sequence[storyworld.Story],
    scored_on: Sequence[storyworld.Story],
    attributes: Sequence[str],
    min_stories: int,
) -> list[Concept]:
    """The values that enough stories have, and enough have not, on either side."""
    found = []
    for attribute in attributes:
        for value in storyworld.ATTRIBUTES[attribute]:
            if attribute == "voice" or all(
                min_stories <= sum(s.attributes[attribute] == value for s in side) <= len(side) - min_stories
                for side in (chosen_on, scored_on)
            ):
                found.append((attribute, value))
    if not found or min(len(chosen_on), len(scored_on)) < 2:
        raise InputError(
            f"{len(chosen_on)} and {len(scored_on)} stories are too few: no value is in {min_stories} of both. "
            "Give more tokens or a smaller min_stories."
        )
    return found


@dataclass(frozen=True)
class _Words:
    """The tokens that count, story by story, with what is true of them."""

    acts: Float[Tensor, "n d_in"]
    token_ids: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    """Index of each token's story."""
    position: Int[np.ndarray, " n"]
    chosen: Bool[np.ndarray, " n"]
    """Whether the token is one of those on which latents are chosen."""
    labels: Bool[np.ndarray, "n concepts"]


@dataclass(frozen=True)
class _Items:
    """What is told apart: tokens, or stories, of which the first token speaks for what is true of all."""

    words: _Words
    per: Per

    @cached_property
    def starts(self) -> Int[np.ndarray, " items"]:
        """The first token of each item."""
        document = self.words.document
        if self.per == "token":
            return np.arange(len(document))
        return np.flatnonzero(np.concatenate([[True], document[1:] != document[:-1]]))

    @cached_property
    def labels(self) -> Bool[np.ndarray, "items concepts"]:
        return self.words.labels[self.starts]

    @cached_property
    def story(self) -> Int[np.ndarray, " items"]:
        return self.words.document[self.starts]

    @cached_property
    def chosen(self) -> Bool[np.ndarray, " items"]:
        return self.words.chosen[self.starts]

    @cached_property
    def scored(self) -> Bool[np.ndarray, " items"]:
        return ~self.chosen

    def strongest(self, values: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "items k"]:
        """The maximum over each item's tokens."""
        return values if self.per == "token" else np.maximum.reduceat(values, self.starts, axis=0)

    def strongest_latents(self, latents: csr_array) -> csr_array:
        """The same for non-negative sparse columns (n, d_sae)."""
        from scipy.sparse import csr_array

        if self.per == "token":
            return latents
        entries = latents.tocoo()
        item = np.searchsorted(self.starts, entries.row, side="right") - 1
        order = np.lexsort((entries.col, item))
        item, column = item[order], entries.col[order]
        new = np.ones(len(item), dtype=bool)
        new[1:] = (item[1:] != item[:-1]) | (column[1:] != column[:-1])
        first = np.flatnonzero(new)
        values = np.maximum.reduceat(entries.data[order], first) if len(first) else entries.data
        return csr_array((values, (item[first], column[first])), shape=(len(self.starts), latents.shape[1]))


def _words(
    model: HookedModel,
    site: str,
    stories: Sequence[storyworld.Story],
    n_chosen: int,
    concepts: Sequence[Concept],
    tokenization: Tokenization | None,
) -> _Words:
    acts = collect(
        model, [story.text for story in stories], site, tokenization=tokenization, drop_special=True
    )
    document, position = acts.document.numpy(), acts.position.numpy()
    index = {name: {v: i for i, v in enumerate(storyworld.ATTRIBUTES[name])} for name, _ in concepts}
    starts = np.concatenate([[0], np.cumsum([len(story.tokens) for story in stories])])
    place = starts[document] + position
    labels = np.empty((len(document), len(concepts)), dtype=bool)
    for attribute, of_value in index.items():
        flat = np.array([of_value[v] for story in stories for v in story.token_labels(attribute)])[place]
        for c, (name, value) in enumerate(concepts):
            if name == attribute:
                labels[:, c] = flat == of_value[value]
    return _Words(acts[site].float(), acts.token_ids.numpy(), document, position, document < n_chosen, labels)


# what is scored


@dataclass(frozen=True)
class _Best:
    """The best latent for each concept."""

    latent: Int[np.ndarray, " concepts"]
    scores: Float[np.ndarray, " concepts"]
    values: Float[np.ndarray, "concepts scored"]
    """Its activations on the scored items."""
    selection: Float[np.ndarray, "d_sae concepts"]

    @classmethod
    def of(cls, sae: SAE, items: _Items) -> _Best:
        latents = items.strongest_latents(_activity(sae, items.words.acts))
        selection = latent_aurocs(latents[items.chosen], items.labels[items.chosen])
        best = selection.argmax(0)
        values = latents[items.scored][:, best].toarray().T
        return cls(best, _aurocs(values.T, items), values, selection)


def _activity(sae: SAE, acts: Float[Tensor, "n d_in"]) -> csr_array:
    """(n, d_sae) latents, those that are not zero."""
    from scipy.sparse import csr_array, vstack

    parts = [csr_array(latents.float().cpu().numpy()) for latents in encoded(sae, acts)]
    found = vstack(parts, format="csr")
    if not np.isfinite(found.data).all():
        raise NumericsError("The SAE gives NaN or inf: check its weights.")
    return found


def _token_scores(items: _Items) -> Float[np.ndarray, " concepts"]:
    """Rates by token on the chosen stories, drawn towards the overall rate by one pseudo-token."""
    words = items.words
    size = int(words.token_ids.max()) + 1
    token, labels = words.token_ids[words.chosen], words.labels[words.chosen]
    seen = np.bincount(token, minlength=size)
    counts = np.stack([np.bincount(token, column, size) for column in labels.T], axis=1)
    rates = (counts + labels.mean(0)) / (seen + 1)[:, None]
    return _aurocs(items.strongest(rates[words.token_ids])[items.scored], items)


def _residual_scores(items: _Items) -> Float[np.ndarray, " concepts"]:
    acts = items.words.acts.cpu().numpy()
    columns = acts if items.per == "token" else items.strongest(np.concatenate([acts, -acts], axis=1))
    selection = column_aurocs(columns[items.chosen], items.labels[items.chosen]) - 0.5
    best = np.abs(selection).argmax(0)
    sign = np.where(selection[best, np.arange(len(best))] < 0, -1.0, 1.0)
    return _aurocs(columns[items.scored][:, best] * sign, items)


def _ceilings(
    stories: Sequence[storyworld.Story], concepts: Sequence[Concept], items: _Items, quiet: bool
) -> Float[np.ndarray, " concepts"]:
    """AUROC of the exact probabilities."""
    attributes = list(dict.fromkeys(name for name, _ in concepts))
    columns = [(name, storyworld.ATTRIBUTES[name].index(value)) for name, value in concepts]
    story, position = items.story[items.scored], items.words.position[items.starts][items.scored]
    found = np.empty((len(story), len(concepts)))
    numbers = np.unique(story)
    with progress(len(numbers), "exact posteriors", unit="stories", quiet=quiet) as bar:
        for number in numbers:
            here = story == number
            tokens = stories[number].tokens
            if items.per == "token":
                beliefs = storyworld.posterior(tokens, attributes=attributes)
                found[here] = np.stack([beliefs[name][position[here], at] for name, at in columns], 1)
            else:
                reader = storyworld.Reader()
                for token in tokens:
                    reader.push(token)
                known = {name: reader.attribute(name) for name in attributes}
                found[here] = [known[name][at] for name, at in columns]
            bar.advance(1)
    return _aurocs(found, items)


def _aurocs(scores: Float[np.ndarray, "scored concepts"], items: _Items) -> Float[np.ndarray, " concepts"]:
    """The AUROC of each concept's own scores, on the scored items."""
    labels = items.labels[items.scored]
    return np.array([auroc(column, label) for column, label in zip(scores.T, labels.T)])
