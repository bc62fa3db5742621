"""Explanations from outside, and how well they predict.

    def explainer(evidence: Evidence) -> str | tuple[str, Simulator]: ...       # a language model, a person, a rule
    build(…, explainer=explainer)

The explainer sees every other one of a latent's contexts. If it also gives a simulator – a function from the tokens of a context
to a predicted activation each – that is scored on the contexts which it has not seen, and on near misses, where the true
activations are 0: by the correlation of predicted and true activations over all those tokens (Bills et al. 2023), and by
detection, how often a context is rightly called active or silent (mean of the two shares; called active if any token's
prediction is above 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.latents import WINDOW, LatentStats

Simulator = Callable[[Sequence[str]], Sequence[float]]
"""Predicted activations of the tokens of a context, in any unit; 0: silent."""


@dataclass(frozen=True)
class Context:
    """Text around a strongest token, token by token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """What an explainer gets to see of a latent."""

    latent: int
    density: float
    maximum: float
    contexts: tuple[Context, ...]
    """The strongest first, then weaker ones."""
    tokens: tuple[tuple[str, float], ...]
    """Its strongest tokens, with their shares of its activation."""
    promoted: tuple[str, ...]
    """Tokens that its decoder direction speaks for; empty where that is not defined."""
    suppressed: tuple[str, ...]


Explainer = Callable[[Evidence], "str | tuple[str, Simulator]"]


class Explanations:
    """What `explainer` says of the latents that this is called with. `texts[i]` is what token i looks like."""

    def __init__(self, explainer: Explainer, stats: LatentStats, texts: Sequence[str]) -> None:
        self.explainer, self.stats, self.texts = explainer, stats, texts
        self.name = getattr(explainer, "__name__", type(explainer).__name__)

    def __call__(self, latents: Sequence[int]) -> list[dict[str, Any] | None]:
        """{text, by, score, n, detection} of each; of one whose explainer failed, the failure as its text."""
        return [self._explained(i) if self.stats.count[i] else None for i in latents]

    def _explained(self, latent: int) -> dict[str, Any]:
        record: dict[str, Any] = {"by": self.name, "score": None, "n": 0, "detection": None}
        try:
            answer = self.explainer(self.evidence(latent))
            text, simulator = (answer, None) if isinstance(answer, str) else answer
            record["text"] = str(text)
            if simulator is not None:
                record |= self._scores(latent, simulator)
        except Exception as error:  # whatever an explainer from outside does, the dashboard is not lost
            record |= {"text": f"The explainer failed: {type(error).__name__}: {error}", "failed": True}
        return record

    def evidence(self, latent: int) -> Evidence:
        """What the explainer sees of a latent."""
        stats = self.stats
        logits = [] if stats.logit_ids is None else [self.texts[i] for i in stats.logit_ids[latent]]
        half = len(logits) // 2
        return Evidence(
            latent,
            float(stats.density[latent]),
            float(stats.maximum[latent]),
            tuple(self._contexts(latent)[::2]),
            tuple(
                (self.texts[i], float(share))
                for i, share in zip(stats.token_ids[latent], stats.token_share[latent])
                if i >= 0
            ),
            tuple(logits[:half]),
            tuple(reversed(logits[half:])),
        )

    def _contexts(self, latent: int) -> list[Context]:
        return [
            self._context(example.row, example.position, example.window)
            for example in self.stats.examples(latent)
        ]

    def _misses(self, latent: int) -> list[Context]:
        rows = zip(self.stats.miss_row[latent], self.stats.miss_position[latent])
        silent = np.zeros(2 * WINDOW + 1)
        return [self._context(int(row), int(position), silent) for row, position in rows if row >= 0]

    def _context(self, row: int, position: int, window: np.ndarray) -> Context:
        ids = self.stats.row(row)
        first, end = max(0, position - WINDOW), min(len(ids), position + WINDOW + 1)
        values = window[first - position + WINDOW : end - position + WINDOW]
        return Context(tuple(self.texts[i] for i in ids[first:end]), tuple(map(float, values)))

    def _scores(self, latent: int, simulator: Simulator) -> dict[str, Any]:
        active, silent = self._contexts(latent)[1::2], self._misses(latent)
        if not active:
            return {}
        predicted = [np.asarray(simulator(context.tokens), dtype=float) for context in active + silent]
        for context, values in zip(active + silent, predicted):
            if values.shape != (len(context.tokens),) or not np.isfinite(values).all():
                raise ValueError(
                    f"the simulator gave {values.shape} for {len(context.tokens)} tokens, or no numbers"
                )
        true = np.concatenate([context.activations for context in active + silent])
        guess = np.concatenate(predicted)
        called = np.array([values.max() > 0 for values in predicted])
        right = [called[: len(active)].mean(), (~called[len(active) :]).mean() if silent else np.nan]
        varied = guess.std() > 0 and true.std() > 0
        return {
            "score": round(float(np.corrcoef(guess, true)[0, 1]), 4) if varied else 0.0,
            "n": len(active) + len(silent),
            "detection": round(float(np.mean(right)), 4) if silent else None,
        }
