"""TopK transcoder: sparse latents of the activations at one site give those at another.

    f = TopK(ReLU(x W_enc + b_enc)),  ŷ = f W_dec + b_dec [+ W_skip x],  rows of W_dec of unit norm
    loss = ‖y - ŷ‖² + AuxK                                                x at `site`, y at `target_site`

Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944: what an MLP computes, from its input to its output, in latents that are not
those of either side. The skip connection is Paulo et al. 2025, https://arxiv.org/abs/2501.18823, which takes over what is linear.
Any two sites do, of any widths. Both sides are scaled to unit mean square; x is not centred. k and AuxK are as in `topk`.
W_skip starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures.base import SAE
from sae.architectures.topk import TopK, TopKSAE
from steerkit.errors import InputError


@dataclass(frozen=True)
class Transcoder(TopK):
    """TopK latents of one site that reconstruct another."""

    target_site: str | None = None
    """Whose activations are reconstructed, such as `blocks.2.hook_mlp_out`."""
    skip: bool = False
    """Whether an affine map of the input is added to the output."""
    d_out: int | None = None
    """Width of `target_site`; training fills it in."""

    name: ClassVar[str] = "transcoder"

    saelens_architecture: ClassVar[str] = "topk_transcoder"
    own_thresholds: ClassVar[str | None] = "jumprelu_transcoder"

    def outputs(self, site: str) -> tuple[str, ...]:
        if self.target_site is None:
            raise InputError("A transcoder needs a target_site (--target-site): what is it to reconstruct?")
        return (self.target_site,)

    def bound(self, site: str, width: Callable[[str], int]) -> Transcoder:
        (target,) = self.outputs(site)
        return replace(self, d_out=width(target))

    def saelens_settings(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "d_out": self.d_out,
            "apply_b_dec_to_input": False,
            "metadata": {"hook_name_out": self.target_site},
        }

    def build(self, d_in: int) -> SAE:
        return TranscoderSAE(self, d_in)


class TranscoderSAE(TopKSAE):
    """See the module. `W_dec` is (d_sae, d_out), `b_dec` (d_out,), `W_skip` (d_out, d_in)."""

    W_skip: nn.Parameter | None

    def __init__(self, config: Transcoder, d_in: int) -> None:
        super().__init__(config, d_in)
        self.d_out = config.d_out or d_in
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_parameter(
            "W_skip", nn.Parameter(torch.zeros(self.d_out, d_in)) if config.skip else None
        )

    @torch.no_grad()
    def initialise(
        self, x: Float[Tensor, "n d_in"], mean: Float[Tensor, " d_out"], generator: torch.Generator
    ) -> None:
        """Random directions on either side: neither says anything of the other yet."""
        for matrix in (self.W_dec, self.W_enc.T):
            rows = torch.randn(matrix.shape, generator=generator)
            matrix.copy_(rows / rows.norm(dim=1, keepdim=True))
        self.b_dec.copy_(mean)

    @property
    def saelens_architecture(self) -> str:
        name = super().saelens_architecture
        return name.replace("transcoder", "skip_transcoder") if self.W_skip is not None else name

    def encoded(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return x

    def without_latents(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if self.W_skip is None:
            return self.b_dec.expand(*x.shape[:-1], -1)
        return x @ self.W_skip.T + self.b_dec

    def reconstruct(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        return latents @ self.W_dec + self.without_latents(x)

    def _affine_gradients(self, x: Float[Tensor, "n d_in"], asked: Float[Tensor, "n d_out"]) -> None:
        self.b_dec.grad = asked.sum(0)
        if self.W_skip is not None:
            self.W_skip.grad = asked.T @ x

    @torch.no_grad()
    def fold_scale(
        self,
        scale: float | Float[Tensor, " d_in"],
        target_scale: float | Float[Tensor, " d_out"] | None = None,
    ) -> None:
        super().fold_scale(scale, target_scale)
        if self.W_skip is not None:
            of_target = scale if target_scale is None else target_scale
            self.W_skip.mul_(scale)
            self.W_skip.div_(of_target[:, None] if isinstance(of_target, Tensor) else of_target)
