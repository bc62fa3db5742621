"""Gradient noise scale: how large a batch is before larger ones help little.

    found = noise_scale(model, objective, examples=256, micro_batch=4)
    found.batch_size                          # 310 [240, 420] examples
    found.modules["model.layers.3.mlp.down_proj"].batch_size

    |G|² = (|Σ_i u_i|² - Σ_i |u_i|²) / (n² - Σ_i n_i²)                   unbiased
    tr Σ = Σ_i |u_i|² / n - |G|² Σ_i n_i² / n                            unbiased, for one example
    B    = tr Σ / |G|²                                                   the simple noise scale, in examples

u_i is the sum of the gradients of the n_i examples of micro-batch i, n = Σ n_i. McCandlish et al. 2018, “An Empirical Model of
Large-Batch Training”, https://arxiv.org/abs/1812.06162, whose two batch sizes are these: all micro-batches, and all of them
together. With micro-batches of one example tr Σ is the sample variance. |G|² and tr Σ add up over modules. Whatever takes gradients
is in it: an adapter's parameters, a head.

Intervals are from the exact delete-one jackknife over micro-batches, which needs every gradient twice and keeps one sum of them.
B's is that of |G|² / tr Σ turned over, so that it has no upper end where |G|² may be 0 (`resolved` is False).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit import distributed
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.objectives import Objective
from steerkit.plots import error_bars
from steerkit.runs import write_json
from steerkit.sites import evaluating
from steerkit.stats import Interval, jackknife_of

TOTAL = "total"
Gradients = Callable[[], Iterable[tuple[Mapping[str, Tensor], int]]]
"""Called, it goes once through the micro-batches: ({name of a parameter: sum of its gradients over the examples}, examples)."""


@dataclass(frozen=True)
class Noise:
    """Noise of the gradients of some parameters."""

    squared_norm: Interval
    """|G|², of the true gradient; its estimate can be negative."""
    trace: Interval
    """tr Σ of one example's gradient."""
    batch_size: Interval
    """B in examples. Without a positive |G|² its estimate is infinite; without an interval for it, its ends are NaN."""
    n_parameters: int

    @property
    def resolved(self) -> bool:
        """Whether |G|² is told from 0, so that B has an upper end."""
        return math.isfinite(self.batch_size.high)

    def __repr__(self) -> str:
        if self.resolved or math.isnan(self.batch_size.low):
            return f"B {self.batch_size!r} examples (|G|² {self.squared_norm!r}, tr Σ {self.trace!r})"
        return f"B at least {self.batch_size.low:.4g} examples: unresolved (|G|² {self.squared_norm!r})"


@dataclass(frozen=True, repr=False)
class NoiseScale:
    """Noise scale of all parameters together, and module by module."""

    total: Noise
    modules: dict[str, Noise] = field(repr=False)
    n_examples: int
    n_batches: int
    """Micro-batches, or steps of a run: what the jackknife leaves out."""

    @property
    def batch_size(self) -> Interval:
        return self.total.batch_size

    @property
    def resolved(self) -> bool:
        return self.total.resolved

    def __repr__(self) -> str:
        shown = [f"  {name}: {noise!r}" for name, noise in list(self.modules.items())[:24]]
        more = [f"  … {len(self.modules)} modules in all"] if len(self.modules) > 24 else []
        title = f"Noise scale of {self.n_examples:,} examples in {self.n_batches} batches: {self.total!r}"
        return "\n".join([title, *shown, *more])

    def to_dict(self) -> dict[str, Any]:
        return {
            "n_examples": self.n_examples,
            "n_batches": self.n_batches,
            "total": asdict(self.total),
            "modules": {name: asdict(noise) for name, noise in self.modules.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())

    def figure(self) -> Any:
        """B by module, logarithmic, as a Plotly figure; modules without a resolved B are left out."""
        from plotly import graph_objects as go

        shown = {
            name: n.batch_size for name, n in self.modules.items() if math.isfinite(n.batch_size.estimate)
        }
        figure = go.Figure(
            go.Scatter(
                x=[value.estimate for value in shown.values()],
                y=list(shown),
                error_x=error_bars(list(shown.values())),
                mode="markers",
            )
        )
        if math.isfinite(self.batch_size.estimate):
            figure.add_vline(x=self.batch_size.estimate, line={"color": "rgb(128, 128, 128)", "width": 1})
        figure.update_layout(
            xaxis={"type": "log", "title": {"text": "B, examples"}},
            yaxis={"autorange": "reversed"},
            height=140 + 22 * len(shown),
        )
        return figure


# -- at one point ----------------------------------------------------------------------------------------------------


def noise_scale(
    model: HookedModel,
    objective: Objective[Any],
    *,
    split: str = "train",
    examples: int | None = 256,
    micro_batch: int = 1,
    interval: bool = True,
    seed: int = 0,
) -> NoiseScale:
    """The noise scale of the objective at the weights as they are, without dropout, on examples drawn at random (None: all).

    An example counts as in the objective's loss: a text by its tokens, when they are modelled. Smaller micro-batches are more exact
    and slower. No gradient is left. Raises InputError when nothing takes gradients or there are too few examples, NumericsError for
    gradients that are NaN or infinite.
    """
    trained = _trained(model, objective)
    every = objective.examples(split)
    n = len(every) if examples is None else min(examples, len(every))
    if micro_batch < 1 or n < 2 * micro_batch:
        raise InputError(
            f"{n} examples in micro-batches of {micro_batch}: a noise scale needs at least two of them."
        )
    drawn = np.random.default_rng(seed).permutation(len(every))[:n].tolist()
    batches = [[every[i] for i in drawn[first : first + micro_batch]] for first in range(0, n, micro_batch)]
    scale = n / sum(objective.weight(example) for batch in batches for example in batch)

    def gradients() -> Iterator[tuple[Mapping[str, Tensor], int]]:
        for batch in batches:
            losses = objective.outcomes(model, batch)["loss"]
            weight = torch.tensor([scale * objective.weight(e) for e in batch], dtype=torch.float64)
            found = torch.autograd.grad(
                (losses * weight.to(losses)).sum(), list(trained.values()), allow_unused=True
            )
            yield {name: g for name, g in zip(trained, found) if g is not None}, len(batch)

    with evaluating(model.model), torch.enable_grad():
        return noise_scale_of(gradients, interval=interval, sizes=_sizes(trained))


def _trained(model: HookedModel, objective: Objective[Any]) -> dict[str, nn.Parameter]:
    """What takes gradients, the head's parameters among it."""
    found = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    if objective.head is not None:
        found |= {
            f"objective.head.{name}": p for name, p in objective.head.named_parameters() if p.requires_grad
        }
    if not found:
        raise InputError(
            f"Nothing of {model.name} takes gradients: put an adapter on it, or choose with `trainable`."
        )
    return found


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: p.numel() for name, p in parameters.items()}


def module_of(parameter: str) -> str:
    """The module that a parameter belongs to."""
    return parameter.rpartition(".")[0] or parameter


def noise_scale_of(
    gradients: Gradients, *, interval: bool = True, sizes: Mapping[str, int] | None = None
) -> NoiseScale:
    """The noise scale of micro-batches that `gradients` goes through: once, or with `interval` twice, with the same gradients.

    `sizes` are the parameters' numbers of elements; by default those of the gradients. Raises InputError with fewer than two
    micro-batches, NumericsError for NaN or infinities.
    """
    sums: dict[str, Tensor] = {}
    squares: list[dict[str, Tensor]] = []
    counts: list[int] = []
    for found, n in gradients():
        squares.append({name: g.detach().double().square().sum() for name, g in found.items()})
        counts.append(n)
        for name, g in found.items():
            sums[name] = sums[name] + g.detach() if name in sums else g.detach().clone()
    products: list[dict[str, Tensor]] = []
    for found, _ in gradients() if interval else ():
        products.append(
            {name: (g.detach().double() * sums[name].double()).sum() for name, g in found.items()}
        )
    whole = {name: float(total.double().square().sum()) for name, total in sums.items()}
    own, other = _by_module(squares), _by_module(products) if interval else None
    modules: dict[str, float] = {}
    for name, value in whole.items():
        modules[module_of(name)] = modules.get(module_of(name), 0.0) + value
    n_parameters: dict[str, int] = {}
    for name, total in sums.items():
        size = total.numel() if sizes is None else sizes[name]
        n_parameters[module_of(name)] = n_parameters.get(module_of(name), 0) + size
    if len(counts) < 2:
        raise InputError(f"{len(counts)} micro-batch: a noise scale needs at least two.")
    sizes_of_batches = np.array(counts, dtype=np.float64)

    def noise(chosen: Sequence[str]) -> Noise:
        square = sum(modules[name] for name in chosen)
        q = np.sum([own[name] for name in chosen], axis=0)
        d = None if other is None else np.sum([other[name] for name in chosen], axis=0)
        return _noise(square, q, d, sizes_of_batches, sum(n_parameters[name] for name in chosen))

    per_module = {name: noise([name]) for name in modules}
    return NoiseScale(noise(list(modules)), per_module, sum(counts), len(counts))


def _by_module(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[np.ndarray, " batches"]]:
    """Sums over each module's parameters. NumericsError for NaN and infinities."""
    found: dict[str, np.ndarray] = {}
    for i, row in enumerate(values):
        for name, value in row.items():
            number = float(value)
            if not math.isfinite(number):
                raise NumericsError(f"The gradient of {name} in micro-batch {i} is NaN or infinite.")
            found.setdefault(module_of(name), np.zeros(len(values)))[i] += number
    return found


def _noise(
    square: float,
    squares: Float[np.ndarray, " batches"],
    products: Float[np.ndarray, " batches"] | None,
    n: Float[np.ndarray, " batches"],
    n_parameters: int,
) -> Noise:
    """From |Σ u|², |u_i|², u_i · Σ u and n_i."""
    norm, trace = _unbiased(square, squares.sum(), n.sum(), np.square(n).sum())
    if products is None or len(n) < 3:
        nothing = (math.nan, math.nan, math.nan)
        size = trace / norm if norm > 0 else math.inf
        return Noise(
            Interval(norm, *nothing), Interval(trace, *nothing), Interval(size, *nothing), n_parameters
        )
    norms, traces = _unbiased(
        square - 2 * products + squares,
        squares.sum() - squares,
        n.sum() - n,
        np.square(n).sum() - np.square(n),
    )
    return _intervals(norm, trace, norms, traces, n_parameters)


def _unbiased(square: Any, squares: Any, n: Any, n_squares: Any) -> tuple[Any, Any]:
    """(|G|², tr Σ); sums over micro-batches are given."""
    norm = (square - squares) / (n**2 - n_squares)
    return norm, squares / n - norm * n_squares / n


def _intervals(norm: float, trace: float, norms: np.ndarray, traces: np.ndarray, n_parameters: int) -> Noise:
    """Jackknife intervals from what is left without each unit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = jackknife_of(norm / trace if trace else math.nan, norms / traces)

    def turned(value: float) -> float:
        return 1 / value if value > 0 else math.inf if value <= 0 else math.nan

    size = turned(ratio.estimate)
    error = ratio.standard_error * size**2 if math.isfinite(size) else math.inf
    return Noise(
        jackknife_of(norm, norms),
        jackknife_of(trace, traces),
        Interval(size, turned(ratio.high), turned(ratio.low), error),
        n_parameters,
    )


# -- while training --------------------------------------------------------------------------------------------------


class NoiseMeter:
    """Measures the noise scale while a model is trained, from the parts that `accumulation` cuts batches into.

        meter = NoiseMeter(model, objective)
        with meter.watching():
            finetune(model, objective, FinetuneConfig(accumulation=4), after_backward=meter.after_backward)
        meter.result(last=100)

    |G|² and tr Σ are averaged over steps and then divided (a mean of ratios would be biased); the jackknife leaves out steps.
    Weights move, dropout acts, and neighbouring steps are alike: intervals are narrower than they should be. It works in one
    process, without `tau` and without a regulariser.
    """

    def __init__(self, model: HookedModel, objective: Objective[Any]) -> None:
        if distributed.world_size() > 1:
            raise InputError("A NoiseMeter measures one process: run without torchrun.")
        self.model, self.objective = model, objective
        self.steps: list[dict[str, tuple[float, float]]] = []
        """(|G|², tr Σ) of each step, by module."""
        self.counts: list[int] = []
        """Examples of each step."""
        self._sizes: dict[str, int] = {}
        self._parts: list[tuple[int, dict[str, Tensor]]] = []
        self._gradients: dict[str, nn.Parameter] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, gradients of parts of a batch are measured as they come."""
        outcomes, reset = self.objective.outcomes, self.objective.reset
        handles: list[Any] = []

        def counted(model: HookedModel, batch: Sequence[Any]) -> dict[str, Tensor]:
            if torch.is_grad_enabled():
                self._parts.append((len(batch), {}))
            return outcomes(model, batch)

        def attach(model: HookedModel, seed: int) -> None:
            reset(model, seed)  # makes the head anew
            for handle in handles:
                handle.remove()
            self._gradients = _trained(self.model, self.objective)
            self._sizes = _sizes(self._gradients)
            handles[:] = [p.register_hook(self._noting(name)) for name, p in self._gradients.items()]

        objective: Any = self.objective
        before = vars(objective).get("outcomes"), vars(objective).get("reset")
        try:
            objective.outcomes, objective.reset = counted, attach
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, own in (("outcomes", before[0]), ("reset", before[1])):
                if own is None:
                    vars(objective).pop(name)
                else:
                    setattr(objective, name, own)

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            if not self._parts:  # of nothing that is trained on
                return
            squares = self._parts[-1][1]
            if name in squares:
                raise InputError(
                    f"{name} has two gradients in one part of a batch: train without a regulariser."
                )
            squares[name] = gradient.detach().double().square().sum()

        return note

    def after_backward(self, model: HookedModel, step: int) -> None:
        """What `finetune` calls. A step whose batch is in one part is left out."""
        parts, self._parts = self._parts, []
        if len(parts) < 2:
            return
        n = sum(size for size, _ in parts)
        n_squares = sum(size**2 for size, _ in parts)
        squares = _by_module([found for _, found in parts])
        whole: dict[str, float] = dict.fromkeys(squares, 0.0)
        for name, parameter in self._gradients.items():
            if parameter.grad is not None:
                whole[module_of(name)] += float(parameter.grad.double().square().sum())
        self.steps.append(
            {  # gradients are those of the mean loss: n times them is their sum
                name: _unbiased(n**2 * whole[name], n**2 * float(q.sum()), n, n_squares)
                for name, q in squares.items()
            }
        )
        self.counts.append(n)

    def result(self, last: int | None = None) -> NoiseScale:
        """The noise scale over the last so many steps, or all. Raises InputError with fewer than three that count."""
        steps, counts = (
            (self.steps, self.counts) if last is None else (self.steps[-last:], self.counts[-last:])
        )
        if len(steps) < 3:
            raise InputError(
                f"{len(steps)} steps were measured, three are needed: train longer, with accumulation at least 2."
            )
        sizes: dict[str, int] = {}
        for name, size in self._sizes.items():
            sizes[module_of(name)] = sizes.get(module_of(name), 0) + size
        values = {name: np.array([step[name] for step in steps]) for name in steps[0]}
        modules = {name: _averaged(found, sizes[name]) for name, found in values.items()}
        total = _averaged(np.sum(list(values.values()), axis=0), sum(sizes[name] for name in values))
        return NoiseScale(total, modules, sum(counts), len(steps))

    def figure(self, window: int = 20) -> Any:
        """B over the steps, each from the `window` steps up to it, as a Plotly figure."""
        from plotly import graph_objects as go

        sums = np.array([np.sum(list(step.values()), axis=0) for step in self.steps])
        means = np.array([sums[max(0, i + 1 - window) : i + 1].mean(0) for i in range(len(sums))])
        sizes = [trace / norm if norm > 0 else None for norm, trace in means]
        figure = go.Figure(go.Scatter(x=list(range(1, len(sizes) + 1)), y=sizes, mode="lines"))
        figure.update_layout(
            xaxis={"title": {"text": "step"}},
            yaxis={"type": "log", "title": {"text": "B, examples"}},
            height=340,
        )
        return figure


def _averaged(values: Float[np.ndarray, "steps 2"], n_parameters: int) -> Noise:
    mean = values.mean(0)
    left_out = (values.sum(0) - values) / (len(values) - 1)
    return _intervals(float(mean[0]), float(mean[1]), left_out[:, 0], left_out[:, 1], n_parameters)


# -- from runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CriticalBatch:
    """The trade of steps for examples."""

    batch_size: Interval
    """E_min / S_min, in examples: twice the fewest steps, and twice the fewest examples, suffice with it."""
    min_steps: float
    min_examples: float


def critical_batch(
    steps: Sequence[float] | Float[np.ndarray, " runs"],
    examples: Sequence[float] | Float[np.ndarray, " runs"],
) -> CriticalBatch:
    """From runs that reached one loss with different batch sizes: steps S and examples E that each took.

        (S / S_min - 1) (E / E_min - 1) = 1,   which is   S_min / S + E_min / E = 1

    a line, fitted by least squares; the jackknife leaves out runs. McCandlish et al. 2018, equation 2.7 and appendix D. Raises
    InputError with fewer than three runs or batch sizes that are all the same, and where no positive S_min and E_min fit.
    """
    inverse = 1 / np.stack(
        [np.asarray(steps, dtype=np.float64), np.asarray(examples, dtype=np.float64)], axis=1
    )
    if not (np.isfinite(inverse).all() and (inverse > 0).all()) or len(inverse) < 3:
        raise InputError("Give steps and examples of at least three runs, all positive.")
    if np.ptp(inverse[:, 0] / inverse[:, 1]) < 1e-9 * (inverse[:, 0] / inverse[:, 1]).max():
        raise InputError("All runs have one batch size: a critical one needs several.")

    def fitted(rows: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]

    least = fitted(inverse)
    if (least <= 0).any():
        raise InputError(
            "The runs do not trade steps for examples: larger batches must take fewer steps and more examples."
        )
    left_out = [fitted(np.delete(inverse, i, axis=0)) for i in range(len(inverse))]
    logs = np.array([math.log(e / s) if s > 0 and e > 0 else math.nan for s, e in left_out])
    size = float(least[1] / least[0])
    found = Interval(size, math.nan, math.nan, math.nan)
    if np.isfinite(logs).all():
        log = jackknife_of(math.log(size), logs)
        found = replace(
            found, low=math.exp(log.low), high=math.exp(log.high), standard_error=size * log.standard_error
        )
    return CriticalBatch(found, float(least[0]), float(least[1]))
