"""Probes scored on groups that they were not fitted on, at all sites, beside what they have to beat.

    found = cross_validate(acts, labels, groups, method="logistic", control=control_codes)
    found.held_out[site].scores()             # of the labels
    found.shuffled[site].scores()             # of labels shuffled within the folds: what chance gives
    found.control[site].scores()              # of the control task
    found.probes[site]                        # the probe fitted on all rows

Every fold's probe, those of shuffled and control labels and the final one are problems of one fit. Settings
are chosen for each fold on another fold of its rows to train on (the next one), so that no row is scored by
settings that it helped to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.linear import Probe, checked, probe_of, stacks
from probes.methods import Method, Problems, get
from probes.scores import HeldOut
from probes.splits import Classes, Labels, encode_labels, grouped_folds, shuffled_within
from steerkit.errors import InputError


@dataclass(frozen=True)
class CrossValidation:
    """Held-out probabilities by site, and the probes of all rows."""

    held_out: dict[str, HeldOut]
    shuffled: dict[str, HeldOut]
    """Of labels shuffled within the folds; empty if not asked for."""
    control: dict[str, HeldOut]
    """Empty without control labels."""
    probes: dict[str, Probe] = field(repr=False)
    classes: Classes
    folds: Int[np.ndarray, " n"] = field(repr=False)
    """The fold of each row."""


def cross_validate(
    acts: Mapping[str, Float[Tensor, "n d"]],
    labels: Labels,
    groups: Shaped[np.ndarray, " n"],
    *,
    method: str | Method = "logistic",
    shuffled: bool = True,
    control: Int[np.ndarray, " n"] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> CrossValidation:
    """Cross-validate probes at every site on the same grouped folds.

    `control` are a control task's labels, as classes from 0 (`probes.control_codes`). The same labels, groups
    and seed give the same folds for any activations. Raises as `fit_linear` and `grouped_folds` do.
    """
    chosen, (codes, classes) = get(method), encode_labels(labels)
    acts, groups = checked(acts, len(codes)), np.asarray(groups)
    folds = grouped_folds(codes, groups, n_folds, seed=seed)
    labellings = {"held_out": codes}
    if shuffled:
        labellings["shuffled"] = shuffled_within(codes, folds, groups, seed=seed)
    if control is not None:
        if len(control) != len(codes):
            raise InputError(f"{len(control)} control labels for {len(codes)} rows: each row needs one.")
        labellings["control"] = np.asarray(control)
    problems = _problems(list(labellings.values()), folds, n_folds, len(classes), seed)
    held: dict[str, dict[str, HeldOut]] = {name: {} for name in ("held_out", "shuffled", "control")}
    probes: dict[str, Probe] = {}
    for names, x in stacks(acts):
        fit = chosen.fit(x, problems.to(x.device))
        probabilities = _held_out(fit.probabilities(x), folds, n_folds, len(labellings))
        for s, site in enumerate(names):
            for (name, own), p in zip(labellings.items(), probabilities[:, s]):
                held[name][site] = HeldOut(p, own, groups)
            probes[site] = probe_of(fit, s, problems.size - 1, classes, chosen.name, site)
    ordered = {name: {site: found[site] for site in acts if site in found} for name, found in held.items()}
    return CrossValidation(
        **ordered, probes={site: probes[site] for site in acts}, classes=classes, folds=folds
    )


def _problems(
    labellings: list[np.ndarray], folds: np.ndarray, n_folds: int, n_classes: int, seed: int
) -> Problems:
    """Labelling by labelling its folds, and last the labels with all rows."""
    numbers = np.arange(n_folds)
    train = np.tile(folds[:, None] != numbers, (1, len(labellings)))
    inner = np.tile(folds[:, None] == (numbers + 1) % n_folds, (1, len(labellings)))
    codes = np.repeat(np.stack(labellings, axis=1), n_folds, axis=1)
    everything = np.ones((len(folds), 1), dtype=bool)
    return Problems(
        torch.from_numpy(np.concatenate([codes, labellings[0][:, None]], axis=1)),
        torch.from_numpy(np.concatenate([train, everything], axis=1)),
        n_classes,
        torch.from_numpy(np.concatenate([inner, folds[:, None] == 0], axis=1))[None],
        seed,
    )


def _held_out(
    probabilities: Float[Tensor, "S n m classes"], folds: np.ndarray, n_folds: int, n_labellings: int
) -> Float[np.ndarray, "labellings S n classes"]:
    """Each row's probabilities by the problem whose fold it was held out from."""
    rows = torch.arange(len(folds), device=probabilities.device)
    fold = torch.from_numpy(folds).to(probabilities.device)
    found = [probabilities[:, rows, fold + n_folds * i] for i in range(n_labellings)]
    return torch.stack(found).cpu().numpy()
