"""What an SAE learns from of a stream's batches: sites side by side, in what units, and labels.

reading = Reading(arch, site, stream.statistics)
x, target, labels = reading(next(stream))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import Config
from steerkit.activations import Statistics


@dataclass(frozen=True)
class Side:
    """What is encoded, or what is reconstructed."""

    sites: tuple[str, ...]
    mean: Float[Tensor, " width"]
    """Of raw activations."""
    scale: float | Float[Tensor, " width"]
    """What brings every site to unit mean square; of several sites one factor a coordinate."""

    @classmethod
    def of(cls, sites: tuple[str, ...], statistics: Callable[[str], Statistics]) -> Side:
        parts = [statistics(site) for site in sites]
        if len(parts) == 1:
            return cls(sites, parts[0].mean, parts[0].scale)
        scale = torch.cat([torch.full_like(part.mean, part.scale) for part in parts])
        return cls(sites, torch.cat([part.mean for part in parts]), scale)

    def __call__(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "n width"]:
        acts = [batch[site] for site in self.sites]
        return acts[0] if len(acts) == 1 else torch.cat(acts, dim=1)


class Reading:
    """What an SAE of an architecture learns from, at a site."""

    def __init__(self, arch: Config, site: str, statistics: Callable[[str], Statistics]) -> None:
        inputs, outputs = arch.inputs(site), arch.outputs(site)
        self.input = Side.of(inputs, statistics)
        self.target = None if outputs == inputs else Side.of(outputs, statistics)
        self.labels = arch.labels

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(activations, target, labels) of a stream's batch; None for what the architecture does not ask for."""
        target = None if self.target is None else self.target(batch)
        labels = torch.stack([batch[name] for name in self.labels], dim=1) if self.labels else None
        return self.input(batch), target, labels
