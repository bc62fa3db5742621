"""What the model loses without a latent: the change of the loss, token by token.

    x → x − f_i(x) · d_i            at the site (a transcoder's target), on every token that counts; d_i: the decoder's row

The reconstruction's error stays, so nothing but the latent goes. Measured on the latent's strongest contexts: the change at a
token is that of the loss of the token after it, in nats; above 0 where the latent helped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures.base import SAE
from sae.dashboard.content import short
from sae.latents import WINDOW, LatentStats
from steerkit.activations import Tokenization, is_sink
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.replay import Replay
from steerkit.runs import progress

N_EXAMPLES = 4
"""Contexts a latent, the strongest."""
_BATCH_TOKENS = 8192
_ELEMENTS = 1 << 24
"""Latents or logits at once."""


@dataclass
class Ablation:
    """The change of the loss without a latent."""

    total: float = 0.0
    """Summed over the tokens on which the latent is active."""
    n: int = 0
    examples: list[tuple[int, int, list[float]]] = field(default_factory=list)
    """(index of the context, place of the first token as seen from its strongest, changes from there on)"""

    def to_dict(self) -> dict[str, Any]:
        examples = [[k, first, [round(v, 4) for v in values]] for k, first, values in sorted(self.examples)]
        return {"mean": short(self.total / self.n) if self.n else 0.0, "n": self.n, "examples": examples}


@dataclass(frozen=True)
class _Pair:
    """A latent and one of its contexts."""

    latent: int
    k: int
    row: int
    position: int
    first: int
    """Place of the window's first active token as seen from the strongest."""


@torch.no_grad()
def ablations(
    model: HookedModel, sae: SAE, stats: LatentStats, ids: Sequence[int], *, quiet: bool = True
) -> dict[int, Ablation]:
    """The ablation of each latent of `ids` that has contexts. Raises InputError for a model that predicts no next token."""
    if not (model.is_causal and model.has_lm_head):
        raise InputError(
            f"{model.name} predicts no next token: there is no loss to see a latent's ablation in."
        )
    pairs = sorted(_pairs(stats, ids), key=lambda pair: (len(stats.row(pair.row)), pair.row))
    measure = _Measure(model, sae, stats)
    found: dict[int, Ablation] = {}
    with progress(len(pairs), "Ablation", "contexts", quiet=quiet) as bar:
        for batch in _batches(pairs, stats):
            for pair, (change, active) in zip(batch, measure(batch)):
                mine = found.setdefault(pair.latent, Ablation())
                mine.total += float(change[active[: len(change)]].sum())
                mine.n += int(active[: len(change)].sum())
                start = max(pair.position + pair.first, 0)
                shown = change[start : pair.position + WINDOW + 1]
                mine.examples.append((pair.k, start - pair.position, shown.tolist()))
            bar.advance(len(batch))
    return found


def _pairs(stats: LatentStats, ids: Sequence[int]) -> Iterator[_Pair]:
    for latent in map(int, ids):
        start = int(stats.example_start[latent])
        for k in range(start, min(start + N_EXAMPLES, int(stats.example_start[latent + 1]))):
            if stats.example_interval[k] == 0:
                first = int(np.flatnonzero(stats.example_window[k])[0]) - WINDOW
                yield _Pair(
                    latent, k - start, int(stats.example_row[k]), int(stats.example_position[k]), first
                )


def _batches(pairs: Sequence[_Pair], stats: LatentStats) -> Iterator[list[_Pair]]:
    batch: list[_Pair] = []
    for pair in pairs:
        if batch and (len(batch) + 1) * len(stats.row(pair.row)) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


class _Measure:
    """Losses with and without latents, for a batch of pairs."""

    def __init__(self, model: HookedModel, sae: SAE, stats: LatentStats) -> None:
        self.model, self.sae, self.stats = model, sae, stats
        self.site = stats.info["site"]
        self.target = sae.config.outputs(self.site)[0]
        self.replay = Replay(model, self.target)
        self.keeps = kept_tokens(model, stats)

    def __call__(self, batch: Sequence[_Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(change of the loss at each token but the last, on which tokens the latent is active) of each pair."""
        rows, which = np.unique([pair.row for pair in batch], return_inverse=True)
        lengths = [len(self.stats.row(pair.row)) for pair in batch]
        ids = torch.full((len(batch), max(lengths)), self.model.pad_id)
        for i, (pair, n) in enumerate(zip(batch, lengths)):
            ids[i, :n] = torch.from_numpy(self.stats.row(pair.row).astype(np.int64))
        ids = ids.to(self.model.device)
        acts, clean = self.replay.run(ids)
        x = acts if self.target == self.site else self.model.run(ids, sites=[self.site])[self.site]
        latent = torch.tensor([pair.latent for pair in batch], device=self.sae.device)
        once = torch.from_numpy(np.unique(which, return_index=True)[1])
        values = self._values(ids, x, once, torch.from_numpy(which), latent)
        part = values[..., None] * self.sae.W_dec[latent].float()[:, None]
        final = self.replay.again(lambda act: act - part.to(act.device, act.dtype))
        change = (self._losses(final, ids) - self._losses(clean, ids)).cpu().numpy()
        active = (values > 0).cpu().numpy()
        return [(change[i, : n - 1], active[i, :n]) for i, n in enumerate(lengths)]

    def _values(
        self, ids: Tensor, x: Tensor, once: Tensor, which: Tensor, latent: Tensor
    ) -> Float[Tensor, "pairs pos"]:
        """Activations of each pair's latent. Rows that several pairs share are encoded once."""
        values = torch.zeros(ids.shape, device=self.sae.device)
        step = max(1, _ELEMENTS // (ids.shape[1] * self.sae.d_sae))
        for start in range(0, len(once), step):
            part = once[start : start + step]
            latents = self.sae.encode(x[part].to(self.sae.device, self.sae.dtype)).float()
            latents = latents.masked_fill(~self.keeps(ids[part], x[part]).to(latents.device)[..., None], 0)
            mine = ((which >= start) & (which < start + step)).nonzero().flatten()
            values[mine] = latents[which[mine] - start, :, latent[mine]]
        return values

    def _losses(
        self, final: Float[Tensor, "pairs pos d"], ids: Int[Tensor, "pairs pos"]
    ) -> Float[Tensor, "pairs pos-1"]:
        step = max(1, _ELEMENTS // (ids.shape[1] * self.model.d_vocab))
        parts = []
        for states, row in zip(final.split(step), ids.split(step)):
            logits = self.model.unembed(states[:, :-1]).float()
            parts.append(
                torch.nn.functional.cross_entropy(logits.mT, row[:, 1:].to(logits.device), reduction="none")
            )
        return torch.cat(parts)


def kept_tokens(
    model: HookedModel, stats: LatentStats
) -> Callable[[Tensor, Tensor], Bool[Tensor, "rows pos"]]:
    """A function of token ids and activations that tells which tokens counted when the statistics were made."""
    layout = Tokenization(**stats.info["tokenization"]).resolve(model)
    special = set(model.special_ids) | {*layout.prefix, *layout.suffix}
    special |= set() if layout.separator is None else {layout.separator}
    left_out = torch.tensor(sorted(special) if layout.drop_special else [], dtype=torch.int64)

    def keeps(ids: Tensor, x: Tensor) -> Tensor:
        kept = ~torch.isin(ids, left_out.to(ids.device))
        return kept.to(x.device) & ~is_sink(x, stats.info["sink_threshold"])

    return keeps
