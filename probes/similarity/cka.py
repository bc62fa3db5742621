"""Linear centred kernel alignment.

    biased      CKA = |Xc'Yc|_F² / (|Xc'Xc|_F |Yc'Yc|_F)                                 Xc, Yc: centred rows, (n, d_x) and (n, d_y)
    debiased    CKA = H(X, Y) / sqrt(H(X, X) H(Y, Y)),  H the unbiased HSIC of Song et al.; in terms of features

        n (n - 3) H(X, Y) = |Xc'Yc|_F² - n/(n - 2) Σ_i |x_i|²|y_i|² + Σ_i |x_i|² Σ_i |y_i|² / ((n - 1)(n - 2))

Kornblith et al. 2019, https://arxiv.org/abs/1905.00414; Song et al. 2012, JMLR 13:1393. Debiased by default: without
relation between the sides the biased form is about sqrt(d_x d_y / ((n + d_x)(n + d_y))), which is 0.6 at n = 512 and d
= 768. The debiased one can be below zero, and is never clamped; as a ratio it is unbiased only to O(1/n), and rows that
resemble each other within documents, of which there are g, bias it upwards by O(1/g), as the null of permuted documents shows.

Both routes are exact. `moments` streams (one product of (n, Σd_a) by (n, Σd_b) for all pairs, memory flat in n) and
leaves out blocks of documents; `gram` keeps the rows and walks over n × n inner products, which is less work and memory
where n is well below the widths, and leaves out documents one by one. A bootstrap with replacement would be wrong here:
rows drawn twice put the diagonal back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.similarity.base import Fitter, Invariances, Settings
from probes.similarity.gram import GramFitter, GramMethod, GramSums, Kernel, linear_kernel
from probes.similarity.moments import MomentFitter, MomentMeasure, PairSums
from steerkit.errors import InputError

KERNEL_INVARIANCES = Invariances(orthogonal=True, scaling=True, linear=False, translation=True)


@dataclass(frozen=True)
class LinearCKA(MomentMeasure):
    """Linear CKA."""

    name: ClassVar[str] = "linear_cka"
    invariances: ClassVar[Invariances] = KERNEL_INVARIANCES

    debiased: bool = True
    """Use the unbiased HSIC."""
    route: Literal["auto", "moments", "gram"] = "auto"
    """`auto`: moments when streaming; `similarity`, which sees all rows at once, takes the cheaper."""

    def fitter(self, **settings: Any) -> Fitter:
        if self.route == "gram":
            return GramFitter(self, cka_method(linear_kernel, self.debiased), Settings(**settings))
        return MomentFitter(self, Settings(**settings))

    def of_site(self, own: PairSums) -> tuple[Tensor, Tensor]:
        """(HSIC with itself, Σ|x|² about the mean)"""
        return self._hsic(own), own.trace_x

    def of_pair(self, x: Any, y: Any, joint: PairSums) -> Tensor:
        return self._hsic(joint) / (x[0] * y[0]).sqrt()

    def expected_null(self, x: Any, y: Any, joint: PairSums) -> float:
        """Mean of tr(K P L P') over permutations P is tr(K) tr(L) / (n - 1) for centred K and L, and 0 for the debiased
        HSIC."""
        if self.debiased:
            return 0.0
        return float(x[1] * y[1] / ((joint.n - 1) * (x[0] * y[0]).sqrt()))

    def note(self, x: Any, y: Any, joint: PairSums) -> str:
        if self.debiased:
            return ""
        return biased_note(int(joint.n), self.expected_null(x, y, joint))

    def _hsic(self, joint: PairSums) -> Tensor:
        """Times (n - 1)² if biased, n (n - 3) if not, which cancels."""
        n = joint.n
        aligned = joint.scatter.square().sum()
        if not self.debiased:
            return aligned
        if n < 4:
            raise InputError(
                "the debiased CKA needs at least four rows, also without any one block of documents."
            )
        traces = joint.trace_x * joint.trace_y / ((n - 1) * (n - 2))
        return aligned - n / (n - 2) * joint.centred_squares + traces


def cka_method(
    kernel: Callable[[Float[Tensor, "n d"]], Kernel],
    debiased: bool,
    max_rows: int | None = None,
    seed: int = 0,
) -> GramMethod:
    """CKA of kernels, for `GramFitter`."""

    def expected_null(sums: GramSums) -> Float[Tensor, "s s"]:
        own = sums.hsic(debiased=debiased)[0].diagonal().sqrt()
        if debiased:
            return torch.zeros_like(sums.products[0])
        centred = (sums.traces - sums.totals[0] / sums.n[0]) / own
        return centred[:, None] * centred / (sums.n[0] - 1)

    return GramMethod(
        kernel,
        lambda sums: of_hsic(sums.hsic(debiased=debiased)),
        expected_null,
        diagonal=not debiased,
        note=lambda sums, p, q: (
            "" if debiased else biased_note(int(sums.n[0]), float(expected_null(sums)[p, q]))
        ),
        max_rows=max_rows,
        seed=seed,
    )


def of_hsic(hsic: Float[Tensor, "... s s"]) -> Float[Tensor, "... s s"]:
    """CKA of every pair of kernels from their HSIC."""
    own = hsic.diagonal(0, -2, -1)
    return hsic / (own[..., :, None] * own[..., None, :]).sqrt()


def biased_note(n: int, expected: float) -> str:
    """What to say of a biased CKA that unrelated rows would reach: of isotropic rows, n / 10 and more dimensions."""
    if expected < 1 / 11:
        return ""
    return (
        f"{n:,} rows are few for so many dimensions: the biased CKA is {expected:.2f} on average if rows are paired at random; "
        "use the debiased form"
    )
