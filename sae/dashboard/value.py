"""A dashboard before it is written: what `SAERun.dashboard()` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.architectures.base import SAE
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

    def save(self, out: str | Path, *, single_file: bool = False) -> Path:
        """Write the pages to the directory `out`; returns the path of the one to open. See `sae.dashboard.build`."""
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
            quiet=True,
        )
