"""The kinds of probe, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from probes.methods.base import Fit, LinearFit, Method, ProbeWarning, Problems
from probes.methods.lda import Lda
from probes.methods.least_squares import LeastSquares
from probes.methods.logistic import Logistic
from probes.methods.mass_mean import MassMean
from probes.methods.mlp import Mlp, MlpFit
from probes.methods.prior import Prior
from steerkit.errors import InputError, did_you_mean

REGISTRY: Mapping[str, type[Method]] = {
    method.name: method for method in (Logistic, LeastSquares, MassMean, Lda, Mlp, Prior)
}

__all__ = [
    "REGISTRY",
    "Fit",
    "Lda",
    "LeastSquares",
    "LinearFit",
    "Logistic",
    "MassMean",
    "Method",
    "Mlp",
    "MlpFit",
    "Prior",
    "ProbeWarning",
    "Problems",
    "get",
]


def get(method: str | Method) -> Method:
    """The method of that name with its defaults, or the one given. Raises InputError for an unknown name."""
    if isinstance(method, Method):
        return method
    if method not in REGISTRY:
        raise InputError(
            f"There is no probe {method!r}.{did_you_mean(method, REGISTRY)} There are {', '.join(REGISTRY)}."
        )
    return REGISTRY[method]()
