"""What is judged: an SAE's latents, and everything that stands beside them, in one form.

A dictionary has m candidates with a value on each example and, where that means something, a direction that
each adds to the activations. Every measure takes any dictionary, so that an SAE and its baselines go through
the very same code.

    sae                       latents and decoder rows; of a transcoder, whose rows are of another site, latents alone
    pca                       principal components of the chosen activations
    raw basis                 the model's own coordinates; to have as many candidates as the SAE, further bases follow that are
                              random rotations of it
    supervised probes         the logit of a logistic regression for each concept, fitted on the chosen examples
    token identity            how often each token occurs
    posterior                 the exact P(value | text) of StoryWorld, for every value

Those without directions (transcoders, the last two) cannot be ablated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.transcoder import TranscoderSAE
from sae.judging.examples import Examples
from sae.thresholds import encoded
from steerkit.errors import NumericsError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_PROBE_C = 1.0
"""Inverse strength of the probes' L2 penalty, on standardised columns."""


@dataclass(frozen=True)
class Dictionary:
    """m candidates on n examples."""

    name: str
    values: csr_array | Float[np.ndarray, "n m"] = field(repr=False)
    directions: Float[np.ndarray, "m d"] | None = field(default=None, repr=False)
    acts: Float[np.ndarray, "n d"] | None = field(default=None, repr=False)
    """The activations that the directions are of."""

    @property
    def size(self) -> int:
        return int(self.values.shape[1])

    @property
    def sparse(self) -> bool:
        return not isinstance(self.values, np.ndarray)

    def columns(self, index: Int[np.ndarray, " k"]) -> Float[np.ndarray, "n k"]:
        """Some candidates' values, dense."""
        found = self.values[:, index]
        return found if isinstance(found, np.ndarray) else found.toarray()

    def __repr__(self) -> str:
        kind = "sparse" if self.sparse else "dense"
        return (
            f"Dictionary({self.name!r}, {self.size:,} {kind} candidates on {self.values.shape[0]:,} examples)"
        )


def of_sae(
    name: str, sae: SAE, acts: Float[Tensor, "tokens d"], pool: csr_array | None = None
) -> tuple[Dictionary, csr_array]:
    """(the SAE's latents on the examples, its latents on the tokens).

    `pool` (n, tokens) makes examples of tokens, as a mean over those of a document; without it tokens are the
    examples. Means of latents and of activations fit together: decoding is linear.
    """
    latents = activity(sae, acts)
    pooled = latents if pool is None else (pool @ latents).tocsr()
    directions = None if isinstance(sae, TranscoderSAE) else sae.W_dec.detach().float().cpu().numpy()
    return Dictionary(name, pooled, directions, pooled_acts(acts, pool)), latents


def pooled_acts(acts: Float[Tensor, "tokens d"], pool: csr_array | None) -> Float[np.ndarray, "n d"]:
    """The activations of the examples."""
    found = acts.float().cpu().numpy()
    return found if pool is None else np.asarray(pool @ found, dtype=np.float32)


@torch.no_grad()
def activity(sae: SAE, acts: Float[Tensor, "n d_in"]) -> csr_array:
    """(n, d_sae) latents, those that are not zero. Raises NumericsError on NaN or inf."""
    from scipy.sparse import csr_array, vstack

    parts = []
    for latents in encoded(sae, acts):
        latents = latents.float().cpu()
        row, column = latents.nonzero(as_tuple=True)
        starts = np.concatenate([[0], np.cumsum(np.bincount(row.numpy(), minlength=len(latents)))])
        entries = (latents[row, column].numpy(), column.numpy(), starts)
        parts.append(csr_array(entries, shape=tuple(latents.shape)))
    found = vstack(parts, format="csr")
    if not np.isfinite(found.data).all():
        raise NumericsError("The SAE gives NaN or inf: check its weights.")
    return found


def pca(acts: Float[np.ndarray, "n d"], chosen: Bool[np.ndarray, " n"]) -> Dictionary:
    """Principal components, of the activations that are chosen on."""
    mean = acts[chosen].mean(0)
    _, _, rows = np.linalg.svd(acts[chosen] - mean, full_matrices=False)
    return Dictionary("PCA", (acts - mean) @ rows.T, rows, acts)


def raw_basis(
    acts: Float[np.ndarray, "n d"], chosen: Bool[np.ndarray, " n"], size: int, *, seed: int = 0
) -> Dictionary:
    """The coordinates, and random rotations of them until there are `size` candidates (never fewer than d)."""
    d = acts.shape[1]
    generator = np.random.default_rng(seed)
    bases = [np.eye(d)]
    while len(bases) * d < size:
        q, r = np.linalg.qr(generator.normal(size=(d, d)))
        bases.append(q * np.sign(np.diag(r)))
    directions = np.concatenate(bases)[: max(size, d)].astype(np.float32)
    return Dictionary("raw basis", (acts - acts[chosen].mean(0)) @ directions.T, directions, acts)


def supervised(acts: Float[np.ndarray, "n d"], examples: Examples) -> Dictionary:
    """One candidate a concept: the logit of its logistic regression."""
    weights, bias = fit_probes(acts, examples)
    norms = np.linalg.norm(weights, axis=0, keepdims=True)
    directions = (weights / np.maximum(norms, 1e-12) ** 2).T
    return Dictionary("supervised probes", acts @ weights + bias, directions, acts)


def token_identity(token_ids: Int[np.ndarray, " tokens"], pool: csr_array | None) -> Dictionary:
    """How often each token occurs in an example."""
    from scipy.sparse import csr_array

    n = len(token_ids)
    once = csr_array(
        (np.ones(n, dtype=np.float32), (np.arange(n), token_ids)), shape=(n, int(token_ids.max()) + 1)
    )
    return Dictionary("token identity", once if pool is None else (pool @ once).tocsr())


# probes


def fit_probes(
    acts: Float[np.ndarray, "n d"],
    examples: Examples,
    *,
    labels: Bool[np.ndarray, "n c"] | None = None,
    weights: Float[np.ndarray, "n c"] | None = None,
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Logistic regressions on the chosen examples, one a column of `labels` (of the concepts, by default).

    They are fitted on standardised coordinates and given for raw ones: logits are acts @ weights + bias.
    `weights` of the examples balance the classes by default; those of weight zero are not looked at.
    """
    labels = examples.labels if labels is None else labels
    directions, bias = [], []
    for c in range(labels.shape[1]):
        part = examples.chosen if weights is None else examples.chosen & (weights[:, c] > 0)
        weight = None if weights is None else weights[part, c]
        w, b = logistic(acts[part], labels[part, c], weight)
        directions.append(w)
        bias.append(b)
    return np.stack(directions, axis=1).astype(np.float32), np.array(bias, dtype=np.float32)


def logistic(
    columns: Float[np.ndarray, "n k"],
    labels: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
) -> tuple[Float[np.ndarray, " k"], float]:
    """(weights, bias) of a balanced L2 logistic regression on standardised columns, in the columns' own units."""
    from sklearn.linear_model import LogisticRegression

    if labels.all() or not labels.any():
        return np.zeros(columns.shape[1]), 1.0 if labels.all() else -1.0
    columns = np.asarray(columns, dtype=np.float64)
    mean, scale = columns.mean(0), columns.std(0)
    scale[scale <= 1e-12 * np.abs(columns).max(0, initial=0.0)] = np.inf
    balance = "balanced" if weights is None else None
    if weights is not None:
        weights = weights / weights.mean()
    probe = LogisticRegression(C=_PROBE_C, class_weight=balance, max_iter=300, tol=1e-3)
    probe.fit((columns - mean) / scale, labels, sample_weight=weights)
    found = probe.coef_[0] / scale
    return found, float(probe.intercept_[0] - found @ mean)
