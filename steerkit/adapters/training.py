"""Training an adapted model: `steerkit.finetuning`, with what the method asks for beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steerkit.adapters.adapted import Adapted
from steerkit.errors import InputError
from steerkit.finetuning import FinetuneConfig, Outcome, finetune
from steerkit.models import HookedModel
from steerkit.objectives import Objective


def train(
    tuned: Adapted,
    objective: Objective[Any],
    config: FinetuneConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train the adapter, in place. See `steerkit.finetuning.finetune` for what it raises and writes."""
    method = tuned.method

    def groups(model: HookedModel) -> list[dict[str, Any]] | None:
        return method.groups(model.model, config.lr, config.weight_decay)

    def regulariser(model: HookedModel) -> Tensor:
        found = method.regulariser(model.model)
        assert found is not None
        return found

    has_groups = groups(tuned) is not None
    penalised = method.regulariser(tuned.model) is not None
    if not tuned.trainable():
        raise InputError(f"{method.name} has nothing to train here: look at modules and layers.")
    outcome = finetune(
        tuned,
        objective,
        config,
        out=out,
        resume=resume,
        quiet=quiet,
        settings=settings,
        groups=groups if has_groups else None,  # type: ignore[arg-type]
        regulariser=regulariser if penalised else None,
        after_step=lambda model, step, n_steps: method.after_step(model.model, step, n_steps),
    )
    method.finish(tuned.model)
    return outcome


def along(
    tuned: Adapted, objective: Objective[Any], alphas: Sequence[float], split: str = "test"
) -> list[float]:
    """Mean loss on a split with the adapter scaled by each α: 0 is the base, 1 what was trained."""
    found = []
    for alpha in alphas:
        with tuned.scaled(alpha):
            found.append(objective.evaluate(tuned, split).mean("loss"))
    return found
