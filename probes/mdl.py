"""Minimum description length: how many bits the labels take, given the activations.

    found = online_code(acts, labels, groups, method="logistic")
    found[site].bits, found[site].compression                # 812.4, 3.1

The online (prequential) code: rows come in blocks; the labels of the first take log₂ K bits each, those of
every further block what a probe of all the blocks before it gives them,

    L = t₁ log₂ K − Σᵢ log₂ p_θᵢ(labels of block i + 1)           θᵢ fitted on the first tᵢ rows

so that both the quality of a probe and the rows that it needs are paid for. What has not been seen must not be
ruled out: p is mixed with the uniform distribution as if each class had been seen once more,
(g p + 1) / (g + K), g being the groups seen, and is the class frequency until all classes have been seen.
Compression is n log₂ K / L; labels that say nothing have about 1 or less. Blocks end after 0.1, 0.2, 0.4, 0.8,
1.6, 3.2, 6.25, 12.5, 25, 50 and 100 % of the rows, at a boundary of groups. A penalty with several candidates is
part of the code: the shortest of the candidates' lengths, and log₂ of their number to name it.

Voita & Titov 2020, https://arxiv.org/abs/2003.12298. With labels alone (`method="prior"`), row by row, that
is Laplace's rule of succession, and the length of n labels of two classes, k of one, is log₂((n + 1) C(n,
k)).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.linear import checked, stacks
from probes.methods import Logistic, Method, Prior, ProbeWarning, Problems, get
from probes.splits import Labels, encode_labels
from steerkit.errors import InputError

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class OnlineCode:
    """The code of one site's labels."""

    bits: float
    """Length of all labels."""
    uniform_bits: float
    """n log₂ K."""
    ends: tuple[int, ...]
    """Rows up to the end of each block."""
    block_bits: tuple[float, ...]
    """Length of each block's labels; the first is that of the uniform code."""
    C: float | None = None
    """The penalty of the shortest code."""

    @property
    def compression(self) -> float:
        """How many times shorter than the uniform code."""
        return self.uniform_bits / self.bits

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "compression": self.compression}

    def __repr__(self) -> str:
        return f"OnlineCode({self.bits:,.1f} bits for {self.ends[-1]:,} labels, compression {self.compression:.3g})"


def online_code(
    acts: Mapping[str, Float[Tensor, "n d"]],
    labels: Labels,
    groups: Shaped[np.ndarray, " n"] | None = None,
    *,
    method: str | Method = "logistic",
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> dict[str, OnlineCode]:
    """The online code of the labels at every site; `seed` orders the groups (rows, without groups).

    Blocks that would be empty are left out. Raises as `fit_linear` does, and InputError for fractions that do not rise to 1.
    """
    chosen, (codes, classes) = get(method), encode_labels(labels)
    acts = checked(acts, len(codes))
    groups = np.arange(len(codes)) if groups is None else np.asarray(groups)
    order, ends = _order(groups, fractions, seed)
    seen = [len(np.unique(groups[order[:end]])) for end in ends]
    candidates = _candidates(chosen)
    penalties = [getattr(candidate, "C", None) for candidate in candidates]
    found = {}
    for names, x in stacks(
        {site: values[torch.from_numpy(order).to(values.device)] for site, values in acts.items()}
    ):
        lengths = np.stack(
            [_lengths(candidate, x, codes[order], len(classes), ends, seen, seed) for candidate in candidates]
        )
        for s, site in enumerate(names):
            best = int(lengths[:, s].sum(-1).argmin())
            blocks = [ends[0] * math.log2(len(classes)), *lengths[best, s].tolist()]
            found[site] = OnlineCode(
                math.fsum(blocks) + math.log2(len(candidates)),
                len(codes) * math.log2(len(classes)),
                tuple(ends),
                tuple(blocks),
                penalties[best],
            )
    return {site: found[site] for site in acts}


def _candidates(method: Method) -> list[Method]:
    if isinstance(method, Logistic) and method.C is None:
        return [replace(method, C=C) for C in method.Cs]
    return [method]


def _order(
    groups: np.ndarray, fractions: Sequence[float], seed: int
) -> tuple[Int[np.ndarray, " n"], list[int]]:
    """(rows in random order, groups whole; where the blocks end)."""
    if list(fractions) != sorted(set(fractions)) or not fractions or fractions[0] <= 0 or fractions[-1] != 1:
        raise InputError(f"Fractions must rise from above 0 to 1, not {list(fractions)}.")
    _, group = np.unique(groups, return_inverse=True)
    place = np.random.default_rng(seed).permutation(group.max() + 1)
    order = np.argsort(place[group], kind="stable")
    bounds = np.cumsum(np.bincount(place[group]))
    wanted = np.array(fractions) * len(groups)
    ends = sorted({int(bounds[np.abs(bounds - rows).argmin()]) for rows in wanted})
    if len(ends) < 2:
        raise InputError("One block of labels is no online code: give more groups, or more fractions.")
    return order, ends


def _lengths(
    method: Method,
    x: Float[Tensor, "S n d"],
    codes: np.ndarray,
    n_classes: int,
    ends: list[int],
    seen: list[int],
    seed: int,
) -> Float[np.ndarray, "S blocks"]:
    """Bits of each block but the first."""
    found = []
    targets = torch.from_numpy(codes).to(x.device)
    for start, end, n_groups in zip(ends, ends[1:], seen):
        problems = Problems.single(targets[:start], n_classes, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ProbeWarning
            )  # the first blocks have few rows, that is what they are for
            known = len(np.unique(codes[:start])) == n_classes
            fit = (method if known else Prior()).fit(x[:, :start], problems.to(x.device))
        p = fit.probabilities(x[:, start:end])[:, :, 0].double()
        picked = p.gather(-1, targets[start:end].expand(len(x), -1)[..., None])[..., 0]
        mixed = (n_groups * picked + 1) / (n_groups + n_classes)
        found.append(-mixed.log2().sum(1))
    return torch.stack(found, dim=1).cpu().numpy()
