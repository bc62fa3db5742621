"""Making a steering vector by a method's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from steerkit.errors import InputError, did_you_mean
from steerkit.models import HookedModel
from steerkit.steering.methods import METHODS, Method
from steerkit.steering.pairs import load_pairs
from steerkit.steering.vector import SteeringVector


def fit(
    model: HookedModel,
    pairs: Any,
    method: str | Method = "mean_diff",
    site: str | Sequence[str] | None = None,
    **settings: Any,
) -> SteeringVector:
    """A steering vector from `pairs` (whatever `load_pairs` takes) by a method of `METHODS`, at one site or several.

    Without `site`: the residual stream after the middle block. `settings` are fields of the method. Raises InputError for a method
    or setting that does not exist, SiteError for a site, and what the method says.
    """
    if isinstance(method, str):
        kind = get(method)
        known = [field.name for field in fields(kind)]
        for name in settings:
            if name not in known:
                raise InputError(
                    f"{method} has no setting {name!r}.{did_you_mean(name, known)} It has {', '.join(known) or 'none'}."
                )
        method = kind(**settings)
    elif settings:
        raise InputError("Give settings with a method's name, or a method that has them.")
    if method.needs_lm_head and not model.has_lm_head:
        raise InputError(f"{method.name} needs a language-model head, which {model.name} has not.")
    sites = (
        [site]
        if isinstance(site, str)
        else list(site or [f"blocks.{(model.n_layers - 1) // 2}.hook_resid_post"])
    )
    for name in sites:
        model.site(name)
    return method.fit(model, load_pairs(pairs), sites)


def get(name: str) -> type[Method]:
    """The method of that name. Raises InputError when there is none."""
    if name not in METHODS:
        raise InputError(
            f"There is no steering method {name!r}.{did_you_mean(name, METHODS)} There are {', '.join(METHODS)}."
        )
    return METHODS[name]
