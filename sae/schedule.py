"""Schedules over the steps of a training run, and the controllers that steer the sparsity penalty to a target L0.

Everything is a function of the step and of a small state that checkpoints hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


def learning_rate_factor(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """Factor of the learning rate at `step` (from 0): linear up over the share `warmup`, linear to 0 over the last `decay`."""
    rising = min(1.0, (step + 1) / max(1.0, warmup * n_steps))
    falling = min(1.0, (n_steps - step) / max(1.0, decay * n_steps))
    return min(rising, falling)


class Controller(Protocol):
    """Sets a penalty's coefficient from the L0 and the squared error a token of the batches so far."""

    @property
    def coefficient(self) -> float: ...
    def update(self, l0: float, mse: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TargetL0:
    """Steers a penalty's coefficient so that the mean number of active latents ends at `target`.

    A proportional-integral controller in logarithms: with e = ln(L0 / target), averaged over recent batches,

        ln λ ← ln λ + gain · clip(e) + damping · (e - e_before)

    The gain is per step and set by the length of the run, so that short and long runs settle alike. The damping is what follows
    the drift of L0 while the learning rate falls (with 1 runs end off the target, with 10 they swing). λ starts small: a
    warm-up in itself.
    """

    target: float
    n_steps: int
    log_coefficient: float = math.log(0.1)
    error: float | None = None
    responses: float = 40.0
    damping: float = 6.0

    def update(self, l0: float, mse: float) -> None:
        """Take in the mean L0 of one batch."""
        now = math.log(max(l0, 0.05 * self.target) / self.target)
        if self.error is None:
            self.error = now
        smooth = 0.8 * self.error + 0.2 * now
        gain = min(0.2, self.responses / self.n_steps)
        self.log_coefficient += gain * max(-1.0, min(1.0, smooth)) + self.damping * (smooth - self.error)
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


@dataclass
class Multiplier:
    """Holds L0 at `target` as a constraint, where the penalty is L0 itself: the method of multipliers.

    With e = ln(L0 / target), averaged over recent batches and bounded by 1, the weight of L0 is

        (λ + κ e) · mse / target,      λ ← max(0, λ + 3 κ e / n_steps),      κ: 8, after a rise over a quarter of the run

    so that a step pushes latents out while too many are active and lets them in – the weight is negative – while too few are. mse /
    target is about what an active latent is worth; λ is its price in those units once the target is met.
    """

    target: float
    n_steps: int
    steps: int = 0
    price: float = 0.0
    error: float = 0.0
    mse: float | None = None
    stiffness: float = 8.0
    rise: float = 0.25

    def update(self, l0: float, mse: float) -> None:
        """Take in the means of one batch."""
        self.steps += 1
        now = math.log(max(l0, 0.05 * self.target) / self.target)
        self.error = 0.8 * self.error + 0.2 * max(-1.0, min(1.0, now))
        self.mse = mse if self.mse is None else 0.8 * self.mse + 0.2 * mse
        self.price = max(0.0, self.price + 3 * self._push() / self.n_steps)

    def _push(self) -> float:
        return self.stiffness * min(1.0, self.steps / (self.rise * self.n_steps)) * self.error

    @property
    def coefficient(self) -> float:
        """The weight of L0, in training units; below 0 while L0 is too low."""
        return 0.0 if self.mse is None else (self.price + self._push()) * self.mse / self.target

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "price", "error", "mse")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
