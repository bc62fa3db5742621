"""Sampling from a model and measuring, exactly, how far its next-token distributions are from another's.

    samples = sample(model, encode_prompts(model, prompts), steered, samples=4, max_new_tokens=40)
    scores = divergence(model, samples, steered)          # kl, own and base log-probabilities of every generated token

Every row of every batch draws from a generator of its own, seeded by (seed, prompt, sample): the same draws for every measurement
(common random numbers; by the Gumbel trick like distributions then choose like tokens), whatever the batch size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.errors import InputError
from steerkit.lens import is_transformer_lens
from steerkit.loading import quiet
from steerkit.models import HookedModel

Changed = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Prompt lengths of the rows of the coming forwards -> a context in which the model is changed."""

Ids = tuple[int, ...]

LOGITS_BUDGET = 1 << 25
"""Elements of logits that are held at once while distributions are compared."""


@dataclass(frozen=True)
class Samples:
    """Continuations of prompts, sorted by prompt, then by sample."""

    prompts: tuple[Ids, ...]
    """What the model was given, for each row."""
    new: tuple[Ids, ...]
    """The generated tokens, up to and including the end of the text."""
    prompt_index: Int[np.ndarray, " rows"]
    broken: Bool[np.ndarray, " rows"]
    """Rows whose logits were NaN or infinite; they end there."""


@dataclass(frozen=True)
class Divergence:
    """Of each generated token, in nats; rows of `Samples` one after the other."""

    row: Int[np.ndarray, " tokens"]
    kl: Float[np.ndarray, " tokens"]
    """KL(changed ‖ base) of the whole next-token distributions."""
    own: Float[np.ndarray, " tokens"]
    """log-probability of the token under the changed model."""
    base: Float[np.ndarray, " tokens"]
    """log-probability of the token under the base model."""


def encode_prompts(model: HookedModel, prompts: Sequence[str]) -> list[Ids]:
    """Token ids as `generate` makes them. Raises InputError without head, tokenizer or a token, or for an encoder."""
    if not model.has_lm_head:
        raise InputError(
            f"{model.name} has no language-model head: it gives hidden states and can't be sampled."
        )
    if not model.is_causal:
        raise InputError(
            f"{model.name} is no decoder-only model: its continuations are not one sequence with the prompt."
        )
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
    rows = []
    for number, prompt in enumerate(prompts):
        ids = list(model.tokenizer(prompt)["input_ids"])
        if len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids and model.bos_id is not None:
            ids = [model.bos_id]
        if not ids:
            raise InputError(f"Prompt {number} has no token: give at least one.")
        rows.append(tuple(ids))
    return rows


def sample(
    model: HookedModel,
    prompts: Sequence[Ids],
    changed: Changed,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Samples:
    """`samples` continuations of each prompt. Raises InputError when a prompt and its continuation exceed the context."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.context:
        raise InputError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {model.name} ({model.context})."
        )
    rows = list(itertools.product(range(len(prompts)), range(samples)))
    new: list[Ids] = [()] * len(rows)
    broken = np.zeros(len(rows), dtype=bool)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[rows[i][0]]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        draws = Draws([(seed, *rows[i]) for i in chosen], temperature, text_ends(model), model.device)
        batch = [prompts[rows[i][0]] for i in chosen]
        with torch.no_grad(), changed([len(ids) for ids in batch]):
            found = (_stepwise if is_transformer_lens(model.model) else _generated)(
                model, batch, draws, max_new_tokens
            )
        for row, i in enumerate(chosen):
            broken[i] = bool(draws.broken[row])
            new[i] = () if broken[i] else _until_end(found[row], draws.ends)
    index = np.array([prompt for prompt, _ in rows])
    return Samples(tuple(prompts[i] for i in index), tuple(new), index, broken)


def divergence(
    model: HookedModel,
    samples: Samples,
    changed: Changed,
    *,
    base_prompts: Sequence[Ids] | None = None,
    batch_size: int = 64,
) -> Divergence:
    """KL(changed ‖ base) at every generated token, by a forward of each over the whole sequences.

    `base_prompts`: what stands before the continuations in the base model's forward, for each row, if not the same.
    Rows that are broken, or turn out to be here, have NaN for their tokens (a broken row without tokens: one).
    """
    base_prompts = samples.prompts if base_prompts is None else base_prompts
    parts: list[np.ndarray] = []
    before = [max(len(own), len(base)) for own, base in zip(samples.prompts, base_prompts)]
    lengths = np.array([(n + len(new)) * bool(new) for n, new in zip(before, samples.new)])
    for chosen in batches(lengths, batch_size, model.d_vocab):
        new = [samples.new[i] for i in chosen]
        own_rows = [samples.prompts[i] for i in chosen]
        with torch.no_grad():
            with changed([len(ids) for ids in own_rows]):
                own = next_token_log_probs(model, own_rows, new)
            base = next_token_log_probs(model, [base_prompts[i] for i in chosen], new)
            tokens = torch.tensor([token for ids in new for token in ids], device=own.device)[:, None]
            own_p = own.exp()
            kl = torch.where(own_p > 0, own_p * (own - base), 0.0).sum(-1)
            kl = torch.where(own.isnan().any(-1), torch.nan, kl.clamp_min(0.0))
            found = [kl, own.gather(1, tokens)[:, 0], base.gather(1, tokens)[:, 0]]
        row = np.repeat(chosen, [len(ids) for ids in new])
        parts.append(np.stack([row, *(values.double().cpu().numpy() for values in found)]))
    nothing = np.flatnonzero(samples.broken)
    parts.append(np.stack([nothing, *np.full((3, len(nothing)), np.nan)]))
    table = np.concatenate(parts, axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    return Divergence(table[0].astype(np.int64), table[1], table[2], table[3])


def next_token_log_probs(
    model: HookedModel, prompts: Sequence[Ids], new: Sequence[Ids]
) -> Float[Tensor, "tokens d_vocab"]:
    """Log-probabilities of the next token (temperature 1) at each place where a token of `new` follows.

    One forward of all rows, padded on the right; a row of NaN where the logits are NaN or infinite. In float64 if the device has
    it: a small divergence is a small difference of these.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, new)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    places = torch.tensor(
        [
            (i, at)
            for i, (prompt, own) in enumerate(zip(prompts, new))
            for at in range(len(prompt) - 1, len(prompt) + len(own) - 1)
        ]
    )
    logits = model.logits(ids, mask)
    found = logits[places[:, 0].to(logits.device), places[:, 1].to(logits.device)]
    found = found.float() if found.device.type == "mps" else found.double()
    return found.masked_fill(_unusable(found)[:, None], torch.nan).log_softmax(-1)


def batches(lengths: Int[np.ndarray, " rows"], batch_size: int, d_vocab: int) -> Iterator[list[int]]:
    """Rows of like length together, in batches whose logits fit the budget; those of length 0 are left out."""
    chosen: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        most = max(1, min(batch_size, LOGITS_BUDGET // (max(1, int(lengths[i])) * d_vocab)))
        if chosen and len(chosen) >= most:
            yield chosen
            chosen = []
        if lengths[i]:
            chosen.append(i)
    if chosen:
        yield chosen


def unchanged(prompt_lengths: Sequence[int]) -> AbstractContextManager[None]:
    """The model as it is."""
    return nullcontext()


class Draws:
    """Chooses each row's next token by noise of the row's own: argmax(logits / temperature + Gumbel noise)."""

    def __init__(
        self, seeds: Sequence[tuple[int, ...]], temperature: float, ends: frozenset[int], device: torch.device
    ) -> None:
        self.generators = []
        for words in seeds:
            state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
            self.generators.append(torch.Generator(device).manual_seed(int(state) >> 1))
        self.temperature = temperature
        self.ends = ends
        self.broken = torch.zeros(len(seeds), dtype=torch.bool, device=device)

    def __call__(
        self, input_ids: Tensor, scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """The scores with noise, so that the greedy choice is the draw; of broken rows, such that they end."""
        noise = torch.empty_like(scores, dtype=torch.float32, device=self.broken.device)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        self.broken |= _unusable(scores).to(self.broken.device)
        drawn = scores.float() / self.temperature - noise.to(scores.device).log()
        ended = torch.zeros_like(drawn[0])
        ended[min(self.ends, default=0)] = 1.0
        return torch.where(self.broken.to(scores.device)[:, None], ended, drawn)


def _generated(
    model: HookedModel, prompts: Sequence[Ids], draws: Draws, max_new_tokens: int
) -> list[list[int]]:
    """With the model's own `generate` and its cache; penalties that its settings may ask for are off."""
    from transformers import LogitsProcessorList

    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[model.pad_id] * (longest - len(row)) + list(row) for row in prompts], device=model.device
    )
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    inner: Any = model.model
    with quiet():
        out = inner.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=model.pad_id,
            eos_token_id=sorted(draws.ends) or None,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            logits_processor=LogitsProcessorList([draws]),
        )
    return out[:, longest:].tolist()


def _stepwise(
    model: HookedModel, prompts: Sequence[Ids], draws: Draws, max_new_tokens: int
) -> list[list[int]]:
    """A forward of the whole text for every token, for models whose `generate` takes no draws from outside."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        longest = max(map(len, rows))
        ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logits = model.logits(ids, mask)
        last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        chosen = draws(ids, logits[torch.arange(len(rows), device=logits.device), last]).argmax(-1).tolist()
        for row, token in zip(rows, chosen):
            row.append(token)
        if all(draws.ends & set(row[len(prompt) :]) for row, prompt in zip(rows, prompts)):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def text_ends(model: HookedModel) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    own = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    tokenizer = getattr(model.tokenizer, "eos_token_id", None)
    several = own if isinstance(own, (list, tuple)) else [own]
    return frozenset(i for i in (*several, tokenizer) if isinstance(i, int) and 0 <= i < model.d_vocab)


def _until_end(ids: Sequence[int], ends: frozenset[int]) -> Ids:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])


def _unusable(logits: Float[Tensor, "n d_vocab"]) -> Bool[Tensor, " n"]:
    """Where there is NaN, infinity, or nothing but minus infinity."""
    top = logits.max(-1).values
    return logits.isnan().any(-1) | top.isinf()
