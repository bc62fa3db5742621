"""A map of decoder directions: near on the page is near in direction.

Directions are scaled to unit norm, reduced to 50 dimensions by PCA and laid out by t-SNE (van der Maaten & Hinton 2008; perplexity
30, 400 iterations, Barnes-Hut angle 1, started from PCA). Of more than 4,000 only 2,000, drawn by the seed, are laid out so; each
of the others stands between the three of them that it is most like, weighted by exp(cosine / 0.1): seconds for 16,000.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

MOST = 4_000
LANDMARKS = 2_000
SIZE = 1_000
"""Coordinates are whole numbers from 0 to this."""
_DIMENSIONS = 50
_TEMPERATURE = 0.1


def layout(
    directions: Float[np.ndarray, "n d"], seed: int = 0
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], str]:
    """(x, y, how they were found). The same again for the same seed."""
    unit = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    n = len(unit)
    if n < 10:
        places, method = _padded(unit - unit.mean(0)), "PCA of decoder directions"
    elif n <= MOST:
        places, method = _tsne(unit, seed), "t-SNE of decoder directions"
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(n, LANDMARKS, replace=False))
        anchors = _tsne(unit[chosen], seed)
        places = np.concatenate(
            [_between(part, unit[chosen], anchors) for part in np.array_split(unit, n // 512)]
        )
        places[chosen] = anchors
        method = f"t-SNE of {LANDMARKS:,} decoder directions, the others between them"
    low, high = places.min(0), places.max(0)
    scaled = np.rint(SIZE * (places - low) / np.maximum(high - low, 1e-12)).astype(int)
    return scaled[:, 0], scaled[:, 1], method


def _tsne(unit: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n_dimensions = min(_DIMENSIONS, unit.shape[1], len(unit) - 1)
    reduced = PCA(n_dimensions, random_state=seed).fit_transform(unit)
    if n_dimensions < 2:
        return _padded(reduced)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", max_iter=400, angle=1.0, random_state=seed).fit_transform(
        reduced
    )


def _padded(centred: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """The first two principal components; zeros where there are fewer."""
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(centred), 2))
    found[:, : min(2, len(s))] = (u * s)[:, :2]
    return found


def _between(
    unit: Float[np.ndarray, "n d"], anchors: Float[np.ndarray, "m d"], places: Float[np.ndarray, "m 2"]
) -> Float[np.ndarray, "n 2"]:
    cosine = unit @ anchors.T
    nearest = np.argpartition(cosine, -3, axis=1)[:, -3:]
    near = np.take_along_axis(cosine, nearest, axis=1)
    weight = np.exp((near - near.max(1, keepdims=True)) / _TEMPERATURE)
    return (places[nearest] * (weight / weight.sum(1, keepdims=True))[..., None]).sum(1)
