"""Logistic regression: the probe to start with.

    minimise  Σᵢ wᵢ (log Σₖ exp zᵢₖ − zᵢ,yᵢ) / Σᵢ wᵢ + |W|² / (2 C n)           z = W x + b

with x standardised on the rows to train on, b not penalised, and n their number; two classes have one z.
That is scikit-learn's LogisticRegression(C, class_weight) after StandardScaler. `C` is the best of `Cs` by
cross-entropy on inner folds.

How. L-BFGS (Liu & Nocedal 1989) of all problems at once; each iteration costs two products with the rows,
as the logits are linear along a step. It starts from the inverse of Böhning's bound (1992): the Hessian at
equal probabilities, h XᵀX/n + 1/(C n), whose eigenvectors are found once a site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.methods.base import LinearFit, Method, Problems, Rows, warn_of_few_rows

_MEMORY = 10
"""Pairs of steps and gradients that L-BFGS keeps."""
_MOST_LOGITS = 1 << 25
"""Logits in memory at once."""


@dataclass(frozen=True)
class Logistic(Method):
    """L2-penalised logistic regression."""

    C: float | None = None
    """Inverse strength of the penalty; None: chosen from `Cs`."""
    Cs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    balanced: bool = False
    """Give every class the same weight, whatever its number of rows."""
    standardize: bool = True
    exact: bool = True
    """Compute in float64. float32 is twice as fast, and good to about 1e-5 in probabilities."""
    tolerance: float = 1e-7
    """Stop when no coordinate of the mean loss's gradient exceeds it; at least 1e-5 in float32."""
    max_iterations: int = 500

    name: ClassVar[str] = "logistic"

    def fit(self, x: Float[Tensor, "S n d"], problems: Problems) -> LinearFit:
        warn_of_few_rows(x, problems.train, "the penalty")
        if self.C is not None:
            C = torch.full((len(x), problems.size), self.C, dtype=torch.float64, device=x.device)
        elif problems.inner is None:
            C = torch.full((len(x), problems.size), 1.0, dtype=torch.float64, device=x.device)
        else:
            C = self._chosen(x, problems)
        dtype = torch.float64 if self.exact else torch.float32
        rows = Rows.of(x, problems.train, standardize=self.standardize, dtype=dtype)
        weight, bias = self._solve(rows, problems, C)
        return rows.linear_fit(weight, bias, C=C)

    def _chosen(self, x: Float[Tensor, "S n d"], problems: Problems) -> Float[Tensor, "S m"]:
        """The C with the least cross-entropy on the inner folds, in float32 and to three digits, as its choice needs no more."""
        assert problems.inner is not None
        n_inner, _, m = problems.inner.shape
        train = (problems.train & ~problems.inner).permute(1, 0, 2).flatten(1)  # (n, q m)
        n_C = len(self.Cs)
        inner = replace(
            problems, codes=problems.codes.repeat(1, n_inner * n_C), train=train.repeat(1, n_C), inner=None
        )
        C = torch.tensor(self.Cs, dtype=torch.float64, device=x.device)
        rough = replace(self, exact=False, tolerance=1e-4)
        rows = Rows.of(x, inner.train, standardize=self.standardize, dtype=torch.float32)
        weight, bias = rough._solve(rows, inner, C.repeat_interleave(n_inner * m).expand(len(x), -1))
        fit = rows.linear_fit(weight, bias)
        held_out = problems.inner.permute(1, 0, 2).flatten(1).repeat(1, n_C).float()
        found = _losses(fit.logits(x), _targets(inner), held_out / held_out.sum(0).clamp_min(1))
        return C[found.unflatten(1, (n_C, n_inner, m)).mean(2).argmin(1)]

    def _solve(
        self, rows: Rows, problems: Problems, C: Float[Tensor, "S m"]
    ) -> tuple[Float[Tensor, "S m k d"], Float[Tensor, "S m k"]]:
        S, n, d = rows.x.shape
        columns = max(1, _MOST_LOGITS // (S * n * max(1, problems.n_classes)))
        parts = []
        for start in range(0, problems.size, columns):
            part = slice(start, start + columns)
            some = replace(problems, codes=problems.codes[:, part], train=problems.train[:, part])
            own = replace(rows, shift=rows.shift[:, part], inverse_scale=rows.inverse_scale[:, part])
            penalty = 1 / (C[:, part] * some.train.sum(0))
            parts.append(
                _Lbfgs(own, some, penalty, self.balanced, self.standardize).run(
                    self.tolerance if self.exact else max(self.tolerance, 1e-5), self.max_iterations
                )
            )
        theta = torch.cat(parts, dim=1)
        return theta[..., :d], theta[..., d]


def _targets(problems: Problems) -> Float[Tensor, "n m k"]:
    """1 for a row's class; of two classes the second alone."""
    if problems.n_classes == 2:
        return problems.codes[..., None]
    return torch.nn.functional.one_hot(problems.codes, problems.n_classes)


def _losses(
    logits: Float[Tensor, "S n m k"], targets: Int[Tensor, "n m k"], weights: Float[Tensor, "n m"]
) -> Float[Tensor, "S m"]:
    """Weighted cross-entropies, in nats."""
    single = logits.shape[-1] == 1
    total = torch.nn.functional.softplus(logits[..., 0]) if single else logits.logsumexp(-1)
    return ((total - (logits * targets).sum(-1)) * weights).sum(1)


class _Lbfgs:
    """The minimisation. Parameters are (S, m, k, d + 1), the bias last; problems that are done leave."""

    def __init__(
        self,
        rows: Rows,
        problems: Problems,
        penalty: Float[Tensor, "S m"],
        balanced: bool,
        standardize: bool,
    ) -> None:
        self.x, dtype = rows.x, rows.x.dtype
        self.shift, self.inverse = rows.shift[:, :, None], rows.inverse_scale[:, :, None]
        self.targets = _targets(problems).to(dtype)
        self.weights = problems.weights(balanced).to(dtype)
        self.penalty = penalty.to(dtype)
        n = self.x.shape[1]
        gram = self.x.mT @ self.x / n
        if not standardize:
            gram = gram * rows.std[:, :, None] * rows.std[:, None]
        self.eigenvalues, self.axes = torch.linalg.eigh(gram.double())
        self.eigenvalues = self.eigenvalues.clamp_min(0).to(dtype)
        self.axes = self.axes.to(dtype)
        share = torch.einsum("nm,nmk->mk", self.weights, self.targets)
        self.curvature = (share * (1 - share)).mean(-1).clamp_min(1e-3)

    def run(self, tolerance: float, max_iterations: int) -> Float[Tensor, "S m k d1"]:
        S, _, d = self.x.shape
        _, m, k = self.targets.shape
        result = self.x.new_zeros(S, m, k, d + 1)
        left = torch.arange(m, device=self.x.device)
        theta = result.clone()
        logits = self.x.new_zeros(S, self.x.shape[1], m, k)
        loss, gradient = self._value(theta, logits), self._gradient(theta, logits)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(max_iterations):
            going = gradient.abs().amax((-1, -2)) > tolerance
            if not going.any():
                break
            if 2 * int(going.any(0).sum()) <= len(left):
                result[:, left] = theta
                keep = going.any(0)
                left, theta, gradient, logits = (
                    left[keep],
                    theta[:, keep],
                    gradient[:, keep],
                    logits[:, :, keep],
                )
                loss, going = loss[:, keep], going[:, keep]
                history = [(s[:, keep], y[:, keep], r[:, keep]) for s, y, r in history]
                self._keep(keep)
            step = -self._direction(gradient, history) * going[..., None, None]
            length, new_loss, along = self._search(theta, logits, loss, gradient, step)
            moved = step * length[..., None, None]
            if not moved.any():
                break
            theta, loss = theta + moved, new_loss
            logits = logits + along * length[:, None, :, None]
            new_gradient = self._gradient(theta, logits)
            change = new_gradient - gradient
            curvature = _dot(moved, change)
            useful = curvature > torch.finfo(curvature.dtype).tiny
            history.append(
                (moved, change, torch.where(useful, 1 / curvature.where(useful, curvature.new_ones(())), 0.0))
            )
            history = history[-_MEMORY:]
            gradient = new_gradient
        result[:, left] = theta
        return result

    def _keep(self, keep: Tensor) -> None:
        self.shift, self.inverse = self.shift[:, keep], self.inverse[:, keep]
        self.targets, self.weights = self.targets[:, keep], self.weights[:, keep]
        self.penalty, self.curvature = self.penalty[:, keep], self.curvature[keep]

    def _logits(self, theta: Tensor) -> Float[Tensor, "S n m k"]:
        scaled = theta[..., :-1] * self.inverse
        constant = theta[..., -1] - (scaled * self.shift).sum(-1)
        return (self.x @ scaled.flatten(1, 2).mT).unflatten(-1, theta.shape[1:3]) + constant[:, None]

    def _value(self, theta: Tensor, logits: Tensor) -> Float[Tensor, "S m"]:
        squares = theta[..., :-1].square().sum((-1, -2))
        return _losses(logits, self.targets, self.weights) + self.penalty * squares / 2

    def _gradient(self, theta: Tensor, logits: Tensor) -> Tensor:
        p = torch.sigmoid(logits) if logits.shape[-1] == 1 else logits.softmax(-1)
        residual = (p - self.targets) * self.weights[..., None]
        total = residual.sum(1)
        by_column = (residual.flatten(2).mT @ self.x).unflatten(1, theta.shape[1:3])
        of_weights = (by_column - total[..., None] * self.shift) * self.inverse
        of_weights = of_weights + self.penalty[..., None, None] * theta[..., :-1]
        return torch.cat([of_weights, total[..., None]], dim=-1)

    def _direction(self, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The two-loop recursion."""
        q, shares = gradient, []
        for s, y, inverse in reversed(history):
            share = inverse * _dot(s, q)
            shares.append(share)
            q = q - share[..., None, None] * y
        r = self._preconditioned(q)
        if history:
            s, y, _ = history[-1]
            length = _dot(y, self._preconditioned(y))
            ratio = torch.where(
                length > 0, _dot(s, y) / length.clamp_min(torch.finfo(length.dtype).tiny), 1.0
            )
            r = r * torch.where(ratio > 0, ratio, 1.0)[..., None, None]
        for (s, y, inverse), share in zip(history, reversed(shares)):
            r = r + (share - inverse * _dot(y, r))[..., None, None] * s
        return r

    def _preconditioned(self, g: Tensor) -> Tensor:
        h = self.curvature[:, None, None]
        spectrum = h * self.eigenvalues[:, None, None] + self.penalty[..., None, None]
        axes = self.axes[:, None]
        return torch.cat([(g[..., :-1] @ axes / spectrum) @ axes.mT, g[..., -1:] / h], dim=-1)

    def _search(
        self, theta: Tensor, logits: Tensor, loss: Tensor, gradient: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(length of each problem's step, losses after it, logits of the step): halved until Armijo's condition holds."""
        along = self._logits(step)
        slope = _dot(gradient, step)
        length = torch.ones_like(loss)
        slack = 8 * torch.finfo(loss.dtype).eps * loss.abs()
        for _ in range(30):
            new_loss = self._value(
                theta + step * length[..., None, None], logits + along * length[:, None, :, None]
            )
            bad = ~(new_loss <= loss + 1e-4 * length * slope + slack)
            if not bad.any():
                return length, new_loss, along
            length = torch.where(bad, length / 2, length)
        return torch.where(bad, 0.0, length), torch.where(bad, loss, new_loss), along


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, "S m"]:
    return (a * b).sum((-1, -2))
