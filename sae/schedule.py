"""Schedules over the steps of a training run, and the controller that steers the sparsity penalty to a target L0.

Everything is a function of the step and of a small state that checkpoints hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def learning_rate_factor(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """Factor of the learning rate at `step` (from 0): linear up over the share `warmup`, linear to 0 over the last `decay`."""
    rising = min(1.0, (step + 1) / max(1.0, warmup * n_steps))
    falling = min(1.0, (n_steps - step) / max(1.0, decay * n_steps))
    return min(rising, falling)


@dataclass
class TargetL0:
    """Steers a penalty's coefficient so that the mean number of active latents ends at `target`.

    A proportional-integral controller in logarithms: with e = ln(L0 / target), averaged over recent batches,

        ln λ ← ln λ + gain · clip(e) + damping · (e - e_before)

    The gain is per step and set by the length of the run, so that short and long runs settle alike; an L0 that is too high by half
    raises λ by half in about `1 / responses` of the run. λ starts small: a warm-up in itself.
    """

    target: float
    n_steps: int
    log_coefficient: float = math.log(0.1)
    error: float | None = None
    responses: float = 20.0

    def update(self, l0: float) -> None:
        """Take in the mean L0 of one batch."""
        now = math.log(max(l0, 0.05 * self.target) / self.target)
        if self.error is None:
            self.error = now
        smooth = 0.8 * self.error + 0.2 * now
        gain = min(0.1, self.responses / self.n_steps)
        self.log_coefficient += gain * max(-1.0, min(1.0, smooth)) + (smooth - self.error)
        self.log_coefficient = max(-12.0, min(8.0, self.log_coefficient))
        self.error = smooth

    @property
    def coefficient(self) -> float:
        """λ, in training units."""
        return math.exp(self.log_coefficient)

    def state_dict(self) -> dict[str, Any]:
        return {"log_coefficient": self.log_coefficient, "error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_coefficient, self.error = state["log_coefficient"], state["error"]
