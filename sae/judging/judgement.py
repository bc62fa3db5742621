"""Everything that judges an SAE, with everything that it has to beat, in one table.

    judgement = judge(model, sae, "blocks.2.hook_resid_post")                       # on StoryWorld, with exact labels
    judgement = judge(model, sae, site, data=LabelledTexts.read("reviews.csv"))     # on any labelled text
    judgement["SAE"].probing.accuracy[1], judgement["random SAE"].monosemanticity.score[1]

Documents are the examples of sparse probing, FMS, SCR and TPP: latents and activations are means over a document's tokens, as in
SAEBench. Tokens are those of absorption, which asks what a word's own latents are; it is measured on StoryWorld only, where it is
known of every word what it says. Candidates are chosen and probes fitted on 60 % of the documents; figures are of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from sae.architectures import SAE
from sae.architectures.transcoder import TranscoderSAE
from sae.evaluation import check_fits, random_sae
from sae.judging import dictionaries
from sae.judging.absorption import Absorption, absorption
from sae.judging.dictionaries import Dictionary
from sae.judging.examples import Examples
from sae.judging.monosemanticity import Monosemanticity, monosemanticity
from sae.judging.scr import SpuriousRemoval, scr
from sae.judging.sparse_probing import SparseProbing, sparse_probing
from sae.judging.tpp import TargetedPerturbation, tpp
from steerkit import storyworld
from steerkit.activations import Activations, Tokenization, collect
from steerkit.errors import InputError, did_you_mean
from steerkit.models import HookedModel
from steerkit.runs import progress, write_json
from steerkit.stats import Interval
from steerkit.storyworld.language import Item, factor_of

if TYPE_CHECKING:
    from scipy.sparse import csr_array

JUDGE_SEED = 7_000_017
"""Stories that no other part uses."""
CHOSEN_ON = 0.6
WORD_FAMILIES = ("mood", "tense", "gender", "politeness")
"""Attributes that many different words tell: what absorption is looked for in."""
SHOWN_N = 5
"""Ablated candidates of the SCR and TPP that a table shows."""
FITTED_ON = 1 << 26
"""Latents that a random SAE's thresholds are fitted on, on at most 16,384 tokens."""
CEILING = "posterior"
SHUFFLED = "SAE, labels shuffled"

Found = TypeVar("Found")


@dataclass(frozen=True)
class LabelledTexts:
    """Documents with one or more labels each."""

    texts: Sequence[str] = field(repr=False)
    labels: Mapping[str, Sequence[str]] = field(repr=False)
    """Name of the label -> its value for each text."""
    name: str = "labelled texts"

    @classmethod
    def read(
        cls, path: str | Path, *, text_column: str = "text", label_columns: Sequence[str] = ("label",)
    ) -> LabelledTexts:
        """Rows of a .csv, .tsv, .jsonl or .parquet file. Raises InputError when it cannot be read or lacks a column."""
        table = _table(Path(path))
        for column in (text_column, *label_columns):
            if column not in table:
                raise InputError(
                    f"{path} has no column {column!r}; its columns are {', '.join(map(str, table))}."
                    f"{did_you_mean(column, list(map(str, table)))}"
                )
        kept = table[table[text_column].astype(str).str.strip() != ""]
        labels = {column: kept[column].fillna("").astype(str).tolist() for column in label_columns}
        return cls(kept[text_column].astype(str).tolist(), labels, Path(path).name)


@dataclass(frozen=True)
class Row:
    """One dictionary's measures; None where it has none."""

    name: str
    size: int
    """Candidates."""
    probing: SparseProbing
    monosemanticity: Monosemanticity
    absorption: Absorption | None
    scr: SpuriousRemoval | None
    tpp: TargetedPerturbation | None

    def figures(self) -> dict[str, Interval | None]:
        """What a table shows of it."""
        found: dict[str, Interval | None] = {
            f"k={k}": interval for k, interval in self.probing.accuracy.items()
        }
        found |= {f"FMS@{p}": interval for p, interval in self.monosemanticity.score.items()}
        found["absorbed"] = None if self.absorption is None else self.absorption.rate
        found[f"SCR@{SHOWN_N}"] = None if self.scr is None else self.scr.score.get(SHOWN_N)
        found[f"TPP@{SHOWN_N}"] = None if self.tpp is None else self.tpp.score.get(SHOWN_N)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "probing": self.probing.to_dict(),
            "monosemanticity": self.monosemanticity.to_dict(),
            "absorption": self.absorption and self.absorption.to_dict(),
            "scr": self.scr and self.scr.to_dict(),
            "tpp": self.tpp and self.tpp.to_dict(),
        }


@dataclass(frozen=True, repr=False)
class Judgement:
    """An SAE and its baselines, measured alike."""

    rows: tuple[Row, ...]
    """The SAE first."""
    examples: str
    """What was judged by, in words."""
    concepts: tuple[str, ...]
    notes: tuple[str, ...]
    """What was not measured, and why."""
    seconds: float

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "concepts": list(self.concepts),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
            "table": self.table(),
        }

    def table(self) -> list[dict[str, Any]]:
        """The figures of each row, plain; None where there is none."""
        found = []
        for row in self.rows:
            figures = {
                name: None if interval is None else interval.to_dict()
                for name, interval in row.figures().items()
            }
            found.append({"name": row.name, "size": row.size, **figures})
        return found

    def columns(self) -> list[str]:
        """The names of what a table shows."""
        return list(self.rows[0].figures())

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        columns = self.columns()
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':<{width}}{'size':>8}" + "".join(f"{name:>9}" for name in columns) + "   95 % of k=1, FMS@1"
        ]
        for row in self.rows:
            figures = row.figures()
            cells = "".join(
                f"{'–' if found is None else f'{found.estimate:.3f}':>9}" for found in figures.values()
            )
            ends = [figures[name] for name in (columns[0], "FMS@1") if figures.get(name)]
            intervals = "  ".join(f"{found.low:.3f}–{found.high:.3f}" for found in ends if found)
            lines.append(f"{row.name:<{width}}{row.size:>8,}{cells}   {intervals}")
        lines.append(self.examples)
        lines += self.notes
        lines.append(
            "chance: k 0.5, FMS 0.25, SCR and TPP 0. Absorption says little of an SAE whose latents do not find the words."
        )
        return "\n".join(lines)


def judge(
    model: HookedModel,
    sae: SAE,
    site: str,
    *,
    data: LabelledTexts | None = None,
    tokens: int = 100_000,
    random_model_sae: SAE | None = None,
    random_model_seed: int = 0,
    max_values: int = 3,
    min_documents: int = 20,
    tokenization: Tokenization | None = None,
    seed: int = JUDGE_SEED,
    quiet: bool = True,
) -> Judgement:
    """Judge an SAE by StoryWorld's labels, or by those of `data`, on about `tokens` tokens.

    `random_model_sae` is an SAE trained on `model.randomized(random_model_seed)`. Of each label at most `max_values`
    values are judged, those that at least `min_documents` documents of either half have. Raises InputError for an
    SAE that does not fit the site, and when no label is common enough.
    """
    started = time.perf_counter()
    if len(sae.config.inputs(site)) > 1:
        raise InputError(
            "A crosscoder cannot be judged: its latents stand at several sites. Judge SAEs of one."
        )
    check_fits(model, sae, site)
    source = _Source.of_stories(tokens, seed) if data is None else _Source.of_texts(data, tokens, seed)
    reading = _Reading(model, source, site, tokenization)
    examples = reading.examples(max_values, min_documents)
    words = reading.words(min_documents)
    notes = [] if words is not None else [f"absorption: not measured, as {reading.no_words}"]
    if isinstance(sae, TranscoderSAE):
        notes.append(
            "absorption, SCR and TPP: not measured, as what a transcoder's latents add is at another site"
        )
    rows = []
    todo = list(_dictionaries(reading, sae, examples, random_model_sae, random_model_seed))
    with progress(len(todo), "judging", unit="dictionaries", quiet=quiet) as bar:
        for make in todo:
            dictionary, on_words = make()
            rows.append(_row(dictionary, examples, on_words, words, min_documents, notes))
            bar.advance(1)
    if random_model_sae is None:
        notes.append("SAE of the random model: none was given")
    return Judgement(
        tuple(rows),
        f"{source.name}: {examples.describe()}",
        examples.names,
        tuple(dict.fromkeys(notes)),
        time.perf_counter() - started,
    )


def _row(
    dictionary: Dictionary,
    examples: Examples,
    on_words: Dictionary | None,
    words: Examples | None,
    min_documents: int,
    notes: list[str],
) -> Row:
    ablatable = dictionary.directions is not None
    return Row(
        dictionary.name,
        dictionary.size,
        sparse_probing(dictionary, examples),
        monosemanticity(dictionary, examples),
        absorption(on_words, words) if ablatable and on_words is not None and words is not None else None,
        _unless_refused(lambda: scr(dictionary, examples, min_cell=min_documents), "SCR", notes)
        if ablatable
        else None,
        _unless_refused(lambda: tpp(dictionary, examples), "TPP", notes) if ablatable else None,
    )


def _unless_refused(measure: Callable[[], Found], name: str, notes: list[str]) -> Found | None:
    """The measure, or None with a note where the labels do not allow it."""
    try:
        return measure()
    except InputError as error:
        notes.append(f"{name}: not measured. {error}")
        return None


# what is judged


Made = tuple[Dictionary, "Dictionary | None"]
"""A dictionary on the documents, and the same on the tokens that absorption looks at."""


def _dictionaries(
    reading: _Reading,
    sae: SAE,
    examples: Examples,
    random_model_sae: SAE | None,
    random_model_seed: int,
) -> Iterator[Callable[[], Made]]:
    """What makes each row's dictionary; one is held at a time."""

    def of_sae(name: str, sae: SAE, reading: _Reading = reading) -> Made:
        on_documents, latents = dictionaries.of_sae(name, sae, reading.acts, reading.pool)
        on_tokens = Dictionary(name, latents, on_documents.directions, reading.token_acts)
        return on_documents, on_tokens

    def of_shuffled() -> Made:
        """Documents have each other's labels, within the halves: what choosing among so many latents makes of nothing."""
        (of_documents, _), order = of_sae(SHUFFLED, sae), np.arange(len(examples))
        generator = np.random.default_rng(0)
        for half in (examples.chosen, ~examples.chosen):
            order[half] = generator.permutation(order[half])
        return Dictionary(SHUFFLED, of_documents.values[order]), None

    def of_random_sae() -> Made:
        chosen = torch.from_numpy(reading.document < reading.source.n_chosen)
        n = min(16_384, FITTED_ON // sae.d_sae)
        return of_sae("random SAE", random_sae(sae, reading.acts[chosen][:n]))

    def of_random_model() -> Made:
        assert random_model_sae is not None
        model = reading.model.randomized(random_model_seed)
        check_fits(model, random_model_sae, reading.site, "of the random model")
        other = _Reading(model, reading.source, reading.site, reading.tokenization)
        return of_sae("SAE of the random model", random_model_sae, other)

    pooled, chosen = reading.pooled, examples.chosen
    yield lambda: of_sae("SAE", sae)
    yield of_shuffled
    yield of_random_sae
    if random_model_sae is not None:
        yield of_random_model
    yield lambda: (dictionaries.pca(pooled, chosen), None)
    yield lambda: (dictionaries.raw_basis(pooled, chosen, sae.d_sae), None)
    yield lambda: (dictionaries.token_identity(reading.token_ids, reading.pool), None)
    yield lambda: (dictionaries.supervised(pooled, examples), None)
    if reading.source.stories is not None:
        yield lambda: (_posterior(reading.source.stories or (), examples), None)


def _posterior(stories: Sequence[storyworld.Story], examples: Examples) -> Dictionary:
    """The exact P(value | story), of families with two values for one of them."""
    families = list(dict.fromkeys(family for family, _ in examples.concepts))
    columns = []
    for story in stories:
        reader = storyworld.Reader()
        for token in story.tokens:
            reader.push(token)
        beliefs = [reader.attribute(family) for family in families]
        columns.append(np.concatenate([b[:1] if len(b) == 2 else b for b in beliefs]))
    return Dictionary(CEILING, np.array(columns))


# what it is judged on


@dataclass(frozen=True)
class _Source:
    """Documents with labels, those to choose on first."""

    name: str
    texts: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    n_chosen: int
    stories: Sequence[storyworld.Story] | None = None

    @classmethod
    def of_stories(cls, tokens: int, seed: int) -> _Source:
        stories: list[storyworld.Story] = []
        n = 0
        for story in storyworld.stream(seed):
            if n >= tokens:
                break
            stories.append(story)
            n += len(story.tokens)
        labels = {
            family: [story.attributes[family] for story in stories]
            for family in storyworld.ATTRIBUTES
            if family != "voice"
        }
        return cls(
            "StoryWorld", [story.text for story in stories], labels, int(CHOSEN_ON * len(stories)), stories
        )

    @classmethod
    def of_texts(cls, data: LabelledTexts, tokens: int, seed: int) -> _Source:
        """Shuffled, as files are often sorted by label; more texts than there are tokens for are left out."""
        for name, column in data.labels.items():
            if len(column) != len(data.texts):
                raise InputError(f"{data.name}: {len(column)} labels {name!r} for {len(data.texts)} texts.")
        order = np.random.default_rng(seed).permutation(len(data.texts))
        words = np.cumsum([len(data.texts[i].split()) for i in order])
        order = order[: int(np.searchsorted(words, tokens)) + 1]
        labels = {name: [column[i] for i in order] for name, column in data.labels.items()}
        return cls(data.name, [data.texts[i] for i in order], labels, int(CHOSEN_ON * len(order)))


class _Reading:
    """A model's activations of the documents."""

    def __init__(
        self, model: HookedModel, source: _Source, site: str, tokenization: Tokenization | None
    ) -> None:
        from scipy.sparse import csr_array

        self.model, self.source, self.site, self.tokenization = model, source, site, tokenization
        found: Activations = collect(model, source.texts, site, tokenization=tokenization, drop_special=True)
        self.acts = found[site].float()
        self.token_acts: Float[np.ndarray, "tokens d"] = self.acts.cpu().numpy()
        self.document: Int[np.ndarray, " tokens"] = found.document.numpy()
        self.position = found.position.numpy()
        self.token_ids = found.token_ids.numpy()
        counts = np.bincount(self.document, minlength=len(source.texts))
        if not counts.all():
            raise InputError(f"{source.name}: document {int(counts.argmin()) + 1} has no token that counts.")
        n = len(self.document)
        weights = (1 / counts)[self.document].astype(np.float32)
        self.pool: csr_array = csr_array(
            (weights, (self.document, np.arange(n))), shape=(len(source.texts), n)
        )
        """Makes means over documents of what is known of tokens."""
        self.pooled = dictionaries.pooled_acts(self.acts, self.pool)
        self.no_words = ""

    def examples(self, max_values: int, min_documents: int) -> Examples:
        """The documents."""
        documents = np.arange(len(self.source.texts))
        return Examples.of(
            self.source.labels,
            documents,
            documents < self.source.n_chosen,
            min_groups=min_documents,
            max_values=max_values,
        )

    def words(self, min_documents: int) -> Examples | None:
        """The tokens, each labelled with what its word alone says; None where that is not known."""
        stories = self.source.stories
        if stories is None:
            self.no_words = "it needs labels for every token, which StoryWorld has"
            return None
        tokenizer = self.model.tokenizer
        if any(
            len(tokenizer(story.text, add_special_tokens=False)["input_ids"]) != len(story.tokens)
            for story in stories[:20]
        ):
            self.no_words = f"{self.model.name} does not read StoryWorld word by word"
            return None
        starts = np.concatenate([[0], np.cumsum([len(story.tokens) for story in stories])])
        place = starts[self.document] + self.position
        values = {
            family: np.array([said for story in stories for said in _said(story, family)])[place].tolist()
            for family in WORD_FAMILIES
        }
        try:
            return Examples.of(
                values,
                self.document,
                self.document < self.source.n_chosen,
                min_groups=min_documents,
                max_values=4,
            )
        except InputError:
            self.no_words = "too few stories have each of the words"
            return None


def _said(story: storyworld.Story, family: str) -> list[str]:
    """The value of the family that each word of a story alone makes certain; "" for the others, and for claims."""
    items = [item for sentence in story.sentences for item in sentence.template.items]
    return [_only_value(item, token, family) for item, token in zip(items, story.tokens)]


def _only_value(item: Item, token: str, family: str) -> str:
    if item.slot is None or item.slot.claim or family not in item.attributes:
        return ""
    factor = factor_of(family)
    possible = np.ones(len(storyworld.ATTRIBUTES[family]), dtype=bool)
    for name, likelihood in item.table[token]:
        if name == factor.name:
            possible &= likelihood @ factor.projection(family) > 0
    return storyworld.ATTRIBUTES[family][int(possible.argmax())] if possible.sum() == 1 else ""


def _table(path: Path) -> Any:
    import pandas

    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": pandas.read_csv,
        ".tsv": lambda p: pandas.read_csv(p, sep="\t", quoting=3),
        ".jsonl": lambda p: pandas.read_json(p, lines=True),
        ".parquet": pandas.read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: labelled text is read from {', '.join(readers)} files.")
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    try:
        return readers[path.suffix.lower()](path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None
