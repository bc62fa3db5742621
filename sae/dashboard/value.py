"""A dashboard before it is written: what `SAERun.dashboard()` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sae.architectures.base import SAE
from sae.dashboard.notebook import N_LATENTS, LatentView, overview
from sae.dashboard.pages import build
from sae.latents import LatentStats
from steerkit.data import Documents
from steerkit.models import HookedModel


@dataclass(frozen=True)
class Dashboard:
    """The statistics of an SAE's latents, ready to be drawn."""

    model: HookedModel
    sae: SAE = field(repr=False)
    documents: Documents
    site: str
    stats: LatentStats = field(repr=False)
    latents: str | Sequence[int] = "all"
    """Which latents get a page: "all" living ones, "top:512", or a list."""
    summary: Mapping[str, Any] | None = field(default=None, repr=False)
    """Figures for the head of the page."""
    concepts: Mapping[int, tuple[str, float]] | None = field(default=None, repr=False)
    """What a latent is about: (name, AUROC)."""
    provenance: Mapping[str, Any] | None = field(default=None, repr=False)

    def latent(self, latent: int) -> LatentView:
        """One latent, as a notebook shows it. Raises InputError for one that does not exist."""
        self.stats.examples(latent)
        return LatentView(
            self.stats, self.model.tokenizer, latent, f"Latent {latent}", (self.concepts or {}).get(latent)
        )

    def _repr_html_(self) -> str:
        """The most active latents, to unfold; `save` writes the dashboard."""
        count = self.stats.count
        chosen = (
            np.arange(len(count))
            if isinstance(self.latents, str)
            else np.array(list(self.latents), dtype=int)
        )
        order = chosen[np.argsort(-count[chosen], kind="stable")]
        shown = [self.latent(int(i)) for i in order[:N_LATENTS] if count[i] > 0]
        return overview(
            f"{self.sae.arch} SAE of {self.model.name}", self.site, shown, int((count[chosen] > 0).sum())
        )

    def save(self, out: str | Path, *, single_file: bool = False, quiet: bool = True, **options: Any) -> Path:
        """Write the pages to the directory `out`; returns the path of the one to open. `options` are those of
        `sae.dashboard.build`: `ablate`, `steer`, `explainer`, `second`, `exports` and `title`."""
        return build(
            self.model,
            self.sae,
            self.documents,
            self.site,
            out,
            latents=self.latents,
            single_file=single_file,
            summary=self.summary,
            concepts=self.concepts,
            stats=self.stats,
            provenance=self.provenance,
            quiet=quiet,
            **options,
        )
