"""What a dashboard shows, as plain data, in the parts that its files are made of.

`Content.shards()` gives one part at a time, so that a dashboard of any number of latents is written in the memory of one shard;
afterwards `head` is what the page shows at once. `sae.dashboard.pages` writes both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sae.architectures.base import SAE
from sae.dashboard.describe import Describer
from sae.dashboard.layout import layout
from sae.dashboard.pieces import readable_tokens, shown_tokens, token_style
from sae.latents import WINDOW, LatentStats
from steerkit.models import HookedModel
from steerkit.runs import jsonable

LATENTS_A_SHARD = 64
TOKENS_A_SHARD = 65_536

Panel = Callable[[Sequence[int]], Sequence[Any]]
"""What one key of the records holds, for the latents of a shard; None for a latent that has no such panel."""


class Content:
    """The pages of the latents `ids`. What costs more than looking at the statistics is added to it."""

    def __init__(
        self,
        model: HookedModel,
        sae: SAE,
        stats: LatentStats,
        ids: np.ndarray,
        concepts: Mapping[int, tuple[str, float]],
        directions: bool = False,
    ) -> None:
        self.model, self.sae, self.stats, self.ids, self.concepts = model, sae, stats, ids, concepts
        self.panels: dict[str, Panel] = {}
        self.row_number: dict[int, int] = {}
        self.used_tokens = {int(i) for i in stats.token_ids[ids].ravel() if i >= 0}
        texts = shown_tokens(model.tokenizer, range(model.d_vocab))
        self.directions = directions
        self.words = Describer(stats, texts, model.special_ids, directions)
        active = stats.example_window > 0
        self.first, self.end = active.argmax(1), active.shape[1] - active[:, ::-1].argmax(1)
        """Of each context: the window's first active token, and the one after its last; the strongest is always active."""
        self.head: dict[str, Any] = {}
        self.table: dict[str, list[Any]] = {}
        """Further columns of the table of latents."""

    def add(self, key: str, panel: Panel) -> None:
        """Let the records have what `panel` gives under `key`."""
        self.panels[key] = panel

    def shards(self) -> Iterator[tuple[str, Any]]:
        """(name, data) of each part; `head` is complete when all have been taken."""
        for number, start in enumerate(range(0, len(self.ids), LATENTS_A_SHARD)):
            part = self.ids[start : start + LATENTS_A_SHARD].tolist()
            records = [self._latent(i) for i in part]
            for key, panel in self.panels.items():
                for record, value in zip(records, panel(part)):
                    if value is not None:
                        record[key] = jsonable(value)
            yield f"latents-{number}", records
        firsts: list[int] = []
        for first, rows in self._row_shards():
            yield f"rows-{len(firsts)}", rows
            firsts.append(first)
        used = sorted(self.used_tokens)
        yield "tokens", {"ids": used, "text": readable_tokens(self.model.tokenizer, used)}
        self.head |= self._head(firsts)

    def _head(self, row_shards: list[int]) -> dict[str, Any]:
        stats, ids = self.stats, self.ids
        top = [int(i) for i in sorted({i for i in stats.token_ids[ids, :4].ravel().tolist() if i >= 0})]
        described = [self.concepts.get(int(i)) for i in ids]
        x, y, method = layout(self.sae.W_dec.detach().float().cpu().numpy()[ids], int(stats.info["seed"]))
        return {
            "d_sae": stats.d_sae,
            "tokens": stats.n_tokens,
            "style": token_style(self.model.tokenizer),
            "special": sorted(self.model.special_ids & self.used_tokens),
            "edges": rounded(stats.edges),
            "per_shard": LATENTS_A_SHARD,
            "row_shards": row_shards,
            "dead": np.flatnonzero(stats.count == 0).tolist(),
            "n_alive": int((stats.count > 0).sum()),
            "top_text": [top, readable_tokens(self.model.tokenizer, top)],
            "cooccurrence_tokens": int(stats.together_tokens),
            "map": {"x": x.tolist(), "y": y.tolist(), "method": method},
            "table": {
                "id": ids.tolist(),
                "count": stats.count[ids].tolist(),
                "max": rounded(stats.maximum[ids]),
                "mean": rounded(stats.mean[ids]),
                "tokens": [[t for t in line if t >= 0] for line in stats.token_ids[ids, :4].tolist()],
                "label": [self.words.label(int(i)) for i in ids],
                "warn": [int(bool(self.words.warnings(int(i)))) for i in ids],
                "concept": [c and str(c[0]) for c in described] if self.concepts else None,
                "auroc": [c and round(float(c[1]), 4) for c in described] if self.concepts else None,
                **self.table,
            },
        }

    def _latent(self, i: int) -> dict[str, Any]:
        stats = self.stats
        latent: dict[str, Any] = {
            "about": self.words.about(i, self.concepts.get(i)),
            "hist": _trimmed(stats.histogram[i]),
            "near": self._near(i),
            "co": [
                [int(j), short(jaccard), short(pmi), int(n)]
                for j, jaccard, pmi, n in zip(
                    stats.together[i],
                    stats.together_jaccard[i],
                    stats.together_pmi[i],
                    stats.together_both[i],
                )
                if j >= 0
            ],
            "tokens": [
                [int(token), round(float(share), 4), short(mean), int(count)]
                for token, share, mean, count in zip(
                    stats.token_ids[i], stats.token_share[i], stats.token_mean[i], stats.token_count[i]
                )
                if token >= 0
            ],
            "examples": [self._example(k) for k in range(stats.example_start[i], stats.example_start[i + 1])],
            "misses": [
                [self._row(int(row)), int(position), None if np.isnan(closeness) else short(closeness)]
                for row, position, closeness in zip(
                    stats.miss_row[i], stats.miss_position[i], stats.miss_closeness[i]
                )
                if row >= 0
            ],
        }
        warnings = self.words.warnings(i)
        if warnings:
            latent["warn"] = warnings
        if not np.isnan(stats.encoder_cosine[i]):
            latent["enc"] = round(float(stats.encoder_cosine[i]), 3)
        if stats.logit_ids is not None and stats.logit_values is not None:
            self.used_tokens.update(stats.logit_ids[i].tolist())
            latent["logits"] = [stats.logit_ids[i].tolist(), rounded(stats.logit_values[i])]
        if stats.logit_range is not None and stats.logit_histogram is not None:
            latent["logit_hist"] = [*rounded(stats.logit_range[i]), stats.logit_histogram[i].tolist()]
        return latent

    def _near(self, i: int) -> list[list[Any]]:
        """[latent, cosine] of the nearest decoder directions; a direction's own other end goes before them."""
        stats = self.stats
        found = [
            [int(j), round(float(cosine), 3)]
            for j, cosine in zip(stats.neighbours[i], stats.neighbour_cosine[i])
            if j >= 0
        ]
        if not self.directions:
            return found
        return [[i ^ 1, -1.0], *(pair for pair in found if pair[0] != i ^ 1)]

    def _example(self, k: int) -> list[Any]:
        """[interval, row, position, activation, offset of the window's first active token, activations in hex]"""
        stats = self.stats
        first = int(self.first[k])
        return [
            int(stats.example_interval[k]),
            self._row(int(stats.example_row[k])),
            int(stats.example_position[k]),
            short(stats.example_activation[k]),
            first - WINDOW,
            stats.example_window[k, first : int(self.end[k])].tobytes().hex(),
        ]

    def _row(self, row: int) -> int:
        """The row's number among those of these pages."""
        return self.row_number.setdefault(row, len(self.row_number))

    def _row_shards(self) -> Iterator[tuple[int, list[list[int]]]]:
        """(number of the first row, token ids of each row) of each shard of rows."""
        shard: list[list[int]] = []
        first = n = 0
        for number, row in enumerate(self.row_number):
            ids = self.stats.row(row).tolist()
            if shard and n + len(ids) > TOKENS_A_SHARD:
                yield first, shard
                shard, first, n = [], number, 0
            shard.append(ids)
            n += len(ids)
            self.used_tokens.update(ids)
        if shard:
            yield first, shard


def _trimmed(counts: np.ndarray) -> list[int]:
    """The first bin that is not empty, then the counts from there to the last."""
    used = np.flatnonzero(counts)
    return [int(used[0]), *counts[used[0] : used[-1] + 1].tolist()] if len(used) else [0]


def rounded(values: np.ndarray) -> list[float]:
    return [short(v) for v in values.tolist()]


def short(value: float) -> float:
    """Four digits are as many as a page shows."""
    return float(f"{float(value):.4g}")
