"""Probes of an SAE's latents: how well one, two or five of them tell the labels.

    found = latent_probes(run.sae, rows.acts[site], rows.labels, rows.groups)
    found.accuracy[1], found.candidates["label=happy"]

Latents are chosen and probes fitted on 60 % of the groups, balanced accuracy is of the others:
`sae.judging.sparse_probing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from sae.architectures import SAE
from sae.judging import dictionaries
from sae.judging.examples import Examples
from sae.judging.sparse_probing import KS, SparseProbing, sparse_probing

CHOSEN_ON = 0.6


def latent_probes(
    sae: SAE,
    acts: Float[Tensor, "n d"],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    *,
    ks: Sequence[int] = KS,
    min_groups: int = 5,
    max_values: int = 20,
    seed: int = 0,
) -> SparseProbing:
    """k-sparse probing of every label that at least `min_groups` groups of both parts have, and as many lack.

    Raises InputError when there is no such label, NumericsError when the SAE gives NaN.
    """
    names, group = np.unique(groups, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(names))
    chosen = place[group] < CHOSEN_ON * len(names)
    examples = Examples.of(
        {"label": [str(label) for label in labels]},
        group,
        chosen,
        min_groups=min_groups,
        max_values=max_values,
    )
    dictionary, _ = dictionaries.of_sae("latents", sae, acts.to(sae.device, sae.dtype))
    return sparse_probing(dictionary, examples, ks=ks)
