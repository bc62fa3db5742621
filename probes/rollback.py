"""Layer rollback: what a tuned model still does with some of its layers as they were before.

    sweep = rollback_sweep(tuned, base, lambda model: objective.evaluate(model, "test"))
    sweep["single", 3].change                     # score with block 3 rolled back less the tuned model's: paired, with interval
    with rolled_back(tuned, base, [2, 3]):        # the same by hand
        tuned.generate("The fox")

    θ_S = θ_base + α (θ_tuned - θ_base) in the parts S, θ_tuned elsewhere;   α = 0 is the base model's weights themselves

Hao et al. 2019, “Visualizing and Understanding the Effectiveness of BERT”, https://arxiv.org/abs/1908.05620. Nothing is trained
again, and the head of an objective stays tuned. `base` is a model of the same architecture or its weights by name
(`probes.weights.weights_of`). For an adapter, set its effective weights in the base model, and roll back from there:

    before = {name: weight.clone() for name, weight in weights_of(base).items()}
    with weights_set(base, effective):
        rollback_sweep(base, before, evaluate)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped

from probes.weights import Part, Weights, matched, names_of, parts, relative_change, weights_set
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.objectives import Evaluation, Score
from steerkit.plots import error_bars
from steerkit.runs import write_json
from steerkit.stats import Comparison, Interval, group_sums, jackknife, paired_test

KINDS = ("single", "prefix", "suffix", "block", "part")
Evaluate = Callable[[HookedModel], "Evaluation | Float[np.ndarray, ' n'] | float"]
"""What a model is worth: values of examples, from which intervals come, or one number, which has none."""
_MEAN = Score("mean", "", higher_is_better=True, bounds=(-math.inf, math.inf))


@contextmanager
def rolled_back(
    tuned: HookedModel, base: HookedModel | Weights, chosen: Iterable[Part], *, alpha: float = 0.0
) -> Iterator[None]:
    """Inside, these parts of `tuned` have the weights base + α (tuned - base); afterwards the model is as it was, bit for bit.

    α = 0 gives the base's weights and α = 1 the tuned ones exactly; it may lie outside of [0, 1]. Parts are indices of blocks,
    'embeddings', 'final_norm' and 'head'. Raises InputError for parts that are not there and models that differ in architecture.
    """
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}; it must be finite.")
    names = names_of(tuned, dict.fromkeys(chosen))
    own = dict(tuned.model.named_parameters())
    other = matched(tuned, base, names) if names else {}
    with torch.no_grad():
        mixed = other if alpha == 0 else {n: torch.lerp(w, own[n].detach(), alpha) for n, w in other.items()}
    with weights_set(tuned, mixed):
        yield


@dataclass(frozen=True)
class RollbackScore:
    """What the model is worth with some parts rolled back."""

    kind: str
    """`single`, `prefix` (blocks up to this one), `suffix` (from it on), `block` (several from it on), `part`."""
    at: Part
    """The block or part that names the entry."""
    parts: tuple[Part, ...]
    alpha: float
    score: Interval
    change: Comparison
    """The score less the tuned model's on the same examples; interval and p-value are NaN if only a number was given."""


@dataclass(frozen=True, repr=False)
class RollbackSweep:
    """Scores of all sets of parts that were rolled back."""

    tuned: Interval
    base: RollbackScore
    """All parts rolled back."""
    scores: tuple[RollbackScore, ...]
    relative_change: dict[Part, float] = field(repr=False)
    """‖tuned - base‖ / ‖base‖ of each part's weights."""
    score_name: str = "mean"

    def of_kind(self, kind: str) -> list[RollbackScore]:
        return [score for score in self.scores if score.kind == kind]

    def __getitem__(self, key: tuple[str, Part] | tuple[str, Part, float]) -> RollbackScore:
        """The entry (kind, block or part), or (kind, block or part, α)."""
        for score in self.scores:
            if (score.kind, score.at, score.alpha)[: len(key)] == tuple(key):
                return score
        raise KeyError(key)

    def __repr__(self) -> str:
        lines = [f"Rollback of {self.score_name}: tuned {self.tuned!r}, base {self.base.score!r}"]
        for s in self.scores:
            at = "" if s.alpha == 0 else f", α {s.alpha:g}"
            lines.append(f"  {s.kind} {s.at}{at}: {s.score.estimate:.4g}, change {s.change.difference!r}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        def entry(score: RollbackScore) -> dict[str, Any]:
            own = {"kind": score.kind, "at": score.at, "parts": list(score.parts), "alpha": score.alpha}
            return {**own, "score": score.score.to_dict(), "change": score.change.to_dict()}

        return {
            "score_name": self.score_name,
            "tuned": self.tuned.to_dict(),
            "base": entry(self.base),
            "scores": [entry(score) for score in self.scores],
            "relative_change": {str(part): value for part, value in self.relative_change.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())

    def figure(self) -> Any:
        """Change of the score by block, a line for each kind (and α), as a Plotly figure."""
        from plotly import graph_objects as go

        figure = go.Figure()
        lines: dict[tuple[str, float], list[RollbackScore]] = {}
        for score in self.scores:
            lines.setdefault((score.kind, score.alpha), []).append(score)
        for (kind, alpha), own in lines.items():
            figure.add_scatter(
                x=[str(score.at) for score in own],
                y=[score.change.difference.estimate for score in own],
                error_y=error_bars([score.change.difference for score in own]),
                mode="markers" if kind == "part" else "lines+markers",
                name=kind if alpha == 0 else f"{kind}, α {alpha:g}",
            )
        figure.add_hline(y=0, line={"color": "rgb(128, 128, 128)", "width": 1})
        order = [str(part) for part in self.relative_change]
        figure.update_layout(
            xaxis={
                "type": "category",
                "categoryorder": "array",
                "categoryarray": order,
                "title": {"text": "block"},
            },
            yaxis={"title": {"text": f"{self.score_name}, rolled back − tuned"}},
            showlegend=True,
            height=440,
        )
        return figure


def rollback_sweep(
    tuned: HookedModel,
    base: HookedModel | Weights,
    evaluate: Evaluate,
    *,
    kinds: Sequence[str] = ("single", "prefix", "suffix"),
    width: int = 2,
    alphas: Sequence[float] = (0.0,),
    groups: Shaped[np.ndarray, " n"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> RollbackSweep:
    """Evaluate `tuned` with each set of its parts rolled back; equal sets are evaluated once.

    `width` is that of a `block`. `groups` names the document of each value where `evaluate` gives plain values. The base's entry
    is the tuned model with all of its parts rolled back. Raises InputError for unknown kinds and models that differ in
    architecture, NumericsError for values that are NaN.
    """
    own = parts(tuned)
    matched(tuned, base, [name for names in own.values() for name in names])
    sets = _sets(tuned.n_layers, list(own), kinds, width)
    found: dict[tuple[frozenset[Part], float], Scored] = {}

    def at(chosen: tuple[Part, ...], alpha: float) -> Scored:
        key = (frozenset(chosen), alpha if chosen else 0.0)
        if key not in found:
            with rolled_back(tuned, base, chosen, alpha=alpha):
                what = f"{tuned.name} with {', '.join(map(str, chosen)) or 'nothing'} rolled back"
                found[key] = Scored.of(evaluate(tuned), groups, what)
        return found[key]

    before = at((), 0.0)

    def score(kind: str, name: Part, chosen: tuple[Part, ...], alpha: float) -> RollbackScore:
        value = at(chosen, alpha)
        change = value.less(before, resamples, seed)
        return RollbackScore(kind, name, chosen, alpha, value.interval(), change)

    whole = score("all", "all", tuple(own), 0.0)
    scores = [score(kind, name, chosen, alpha) for alpha in alphas for kind, name, chosen in sets]
    return RollbackSweep(
        before.interval(), whole, tuple(scores), relative_change(tuned, base), before.judged_by.name
    )


def _sets(
    n_layers: int, own: Sequence[Part], kinds: Sequence[str], width: int
) -> list[tuple[str, Part, tuple[Part, ...]]]:
    """(kind, name, parts) of each set."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(
            f"kinds is {tuple(kinds)!r}; give one or more of {', '.join(KINDS)} (interpolations come from alphas)."
        )
    if not 1 <= width <= n_layers:
        raise InputError(f"width is {width}; blocks of {n_layers} layers are of 1 to {n_layers}.")
    every = range(n_layers)
    made: dict[str, list[tuple[Part, tuple[Part, ...]]]] = {
        "single": [(i, (i,)) for i in every],
        "prefix": [(i, tuple(range(i + 1))) for i in every],
        "suffix": [(i, tuple(range(i, n_layers))) for i in every],
        "block": [(i, tuple(range(i, i + width))) for i in range(n_layers - width + 1)],
        "part": [(part, (part,)) for part in own if isinstance(part, str)],
    }
    return [(kind, name, chosen) for kind in kinds for name, chosen in made[kind]]


# -- what an evaluation gives ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A score, with its sums by document where values of examples were given."""

    estimate: float
    sums: Float[np.ndarray, "documents 2"] | None
    judged_by: Score

    @classmethod
    def of(cls, value: Any, groups: np.ndarray | None, what: str) -> Scored:
        """What `evaluate` gave for the model that `what` says. NumericsError for NaN and infinities."""
        if isinstance(value, Evaluation):
            judged = value.judged_by
            weight, values = value.weight, value[judged.of]
            clusters = value.document if groups is None else np.asarray(groups)[value.document]
        else:
            judged, values = _MEAN, np.asarray(_plain(value), dtype=np.float64)
            if values.ndim > 1 or not values.size:
                raise InputError(
                    f"evaluate gave values of the shape {values.shape}; give a number or one for each example."
                )
            if values.ndim == 1 and groups is not None and len(groups) != len(values):
                raise InputError(f"There are {len(groups)} groups for {len(values)} values.")
            weight = np.ones(values.shape)
            clusters = np.arange(values.size) if groups is None else np.asarray(groups)
        if not np.isfinite(values).all():
            raise NumericsError(
                f"The score of {what} is NaN or infinite: look at the weights, or use float32."
            )
        if values.ndim == 0:
            return cls(float(values), None, judged)
        sums = group_sums(np.stack([weight * values, weight], axis=1), clusters)
        return cls(float(judged(sums[:, 0].sum() / sums[:, 1].sum())), sums, judged)

    def statistic(self, sums: Float[np.ndarray, "... 2"]) -> Any:
        return self.judged_by(sums[..., 0] / sums[..., 1])

    def interval(self) -> Interval:
        """Jackknife over documents; NaN ends for one number, or one document."""
        if self.sums is None or len(self.sums) < 2:
            return Interval(self.estimate, math.nan, math.nan, math.nan)
        return jackknife(self.sums, self.statistic).clipped(*self.judged_by.bounds)

    def less(self, other: Scored, resamples: int, seed: int) -> Comparison:
        """This score less another of the same examples, resampled together."""
        if self.sums is None or other.sums is None or len(self.sums) < 2:
            gap = self.estimate - other.estimate
            return Comparison(Interval(gap, math.nan, math.nan, math.nan), math.nan)
        return paired_test(self.sums, other.sums, self.statistic, resamples=resamples, seed=seed)


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
