"""What a model is fine-tuned for: classes of texts, the next token, preferences. See `steerkit.finetuning`.

    objective = Classification(model, train, validation, test, label_column="label")
    found = objective.evaluate(model, "test")         # {"loss": (n,), "correct": (n,), …}: one value for each example
    found.score, found.interval()                     # accuracy (perplexity, …) and its interval over documents

Texts are tokenised once, when the objective is made; runs with other seeds share it.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from steerkit import distributed
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError
from steerkit.finetune import (
    Example,
    Sized,
    all_log_probs,
    at_least_float32,
    encode_texts,
    log_probs,
    padded,
    token_log_probs,
)
from steerkit.loading import parse_dtype
from steerkit.models import HookedModel
from steerkit.sites import evaluating
from steerkit.stats import Interval, group_sums, jackknife
from steerkit.tokens import RowReader, Tokenization

SPLITS = ("train", "validation", "test")
POOLINGS = ("auto", "cls", "mean", "last")
_EVALUATION_TOKENS = 8192


E = TypeVar("E", bound=Sized)


@dataclass(frozen=True)
class Score:
    """The figure that a model is judged by: the mean of one of the values of examples, or a function of it."""

    name: str
    of: str
    """Whose mean it is of what `evaluate` gives."""
    higher_is_better: bool
    bounds: tuple[float, float]
    """Between which it lies."""
    exponential: bool = False
    """The mean's exponential is given."""

    def __call__(self, mean: Any) -> Any:
        return np.exp(mean) if self.exponential else mean


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, np.ndarray]):
    """Values of a split's examples, by name."""

    arrays: dict[str, Float[np.ndarray, " n"]]
    weight: Float[np.ndarray, " n"]
    """What each counts for in means: the tokens that are predicted, or 1."""
    document: Int[np.ndarray, " n"]
    """The document (or pair) of the split that each comes from."""
    judged_by: Score

    def __getitem__(self, name: str) -> Float[np.ndarray, " n"]:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics().items())
        return f"Evaluation({len(self.document):,} examples: {shown})"

    def mean(self, name: str) -> float:
        """Weighted mean of one of the values."""
        return float((self.weight * self.arrays[name]).sum() / self.weight.sum())

    @property
    def score(self) -> float:
        return float(self.judged_by(self.mean(self.judged_by.of)))

    def metrics(self) -> dict[str, float]:
        """Mean loss and score."""
        return {"loss": self.mean("loss"), self.judged_by.name: self.score}

    def interval(
        self, name: str | None = None, groups: Shaped[np.ndarray, " n"] | None = None, level: float = 0.95
    ) -> Interval:
        """Jackknife interval of a value's mean, or of the score, over documents, or `groups` of them, (n_documents,): sentences
        whose parts are documents, say. InputError with fewer than two."""
        clusters = self.document if groups is None else np.asarray(groups)[self.document]
        of = self.judged_by.of if name is None else name
        sums = group_sums(np.stack([self.weight * self.arrays[of], self.weight], axis=1), clusters)

        def statistic(s: np.ndarray) -> Any:
            mean = s[..., 0] / s[..., 1]
            return self.judged_by(mean) if name is None else mean

        found = jackknife(sums, statistic, level=level)
        return found.clipped(*self.judged_by.bounds) if name is None else found


class Objective(ABC, Generic[E]):
    """Examples of three splits, and what of a model's output on them is to be small."""

    name: ClassVar[str]
    judged_by: ClassVar[Score]
    head: nn.Module | None = None
    """What is trained beside the model."""

    def __init__(self, splits: Mapping[str, tuple[Sequence[E], Sequence[int]]]) -> None:
        self._examples = {split: list(examples) for split, (examples, _) in splits.items()}
        self._documents = {
            split: np.array(document, dtype=np.int64) for split, (_, document) in splits.items()
        }
        for split, examples in self._examples.items():
            if not examples:
                raise InputError(
                    f"The {split} split has no examples: give at least one text that is not blank."
                )

    @property
    def score_name(self) -> str:
        return self.judged_by.name

    @property
    def higher_is_better(self) -> bool:
        return self.judged_by.higher_is_better

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self._examples

    def examples(self, split: str) -> list[E]:
        """The examples of a split. Raises InputError if it was not given."""
        if split not in self._examples:
            raise InputError(f"There is no {split} split; given were {', '.join(self._examples)}.")
        return self._examples[split]

    @abstractmethod
    def outcomes(self, model: HookedModel, batch: Sequence[E]) -> dict[str, Float[Tensor, " batch"]]:
        """The values of each example: `loss`, through which gradients flow, and others."""

    def weight(self, example: E) -> float:
        """What an example counts for in the mean loss."""
        return 1.0

    def reset(self, model: HookedModel, seed: int) -> None:
        """Make the head anew."""

    def settings(self) -> dict[str, Any]:
        """What run.yaml says about it."""
        sizes = {split: len(examples) for split, examples in self._examples.items()}
        return {"name": self.name, "examples": sizes, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A sha256 (hex) of all examples, as their `repr` gives them: without what was computed with a model."""
        digest = hashlib.sha256()
        for split, examples in self._examples.items():
            for example in examples:
                digest.update(f"{split} {example!r}\n".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def evaluate(
        self, model: HookedModel, split: str = "test", dtype: str | torch.dtype | None = None
    ) -> Evaluation:
        """Values of all examples of a split, in evaluation mode; `dtype` as in `FinetuneConfig`.

        In a distributed run, which all processes must call it in, each does its share and all get the whole.
        """
        examples = self.examples(split)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        own = order[distributed.rank() :: distributed.world_size()]
        found: dict[str, Tensor] = {}
        with evaluating(model.model), autocast(model, dtype):
            while own or not found:
                longest = len(examples[(own or order)[-1]])
                size = max(1, _EVALUATION_TOKENS // max(1, longest))
                part, own = (own or order)[-size:], own[:-size]
                for name, values in self.outcomes(model, [examples[i] for i in part]).items():
                    whole = found.setdefault(name, torch.zeros(len(examples), dtype=torch.float64))
                    whole[part] = values.detach().double().cpu()
        if distributed.world_size() > 1:
            mine = torch.zeros(len(examples), dtype=torch.float64)
            mine[order[distributed.rank() :: distributed.world_size()]] = 1.0
            for whole in found.values():
                distributed.add_up(whole.mul_(mine))
        weight = np.array([self.weight(example) for example in examples])
        arrays = {name: whole.numpy() for name, whole in found.items()}
        return Evaluation(arrays, weight, self._documents[split], self.judged_by)


def autocast(model: HookedModel, dtype: str | torch.dtype | None) -> torch.autocast:
    """Products in `dtype` inside, or as the weights are if it is None."""
    lower = parse_dtype(dtype)
    return torch.autocast(model.device.type, dtype=lower or torch.bfloat16, enabled=lower is not None)


# -- classes of texts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled(Example):
    """A text and the index of its class."""

    label: int = -1


class Classification(Objective[Labelled]):
    """Classes of texts: cross-entropy of a linear head on the pooled final hidden state.

    A split is whatever `load_documents` takes, with the labels in `label_column` (StoryWorld: an attribute), or a sequence of
    (text, label). Texts longer than `context` tokens (by default what the model has, at most 512) are cut. `pooling`: the state of
    the first token (`cls`), the `last`, or the `mean` over all that are no pads; `auto` is `last` for a causal model and `mean`
    for others. The head is made from the run's seed, uniform within ±1/√d_model.

    Raises InputError for training labels of one class only, labels that training has not, and documents without any.
    """

    name = "classification"
    judged_by = Score("accuracy", "correct", higher_is_better=True, bounds=(0.0, 1.0))
    head: nn.Linear

    def __init__(
        self,
        model: HookedModel,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        pooling: str = "auto",
        label_column: str = "label",
        context: int | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}; it is one of {', '.join(POOLINGS)}.")
        if pooling == "cls" and model.is_causal:
            raise InputError(f"The first token of {model.name} sees no other: use pooling 'last' or 'mean'.")
        self.pooling = pooling if pooling != "auto" else "last" if model.is_causal else "mean"
        given = {
            split: _labelled(data, label_column)
            for split, data in zip(SPLITS, (train, validation, test))
            if data is not None
        }
        self.classes: tuple[str, ...] = tuple(sorted(set(given["train"][1])))
        if len(self.classes) < 2:
            raise InputError(f"All training labels are {self.classes[0]!r}: there are no classes to learn.")
        tokenization = Tokenization(context=context)
        super().__init__({split: self._encoded(model, *given[split], split, tokenization) for split in given})
        self.reset(model, 0)

    def _encoded(
        self,
        model: HookedModel,
        documents: Documents,
        labels: Sequence[str],
        split: str,
        tokenization: Tokenization,
    ) -> tuple[list[Labelled], list[int]]:
        unknown = sorted(set(labels) - set(self.classes))
        if unknown:
            raise InputError(f"The {split} split has the label {unknown[0]!r}, which no training text has.")
        examples, found = [], []
        for ids, document, position in _rows(model, documents, tokenization):
            if position == 0:
                examples.append(Labelled(ids, label=self.classes.index(labels[document])))
                found.append(document)
        return examples, found

    def reset(self, model: HookedModel, seed: int) -> None:
        self.head = nn.utils.skip_init(nn.Linear, model.d_model, len(self.classes))
        bound = 1 / math.sqrt(model.d_model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.head.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.head.to(model.device, torch.promote_types(model.dtype, torch.float32))

    def pooled(self, model: HookedModel, batch: Sequence[Example]) -> Float[Tensor, "batch d_model"]:
        """What the head reads."""
        ids, mask = padded(model, batch)
        states = at_least_float32(model.final(ids, mask))
        mask = mask.to(states.device)
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(batch), device=states.device), mask.sum(1) - 1]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def outcomes(self, model: HookedModel, batch: Sequence[Labelled]) -> dict[str, Float[Tensor, " batch"]]:
        return self.judged(self.pooled(model, batch), batch)

    def judged(
        self, states: Float[Tensor, "batch d_model"], batch: Sequence[Labelled]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """The outcomes, of what the head reads."""
        logits = at_least_float32(self.head(states.to(self.head.weight.device)))
        labels = torch.tensor([example.label for example in batch], device=logits.device)
        return {
            "loss": nn.functional.cross_entropy(logits, labels, reduction="none"),
            "correct": (logits.argmax(1) == labels).to(logits.dtype),
        }

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pooling": self.pooling, "classes": self.classes}


def _labelled(data: Any, column: str) -> tuple[Documents, list[str]]:
    """Texts and their labels. InputError for a text without one."""
    if isinstance(data, (str, Path, Documents)):
        documents = load_documents(data)
        label = documents.column(column)
        values: list[Any] = [label(i) for i in range(len(documents))]
    else:
        rows = list(data)
        documents = load_documents([text for text, _ in rows])
        values = [str(value) for _, value in rows]
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(
                f"{column} of {documents.name} is a label of tokens: classes are of whole texts."
            )
        if not value:
            raise InputError(f"Document {i} of {documents.name} has no label in {column}.")
    return documents, values


def _rows(
    model: HookedModel, data: Any, tokenization: Tokenization
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(token ids with the special ones around, index of the first token's document, its place in there) of each row."""
    reader = RowReader(model, load_documents(data), tokenization)
    prefix, suffix = reader.layout.prefix, reader.layout.suffix
    for row in reader.rows():
        yield (*prefix, *row.ids.tolist(), *suffix), int(row.document[0]), int(row.position[0])


# -- the next token --------------------------------------------------------------------------------------------------


class LanguageModelling(Objective[Example]):
    """The next token: mean cross-entropy, in nats, over all tokens of a batch but the first of each row.

    A split is whatever `load_documents` takes. One document is one example, and one that is longer than `context` tokens (by
    default what the model has, at most 512) several; with `packing`, documents are laid end to end and cut into full rows
    (`steerkit.tokens`). Raises InputError for a model that is no decoder with an LM head.
    """

    name = "language modelling"
    judged_by = Score("perplexity", "loss", higher_is_better=False, bounds=(1.0, math.inf), exponential=True)

    def __init__(
        self,
        model: HookedModel,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        packing: bool = False,
        context: int | None = None,
    ) -> None:
        if not (model.is_causal and model.has_lm_head):
            raise InputError(
                f"{model.name} does not predict the next token: give a decoder with its LM head."
            )
        self.tokenization = Tokenization(context=context, packing=packing)
        given = {split: data for split, data in zip(SPLITS, (train, validation, test)) if data is not None}
        super().__init__({split: self._encoded(model, data) for split, data in given.items()})

    def _encoded(self, model: HookedModel, data: Any) -> tuple[list[Example], list[int]]:
        rows = [(ids, document) for ids, document, _ in _rows(model, data, self.tokenization) if len(ids) > 1]
        return [Example(ids) for ids, _ in rows], [document for _, document in rows]

    def weight(self, example: Example) -> float:
        return len(example) - example.start

    def outcomes(self, model: HookedModel, batch: Sequence[Example]) -> dict[str, Float[Tensor, " batch"]]:
        found, counted = token_log_probs(model, batch)
        return {"loss": -found.sum(1) / counted.sum(1)}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "packing": self.tokenization.packing}


# -- preferences -----------------------------------------------------------------------------------------------------


class Pair(Protocol):
    """Two texts, of which the first is preferred; `steerkit.steering.Pair` is one."""

    def texts(self) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Preferred:
    """Both sides of a pair; they `start` where they begin to differ: what comes before is as likely in either."""

    chosen: Example
    rejected: Example
    reference: float = field(default=math.nan, repr=False)
    """log π_ref(chosen) - log π_ref(rejected)."""

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


class Preference(Objective[Preferred]):
    """Direct preference optimisation, against the model as it is when the objective is made.

        loss = -log σ(β Δ),   Δ = log π(y+|x) - log π(y-|x) - [log π_ref(y+|x) - log π_ref(y-|x)]

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; β 0.1 is the paper's. A split is a sequence of pairs
    (`steerkit.steering.Pairs`) or of (preferred text, other text). An example is `correct` where Δ > 0, half where Δ = 0, as it
    everywhere is for π_ref. Raises InputError for texts that are too long and for sides that are equal.
    """

    name = "preference"
    judged_by = Score("accuracy", "correct", higher_is_better=True, bounds=(0.0, 1.0))

    def __init__(
        self, model: HookedModel, train: Any, validation: Any = None, test: Any = None, *, beta: float = 0.1
    ) -> None:
        if not (model.is_causal and model.has_lm_head):
            raise InputError(
                f"{model.name} does not predict the next token: give a decoder with its LM head."
            )
        if not beta > 0:
            raise InputError(f"beta is {beta}; it must be positive.")
        self.beta = beta
        given = {split: pairs for split, pairs in zip(SPLITS, (train, validation, test)) if pairs is not None}
        super().__init__({split: _preferred(model, pairs, split) for split, pairs in given.items()})

    def outcomes(self, model: HookedModel, batch: Sequence[Preferred]) -> dict[str, Float[Tensor, " batch"]]:
        chosen, rejected = log_probs(model, _sides(batch)).chunk(2)
        reference = torch.tensor([pair.reference for pair in batch], dtype=torch.float64).to(chosen)
        margin = chosen - rejected - reference
        return {
            "loss": -nn.functional.logsigmoid(self.beta * margin),
            "correct": 0.5 * (1 + margin.sign()),
            "margin": margin,
        }

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "beta": self.beta}


def _preferred(model: HookedModel, pairs: Any, split: str) -> tuple[list[Preferred], range]:
    """Pairs as examples, with their reference."""
    found = []
    for i, pair in enumerate(pairs):
        chosen, rejected = encode_texts(model, pair if isinstance(pair, tuple) else pair.texts())
        if chosen == rejected:
            raise InputError(f"Both sides of pair {i} of the {split} split are the same tokens.")
        same = (j for j, (a, b) in enumerate(zip(chosen.ids, rejected.ids)) if a != b)
        start = max(1, next(same, min(len(chosen), len(rejected))))
        found.append(Preferred(Example(chosen.ids, start), Example(rejected.ids, start)))
    with evaluating(model.model):
        sides = all_log_probs(model, _sides(found)).double()
    gaps = (sides[: len(found)] - sides[len(found) :]).tolist()
    return [Preferred(p.chosen, p.rejected, gap) for p, gap in zip(found, gaps)], range(len(found))


def _sides(pairs: Sequence[Preferred]) -> list[Example]:
    """Preferred sides, then the others."""
    return [p.chosen for p in pairs] + [p.rejected for p in pairs]
