"""Labels, and folds that never split a group (a document, a sentence, a story).

    codes, classes = encode_labels(["happy", "sad", …])
    folds = grouped_folds(codes, groups, n_folds=5, seed=0)          # (n,) the fold of each row

Folds depend on labels and groups alone: two models probed on the same rows get the same folds, so that they
can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from torch import Tensor

from steerkit.errors import InputError

Labels = Sequence[Any] | Shaped[np.ndarray, " n"] | Shaped[Tensor, " n"]
Classes = tuple[str | int | float | bool, ...]


def encode_labels(labels: Labels) -> tuple[Int[np.ndarray, " n"], Classes]:
    """(class of each row, from 0; the classes in order). Raises InputError for a missing label or fewer than two classes."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    values = np.asarray(labels)
    if values.ndim != 1:
        raise InputError(f"Labels are of the shape {values.shape}: one label a row is needed.")
    if (values.dtype.kind == "f" and np.isnan(values).any()) or values.dtype.kind == "O":
        raise InputError("Some labels are missing or of mixed types: leave those rows out.")
    classes, codes = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        only = f"all labels are {classes[0]!r}" if len(classes) else "there are no rows"
        raise InputError(f"A probe tells classes apart, and {only}: give rows of at least two classes.")
    return codes.astype(np.int64), tuple(classes.tolist())


def grouped_folds(
    codes: Int[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"], n_folds: int = 5, *, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """The fold of each row: groups are dealt out class by class, the rarest first.

    A group counts for the class that is commonest in it. Raises InputError for fewer
    groups than folds, and for a class that would be missing from the rows to train on of some fold.
    """
    names, group = np.unique(groups, return_inverse=True)
    if len(group) != len(codes):
        raise InputError(f"{len(group)} groups for {len(codes)} labels: each row needs both.")
    if not 2 <= n_folds <= len(names):
        raise InputError(
            f"{n_folds} folds of {len(names)} groups: give at least two folds, and as many groups as folds."
        )
    n_classes = int(codes.max()) + 1
    counts = np.zeros((len(names), n_classes))
    np.add.at(counts, (group, codes), 1)
    majority = counts.argmax(1)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(names))
    rarity = np.argsort(np.argsort(np.bincount(majority, minlength=n_classes), kind="stable"), kind="stable")
    order = order[np.argsort(rarity[majority[order]], kind="stable")]
    of_group = np.empty(len(names), dtype=np.int64)
    of_group[order] = np.arange(len(names)) % n_folds
    folds = of_group[group]
    present = np.zeros((n_folds, n_classes), dtype=bool)
    present[folds, codes] = True
    for code in np.flatnonzero(present.sum(0) < 2):
        raise InputError(
            f"Class {code} (from 0) is in too few groups to train on it in every fold: leave it out, or give more texts of it."
        )
    return folds


def shuffled_within(
    codes: Int[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> Int[np.ndarray, " n"]:
    """Labels that say nothing: permuted within each fold; whole groups change labels where each has one."""
    generator = np.random.default_rng(seed)
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if np.array_equal(codes[first][group], codes):
        return _permuted(codes[first], folds[first], generator)[group]
    return _permuted(codes, folds, generator)


def _permuted(codes: np.ndarray, folds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    found = codes.copy()
    for fold in np.unique(folds):
        inside = np.flatnonzero(folds == fold)
        found[inside] = codes[generator.permutation(inside)]
    return found
