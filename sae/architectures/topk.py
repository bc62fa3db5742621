"""TopK sparse autoencoder with AuxK.

    f = TopK(ReLU((x - b_dec) W_enc + b_enc)),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + α · s · ‖e - ê‖²,   e = (x - x̂) without gradient,  ê = the k_aux strongest dead latents, decoded

Gao et al. 2024, https://arxiv.org/abs/2406.04093. Dead latents explain what the living leave over: α = 1/32, k_aux = d_in / 2,
s = min(dead / k_aux, 1), and the auxiliary gradient reaches encoder and decoder. The pre-activations of dead latents enter ê
without the ReLU, so that a latent that is never positive learns too.

The other members of the family choose other latents (`choose`), or ask that the latents reconstruct in parts, too (`nested`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.architectures.base import SAE, Config, Step, Terms, gradient, set_gradient, squared
from sae.kernels import make_pattern
from steerkit.errors import InputError


@dataclass(frozen=True)
class TopK(Config):
    """The k largest pre-activations of each token are its latents."""

    k: int = 16
    """Active latents a token."""
    aux_coefficient: float = 1 / 32
    """α; 0 leaves dead latents dead."""

    name: ClassVar[str] = "topk"
    saelens_architecture: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise InputError(f"k is {self.k}; it lies between 1 and d_sae = {self.d_sae}.")
        if self.aux_coefficient < 0:
            raise InputError(f"aux_coefficient is {self.aux_coefficient}; it must be 0 or more.")

    def saelens_settings(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def build(self, d_in: int) -> SAE:
        return TopKSAE(self, d_in)


_FAINT = 0.3
"""Norm of the encoder's columns before training; trials on three models had less error than with 1."""
Entries = tuple[Int[Tensor, " entries"], Int[Tensor, " entries"], Float[Tensor, " entries"]]
"""Rows (never decreasing), columns, and values: latents that were chosen."""
Parts = Iterable[tuple[int, Float[Tensor, "part d_sae"]]]
"""Pre-activations in parts of rows, with the number of the first: a part may last until the next; can be gone over again."""


class TopKSAE(SAE):
    """See the module."""

    b_enc: nn.Parameter

    def __init__(self, config: TopK, d_in: int) -> None:
        super().__init__(config, d_in)
        self.k, self.aux_coefficient = config.k, config.aux_coefficient
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.encoded(x) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre.relu_()
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"] | None:
        """A latent has to exceed 0 and the k-th of the others."""
        pre = self.encoded(x) @ self.W_enc + self.b_enc
        if self.threshold is not None or self.k == self.d_sae:
            return self.above_threshold(pre)
        last, following = pre.topk(self.k + 1, dim=-1).values[..., -2:].clamp(min=0).split(1, dim=-1)
        return pre - torch.where(pre > following, following, last)

    @torch.no_grad()
    def initialise(
        self, x: Float[Tensor, "n d_in"], mean: Float[Tensor, " d_in"], generator: torch.Generator
    ) -> None:
        """As everywhere, but for a fainter encoder: which latents are chosen stays the same, and directions are learned sooner."""
        super().initialise(x, mean, generator)
        self.W_enc.mul_(_FAINT)

    def encoded(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What the encoder's product is taken of."""
        return x - self.b_dec

    def without_latents(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of a token on which no latent is active."""
        return self.b_dec.expand_as(x)

    def choose(self, parts: Parts) -> list[Entries]:
        """The latents that take part, by their pre-activations, as one group or more: what one group lacks of a reconstruction, the
        next adds, and each sum is a reconstruction in itself."""
        return [flat(*self._strongest(parts, sorted=False))]

    def _strongest(self, parts: Parts, sorted: bool) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """(indices, values) of the k largest of each row."""
        found = [pre.topk(self.k, dim=-1, sorted=sorted) for _, pre in parts]
        return torch.cat([indices for _, indices in found]), torch.cat([values for values, _ in found])

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        inputs = self.encoded(x)
        pre = inputs @ self.W_enc + self.b_enc
        groups = self.choose([(0, pre)])
        aim = x if terms.target is None else terms.target
        reconstruction, error = self.without_latents(x), x.new_zeros(())
        for rows, columns, values in groups:
            latents = torch.zeros_like(pre).index_put((rows, columns), values.relu())
            reconstruction = reconstruction + latents @ self.W_dec
            error = error + (reconstruction - aim).square().sum(-1).mean() / len(groups)
        if terms.dead is None or not self.aux_coefficient or not terms.dead.any():
            return error
        which, chosen, weight = self._auxiliary(inputs, terms.dead)
        left_over = (aim - reconstruction).detach() - chosen @ self.W_dec[which]
        return error + weight * left_over.square().sum(-1).mean()

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        n, dtype = len(x), terms.dtype or x.dtype
        W_dec = self.W_dec.to(dtype)
        inputs = self.encoded(x).to(dtype)
        aim = x if terms.target is None else terms.target
        groups = [
            (make_pattern(rows, columns, (n, self.d_sae), dtype), values.relu_())
            for rows, columns, values in self.choose(self.pre_activations(inputs, self.b_enc))
        ]
        step = Step.zero(self)
        error = self.without_latents(x) - aim
        errors = []
        for pattern, values in groups:
            error = pattern.times(values, W_dec).to(x.dtype).add_(error)
            errors.append(error)
            step.counts += pattern.counts(values > 0)
            step.loss += squared(error) / (n * len(groups))
        step.mse += squared(error) / n
        step.l0 += step.counts.sum() / n
        auxiliary = None
        if terms.dead is not None and self.aux_coefficient and bool(terms.dead.any()):
            which, chosen, weight = self._auxiliary(inputs, terms.dead)
            left_over = (chosen @ W_dec[which]).to(x.dtype).add_(error).neg_()
            step.loss += weight * squared(left_over) / n
            auxiliary = which, chosen, left_over.mul_(-2 * weight / n).to(dtype)

        asked = None
        gradients = []
        for (pattern, values), error in zip(reversed(groups), reversed(errors)):
            error.mul_(2 / (n * len(groups)))
            # every later reconstruction has this group in it, too
            asked = error if asked is None else asked.add_(error)
            upstream = pattern.sample(asked.to(dtype), W_dec).mul_(values > 0)
            gradients.append(
                (
                    pattern.transposed_times(values, asked.to(dtype)),
                    pattern.transposed_times(upstream, inputs),
                    pattern.column_sums(upstream),
                )
            )
        decoder, encoder, bias = (_total(parts) for parts in zip(*gradients))
        if auxiliary is not None:
            which, chosen, left = auxiliary
            decoder.index_add_(0, which, chosen.T @ left)
            upstream = (left @ W_dec[which].T).mul_(chosen != 0)
            encoder.index_add_(0, which, upstream.T @ inputs)
            bias.index_add_(0, which, upstream.sum(0, dtype=bias.dtype))
        self.W_dec.grad, self.b_enc.grad = decoder.to(x.dtype), bias.to(x.dtype)
        set_gradient(self.W_enc, encoder.T)
        assert asked is not None
        self._affine_gradients(x, asked)
        return step

    def _affine_gradients(self, x: Float[Tensor, "n d_in"], asked: Float[Tensor, "n d_out"]) -> None:
        """The gradients of `encoded` and `without_latents`, after those of the latents; `asked` is that of the reconstruction."""
        self.b_dec.grad = asked.sum(0) - self.W_enc @ gradient(self.b_enc)

    def _auxiliary(self, inputs: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, float]:
        """(indices of the dead latents, their pre-activations with all but the k_aux strongest zeroed, α·s)."""
        which = dead.nonzero().flatten()
        dtype = inputs.dtype
        chosen = torch.addmm(self.b_enc[which].to(dtype), inputs, self.W_enc[:, which].to(dtype))
        k_aux = max(self.d_in // 2, 1)
        if len(which) > k_aux:
            values, indices = chosen.topk(k_aux, dim=-1, sorted=False)
            chosen = torch.zeros_like(chosen).scatter(-1, indices, values)
        return which, chosen, self.aux_coefficient * min(len(which) / k_aux, 1.0)


def flat(indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"]) -> Entries:
    """k entries in each row."""
    n, k = indices.shape
    rows = torch.arange(n, device=indices.device).repeat_interleave(k)
    return rows, indices.flatten(), values.flatten()


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in the first of them."""
    first, *others = parts
    for part in others:
        first.add_(part)
    return first
