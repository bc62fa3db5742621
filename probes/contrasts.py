"""Two runs that differ in one thing, and a number that tells them apart: what patching sets out to explain.

    contrast = Contrast.of_prompts(model, clean, corrupt, answers="red", wrong="blue")
    contrast = Contrast.of_models(base, tuned, prompts, answers="red", wrong="blue")
    contrast = Contrast.of_prompts(model, clean, corrupt, metric=lambda logits, pair: logits[:, 17])

Either one model on a clean and a corrupt prompt, or a base model (clean) and a tuned one (corrupt) on one
prompt. The metric is of the logits where the next token is read: logit of the answer less that of the wrong
one, or the answer's log-probability where no wrong one is given (Heimersheim & Nanda 2024, “How to use and
interpret activation patching”, https://arxiv.org/abs/2404.15255: the difference does not saturate, and sees
what speaks against the answer). A masked language model is read at the mask token of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import evaluating
from steerkit.tokens import BATCH_TOKENS

Metric = Callable[[Float[Tensor, "rows d_vocab"], Int[Tensor, " rows"]], Float[Tensor, " rows"]]
"""Logits where they are read, and the index of the pair that each row belongs to -> one number a row."""
Prompt = str | Sequence[int]
"""Text, or token ids."""
Answers = str | int | Sequence[str | int]
"""One token for all prompts, or one each: text or a token id."""
Direction = Literal["denoising", "noising"]
"""Into which run is patched: the corrupt one, from the clean; or the clean one, from the corrupt."""
Positions = Literal["each", "all"] | Mapping[str, "int | Sequence[int | tuple[int, int]]"]
"""`each` token, one patch each; `all` tokens in one patch; or names of one token a pair: an index, the same
in both prompts or (clean, corrupt), negative ones from the end."""
_PAIRS = 16
"""Pairs in a forward, at most: there is to be room for several patches of each."""


@dataclass(frozen=True)
class LogitDifference:
    """Logit of the answer less the logit of the wrong one."""

    answers: Int[Tensor, " n"]
    wrong: Int[Tensor, " n"]

    def __call__(
        self, logits: Float[Tensor, "rows d_vocab"], pair: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        row = torch.arange(len(logits), device=logits.device)
        answers, wrong = (ids.to(logits.device)[pair] for ids in (self.answers, self.wrong))
        return logits[row, answers] - logits[row, wrong]


@dataclass(frozen=True)
class LogProbability:
    """Log-probability of the answer, in nats."""

    answers: Int[Tensor, " n"]

    def __call__(
        self, logits: Float[Tensor, "rows d_vocab"], pair: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        row = torch.arange(len(logits), device=logits.device)
        return logits.log_softmax(-1)[row, self.answers.to(logits.device)[pair]]


@dataclass(frozen=True)
class Run:
    """Prompts, right-padded, as one model reads them."""

    model: HookedModel
    ids: Int[Tensor, "n pos"] = field(repr=False)
    mask: Int[Tensor, "n pos"] = field(repr=False)
    read: Int[Tensor, " n"] = field(repr=False)
    """Where the metric's logits are: the last token, or the mask token of a masked language model."""

    @classmethod
    def of(cls, model: HookedModel, prompts: Sequence[Prompt]) -> Run:
        """Tokenise. Raises InputError where the model gives no logits, or none that a metric could be of."""
        if not model.has_lm_head:
            raise InputError(
                f"{model.name} has no language-model head: an answer's logit makes no sense for it."
            )
        if not prompts:
            raise InputError("There are no prompts.")
        rows = [prompt_ids(model, prompt) for prompt in prompts]
        if not all(rows):
            raise InputError("A prompt is empty: give at least one token.")
        longest = max(map(len, rows))
        ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows], device=model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
        return cls(model, ids, mask, lengths - 1 if model.is_causal else _mask_tokens(model, rows))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def logits(
        self, final: Float[Tensor, "copies*n pos d_model"], pairs: slice
    ) -> Float[Tensor, "rows d_vocab"]:
        """Logits where they are read, from final states of these pairs, or of several copies laid end to end."""
        read = self.read[pairs].to(final.device)
        read = read.repeat(len(final) // len(read))
        return self.model.unembed(final[torch.arange(len(final), device=final.device), read]).float()


def prompt_ids(model: HookedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with the special tokens that the model expects but no EOS that would end it.

    Ids are taken as they are.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
    ids = list(model.tokenizer(prompt)["input_ids"])
    if model.is_causal and len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def answer_ids(model: HookedModel, answers: Answers, n: int) -> Int[Tensor, " n"]:
    """Ids of answers, one for all prompts or one each. Raises InputError for an answer of several tokens."""
    given = [answers] * n if isinstance(answers, (str, int)) else list(answers)
    if len(given) != n:
        raise InputError(f"{len(given)} answers for {n} prompts: give one, or one each.")
    known = {answer: _answer_id(model, answer) for answer in dict.fromkeys(given)}
    return torch.tensor([known[answer] for answer in given], device=model.device)


def _answer_id(model: HookedModel, answer: str | int) -> int:
    if isinstance(answer, int):
        if not 0 <= answer < model.d_vocab:
            raise InputError(
                f"Answer {answer} is no token id of {model.name}: they go from 0 to {model.d_vocab - 1}."
            )
        return answer
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: give the answer {answer!r} as a token id.")
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        tokens = ", ".join(map(repr, model.tokenizer.convert_ids_to_tokens(ids)))
        raise InputError(
            f"The answer {answer!r} is {len(ids)} tokens ({tokens}) and the metric is of one: "
            "give its first token, or a word that is one (mind the space before it)."
        )
    if ids[0] == model.tokenizer.unk_token_id:
        raise InputError(f"The answer {answer!r} is not in the vocabulary of {model.name}.")
    return ids[0]


def _metric(
    model: HookedModel, n: int, answers: Answers | None, wrong: Answers | None, metric: Metric | None
) -> Metric:
    if (answers is None) == (metric is None) or (wrong is not None and answers is None):
        raise InputError("Give answers, with wrong ones beside them or not; or else a metric.")
    if metric is not None:
        return metric
    assert answers is not None
    right = answer_ids(model, answers, n)
    return LogProbability(right) if wrong is None else LogitDifference(right, answer_ids(model, wrong, n))


def _mask_tokens(model: HookedModel, rows: Sequence[list[int]]) -> Int[Tensor, " n"]:
    """Where a masked language model fills in."""
    mask_id = getattr(model.tokenizer, "mask_token_id", None)
    if mask_id is None:
        raise InputError(f"{model.name} predicts no next token, and it has no mask token to be read at.")
    if any(row.count(mask_id) != 1 for row in rows):
        raise InputError(
            f"{model.name} predicts no next token: its prompts need exactly one mask token each."
        )
    return torch.tensor([row.index(mask_id) for row in rows], device=model.device)


@dataclass(frozen=True)
class Position:
    """Which tokens one patch takes and replaces, pair by pair."""

    label: str
    clean: Int[Tensor, "n k"]
    corrupt: Int[Tensor, "n k"]

    def indices(self, direction: Direction, pairs: slice) -> tuple[Tensor, Tensor]:
        """(where activations come from, where they go), (n, k) each."""
        clean, corrupt = self.clean[pairs], self.corrupt[pairs]
        return (clean, corrupt) if direction == "denoising" else (corrupt, clean)


@dataclass(frozen=True)
class Contrast:
    """Pairs of runs and the metric of both."""

    clean: Run
    corrupt: Run
    metric: Metric = field(repr=False)

    @classmethod
    def of_prompts(
        cls,
        model: HookedModel,
        clean: Sequence[Prompt],
        corrupt: Sequence[Prompt],
        *,
        answers: Answers | None = None,
        wrong: Answers | None = None,
        metric: Metric | None = None,
    ) -> Contrast:
        """One model on prompts and their corrupted forms. Raises InputError as `Run.of` and `answer_ids` do."""
        if len(clean) != len(corrupt):
            raise InputError(f"{len(clean)} clean and {len(corrupt)} corrupt prompts: they must be pairs.")
        found = _metric(model, len(clean), answers, wrong, metric)
        return cls(Run.of(model, clean), Run.of(model, corrupt), found)

    @classmethod
    def of_models(
        cls,
        base: HookedModel,
        tuned: HookedModel,
        prompts: Sequence[Prompt],
        *,
        answers: Answers | None = None,
        wrong: Answers | None = None,
        metric: Metric | None = None,
    ) -> Contrast:
        """A base model (clean) and a tuned copy of it (corrupt) on the same prompts."""
        sizes = [(m.n_layers, m.d_model, m.d_vocab, m.n_heads, m.is_causal) for m in (base, tuned)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{base.name} and {tuned.name} are not of one architecture: nothing can be patched."
            )
        run = Run.of(base, prompts)
        tensors = (tensor.to(tuned.device) for tensor in (run.ids, run.mask, run.read))
        return cls(run, Run(tuned, *tensors), _metric(base, len(prompts), answers, wrong, metric))

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        models = list(dict.fromkeys((self.clean.model.name, self.corrupt.model.name)))
        return f"Contrast({len(self)} pairs, {' against '.join(models)}, {type(self.metric).__name__})"

    def runs(self, direction: Direction) -> tuple[Run, Run]:
        """(the run that activations come from, the run that they are put into)."""
        if direction not in ("denoising", "noising"):
            raise InputError(f"The direction is {direction!r}: choose denoising or noising.")
        return (self.clean, self.corrupt) if direction == "denoising" else (self.corrupt, self.clean)

    def batches(self, batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[slice, int]]:
        """Slices of pairs, the same ones always, and how many copies of each make a forward of about `batch_tokens`
        tokens: one at least."""
        longest = max(self.clean.ids.shape[1], self.corrupt.ids.shape[1])
        size = min(len(self), _PAIRS, max(1, BATCH_TOKENS // longest))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self))), max(1, batch_tokens // (size * longest))

    def measure(
        self, run: Run, final: Float[Tensor, "copies*n pos d_model"], pairs: slice
    ) -> Float[Tensor, "copies n"]:
        """The metric of final states. Raises NumericsError on NaN or inf."""
        logits = run.logits(final, pairs)
        index = torch.arange(pairs.start, pairs.stop, device=logits.device)
        values = self.metric(logits, index.repeat(len(logits) // len(index)))
        if values.shape != logits.shape[:1]:
            raise InputError(
                f"The metric gave {tuple(values.shape)} for {len(logits)} rows: it gives one number a row."
            )
        if not bool(values.isfinite().all()):
            raise NumericsError(
                f"The metric of {run.model.name} on the pairs from {pairs.start} on is NaN or inf."
            )
        return values.view(-1, len(index))

    @torch.no_grad()
    def values(self, run: Run) -> Float[Tensor, " n"]:
        """The metric of a run as it is."""
        with evaluating(run.model.model):
            found = [
                self.measure(run, run.model.final(run.ids[pairs], run.mask[pairs]), pairs)[0]
                for pairs, _ in self.batches()
            ]
        return torch.cat(found).cpu()

    @cached_property
    def clean_values(self) -> Float[Tensor, " n"]:
        return self.values(self.clean)

    @cached_property
    def corrupt_values(self) -> Float[Tensor, " n"]:
        return self.values(self.corrupt)

    def positions(self, positions: Positions) -> tuple[Position, ...]:
        """What `positions` means for these prompts. Raises InputError for prompts that are not aligned and for
        indices out of range."""
        if isinstance(positions, Mapping):
            return tuple(self._named(label, given) for label, given in positions.items())
        if positions not in ("each", "all"):
            raise InputError(
                f"positions is {positions!r}: choose each, all, or name them: {{'fact': 7, 'last': -1}}."
            )
        for i, (a, b) in enumerate(zip(self.clean.lengths, self.corrupt.lengths)):
            if a != b:
                raise InputError(
                    f"Pair {i} has {a} clean and {b} corrupt tokens: prompts are aligned token by token; "
                    "give prompts of one length, or positions."
                )
        width = self.clean.ids.shape[1]
        index = torch.arange(width).expand(len(self), width)
        if positions == "all":
            return (Position("all", index, index),)
        if len(set(self.clean.lengths)) > 1:
            raise InputError(
                "The pairs have different lengths, so that a position means another thing in each: name positions."
            )
        return tuple(Position(self._label(i), index[:, i : i + 1], index[:, i : i + 1]) for i in range(width))

    def _named(self, label: str, given: int | Sequence[int | tuple[int, int]]) -> Position:
        rows = [given] * len(self) if isinstance(given, int) else list(given)
        if len(rows) != len(self):
            raise InputError(f"Position {label!r} has {len(rows)} indices for {len(self)} pairs.")
        both = [(row, row) if isinstance(row, int) else row for row in rows]
        sides = []
        for side, lengths in enumerate((self.clean.lengths, self.corrupt.lengths)):
            for i, (row, length) in enumerate(zip(both, lengths)):
                if not -length <= row[side] < length:
                    raise InputError(
                        f"Position {label!r} is {row[side]} in pair {i}, whose prompt has {length} tokens."
                    )
            sides.append(torch.tensor([[row[side] % length] for row, length in zip(both, lengths)]))
        return Position(label, *sides)

    def _label(self, i: int) -> str:
        """A position's number, with its token where all pairs have the same."""
        tokenizer = self.clean.model.tokenizer
        if tokenizer is None:
            return str(i)
        found = [run.ids[:, i].unique().tolist() for run in (self.clean, self.corrupt)]
        tokens = [
            tokenizer.convert_ids_to_tokens(ids[0]).strip("Ġ▁ ") if len(ids) == 1 else "…" for ids in found
        ]
        return f"{i} {tokens[0]}" if tokens[0] == tokens[1] else f"{i} {tokens[0]}/{tokens[1]}"
