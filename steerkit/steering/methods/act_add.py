"""Activation addition (ActAdd): the difference of two prompts, position by position, added to the beginning of a text.

    M_t = h+_t - h-_t,  t = 0 … T - 1 after BOS;      h_{start + t} ← h_{start + t} + s M_t

Turner et al. 2023, https://arxiv.org/abs/2308.10248. The shorter prompt is filled up with spaces to the T tokens of the longer. No
data but one pair; of several the matrices are averaged, a matrix that ends early counting as zero from there. The paper adds
before a block (`blocks.6.hook_resid_pre` of 48, s = 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.steering.edits import AddMatrix
from steerkit.steering.methods.base import Method, register
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import encode_side
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where


@register
@dataclass(frozen=True)
class ActAdd(Method):
    """Matrices of aligned positions from prompt pairs."""

    name: ClassVar[str] = "act_add"

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        sums: dict[str, Tensor] = {}
        for pair in pairs:
            matrices = self._matrices(model, *pair.texts(), sites)
            for site, matrix in matrices.items():
                total = sums.get(site, matrix[:0])
                longer, shorter = (total, matrix) if len(total) >= len(matrix) else (matrix, total)
                sums[site] = longer.clone()
                sums[site][: len(shorter)] += shorter
        start = _start(model, encode_side(model, "", pairs[0].positive)[0])
        edits = tuple(AddMatrix(site, total / len(pairs), start=start) for site, total in sums.items())
        for edit in edits:
            if not edit.matrix.any():
                raise InputError(f"The two sides of {pairs.name} do not differ at {edit.site}.")
        return SteeringVector(edits, self.provenance(model, pairs, sites), Where.prompt_only())

    def _matrices(
        self, model: HookedModel, positive: str, negative: str, sites: Sequence[str]
    ) -> dict[str, Tensor]:
        rows = [list(encode_side(model, "", text)[0]) for text in (positive, negative)]
        longest, space = max(map(len, rows)), _space(model)
        ids = torch.tensor([row + [space] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            acts = model.run(ids, sites=sites)
        start = _start(model, rows[0])
        return {site: (act[0] - act[1]).float().cpu()[start:].clone() for site, act in acts.items()}


def _start(model: HookedModel, ids: Sequence[int]) -> int:
    """1 after a BOS token, else 0."""
    return int(ids[0] in model.special_ids)


def _space(model: HookedModel) -> int:
    """The token of a space; of a tokenizer without one the pad token."""
    ids = model.tokenizer(" ", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] != model.tokenizer.unk_token_id else model.pad_id
