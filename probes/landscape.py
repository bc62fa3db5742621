"""Loss landscapes around fine-tuning: the line through base and tuned model, and a plane that holds both.

    found = line(tuned, base, lambda model: objective.evaluate(model, "test")["loss"])
    found.barrier;  found.figure()
    plane(tuned, base, evaluate, other=tuned_on_another_seed).figure()
    plane(tuned, base, evaluate, seed=0)                            # across: a filter-normalised random direction

    θ(a, b) = θ_base + a (θ_tuned - θ_base) + b δ,   δ = θ_other - θ_base, or random

    random: δ_f = ε_f ‖θ_f‖ / ‖ε_f‖ for each filter f (the weights of one output unit, or a token's embedding) of the tuned model,
    ε normal; 0 for biases and gains

Goodfellow et al. 2015, https://arxiv.org/abs/1412.6544 (the line); Li et al. 2018, https://arxiv.org/abs/1712.09913 (filter
normalisation); Hao et al. 2019, https://arxiv.org/abs/1908.05620 (both, for BERT). (0, 0) and (1, 0) are the base and tuned weights
exactly, and so is (0, 1) the other's. The head of an objective, and buffers, are the tuned model's everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.rollback import Evaluate, Scored
from probes.weights import Weights, matched, weights_set
from steerkit.errors import InputError
from steerkit.finetuning import everything
from steerkit.models import HookedModel
from steerkit.plots import error_bars
from steerkit.sites import is_transposed
from steerkit.stats import Interval


@dataclass(frozen=True)
class Line:
    """Scores from the base model (a = 0) to the tuned one (a = 1) and beyond."""

    alphas: tuple[float, ...]
    scores: tuple[Interval, ...]
    score_name: str = "mean"

    @property
    def barrier(self) -> float:
        """Greatest height of the score above the straight line between its values at 0 and 1, over the points in between.

        Frankle et al. 2020, https://arxiv.org/abs/1912.05671. For losses; InputError unless 0 and 1 are among the points.
        """
        values = dict(zip(self.alphas, (score.estimate for score in self.scores)))
        if 0.0 not in values or 1.0 not in values:
            raise InputError("A barrier needs the points 0 and 1 of the line.")
        return max(
            value - (1 - a) * values[0.0] - a * values[1.0] for a, value in values.items() if 0 <= a <= 1
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"{a:g}: {score.estimate:.4g}" for a, score in zip(self.alphas, self.scores))
        return f"Line({self.score_name} at {shown})"

    def figure(self) -> Any:
        """The scores, as a Plotly figure."""
        from plotly import graph_objects as go

        figure = go.Figure(
            go.Scatter(
                x=self.alphas,
                y=[score.estimate for score in self.scores],
                error_y=error_bars(self.scores),
                mode="lines+markers",
            )
        )
        for a, name in ((0, "base"), (1, "tuned")):
            figure.add_vline(x=a, line={"color": "rgb(128, 128, 128)", "width": 1}, annotation={"text": name})
        figure.update_layout(
            xaxis={"title": {"text": "a"}}, yaxis={"title": {"text": self.score_name}}, height=400
        )
        return figure


@dataclass(frozen=True)
class Plane:
    """Scores on a grid: a from base to tuned, b along a second direction."""

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    values: Float[np.ndarray, "alphas betas"] = field(repr=False)
    across: str
    """What the second direction is."""
    score_name: str = "mean"

    def __repr__(self) -> str:
        i, j = np.unravel_index(int(self.values.argmin()), self.values.shape)
        return (
            f"Plane({len(self.alphas)} × {len(self.betas)} points, across: {self.across}; {self.score_name} "
            f"{self.values.min():.4g} at a {self.alphas[i]:g}, b {self.betas[j]:g} to {self.values.max():.4g})"
        )

    def figure(self) -> Any:
        """Contours with the models marked, as a Plotly figure."""
        from plotly import graph_objects as go

        figure = go.Figure(
            go.Contour(
                x=self.alphas,
                y=self.betas,
                z=self.values.T.tolist(),
                colorscale="Cividis",
                colorbar={"title": {"text": self.score_name}},
            )
        )
        marks = [(0, 0, "base"), (1, 0, "tuned"), *([(0, 1, "other")] if self.across == "other" else [])]
        figure.add_scatter(
            x=[x for x, _, _ in marks],
            y=[y for _, y, _ in marks],
            text=[name for _, _, name in marks],
            mode="markers+text",
            textposition="top center",
            marker={"color": "white", "size": 9, "line": {"color": "black", "width": 1}},
            textfont={"color": "white"},
            showlegend=False,
        )
        figure.update_layout(
            xaxis={"title": {"text": "a, from base to tuned"}},
            yaxis={"title": {"text": f"b, {self.across}"}},
            height=480,
        )
        return figure


def line(
    tuned: HookedModel,
    base: HookedModel | Weights,
    evaluate: Evaluate,
    *,
    alphas: Sequence[float] = tuple(np.linspace(-0.5, 1.5, 21).round(3).tolist()),
    groups: np.ndarray | None = None,
) -> Line:
    """Evaluate the models on the line; `evaluate` and `groups` are as for a rollback. Raises as `moved`; NumericsError for NaN."""
    found = [_at(tuned, base, evaluate, groups, a) for a in alphas]
    return Line(tuple(alphas), tuple(score.interval() for score in found), found[0].judged_by.name)


def plane(
    tuned: HookedModel,
    base: HookedModel | Weights,
    evaluate: Evaluate,
    *,
    other: HookedModel | Weights | None = None,
    alphas: Sequence[float] = tuple(np.linspace(-0.5, 1.5, 9).tolist()),
    betas: Sequence[float] | None = None,
    seed: int = 0,
) -> Plane:
    """Evaluate the models on a grid; across runs the way to `other`, or without it a random direction.

    `betas` default to `alphas` with another model, and to 9 points from -1 to 1 with a random direction, whose length is about that
    of the weights. Raises as `moved`; NumericsError for NaN.
    """
    direction = random_direction(tuned, seed) if other is None else None
    if betas is None:
        betas = alphas if other is not None else np.linspace(-1, 1, 9).tolist()
    found = [
        [_at(tuned, base, evaluate, None, a, b, other=other, direction=direction) for b in betas]
        for a in alphas
    ]
    return Plane(
        tuple(alphas),
        tuple(betas),
        np.array([[score.estimate for score in row] for row in found]),
        "other" if other is not None else f"random, seed {seed}",
        found[0][0].judged_by.name,
    )


def _at(
    tuned: HookedModel,
    base: HookedModel | Weights,
    evaluate: Evaluate,
    groups: np.ndarray | None,
    a: float,
    b: float = 0.0,
    **across: Any,
) -> Scored:
    with moved(tuned, base, a, b, **across):
        return Scored.of(evaluate(tuned), groups, f"{tuned.name} moved to a {a:g}, b {b:g}")


@contextmanager
def moved(
    tuned: HookedModel,
    base: HookedModel | Weights,
    a: float,
    b: float = 0.0,
    *,
    other: HookedModel | Weights | None = None,
    direction: Weights | None = None,
) -> Iterator[None]:
    """Inside, `tuned` has the weights θ(a, b); afterwards its own, bit for bit.

    Across is `other` or a `direction` (parameters that it does not name stay). Raises InputError for models that differ in
    architecture, for both or, with b ≠ 0, neither.
    """
    if (other is not None and direction is not None) or (b and other is None and direction is None):
        raise InputError("Give another model or a direction to go along b, one of them.")
    names = everything(tuned)
    own = {name: p.detach() for name, p in tuned.model.named_parameters()}
    start = matched(tuned, base, names)
    with torch.no_grad():
        if other is not None and a == 0:  # so that the other model is met exactly
            mixed = {n: torch.lerp(start[n], w, b) for n, w in matched(tuned, other, names).items()}
        else:
            mixed = {n: torch.lerp(start[n], own[n], a) for n in names}
            for n, step in _across(tuned, start, other, direction).items() if b else ():
                mixed[n].add_(step, alpha=b)
    with weights_set(tuned, mixed):
        yield


def _across(
    tuned: HookedModel, start: Weights, other: HookedModel | Weights | None, direction: Weights | None
) -> dict[str, Tensor]:
    if other is not None:
        return {name: weight - start[name] for name, weight in matched(tuned, other, start).items()}
    assert direction is not None
    return matched(tuned, direction, direction)


@torch.no_grad()
def random_direction(model: HookedModel, seed: int = 0) -> dict[str, Tensor]:
    """A filter-normalised random direction: each filter's norm is that of the model's; biases and gains stay."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.model.named_parameters():
        if parameter.dim() < 2:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        module = model.model.get_submodule(name.rpartition(".")[0])
        dims = (0,) if is_transposed(module) else tuple(range(1, parameter.dim()))
        size = parameter.detach().norm(dim=dims, keepdim=True)
        found[name] = noise * (size / noise.norm(dim=dims, keepdim=True))
    return found
