"""Control tasks: does a probe read the model, or learn by heart?

    codes = control_codes(token_ids, codes, seed=0)
    selectivity = difference_on_other_labels(found.held_out[site], found.control[site])

Every word type gets one label at random, drawn from the task's own label frequencies; selectivity is the
probe's accuracy on the task less that on the control task. A probe of activations that do not know the word
reaches the commonest label's share on it; one that can look up the word reaches 1 on the types that it has
seen.

Hewitt & Liang 2019, https://arxiv.org/abs/1909.03368.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Shaped

from steerkit.errors import InputError


def control_codes(
    types: Shaped[np.ndarray, " n"], codes: Int[np.ndarray, " n"], *, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """The control task's class of each row: the same for rows of one type. Raises InputError when lengths differ."""
    types = np.asarray(types)
    if len(types) != len(codes):
        raise InputError(f"{len(types)} word types for {len(codes)} labels: each row needs both.")
    names, index = np.unique(types, return_inverse=True)
    drawn = np.random.default_rng(seed).choice(codes, size=len(names))
    return drawn[index]
