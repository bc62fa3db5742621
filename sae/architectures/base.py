"""What every sparse autoencoder is, and what an architecture adds.

An architecture is a file: a frozen `Config` and an `SAE` subclass with

    encode(x)                          latents f(x) >= 0, (…, d_sae)
    loss(x, terms)                     the objective, plainly, for autograd: the definition
    gradients(x, terms)                the same objective with its gradients worked out by hand: what training runs

where `terms` says what the objective depends on beside the activations. A test holds the two equal for every architecture, in every
way to compute it. Activations are in training units: unit mean square per coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae import saelens
from sae.kernels import Pattern, make_pattern
from sae.schedule import Controller, TargetL0
from steerkit.errors import InputError

_CACHED = 1 << 21
"""Latents that are worked on at once on a CPU."""


@dataclass(frozen=True)
class Config:
    """What an architecture needs beside the width of the activations."""

    d_sae: int
    """Number of latents."""

    name: ClassVar[str]
    """The name on the command line and in files."""
    saelens_architecture: ClassVar[str] = "standard"
    """What SAELens calls the function that such an SAE computes."""
    labels: ClassVar[tuple[str, ...]] = ()
    """What of the tokens it learns from beside their activations."""
    tuned: ClassVar[str | None] = None
    """The fine-tuned model that it reads beside the model itself."""
    own_thresholds: ClassVar[str | None] = None
    """What SAELens calls it with thresholds, if it does not become a plain JumpReLU SAE then."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise InputError(f"d_sae is {self.d_sae}; an SAE needs at least one latent.")

    def build(self, d_in: int) -> SAE:
        """A freshly made SAE of this architecture for activations of width `d_in`."""
        raise NotImplementedError

    def inputs(self, site: str) -> tuple[str, ...]:
        """The sites whose activations, side by side, such an SAE of `site` encodes."""
        return (site,)

    def outputs(self, site: str) -> tuple[str, ...]:
        """The sites whose activations, side by side, it reconstructs."""
        return self.inputs(site)

    def bound(self, site: str, width: Callable[[str], int]) -> Config:
        """The config with what it must know of the sites' widths, if anything."""
        return self

    def saelens_settings(self) -> dict[str, Any]:
        """What SAELens's `cfg.json` has of such an SAE beyond what all have, also in its `metadata`."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Sparsity(Config):
    """Config of the architectures whose sparsity is set by a penalty: by the L0 to reach, or by its coefficient."""

    target_l0: float | None = 16.0
    """Mean number of active latents a token that training steers to; None with a fixed coefficient."""
    l1: float | None = None
    """Fixed coefficient of the penalty, in training units; instead of `target_l0`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 is not None and self.l1 < 0:
            raise InputError(f"l1 is {self.l1}; a penalty's coefficient is 0 or more.")
        if self.l1 is None and self.target_l0 is None:
            raise InputError("Give target_l0, or l1 for a fixed coefficient.")
        if self.target_l0 is not None and not 0 < self.target_l0 < self.d_sae:
            raise InputError(f"target_l0 is {self.target_l0}; it lies between 0 and d_sae = {self.d_sae}.")

    def controller(self, d_in: int, n_steps: int) -> Controller | None:
        """What sets the coefficient, step by step; None where it is fixed."""
        if self.l1 is not None or self.target_l0 is None:
            return None
        return TargetL0(self.target_l0, n_steps, log_coefficient=math.log(0.1 * d_in**0.5))

    def fixed_coefficient(self, d_in: int) -> float:
        """The coefficient where no controller sets it."""
        return self.l1 or 0.0

    @property
    def initial_density(self) -> float:
        """Share of the latents that are active on a token before training: twice what is aimed at."""
        return min(0.5, 2 * (self.target_l0 or 16.0) / self.d_sae)


@dataclass(frozen=True)
class Terms:
    """What a step's objective depends on beside the activations, and how to compute it."""

    coefficient: float = 0.0
    """Weight of the sparsity term, if there is one."""
    dead: Bool[Tensor, " d_sae"] | None = None
    """Latents that have been silent for long; None: none."""
    progress: float = 0.0
    """Share of the run that is done."""
    dtype: torch.dtype | None = None
    """What products are computed in, sums and errors in that of the activations; None: that of the activations."""
    sparse: bool = False
    """Whether latents are so few that products go over them one by one: the same result, sooner."""
    target: Float[Tensor, "n d_out"] | None = None
    """What is to be reconstructed, in training units; None: the activations themselves."""
    labels: Float[Tensor, "n n_labels"] | None = None
    """Labels of the tokens, from 0 to 1; NaN: unknown."""

    def rows(self, part: slice) -> Terms:
        """The terms of a part of the batch."""
        target, labels = (None if side is None else side[part] for side in (self.target, self.labels))
        return replace(self, target=target, labels=labels)


@dataclass
class Step:
    """What one batch gave: the mean loss a token, its parts, and which latents were active."""

    loss: Tensor
    """Mean over tokens of the whole objective, ()."""
    mse: Tensor
    """Mean over tokens of the squared error, summed over coordinates, ()."""
    l0: Tensor
    """Mean number of active latents a token, ()."""
    counts: Float[Tensor, " d_sae"]
    """On how many tokens of the batch each latent was active."""

    @classmethod
    def zero(cls, sae: SAE) -> Step:
        """Nothing yet, to add the parts of a batch to."""
        zeros = torch.zeros(sae.d_sae + 3, device=sae.device, dtype=sae.dtype)
        return cls(zeros[-3], zeros[-2], zeros[-1], zeros[:-3])


class SAE(nn.Module):
    """A sparse autoencoder: x ≈ decode(encode(x)). Trained and loaded ones act on raw activations.

    `W_enc` is (d_in, d_sae), `W_dec` (d_sae, d_in), `b_dec` (d_in,), as in SAELens. `threshold` (d_sae,), where it is set, cuts off
    activations that are not above it (`sae.prune`). `metadata` says what it was trained on and how.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor | None

    uses_penalty: ClassVar[bool] = False
    """Whether the objective has a sparsity term whose coefficient is steered or set."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the objective of a batch is more than the mean of its tokens'."""
        return False

    def __init__(self, config: Config, d_in: int) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_sae = d_in, config.d_sae
        self.W_enc = nn.Parameter(torch.zeros(d_in, self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", None)
        self.metadata: dict[str, Any] = {}

    @property
    def arch(self) -> str:
        """The architecture's name; `jumprelu` once there is a threshold, unless that changes nothing of what it is."""
        return self.config.name if self.threshold is None or self.config.own_thresholds else "jumprelu"

    @property
    def saelens_architecture(self) -> str:
        """What SAELens calls the function that this computes."""
        if self.threshold is None:
            return self.config.saelens_architecture
        return self.config.own_thresholds or "jumprelu"

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of activations; 0 where a latent is inactive."""
        self._check_width(x)
        latents = self._encode(x)
        if self.threshold is not None:
            latents = latents * (latents > self.threshold)
        return latents

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        raise NotImplementedError

    def margins(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"] | None:
        """Each latent's pre-activation minus what it has to exceed: above 0 exactly where the latent is active. None where that
        depends on other tokens, too."""
        return None

    def above_threshold(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The margins of ReLU latents with these pre-activations."""
        return pre if self.threshold is None else pre - self.threshold.clamp(min=0)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The activations that latents stand for."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of `x`, or of what else is to be reconstructed from it."""
        return self.reconstruct(self.encode(x), x)

    def reconstruct(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """`decode`, and what else goes into a reconstruction from `x`."""
        return self.decode(latents)

    def loss(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Tensor:
        """The objective, mean over tokens, for autograd."""
        raise NotImplementedError

    def gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        """The objective's gradients, written into `.grad` of the parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def select(
        self,
        inputs: Float[Tensor, "n d_in"],
        bias: Float[Tensor, " d_sae"],
        above: Float[Tensor, " d_sae"] | float = 0.0,
    ) -> tuple[Pattern, Float[Tensor, " entries"]]:
        """Where `inputs @ W_enc + bias` exceeds `above`, and its values there."""
        found = []
        for first, pre in self.pre_activations(inputs, bias):
            where = (pre > above).view(-1).nonzero().squeeze(1)
            rows = torch.div(where, self.d_sae, rounding_mode="floor")
            found.append((rows + first, where - rows * self.d_sae, pre.view(-1)[where]))
        rows, columns, values = (torch.cat(parts) for parts in zip(*found))
        return make_pattern(rows, columns, (len(inputs), self.d_sae), inputs.dtype), values

    @torch.no_grad()
    def initialise(
        self, x: Float[Tensor, "n d_in"], mean: Float[Tensor, " d_in"], generator: torch.Generator
    ) -> None:
        """Random unit decoder rows, the encoder their transpose, the decoder bias at the activations' mean.

        `x` is a first batch, for architectures that set their encoder bias by it.
        """
        rows = torch.randn(self.d_sae, self.d_in, generator=generator)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_dec.copy_(mean)
        self.set_density(x)

    @torch.no_grad()
    def set_density(self, x: Float[Tensor, "n d_in"], latents: Tensor | slice = slice(None)) -> None:
        """Set the encoder biases of `latents` (indices) so that they are active on about the share of tokens that training starts
        with. Architectures without such a bias leave this out."""

    @torch.no_grad()
    def revive(
        self, x: Float[Tensor, "n d_in"], dead: Int[Tensor, " n_dead"], generator: torch.Generator
    ) -> None:
        """Make the latents `dead` anew: in the directions of errors, drawn from the batch in proportion to their squares."""
        error = x - self(x)
        drawn = torch.multinomial(
            error.square().sum(1).cpu(), len(dead), len(dead) > len(x), generator=generator
        )
        rows = torch.nn.functional.normalize(error[drawn.to(x.device)], dim=1)
        self.W_dec[dead] = rows
        self.W_enc[:, dead] = rows.T
        self.set_density(x, dead)

    @torch.no_grad()
    def upper_quantile(
        self, x: Float[Tensor, "n d_in"], share: float, latents: Tensor | slice = slice(None)
    ) -> Float[Tensor, " n_latents"]:
        """What each latent's encoder product exceeds on the share `share` of the tokens `x`."""
        keep = max(1, min(len(x), round(share * len(x))))
        centred = x - self.b_dec
        parts = [
            (centred @ columns).topk(keep, dim=0).values[-1]
            for columns in self.W_enc[:, latents].split(1024, dim=1)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Set every `.grad` to zeros, in place where it is there."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the rows' norms."""
        assert self.W_dec.grad is not None
        along = torch.einsum("si,si->s", self.W_dec.grad, self.W_dec)
        self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """What holds after every step: decoder rows of unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min_(1e-8))

    @torch.no_grad()
    def finish(self) -> None:
        """Called once, on the trained SAE: what turns it from how it trained into how it is used."""

    @torch.no_grad()
    def fold_scale(
        self,
        scale: float | Float[Tensor, " d_in"],
        target_scale: float | Float[Tensor, " d_out"] | None = None,
    ) -> None:
        """Turn an SAE of `scale * x` into one of `x`. Latents stay what they were.

        The scale may differ by coordinate, and that of what is reconstructed from that of what is encoded.
        """
        target_scale = scale if target_scale is None else target_scale
        self.W_enc.mul_(scale[:, None] if isinstance(scale, Tensor) else scale)
        self.W_dec.div_(target_scale)
        self.b_dec.div_(target_scale)

    @torch.no_grad()
    def jumprelu_weights(self) -> dict[str, Tensor]:
        """W_enc, W_dec, b_enc, b_dec and threshold of the same function as ReLU latents with thresholds."""
        weights = {name: self.get_parameter(name).clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        cut = torch.zeros_like(weights["b_enc"]) if self.threshold is None else self.threshold.clone()
        return {**weights, "threshold": cut}

    def pre_activations(
        self, inputs: Float[Tensor, "n d_in"], bias: Float[Tensor, " d_sae"]
    ) -> PreActivations:
        """`inputs @ W_enc + bias`, in parts."""
        return PreActivations(inputs, self.W_enc.to(inputs.dtype), bias.to(inputs.dtype), self._chunk(inputs))

    def row_chunks(self, x: Float[Tensor, "n d_in"]) -> Iterator[Float[Tensor, "part d_in"]]:
        """Parts of a batch whose latents stay in a CPU's cache from one operation to the next; all of it elsewhere."""
        return iter(x.split(self._chunk(x)))

    def _chunk(self, x: Tensor) -> int:
        return max(64, _CACHED // self.d_sae) if x.device.type == "cpu" else max(1, len(x))

    def latent_chunks(self, size: int = 4096) -> Iterator[slice]:
        """Slices over the latents, for work that would need too much memory at once."""
        return (slice(i, min(i + size, self.d_sae)) for i in range(0, self.d_sae, size))

    def save(self, path: str | Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors` in SAELens's layout into the directory `path`.

        An SAE with thresholds is written as `jumprelu`, whatever it was trained as.
        """
        own = {"arch": self.config.to_dict(), **self.metadata}
        if self.threshold is None or self.config.own_thresholds:
            saelens.write(
                path, self.saelens_architecture, self.state_dict(), self.config.saelens_settings(), own
            )
            return
        if self.config.name != "jumprelu":
            own |= {
                "arch": {"name": "jumprelu", "d_sae": self.d_sae, "target_l0": None, "l1": 0.0},
                "trained_as": self.config.to_dict(),
            }
        saelens.write(path, "jumprelu", self.jumprelu_weights(), {}, own)

    def __repr__(self) -> str:
        settings = ", ".join(f"{f.name}={getattr(self.config, f.name)!r}" for f in fields(self.config))
        site = f", site={self.metadata['site']!r}" if self.metadata.get("site") else ""
        return f"{type(self).__name__}(d_in={self.d_in}, {settings}{site})"

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"Activations of width {x.shape[-1]} do not fit this SAE of width {self.d_in}: "
                "check that the model and the site are the ones it was trained on."
            )


@dataclass(frozen=True)
class PreActivations:
    """`inputs @ weight + bias` in parts of rows: (number of the first row, the part). The next part overwrites the last one: a
    buffer that stays in the cache, where new memory for all of it takes a CPU as long as the product. Can be gone over again."""

    inputs: Float[Tensor, "n d_in"]
    weight: Float[Tensor, "d_in d_sae"]
    bias: Float[Tensor, " d_sae"]
    rows: int
    """Rows of a part."""

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "part d_sae"]]]:
        buffer = self.inputs.new_empty(min(self.rows, len(self.inputs)), self.weight.shape[1])
        for first in range(0, len(self.inputs), self.rows):
            part = self.inputs[first : first + self.rows]
            yield first, torch.mm(part, self.weight, out=buffer[: len(part)]).add_(self.bias)


def squared(x: Tensor) -> Tensor:
    """The sum of squares, (), without a tensor of them."""
    return torch.linalg.vector_norm(x).square()


def gradient(parameter: nn.Parameter) -> Tensor:
    """`.grad`, which is there after `clear_gradients`."""
    assert parameter.grad is not None
    return parameter.grad


def set_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    """Write `value`, of whatever layout and dtype, to `.grad`: into the memory of the last step's."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.copy_(value)


def add_product(
    parameter: nn.Parameter, left: Float[Tensor, "a part"], right: Float[Tensor, "part b"]
) -> None:
    """Add `left @ right` to `.grad`."""
    if left.dtype == parameter.dtype:
        gradient(parameter).addmm_(left, right)
    else:
        gradient(parameter).add_(left @ right)


def add_sum(parameter: nn.Parameter, values: Float[Tensor, "part a"]) -> None:
    """Add the sum over the rows of `values` to `.grad`."""
    gradient(parameter).add_(values.sum(0, dtype=parameter.dtype))


def column_counts(mask: Bool[Tensor, "n a"]) -> Float[Tensor, " a"]:
    """How many rows have a column set. As a product: summing booleans takes torch many times as long on a CPU."""
    return torch.ones(len(mask), device=mask.device) @ mask.float()
