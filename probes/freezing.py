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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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
from steerkit.runs import Run, make_provenance, read_json, write_json
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
    extend: int = 0,
    split: str = "test",
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> FreezingSweep:
    """Train the blocks at one side, for each of `counts` (all from 0 to L; 0 and L are always there), and score on `split`.

    All rates are tried with the first seed, the best is then run with the others. Where it is the least or the greatest of
    several, one beyond it is tried first, up to `extend` times. `out` is a directory where every training that is done is kept;
    with `resume` those that are there are not repeated. Model and head are as before afterwards.

    Raises InputError without a validation split, for counts that are not there and an `out` that holds another sweep; NumericsError
    when training fails at every rate.
    """
    _check(model, objective, side, counts, learning_rates, seeds)
    n = model.n_layers
    chosen = sorted({0, n, *(range(n + 1) if counts is None else counts)})
    trials = _Trials(model, objective, config, side, split, quiet)
    if out is not None:
        trials.keep_in(Path(out), resume)
    found: dict[int, list[Evaluation]] = {}
    rates: dict[int, dict[float, float]] = {}
    for k in chosen:
        found[k], rates[k] = trials.of(k, learning_rates, seeds, extend)
    sums = {k: _sums(evaluations) for k, evaluations in found.items()}
    judged = objective.judged_by

    def mean_score(s: Float[np.ndarray, "... k"]) -> Any:
        return judged(s[..., ::2] / s[..., 1::2]).mean(-1)

    width = sums[0].shape[1]
    sign = 1 if judged.higher_is_better else -1

    def way(s: Float[np.ndarray, "... k"]) -> Any:
        own, least, most = (mean_score(s[..., i * width : (i + 1) * width]) for i in range(3))
        return (own - least) / (most - least) + 0.0  # no -0.0 where a falling score is the better one

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
    sweep = FreezingSweep(side, tuple(results), whole, objective.score_name)
    if trials.run is not None:
        trials.run.finish(sweep.to_dict())
    return sweep


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


class _Trials:
    """Trainings, each done once: found again in a directory if there is one."""

    def __init__(
        self,
        model: HookedModel,
        objective: Objective[Any],
        config: FinetuneConfig,
        side: str,
        split: str,
        quiet: bool,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.side, self.split, self.quiet = side, split, quiet
        self.sign = 1 if objective.higher_is_better else -1
        self.done: dict[str, dict[str, Any]] = {}
        self.run: Run | None = None

    def keep_in(self, path: Path, resume: bool) -> None:
        training = {name: value for name, value in asdict(self.config).items() if name not in ("lr", "seed")}
        settings = {
            "model": self.model.name,
            "objective": self.objective.settings(),
            "side": self.side,
            "split": self.split,
            "training": training,
        }
        origin = make_provenance(revision=self.model.revision)
        self.run = Run.open(path, "freezing", settings, resume=resume, provenance=origin)

    def of(
        self, k: int, rates: Sequence[float], seeds: Sequence[int], extend: int
    ) -> tuple[list[Evaluation], dict[float, float]]:
        """(evaluation of each seed at the best rate, score on validation of each rate)."""
        select = _select(self.side, k, self.model.n_layers)
        if not set(select(self.model)) and self.objective.head is None:
            evaluation = self.objective.evaluate(self.model, self.split, self.config.dtype)
            return [evaluation] * len(seeds), {}
        found = {lr: self.trial(k, lr, seeds[0]) for lr in rates}
        for _ in range(extend):
            beyond = _beyond({lr: score for lr, (score, _) in found.items()}, self.sign)
            if beyond is None:
                break
            found[beyond] = self.trial(k, beyond, seeds[0])
        validation = {lr: score for lr, (score, _) in found.items()}
        lr = _best(validation, self.sign)
        if lr is None:
            raise NumericsError(
                f"Training failed at each of the rates {', '.join(map(str, validation))}: give lower ones."
            )
        evaluations = [self.trial(k, lr, seed)[1] for seed in seeds]
        return [e for e in evaluations if e is not None], validation

    def trial(self, k: int, lr: float, seed: int) -> tuple[float, Evaluation | None]:
        """(score on validation, evaluation) of one training; NaN and None where it failed."""
        key = f"k{k}-lr{lr:g}-seed{seed}"
        if key not in self.done:
            file = None if self.run is None else self.run.path / "trainings" / f"{key}.json"
            kept = read_json(file) if file is not None and file.exists() else None
            if kept is None:
                kept = self._train(k, lr, seed)
                if file is not None:
                    file.parent.mkdir(exist_ok=True)
                    write_json(file, kept)
            self.done[key] = kept
        kept = self.done[key]
        if kept["validation"] is None:
            return math.nan, None
        arrays = {name: np.array(kept[name]) for name in ("values", "weight", "document")}
        judged = self.objective.judged_by
        return kept["validation"], Evaluation(
            {judged.of: arrays["values"]}, arrays["weight"], arrays["document"], judged
        )

    def _train(self, k: int, lr: float, seed: int) -> dict[str, Any]:
        """One training, which leaves the model as it was: what is kept of it."""
        model, objective, config = self.model, self.objective, replace(self.config, lr=lr, seed=seed)
        with preserved(model, objective), trainable(model, _select(self.side, k, model.n_layers)):
            try:
                outcome = finetune(model, objective, config)
            except NumericsError:
                return {"validation": None}
            assert outcome.best is not None
            validation = outcome.best[1][objective.score_name]
            found = objective.evaluate(model, self.split, config.dtype)
        if not self.quiet:
            told = (
                f"{k} blocks, lr {lr:.3g}, seed {seed}: {objective.score_name} {validation:.4f} on validation"
            )
            print(told, file=sys.stderr, flush=True)
        return {
            "validation": validation,
            "values": found[objective.judged_by.of].tolist(),
            "weight": found.weight.tolist(),
            "document": found.document.tolist(),
        }


def _beyond(validation: dict[float, float], sign: int) -> float | None:
    """The rate beyond the best one, where that is the least or the greatest of several: as far as the last two are apart."""
    best, tried = _best(validation, sign), sorted(validation)
    if best is None or len(tried) < 2 or best not in (tried[0], tried[-1]):
        return None
    return best * (tried[0] / tried[1] if best == tried[0] else tried[-1] / tried[-2])


def _best(validation: dict[float, float], sign: int) -> float | None:
    """The rate with the best score; the first of equals."""
    known = [rate for rate, score in validation.items() if not math.isnan(score)]
    return max(known, key=lambda rate: sign * validation[rate], default=None)


def _sums(evaluations: Sequence[Evaluation]) -> Float[np.ndarray, "documents two_seeds"]:
    """Sums of score and weight by document, two columns a seed."""
    columns = [c for e in evaluations for c in (e.weight * e[e.judged_by.of], e.weight)]
    return group_sums(np.stack(columns, axis=1), evaluations[0].document)
