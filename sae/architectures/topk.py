"""TopK sparse autoencoder with AuxK.

    f = TopK(ReLU((x - b_dec) W_enc + b_enc)),  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm
    loss = ‖x - x̂‖² + α · s · ‖e - ê‖²,   e = (x - x̂) without gradient,  ê = the k_aux strongest dead latents, decoded

Gao et al. 2024, https://arxiv.org/abs/2406.04093. Dead latents explain what the living leave over: α = 1/32, k_aux = d_in / 2,
s = min(dead / k_aux, 1), and the auxiliary gradient reaches encoder and decoder. The pre-activations of dead latents enter ê
without the ReLU, so that a latent that is never positive learns too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.architectures.base import SAE, Config, Step
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

    def saelens_settings(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def build(self, d_in: int) -> SAE:
        return TopKSAE(self, d_in)


class TopKSAE(SAE):
    """See the module."""

    b_enc: nn.Parameter

    def __init__(self, config: TopK, d_in: int) -> None:
        super().__init__(config, d_in)
        self.k, self.aux_coefficient = config.k, config.aux_coefficient
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre.relu_()
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())

    def _auxiliary(self, pre: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, float]:
        """(indices of the dead latents, their pre-activations with all but the k_aux strongest zeroed, α·s)."""
        which = dead.nonzero().flatten()
        chosen = pre[:, which]
        k_aux = max(self.d_in // 2, 1)
        if len(which) > k_aux:
            values, indices = chosen.topk(k_aux, dim=-1, sorted=False)
            chosen = torch.zeros_like(chosen).scatter(-1, indices, values)
        return which, chosen, self.aux_coefficient * min(len(which) / k_aux, 1.0)

    def loss(self, x: Float[Tensor, "n d_in"], coefficient: float, dead: Bool[Tensor, " d_sae"]) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        latents = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        reconstruction = self.decode(latents)
        error = (reconstruction - x).square().sum(-1).mean()
        if not self.aux_coefficient or not dead.any():
            return error
        which, chosen, weight = self._auxiliary(pre, dead)
        left_over = (x - reconstruction).detach() - chosen @ self.W_dec[which]
        return error + weight * left_over.square().sum(-1).mean()

    @torch.no_grad()
    def gradients(
        self,
        x: Float[Tensor, "n d_in"],
        coefficient: float,
        dead: Bool[Tensor, " d_sae"],
        dtype: torch.dtype | None = None,
    ) -> Step:
        n, dtype = len(x), dtype or x.dtype
        W_enc, W_dec = self.W_enc.to(dtype), self.W_dec.to(dtype)
        centred = x - self.b_dec
        inputs = centred.to(dtype)
        pre = torch.addmm(self.b_enc.to(dtype), inputs, W_enc)
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        values.relu_()
        counts = torch.bincount(indices[values > 0], minlength=self.d_sae).float()
        sparse = x.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        rows = (SparseRows if sparse else ScatteredRows)(indices, self.d_sae)
        error = rows.times(values, W_dec).to(x.dtype).sub_(centred)
        mse = error.square().sum() / n
        loss = mse
        auxiliary = self._auxiliary(pre, dead) if self.aux_coefficient and bool(dead.any()) else None
        if auxiliary is not None:
            which, chosen, weight = auxiliary
            left_over = (chosen @ W_dec[which]).to(x.dtype).add_(error).neg_()
            loss = loss + weight * left_over.square().sum() / n

        error.mul_(2 / n)
        errors = error.to(dtype)
        upstream = rows.sample(errors, W_dec).mul_(values > 0)
        decoder, encoder = rows.transposed_times(values, errors, upstream, inputs)
        bias = torch.zeros_like(self.b_enc).index_add_(0, indices.flatten(), upstream.flatten().to(x.dtype))
        if auxiliary is not None:
            left = left_over.mul_(-2 * weight / n).to(dtype)
            decoder.index_add_(0, which, chosen.T @ left)
            upstream_dead = (left @ W_dec[which].T).mul_(chosen != 0)
            encoder.index_add_(1, which, inputs.T @ upstream_dead)
            bias.index_add_(0, which, upstream_dead.sum(0, dtype=x.dtype))
        self.W_dec.grad, self.W_enc.grad = decoder.to(x.dtype), encoder.to(x.dtype)
        self.b_enc.grad, self.b_dec.grad = bias, error.sum(0) - self.W_enc @ bias
        return Step(loss, mse, counts.sum() / n, counts)


class ScatteredRows:
    """Products with a matrix S (n, d_sae) that has k entries in each row, at `indices` (n, k): densely, on any device."""

    def __init__(self, indices: Tensor, d_sae: int) -> None:
        self.indices, self.d_sae = indices, d_sae

    def dense(self, values: Tensor) -> Tensor:
        """S itself."""
        return values.new_zeros(len(values), self.d_sae).scatter_(1, self.indices, values)

    def times(self, values: Tensor, matrix: Tensor) -> Tensor:
        """S @ matrix, (n, d)."""
        return self.dense(values) @ matrix

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """(left @ right.T) at the entries, (n, k); left (n, d), right (d_sae, d)."""
        return (left @ right.T).gather(1, self.indices)

    def transposed_times(self, a: Tensor, left: Tensor, b: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(S_a.T @ left, right.T @ S_b), (d_sae, d) and (d, d_sae), for the values `a` and `b` at the entries."""
        return self.dense(a).T @ left, right.T @ self.dense(b)


class SparseRows(ScatteredRows):
    """The same through compressed sparse rows: no product touches what is zero. For CPUs."""

    def __init__(self, indices: Tensor, d_sae: int) -> None:
        super().__init__(indices, d_sae)
        self.n, self.k = indices.shape
        self.order = torch.argsort(indices.flatten(), stable=True)
        self.columns = indices.flatten()[self.order]
        self.rows = torch.div(self.order, self.k, rounding_mode="floor")
        counts = torch.bincount(self.columns, minlength=d_sae)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.ends = torch.arange(0, self.n * self.k + 1, self.k, device=indices.device)

    def times(self, values: Tensor, matrix: Tensor) -> Tensor:
        return self._matrix(values) @ matrix

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        pattern = self._matrix(left.new_zeros(self.n * self.k))
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values().view(self.n, self.k)

    def transposed_times(self, a: Tensor, left: Tensor, b: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self._transpose(a) @ left, (self._transpose(b) @ right).T.contiguous()

    def _matrix(self, values: Tensor) -> Tensor:
        return _csr(self.ends, self.indices.flatten(), values.flatten(), (self.n, self.d_sae))

    def _transpose(self, values: Tensor) -> Tensor:
        return _csr(self.starts, self.rows, values.flatten()[self.order], (self.d_sae, self.n))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)
