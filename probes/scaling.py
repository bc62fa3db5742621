"""Scaling laws: loss as a function of parameters and tokens, fitted with intervals, and what to do with it.

    law = fit_chinchilla(parameters, tokens, losses)                 # L = E + A / N^α + B / D^β
    law.alpha;  law.optimal(5.76e23)                                 # 0.34 [0.31, 0.37];  N and D for so many FLOP
    fit_power_law(parameters, losses)                                # L = (x_c / x)^α, with irreducible=True + E
    fit_kaplan(parameters, tokens, losses)                           # L = [(N_c / N)^(α_N / α_D) + D_c / D]^α_D

Kaplan et al. 2020, https://arxiv.org/abs/2001.08361 (equations 1.1 to 1.5); Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556
(approach 3); Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102, on how that fit went wrong.

Chinchilla's form is fitted by variable projection (Golub and Pereyra 1973): it is linear in E, A and B once the exponents are
given, so that only these two are searched, from a grid, with non-negative least squares of relative errors (L̂ - L) / L inside.
With `huber` the objective is then Hoffmann's, Σ Huber_δ(log L̂ - log L) with δ = 1e-3, begun where the former ended. Intervals are
percentiles of fits to runs drawn with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from steerkit.errors import InputError, NumericsError
from steerkit.runs import write_json
from steerkit.stats import Interval

Values = Sequence[float] | Float[np.ndarray, " runs"]
_EXPONENTS = np.geomspace(0.02, 2.0, 24)
"""Grid that exponents are first sought on."""
_BOUNDS = (1e-3, 5.0)
FLOP_PER_PARAMETER_TOKEN = 6.0
"""Compute C = 6 N D."""


@dataclass(frozen=True)
class Allocation:
    """The best use of a compute budget: N parameters trained on D tokens, C = 6 N D."""

    compute: float
    """FLOP."""
    parameters: Interval
    tokens: Interval
    loss: Interval

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens.estimate / self.parameters.estimate


@dataclass(frozen=True, repr=False)
class Law:
    """A fitted law."""

    names: tuple[str, ...]
    """Names of its parameters."""
    values: Float[np.ndarray, " p"] = field(repr=False)
    drawn: Float[np.ndarray, "resamples p"] = field(repr=False)
    """Parameters of the fits to resampled runs."""
    inputs: tuple[Float[np.ndarray, " runs"], ...] = field(repr=False)
    losses: Float[np.ndarray, " runs"] = field(repr=False)

    formula = ""

    def interval(self, name: str) -> Interval:
        """A parameter with its interval; ends are NaN without resamples."""
        i = self.names.index(name)
        return _percentiles(float(self.values[i]), self.drawn[:, i])

    @property
    def residual(self) -> float:
        """Root mean square of log L̂ - log L; NaN of a law that was not fitted here."""
        if not len(self.losses):
            return math.nan
        return float(np.sqrt(np.square(np.log(self(*self.inputs)) - np.log(self.losses)).mean()))

    def __call__(self, *inputs: Any) -> Any:
        """Losses that it predicts."""
        return self.predict(self.values, *(np.asarray(x, dtype=np.float64) for x in inputs))

    @staticmethod
    def predict(values: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {self.interval(name)!r}" for name in self.names)
        return f"{self.formula} from {len(self.losses)} runs: {shown}; residual {self.residual:.2g}"

    def to_dict(self) -> dict[str, Any]:
        fitted = {name: self.interval(name).to_dict() for name in self.names}
        return {
            "formula": self.formula,
            "runs": len(self.losses),
            "residual": self.residual,
            "parameters": fitted,
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())

    def figure(self) -> Any:
        """Loss by the first input: measured points, and the law for each value of the second, as a Plotly figure."""
        from plotly import graph_objects as go

        if not len(self.losses):
            raise InputError("The law was not fitted here: there are no runs to draw.")
        x, *rest = self.inputs
        line = np.geomspace(x.min(), x.max(), 60)
        figure = go.Figure()
        for value in np.unique(rest[0]) if rest else [None]:
            own = np.ones(len(x), dtype=bool) if value is None else rest[0] == value
            name = "runs" if value is None else f"{value:.3g}"
            at = () if value is None else (np.full(len(line), value),)
            figure.add_scatter(
                x=x[own],
                y=self.losses[own],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=bool(rest),
            )
            figure.add_scatter(x=line, y=self(line, *at), mode="lines", legendgroup=name, showlegend=False)
        figure.update_layout(
            xaxis={"type": "log", "title": {"text": "parameters" if rest else "size"}},
            yaxis={"type": "log", "title": {"text": "loss"}},
            legend={"title": {"text": "tokens" if rest else ""}},
            height=440,
        )
        return figure


# -- one variable ----------------------------------------------------------------------------------------------------


class PowerLaw(Law):
    """L = E + (x_c / x)^α; E is 0 unless it was fitted. x is what loss falls with: parameters, tokens, compute, steps.

    The critical batch size falls with loss in the same way, B = (L_c / L)^(1 / α_B): give losses as x.
    """

    formula = "L = E + (x_c / x)^α"

    @property
    def alpha(self) -> Interval:
        return self.interval("alpha")

    @staticmethod
    def predict(values: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
        irreducible, log_scale, alpha = values
        return irreducible + np.exp(alpha * (log_scale - np.log(inputs[0])))


def fit_power_law(
    x: Values, losses: Values, *, irreducible: bool = False, resamples: int = 200, seed: int = 0
) -> PowerLaw:
    """Fit L = (x_c / x)^α as a line of logarithms, or with an `irreducible` E by variable projection.

    Parameters of the law are `E`, `log_scale` (log x_c) and `alpha`. Raises InputError with too few runs or sizes, NumericsError
    for values that are not positive and finite.
    """
    inputs, y = _checked([x], losses, 3 + irreducible)

    def fit(rows: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        size, loss = inputs[0][rows], y[rows]
        if not irreducible:
            slope, offset = np.polyfit(np.log(size), np.log(loss), 1)
            return np.array([0.0, -offset / slope, -slope])
        projection = _Projection([size], loss)
        exponents = projection.search(None if start is None else start[2:])
        linear = projection.linear(exponents)
        return np.array([linear[0], math.log(max(linear[1], 1e-300)) / exponents[0], exponents[0]])

    return _fitted(PowerLaw, ("E", "log_scale", "alpha"), fit, inputs, y, resamples, seed)


# -- Chinchilla ------------------------------------------------------------------------------------------------------


class Chinchilla(Law):
    """L = E + A / N^α + B / D^β."""

    formula = "L = E + A / N^α + B / D^β"

    @property
    def alpha(self) -> Interval:
        return self.interval("alpha")

    @property
    def beta(self) -> Interval:
        return self.interval("beta")

    @property
    def irreducible(self) -> Interval:
        """E, in the losses' unit."""
        return self.interval("E")

    @staticmethod
    def predict(values: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = values
        return e + a * inputs[0] ** -alpha + b * inputs[1] ** -beta

    def optimal(self, compute: float) -> Allocation:
        """Parameters and tokens of the least loss for `compute` FLOP.

            N = G (C / 6)^(β / (α + β)),   D = (C / 6) / N,   G = (α A / (β B))^(1 / (α + β))

        Raises InputError where the law has no such point, because A or B is 0.
        """
        best = _optimal(self.values[None], compute)
        if not (np.isfinite(best).all() and (best > 0).all()):
            raise InputError(
                "One of A and B is 0: the runs say nothing of how to divide compute. Fit runs of more sizes."
            )
        drawn = _optimal(self.drawn, compute)
        drawn = drawn[np.isfinite(drawn).all(1)]
        return Allocation(compute, *(_percentiles(float(best[0, i]), drawn[:, i]) for i in range(3)))


def chinchilla(e: float, a: float, b: float, alpha: float, beta: float) -> Chinchilla:
    """The law with parameters that are known, as published ones."""
    nothing = np.empty(0)
    return Chinchilla(
        _CHINCHILLA, np.array([e, a, b, alpha, beta]), np.empty((0, 5)), (nothing, nothing), nothing
    )


_CHINCHILLA = ("E", "A", "B", "alpha", "beta")


def fit_chinchilla(
    parameters: Values,
    tokens: Values,
    losses: Values,
    *,
    huber: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Chinchilla:
    """Fit E, A, B (at least 0), α and β; `huber` is δ of Hoffmann's objective, theirs being 1e-3.

    Raises InputError with fewer than six runs or three different values of either input, NumericsError for values that are not
    positive and finite.
    """
    inputs, y = _checked([parameters, tokens], losses, 6)
    if huber is not None and not huber > 0:
        raise InputError(f"huber is {huber}; it must be positive.")

    def fit(rows: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        own, loss = [x[rows] for x in inputs], y[rows]
        projection = _Projection(own, loss)
        exponents = projection.search(None if start is None else start[3:])
        found = np.concatenate([projection.linear(exponents), exponents])
        return found if huber is None else _huber(found, own, loss, huber)

    return _fitted(Chinchilla, _CHINCHILLA, fit, inputs, y, resamples, seed)


def _optimal(values: Float[np.ndarray, "k 5"], compute: float) -> Float[np.ndarray, "k 3"]:
    """(N, D, loss) of each."""
    if not (math.isfinite(compute) and compute > 0):
        raise InputError(f"compute is {compute} FLOP; it must be positive.")
    e, a, b, alpha, beta = values.T
    product = compute / FLOP_PER_PARAMETER_TOKEN
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * product ** (beta / (alpha + beta))
        d = product / n
        return np.stack([n, d, e + a * n**-alpha + b * d**-beta], axis=1)


class _Projection:
    """Sums of powers c_0 + Σ_j c_j x_j^(-a_j), with c ≥ 0 eliminated: relative least squares in the exponents alone."""

    def __init__(self, inputs: Sequence[np.ndarray], losses: np.ndarray) -> None:
        self.losses = losses
        self.middles = [math.exp(np.log(x).mean()) for x in inputs]
        self.logs = [np.log(x / middle) for x, middle in zip(inputs, self.middles)]  # columns near 1

    def _solved(self, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(coefficients of the scaled columns, relative errors)."""
        from scipy.optimize import nnls

        columns = [np.ones(len(self.losses)), *(np.exp(-a * x) for a, x in zip(exponents, self.logs))]
        weighted = np.stack(columns, axis=1) / self.losses[:, None]
        ones = np.ones(len(self.losses))
        coefficients = nnls(weighted, ones)[0]
        return coefficients, weighted @ coefficients - ones

    def linear(self, exponents: np.ndarray) -> np.ndarray:
        """c_0 and the c_j of unscaled inputs."""
        coefficients = self._solved(exponents)[0]
        return coefficients * np.array([1.0, *(m**a for m, a in zip(self.middles, exponents))])

    def search(self, start: np.ndarray | None = None) -> np.ndarray:
        """The best exponents: from `start`, or from the three best points of a grid."""
        from scipy.optimize import least_squares

        if start is not None:
            starts = [start]
        else:
            axes = np.meshgrid(*[_EXPONENTS] * len(self.logs), indexing="ij")
            grid = np.stack([axis.ravel() for axis in axes], axis=1)
            costs = [float(np.square(self._solved(point)[1]).sum()) for point in grid]
            starts = list(grid[np.argsort(costs)[:3]])
        found = [
            least_squares(
                lambda a: self._solved(a)[1],
                np.clip(point, _BOUNDS[0] * 1.01, _BOUNDS[1] * 0.99),
                bounds=_BOUNDS,
                x_scale="jac",
                ftol=1e-15,
                xtol=1e-12,
                gtol=1e-15,
                max_nfev=200,
            )
            for point in starts
        ]
        return min(found, key=lambda f: f.cost).x


def _huber(start: np.ndarray, inputs: Sequence[np.ndarray], losses: np.ndarray, delta: float) -> np.ndarray:
    """Minimise Σ Huber_δ(log L̂ - log L) over log E, log A, log B and the exponents.

    In units of δ: a solver that stops at a change of 1e-9 of objectives near 1 stops too early at those of 1e-6 (2404.10102).
    """
    from scipy.optimize import least_squares

    log_inputs, target = [np.log(x) for x in inputs], np.log(losses)

    def terms(p: np.ndarray) -> np.ndarray:
        powers = [p[1 + j] - p[3 + j] * x for j, x in enumerate(log_inputs)]
        return np.stack([np.full(len(target), p[0]), *powers])

    def errors(p: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(p), axis=0) - target

    def slopes(p: np.ndarray) -> np.ndarray:
        own = terms(p)
        share = np.exp(own - np.logaddexp.reduce(own, axis=0))
        return np.stack([*share, *(-share[1 + j] * x for j, x in enumerate(log_inputs))], axis=1)

    first = np.concatenate([np.log(np.maximum(start[:3], 1e-12)), start[3:]])
    found = least_squares(
        errors, first, slopes, loss="huber", f_scale=delta, x_scale="jac", ftol=1e-14, xtol=1e-12, gtol=1e-14,
        max_nfev=2000,
    )  # fmt: skip
    return np.concatenate([np.exp(found.x[:3]), found.x[3:]])


# -- Kaplan ----------------------------------------------------------------------------------------------------------


class Kaplan(Law):
    """L = [(N_c / N)^(α_N / α_D) + D_c / D]^α_D; `log_parameters` and `log_tokens` are log N_c and log D_c."""

    formula = "L = [(N_c / N)^(α_N / α_D) + D_c / D]^α_D"

    @staticmethod
    def predict(values: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
        alpha_n, alpha_d, log_n, log_d = values
        small = alpha_n / alpha_d * (log_n - np.log(inputs[0]))
        return np.exp(alpha_d * np.logaddexp(small, log_d - np.log(inputs[1])))


def fit_kaplan(
    parameters: Values, tokens: Values, losses: Values, *, resamples: int = 200, seed: int = 0
) -> Kaplan:
    """Fit the joint law by least squares of logarithms. Raises as `fit_chinchilla`, with fewer than five runs."""
    inputs, y = _checked([parameters, tokens], losses, 5)
    names = ("alpha_N", "alpha_D", "log_parameters", "log_tokens")

    def fit(rows: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        from scipy.optimize import least_squares

        own, target = [x[rows] for x in inputs], np.log(y[rows])
        # Exponents by their logarithms; constants as powers of the data's own middle, where each term gives about the loss.
        middle = [np.log(x).mean() for x in own]

        def values(p: np.ndarray) -> np.ndarray:
            a, b = np.exp(p[:2])
            return np.array([a, b, middle[0] + p[2] / a, middle[1] + p[3] / b])

        def errors(p: np.ndarray) -> np.ndarray:
            return np.log(Kaplan.predict(values(p), *own)) - target

        if start is not None:
            a, b, log_n, log_d = start
            starts = [[math.log(a), math.log(b), a * (log_n - middle[0]), b * (log_d - middle[1])]]
        else:
            level = float(target.mean())
            starts = [
                [math.log(a), math.log(b), level - s, level - t]
                for a in (0.05, 0.3)
                for b in (0.05, 0.3)
                for s, t in ((0.1, 0.1), (0.0, 1.0), (1.0, 0.0))
            ]
        found = [
            least_squares(
                errors,
                p,
                bounds=([-7, -7, -50, -50], [2, 2, 50, 50]),
                x_scale="jac",
                ftol=1e-15,
                xtol=1e-12,
                gtol=1e-15,
            )
            for p in starts
        ]
        return values(min(found, key=lambda f: f.cost).x)

    return _fitted(Kaplan, names, fit, inputs, y, resamples, seed)


# -- what all of them share ------------------------------------------------------------------------------------------


def _checked(inputs: Sequence[Values], losses: Values, least: int) -> tuple[list[np.ndarray], np.ndarray]:
    x, y = [np.asarray(v, dtype=np.float64) for v in inputs], np.asarray(losses, dtype=np.float64)
    if any(v.shape != y.shape or v.ndim != 1 for v in x):
        raise InputError(f"Each run has its sizes and its loss, not {[v.shape for v in x]} and {y.shape}.")
    if not all(np.isfinite(v).all() and (v > 0).all() for v in (*x, y)):
        raise NumericsError("Sizes and losses must be positive and finite: leave out runs that failed.")
    if len(y) < least:
        raise InputError(f"{len(y)} runs: this law needs at least {least}.")
    for v in x:
        if len(np.unique(v)) < 3:
            raise InputError(
                f"The runs have {len(np.unique(v))} different sizes of an input: a power law needs at least three."
            )
    return x, y


def _fitted(
    kind: Any,
    names: tuple[str, ...],
    fit: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    inputs: Sequence[np.ndarray],
    losses: np.ndarray,
    resamples: int,
    seed: int,
) -> Any:
    """The law of all runs, and those of runs drawn with replacement that still have three different sizes of each input."""
    generator = np.random.default_rng(seed)
    n = len(losses)
    best = fit(np.arange(n), None)
    drawn: list[np.ndarray] = []
    while len(drawn) < resamples:
        rows = generator.integers(0, n, n)
        if all(len(np.unique(x[rows])) >= 3 for x in inputs):
            drawn.append(fit(rows, best))
    return kind(names, best, np.array(drawn).reshape(resamples, len(names)), tuple(inputs), losses)


def _percentiles(estimate: float, drawn: Float[np.ndarray, " k"], level: float = 0.95) -> Interval:
    if len(drawn) < 2:
        return Interval(estimate, math.nan, math.nan, math.nan, level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), float(drawn.std(ddof=1)), level)
