"""Freezing sweeps: how many blocks must be trained to get as far as training all of them does.

    sweep = freezing_sweep(model, objective, FinetuneConfig(epochs=3), learning_rates=(1e-5, 3e-5, 1e-4), seeds=(0, 1, 2))
    sweep[2].normalised                  # 0.93 [0.88, 0.98]: how far two trained blocks come, from the head alone (0) to all (1)
    sweep.blocks_for(0.9)                # the fewest that reach 90 % of the way

    normalised(k) = (m_k - m_0) / (m_L - m_0)           m: score on test, mean over seeds

Lee et al. 2019, “What Would Elsa Do?”, https://arxiv.org/abs/1911.03090. They give m_k / m_L, which a probe on the frozen model
(k = 0) often brings near 1 already: hence the way from there. k = 0 trains the objective's head (the model as it is, if it has
none), 0 < k < L also the k blocks at the `top` or the `bottom`, and k = L everything, embeddings and final norm included. Every k
has the learning rate that is best on validation for it. Intervals are over test documents, for the seeds that were run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from probes.weights import preserved
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, Select, everything, finetune, layers, trainable
from steerkit.models import HookedModel
from steerkit.objectives import Evaluation, Objective
from steerkit.plots import error_bars
from steerkit.runs import write_json
from steerkit.stats import Interval, group_sums, jackknife

_DEFAULTS = FinetuneConfig()


@dataclass(frozen=True)
class Frozen:
    """What training k blocks came to."""

    k: int
    """Blocks trained."""
    lr: float | None
    """Learning rate chosen on validation; None where nothing was trained."""
    at_edge: bool
    """Whether that is the least or the greatest of several rates: a better one may lie beyond."""
    scores: tuple[float, ...]
    """On test, seed by seed."""
    score: Interval
    """Their mean."""
    normalised: Interval
    """How far it comes from k = 0 to k = L, where that is 0 to 1."""
    validation: dict[float, float] = field(repr=False)
    """Rate -> score on validation with the first seed; NaN where training failed."""


@dataclass(frozen=True, repr=False)
class FreezingSweep:
    """All numbers of blocks that were tried, in order."""

    side: str
    results: tuple[Frozen, ...]
    gain: Interval
    """m_L - m_0, so signed that more is better."""
    score_name: str

    @property
    def resolved(self) -> bool:
        """Whether training all blocks is better than the head alone beyond doubt; else normalised scores say nothing."""
        return self.gain.low > 0

    def __getitem__(self, k: int) -> Frozen:
        for result in self.results:
            if result.k == k:
                return result
        raise KeyError(k)

    def blocks_for(self, share: float = 0.9, *, surely: bool = False) -> int | None:
        """Fewest trained blocks that come so far; with `surely`, whose interval lies above. None if none does, or unresolved."""
        for result in self.results if self.resolved else ():
            found = result.normalised
            if (found.low if surely and result.k < self.results[-1].k else found.estimate) >= share:
                return result.k
        return None

    def __repr__(self) -> str:
        title = f"Freezing: {self.score_name} with the {self.side} k blocks trained, gain {self.gain!r}"
        if not self.resolved:
            title += " (unresolved: it may be 0)"
        lines = [
            f"  k {r.k}: {r.score!r}, normalised {r.normalised!r}, lr {r.lr}{' (edge)' if r.at_edge else ''}"
            for r in self.results
        ]
        return "\n".join([title, *lines])

    def to_dict(self) -> dict[str, Any]:
        def entry(r: Frozen) -> dict[str, Any]:
            plain = {"k": r.k, "lr": r.lr, "at_edge": r.at_edge, "scores": list(r.scores)}
            return {**plain, "score": r.score.to_dict(), "normalised": r.normalised.to_dict()}

        return {
            "side": self.side,
            "score_name": self.score_name,
            "gain": self.gain.to_dict(),
            "results": [entry(r) for r in self.results],
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())

    def figure(self, share: float = 0.9) -> Any:
        """Normalised score by number of blocks, as a Plotly figure."""
        from plotly import graph_objects as go

        values = [r.normalised for r in self.results]
        figure = go.Figure(
            go.Scatter(
                x=[r.k for r in self.results],
                y=[v.estimate for v in values],
                error_y=error_bars(values),
                mode="lines+markers",
            )
        )
        figure.add_hline(y=share, line={"color": "rgb(128, 128, 128)", "width": 1, "dash": "dot"})
        figure.update_layout(
            xaxis={"title": {"text": f"blocks trained, from the {self.side}"}, "dtick": 1},
            yaxis={"title": {"text": f"{self.score_name}, head alone = 0, all = 1"}},
            height=400,
        )
        return figure


def freezing_sweep(
    model: HookedModel,
    objective: Objective[Any],
    config: FinetuneConfig = _DEFAULTS,
    *,
    side: Literal["top", "bottom"] = "top",
    counts: Sequence[int] | None = None,
    learning_rates: Sequence[float] = (1e-5, 3e-5, 1e-4),
    seeds: Sequence[int] = (0,),
    split: str = "test",
) -> FreezingSweep:
    """Train the blocks at one side, for each of `counts` (all from 0 to L; 0 and L are always there), and score on `split`.

    All rates are tried with the first seed, the best is then run with the others. Model and head are as before afterwards. Raises
    InputError without a validation split and for counts that are not there; NumericsError when training fails at every rate.
    """
    _check(model, objective, side, counts, learning_rates, seeds)
    n = model.n_layers
    chosen = sorted({0, n, *(range(n + 1) if counts is None else counts)})
    found: dict[int, list[Evaluation]] = {}
    rates: dict[int, dict[float, float]] = {}
    for k in chosen:
        found[k], rates[k] = _trained(
            model, objective, config, _select(side, k, n), learning_rates, seeds, split
        )
    sums = {k: _sums(evaluations) for k, evaluations in found.items()}
    judged = objective.judged_by

    def mean_score(s: Float[np.ndarray, "... k"]) -> Any:
        return judged(s[..., ::2] / s[..., 1::2]).mean(-1)

    width = sums[0].shape[1]
    sign = 1 if judged.higher_is_better else -1

    def way(s: Float[np.ndarray, "... k"]) -> Any:
        own, least, most = (mean_score(s[..., i * width : (i + 1) * width]) for i in range(3))
        return (own - least) / (most - least)

    def gain(s: Float[np.ndarray, "... k"]) -> Any:
        return sign * (mean_score(s[..., width:]) - mean_score(s[..., :width]))

    results = []
    for k in chosen:
        lr = _best(rates[k], sign)
        results.append(
            Frozen(
                k,
                lr,
                lr is not None and len(rates[k]) > 1 and lr in (min(rates[k]), max(rates[k])),
                tuple(evaluation.score for evaluation in found[k]),
                jackknife(sums[k], mean_score).clipped(*judged.bounds),
                jackknife(np.concatenate([sums[k], sums[0], sums[n]], axis=1), way),
                rates[k],
            )
        )
    whole = jackknife(np.concatenate([sums[0], sums[n]], axis=1), gain)
    return FreezingSweep(side, tuple(results), whole, objective.score_name)


def _check(
    model: HookedModel,
    objective: Objective[Any],
    side: str,
    counts: Sequence[int] | None,
    rates: Sequence[float],
    seeds: Sequence[int],
) -> None:
    if side not in ("top", "bottom"):
        raise InputError(f"side is {side!r}; it is 'top' or 'bottom'.")
    if not objective.has("validation"):
        raise InputError(
            "The learning rate of each k is chosen on a validation split: give the objective one."
        )
    if not rates or not seeds:
        raise InputError("Give at least one learning rate and one seed.")
    wrong = [k for k in counts or () if not 0 <= k <= model.n_layers]
    if wrong:
        raise InputError(f"{wrong[0]} blocks cannot be trained: {model.name} has {model.n_layers}.")


def _select(side: str, k: int, n_layers: int) -> Select:
    if k == n_layers:
        return everything
    return layers(*(range(n_layers - k, n_layers) if side == "top" else range(k)))


def _trained(
    model: HookedModel,
    objective: Objective[Any],
    config: FinetuneConfig,
    select: Select,
    rates: Sequence[float],
    seeds: Sequence[int],
    split: str,
) -> tuple[list[Evaluation], dict[float, float]]:
    """(evaluation of each seed at the best rate, score on validation of each rate)."""
    if not set(select(model)) and objective.head is None:
        return [objective.evaluate(model, split, config.dtype)] * len(seeds), {}
    sign = 1 if objective.higher_is_better else -1
    validation: dict[float, float] = {}
    found: dict[float, Evaluation] = {}
    for lr in rates:
        try:
            validation[lr], evaluation = _run(
                model, objective, replace(config, lr=lr, seed=seeds[0]), select, split
            )
            found = found if _best(validation, sign) != lr else {lr: evaluation}
        except NumericsError:
            validation[lr] = math.nan
    if not found:
        raise NumericsError(
            f"Training failed at each of the rates {', '.join(map(str, rates))}: give lower ones."
        )
    [(lr, best)] = found.items()
    rest = [_run(model, objective, replace(config, lr=lr, seed=seed), select, split)[1] for seed in seeds[1:]]
    return [best, *rest], validation


def _run(
    model: HookedModel, objective: Objective[Any], config: FinetuneConfig, select: Select, split: str
) -> tuple[float, Evaluation]:
    """(score on validation, evaluation) of one run, which leaves the model as it was."""
    with preserved(model, objective), trainable(model, select):
        outcome = finetune(model, objective, config)
        assert outcome.best is not None
        return outcome.best[1][objective.score_name], objective.evaluate(model, split, config.dtype)


def _best(validation: dict[float, float], sign: int) -> float | None:
    """The rate with the best score; the first of equals."""
    known = [rate for rate, score in validation.items() if not math.isnan(score)]
    return max(known, key=lambda rate: sign * validation[rate], default=None)


def _sums(evaluations: Sequence[Evaluation]) -> Float[np.ndarray, "documents two_seeds"]:
    """Sums of score and weight by document, two columns a seed."""
    columns = [c for e in evaluations for c in (e.weight * e[e.judged_by.of], e.weight)]
    return group_sums(np.stack(columns, axis=1), evaluations[0].document)
