"""Blocks: the activations of a lot of rows, token by token, and what is measured on them.

    block = read_block(reader, rows, sites)          # forwards of rows of like length
    thresholds = block.sink_thresholds(reader.layout)
    block = block.without_sinks(thresholds)

The common ground of `steerkit.activations` and `steerkit.activation_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit import distributed
from steerkit.errors import InputError, NumericsError
from steerkit.tokens import BATCH_TOKENS, Layout, Model, Row, RowReader, TokenBatch, length_sorted

SINK_FACTOR = 10.0
"""A token is a sink where its norm is more than this many times the median."""


def sink_threshold(norms: Float[Tensor, " n"]) -> float:
    """The norm above which a token is an attention sink at a site: ten times the median norm of a first lot
    of tokens.

    Sinks (often a row's first token, some delimiters) have norms tens to hundreds of times those of other
    tokens and would dominate every mean square; the norms of ordinary tokens lie within a factor of a few.
    The rule asks for no position, and where there are no sinks it finds none.
    """
    return SINK_FACTOR * float(norms.median())


def is_sink(acts: Float[Tensor, "*batch width"], threshold: float | None) -> Bool[Tensor, "*batch"]:
    """Which tokens are sinks; none if `threshold` is None."""
    if threshold is None:
        return torch.zeros(acts.shape[:-1], dtype=torch.bool, device=acts.device)
    return _norms(acts) > threshold


@dataclass(frozen=True)
class Statistics:
    """What is measured once at a site, on the tokens of a first block that count."""

    mean: Float[Tensor, " width"]
    scale: float
    """The factor that brings the mean squared L2 norm of activations to `width` (unit mean square per
    coordinate)."""
    sink_threshold: float | None
    """Tokens of a greater norm are sinks; None if sinks are kept."""
    tokens: int
    """How many tokens were measured."""

    @classmethod
    def of(cls, acts: Float[Tensor, "n width"], site: str, threshold: float | None) -> Statistics:
        """Measure activations that hold no sinks. Raises NumericsError if they are all zero."""
        total = torch.zeros(acts.shape[1], dtype=torch.float64, device=acts.device)
        squares = 0.0
        for chunk in acts.split(8192):
            total += chunk.double().sum(0)
            squares += float(chunk.double().square().sum())
        if squares == 0.0:
            raise NumericsError(f"All activations at {site} are zero: there is nothing to learn from them.")
        scale = (acts.shape[1] * len(acts) / squares) ** 0.5
        return cls((total / len(acts)).float().cpu(), scale, threshold, len(acts))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        return cls(**{**values, "mean": torch.tensor(values["mean"])})


@dataclass
class Block:
    """Activations of whole rows, token by token, in the order in which they were computed."""

    acts: dict[str, Float[Tensor, "n width"]]
    norms: dict[str, Float[Tensor, " n"]]
    token_ids: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    """Which of the block's rows each token belongs to."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def sink_thresholds(self, layout: Layout) -> dict[str, float | None]:
        """The thresholds per site that this block's norms give; None each if sinks are kept."""
        if not layout.drop_sinks or not len(self):
            return dict.fromkeys(self.acts)
        return {site: sink_threshold(norms) for site, norms in self.norms.items()}

    def without_sinks(self, thresholds: Mapping[str, float | None]) -> Block:
        """The block without the tokens that are sinks at any of its sites."""
        sink = np.zeros(len(self), dtype=bool)
        for site, threshold in thresholds.items():
            if threshold is not None:
                sink |= (self.norms[site] > threshold).cpu().numpy()
        return self._take(np.flatnonzero(~sink)) if sink.any() else self

    def in_text_order(self) -> Block:
        """The block's tokens row by row, as the text has them."""
        return self._take(np.argsort(self.row, kind="stable"))

    def first(self, n: int) -> Block:
        """At most `n` of the block's tokens."""
        return self if len(self) <= n else self._take(np.arange(n))

    def _take(self, index: np.ndarray) -> Block:
        chosen = torch.from_numpy(index)
        return Block(
            {site: acts[chosen.to(acts.device)] for site, acts in self.acts.items()},
            {site: norms[chosen.to(norms.device)] for site, norms in self.norms.items()},
            *(array[index] for array in (self.token_ids, self.document, self.position, self.row)),
        )


class Cancelled(Exception):
    """The work was asked to stop."""


def read_block(
    reader: RowReader,
    rows: Sequence[Row],
    sites: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    buffers: dict[str, Tensor] | None = None,
    place: str = "",
    cancelled: Callable[[], bool] = lambda: False,
    shared: bool = False,
) -> Block:
    """Run the model over `rows` in batches of like length and keep the tokens that count.

    The block's activations are written into `buffers` where those are large enough; larger ones are put
    there. With `shared` each process of a distributed run does some of the forwards, and all get the block,
    bit by bit the same as from one process.

    Raises NumericsError, naming site, `place` and documents, on NaN or inf; Cancelled soon after
    `cancelled()` is true.
    """
    n = sum(row.n_kept for row in rows)
    buffers = {} if buffers is None else buffers
    numbers = {id(row): number for number, row in enumerate(rows)}
    acts: dict[str, Tensor] = {}
    index = np.empty((4, n), dtype=np.int64)
    end = 0
    groups = length_sorted(rows, batch_tokens)
    rank, ranks = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    own = np.zeros(n, dtype=bool)
    for turn, group in enumerate(groups):
        if cancelled():
            raise Cancelled
        batch = reader.batch(group)
        kept = batch.keep.flatten().nonzero().flatten()
        here = slice(end, end := end + len(kept))
        row = torch.tensor([numbers[id(row)] for row in group])[:, None].expand_as(batch.keep)
        for line, values in enumerate((batch.input_ids, batch.token_document, batch.token_position, row)):
            index[line, here] = values.flatten()[kept].numpy()
        own[here] = turn % ranks == rank
        if turn % ranks != rank and (
            acts or turn + 1 < len(groups)
        ):  # the last one tells idle ranks the widths
            continue
        for site, found in _forward(reader.model, batch, sites).items():
            flat = found.flatten(0, 1)
            if site not in acts:
                if site not in buffers or len(buffers[site]) < n:
                    buffers[site] = flat.new_empty((n + reader.layout.context, flat.shape[1]))
                acts[site] = buffers[site][:n]
            torch.index_select(flat, 0, kept.to(flat.device), out=acts[site][here])
    if ranks > 1:
        for values in acts.values():
            values[torch.from_numpy(~own).to(values.device)] = 0
            distributed.add_up(values)
    norms = {site: _norms(values) for site, values in acts.items()}
    for site in acts:
        if not norms[site].isfinite().all():
            raise _not_finite(site, place, acts[site], index[1])
    return Block(acts, norms, *index)


@torch.no_grad()
def _forward(model: Model, batch: TokenBatch, sites: Sequence[str]) -> dict[str, Tensor]:
    """Pads on the right of a causal model change nothing before them, so it needs no mask (and attention is
    faster)."""
    return model.run(batch.input_ids, None if model.is_causal else batch.attention_mask, sites=sites)


def _norms(acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)


def _not_finite(site: str, place: str, acts: Tensor, document: np.ndarray) -> NumericsError:
    wrong = (~acts.isfinite().all(-1)).nonzero().flatten().cpu().numpy()
    documents = sorted({int(d) for d in document[wrong]})[:5]
    return NumericsError(
        f"NaN or inf at {site} in {len(wrong)} tokens{place} (documents {', '.join(map(str, documents))}). "
        "Check the model's weights, or load it in float32 or bfloat16."
    )


def site_names(sites: Sequence[str] | str) -> tuple[str, ...]:
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names:
        raise InputError("No site is named: give at least one, such as 'blocks.2.hook_resid_post'.")
    return names
