"""Crosscoder: one set of latents over several sites of a model, or over the same site of a model and a fine-tuned copy.

    x = (s_1 x_1, …, s_m x_m)            the sites' activations side by side, each scaled to unit mean square by its own factor
    f, x̂ and loss as in `batch_topk`;    a latent has one activation, and a decoder row at every site

Lindsey et al. 2024, https://transformer-circuits.pub/2024/crosscoders, with BatchTopK in place of their penalty, as Minder et al.
2025 have it, https://arxiv.org/abs/2504.02922: an L1 penalty makes latents look as if one model alone had them. How much of a
latent is at each site is in `decoder_norms`; `relative_norms` tells latents that both models share from those of one. The papers
weigh a latent by the sum of its norms over the sites; here its row over all sites has unit norm, as decoder rows have throughout.
One θ cuts the latents off after training, as in `batch_topk`. k is 16 for all sites together by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures.base import SAE
from sae.architectures.batch_topk import BatchTopK, BatchTopKSAE
from steerkit.errors import InputError
from steerkit.pair import both


@dataclass(frozen=True)
class Crosscoder(BatchTopK):
    """BatchTopK over several sites; `site` names them, with commas between."""

    tuned: str | None = None  # type: ignore[misc]
    """The fine-tuned copy whose activations stand beside the model's, at each of the sites; None: the model alone."""
    widths: tuple[int, ...] = ()
    """Widths of the sites; training fills them in."""

    name: ClassVar[str] = "crosscoder"
    saelens_architecture: ClassVar[str] = "crosscoder"
    own_thresholds: ClassVar[str | None] = "crosscoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple(self.widths))  # a list, when it comes from a file

    def inputs(self, site: str) -> tuple[str, ...]:
        names = dict.fromkeys(name.strip() for name in site.split(","))
        sites = tuple(names) if self.tuned is None else tuple(s for name in names for s in both(name))
        if len(sites) < 2:
            raise InputError(
                f"A crosscoder joins two sites or more, and {site!r} is one: name others after a comma, or a tuned model."
            )
        return sites

    def bound(self, site: str, width: Callable[[str], int]) -> Crosscoder:
        return replace(self, widths=tuple(width(name) for name in self.inputs(site)))

    def build(self, d_in: int) -> SAE:
        return CrosscoderSAE(self, d_in)


class CrosscoderSAE(BatchTopKSAE):
    """See the module. Activations are those of all sites side by side, in the order of `widths`."""

    scales: Tensor
    """The factors that bring each site's activations to unit mean square, (n_sites,), as far as they are folded in."""

    def __init__(self, config: Crosscoder, d_in: int) -> None:
        super().__init__(config, d_in)
        self.widths = config.widths or (d_in,)
        if sum(self.widths) != d_in:
            raise InputError(f"Sites of widths {', '.join(map(str, self.widths))} do not make {d_in}.")
        self.register_buffer("scales", torch.ones(len(self.widths)))

    def split(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, ...]:
        """The sites' parts of activations, reconstructions or decoder rows."""
        return x.split(self.widths, dim=-1)

    def decoder_norms(self) -> Float[Tensor, "n_sites d_sae"]:
        """Norm of each latent's decoder row at each site, in units in which every site has unit mean square."""
        return torch.stack([rows.norm(dim=1) for rows in self.split(self.W_dec)]) * self.scales[:, None]

    def relative_norms(self) -> Float[Tensor, "n_sites d_sae"]:
        """Each site's share of a latent's norms, from 0 to 1. Of a base and a tuned model: (0.5, 0.5) is shared, (0, 1) the tuned
        model's own."""
        norms = self.decoder_norms()
        return norms / norms.sum(0).clamp_min(1e-12)

    @torch.no_grad()
    def fold_scale(
        self,
        scale: float | Float[Tensor, " d_in"],
        target_scale: float | Float[Tensor, " d_out"] | None = None,
    ) -> None:
        super().fold_scale(scale, target_scale)
        if isinstance(scale, Tensor):
            self.scales.mul_(torch.stack([part[0] for part in self.split(scale)]))
        else:
            self.scales.mul_(scale)
