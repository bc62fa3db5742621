"""Propensity: which of two answers a model prefers, without sampling: A or B, yes or no, or whole sentences.

    bench = Bench(model, prompts, Propensity(load_pairs("test.csv")))
    found = bench.measure(vector, strength=1.0)
    found.effect, found.propensity["log_odds"]           # share that prefers the positive side, mean log-odds

CAA's measure (Rimsky et al. 2024, https://arxiv.org/abs/2312.06681), for sides of any length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from steerkit.errors import InputError, did_you_mean
from steerkit.models import HookedModel
from steerkit.steering.pairs import Pairs, join, load_pairs
from steerkit.steering.reading import encode_side
from steerkit.steering.sampling import Changed, batches, next_token_log_probs, unchanged

QUANTITIES = ("preferred", "log_odds", "log_prob")


@dataclass(frozen=True)
class Preferences:
    """Of each pair, in nats; NaN where the logits are NaN or infinite."""

    positive: Float[np.ndarray, " pairs"]
    """log p(positive | prompt): the sum over its tokens."""
    negative: Float[np.ndarray, " pairs"]
    group: Int[np.ndarray, " pairs"]
    """Which pairs have the same prompt."""

    def values(self, quantity: str) -> Float[np.ndarray, " pairs"]:
        """`preferred`: 1 where the positive side is likelier, 1/2 if both are alike; `log_odds`; `log_prob` of the positive."""
        if quantity == "log_prob":
            return self.positive
        odds = self.positive - self.negative
        return odds if quantity == "log_odds" else np.where(np.isnan(odds), np.nan, 0.5 * (1 + np.sign(odds)))


@dataclass(frozen=True)
class Propensity:
    """log p(positive | prompt) - log p(negative | prompt) for pairs, under the changed model.

    Each side is scored after the prompt, whose tokens – those that both texts begin with – count as the prompt for `Where`.
    """

    pairs: Any = field(repr=False)
    """Whatever `load_pairs` takes."""
    quantity: str = "preferred"
    """What `Measurement.effect` is: the share of pairs whose positive side is `preferred`, or the mean `log_odds` or `log_prob`."""

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise InputError(
                f"There is no {self.quantity!r} of a propensity.{did_you_mean(self.quantity, QUANTITIES)} "
                f"There are {', '.join(QUANTITIES)}."
            )
        object.__setattr__(self, "pairs", load_pairs(self.pairs))

    @property
    def name(self) -> str:
        return f"propensity ({self.quantity}): {self.pairs.name}"

    @property
    def binary(self) -> bool:
        return self.quantity == "preferred"

    def measure(
        self, model: HookedModel, changed: Changed = unchanged, *, prefix: str = "", batch_size: int = 64
    ) -> Preferences:
        """Both sides' log-probabilities, with `prefix` before each prompt.

        Raises InputError for a model without head or tokenizer, and for a side without a token of its own.
        """
        pairs: Pairs = self.pairs
        sides = [
            encode_side(model, join(prefix, pair.prompt), side)
            for pair in pairs
            for side in (pair.positive, pair.negative)
        ]
        prompts, answers = [], []
        for ids, start in sides:
            start = max(1, start)
            stop = len(ids) - (len(ids) > start + 1 and ids[-1] == model.tokenizer.eos_token_id)
            if stop <= start:
                raise InputError(f"A side of {pairs.name} has no token after the prompt's first.")
            prompts.append(ids[:start])
            answers.append(ids[start:stop])
        found = np.full(len(sides), np.nan)
        lengths = np.array([len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)])
        for chosen in batches(lengths, batch_size, model.d_vocab):
            own = [prompts[i] for i in chosen]
            new = [answers[i] for i in chosen]
            with torch.no_grad(), changed([len(ids) for ids in own]):
                log_probs = next_token_log_probs(model, own, new)
            tokens = torch.tensor([token for ids in new for token in ids], device=log_probs.device)[:, None]
            parts = log_probs.gather(1, tokens)[:, 0].double().cpu().split([len(ids) for ids in new])
            found[chosen] = [float(part.sum()) for part in parts]
        prompts_of = [pair.prompt or f"\0{i}" for i, pair in enumerate(pairs)]
        return Preferences(found[0::2], found[1::2], np.unique(prompts_of, return_inverse=True)[1])
