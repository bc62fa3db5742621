"""Looking inside a weight change: what training did to a linear map W (d_out, d_in), which is now W + dW.

    change = effective_delta(base.get_submodule(path), tuned.get_submodule(path), d_in)   # any adapter that is linear in its input
    spectrum(change).stable_rank                      # how many directions dW has
    base_energy(change, k=10).top.both                # 0.041 (null 0.006 ± 0.001): how much of dW is in W's own top directions
    intruders(change).count                           # new directions among the top ones of W + dW
    magnitude_direction(change), rotation(change)     # DoRA's and OFT's view
    summarise({path: change, …})                      # one row per module

Rows of W are neurons: the map is x -> W x. Whatever is a share of energy stands beside its null: the same singular values in random
(Haar) directions, whose mean and standard deviation are exact. Quotients by a dW, or a W, of zeros are NaN.

Two changes – of seeds, of methods, of LoRA and full fine-tuning – are compared in `inside_pairs`, drawn in `inside_figures`; the
intrinsic dimension of a task is in `inside_subspace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.stats import Interval, group_sums, jackknife

Map = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]]
"""A module, or any function, that acts on each row alone."""
SVD = tuple[Tensor, Tensor, Tensor]
"""U (d_out, m), the singular values (m,), descending, and Vᵀ (m, d_in), with m = min(d_out, d_in)."""


@dataclass(frozen=True, eq=False)
class Change:
    """A linear map before, and what was added to it. Half precision becomes float32.

    Raises InputError for shapes that differ, NumericsError for NaN or inf. Decompositions are computed once and kept.
    """

    base: Float[Tensor, "d_out d_in"]
    delta: Float[Tensor, "d_out d_in"]

    def __post_init__(self) -> None:
        base, delta = (_full_precision(t.detach()) for t in (self.base, self.delta))
        if base.ndim != 2 or base.shape != delta.shape or not base.numel():
            raise InputError(
                f"A change needs W and dW as matrices of one shape, not {tuple(base.shape)} and {tuple(delta.shape)}."
            )
        if not (base.isfinite().all() and delta.isfinite().all()):
            raise NumericsError("W or dW has NaN or inf: the change has no spectrum.")
        dtype = torch.promote_types(base.dtype, delta.dtype)
        object.__setattr__(self, "base", base.to(dtype))
        object.__setattr__(self, "delta", delta.to(dtype))

    def __repr__(self) -> str:
        d_out, d_in = self.base.shape
        return f"Change({d_out}×{d_in}, ‖dW‖/‖W‖ = {self.relative_norm:.3g})"

    @property
    def tuned(self) -> Float[Tensor, "d_out d_in"]:
        return self.base + self.delta

    @property
    def norm(self) -> float:
        """Frobenius norm of dW."""
        return float(self.delta.norm())

    @property
    def relative_norm(self) -> float:
        """‖dW‖_F / ‖W‖_F."""
        return _ratio(self.norm, float(self.base.norm()))

    @cached_property
    def base_svd(self) -> SVD:
        return _svd(self.base)

    @cached_property
    def delta_svd(self) -> SVD:
        return _svd(self.delta)

    @cached_property
    def tuned_svd(self) -> SVD:
        return _svd(self.tuned)


def linear_map(
    forward: Map,
    d_in: int,
    *,
    batch: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Float[Tensor, "d_out d_in"]:
    """(f(I) - f(0))ᵀ: the matrix of a map that is linear but for a bias, read `batch` rows of I at a time.

    `dtype` and `device` are the map's; with a bias, entries are good to one rounding of the bias, so small changes
    want float64. Raises InputError unless f(a + b) - f(a) - f(b) + f(0) is at most `tolerance` times the outputs, on random a
    and b of variance 1, or unless the precision is float32 or float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{dtype} rounds more than most changes are large: convert the module to float32 or float64."
        )
    rows: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
    with torch.no_grad():
        bias = forward(torch.zeros(1, d_in, **rows))
        if bias.ndim != 2:
            raise InputError(f"The map makes {tuple(bias.shape)} of (1, {d_in}); it must act on rows.")
        _require_linear(forward, bias, d_in, tolerance, seed)
        found = bias.new_empty(bias.shape[-1], d_in)
        for start in range(0, d_in, batch):
            stop = min(start + batch, d_in)
            basis = torch.zeros(stop - start, d_in, **rows)
            basis[:, start:stop].fill_diagonal_(1)
            found[:, start:stop] = (forward(basis) - bias).T
    return found


def effective_delta(before: Map, after: Map, d_in: int, **options: Any) -> Change:
    """What an adapter added to a map, whatever its parametrisation: both are read by `linear_map`, with its options and errors."""
    base = linear_map(before, d_in, **options)
    tuned = linear_map(after, d_in, **options)
    if base.shape != tuned.shape:
        raise InputError(
            f"The map has {base.shape[0]} outputs before and {tuned.shape[0]} after: they are not the same module."
        )
    return Change(base, tuned - base)


def _require_linear(forward: Map, bias: Tensor, d_in: int, tolerance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, d_in, generator=generator, dtype=torch.float64).to(bias)
    of_a, of_b, of_sum = forward(a), forward(b), forward(a + b)
    residual = float((of_sum - of_a - of_b + bias).norm())
    scale = float(of_a.norm() + of_b.norm() + of_sum.norm() + bias.norm())
    if not residual <= tolerance * scale:
        raise InputError(
            f"The map is not linear in its input: f(a+b) differs from f(a)+f(b)-f(0) by {_ratio(residual, scale):.2g} of "
            "the outputs. It has no dW; if only dropout is on, call .eval() first."
        )


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of dW, and how many of them matter."""

    values: Float[Tensor, " m"]
    """Descending."""

    def __repr__(self) -> str:
        return (
            f"Spectrum(norm {float(self.values.norm()):.3g}, stable rank {self.stable_rank:.3g}, effective rank "
            f"{self.effective_rank:.3g}, 90 % in {self.rank_at(0.9)} of {len(self.values)})"
        )

    @property
    def stable_rank(self) -> float:
        """‖dW‖_F² / ‖dW‖_2², from 1 to m."""
        return _ratio(float(self.values.square().sum()), float(self.values[0]) ** 2)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ_i / Σσ, from 1 to m (Roy & Vetterli 2007)."""
        return float(torch.special.entr(self.values / self.values.sum()).sum().exp())

    def energy(self, rank: int) -> float:
        """Σ_{i≤rank} σ_i² / Σ σ_i²: how much of dW the best approximation of that rank captures."""
        _require_rank(rank, len(self.values))
        return float(self._captured[rank - 1])

    def rank_at(self, share: float) -> int | None:
        """The smallest rank that captures `share` of the energy; None for dW = 0.

        Biderman et al. 2024, https://arxiv.org/abs/2405.09673, give it at 0.9 for full fine-tuning.
        """
        if not 0 < share < 1:
            raise InputError(f"share is {share}; it must be between 0 and 1.")
        reached = self._captured >= share
        return int(reached.int().argmax()) + 1 if bool(reached.any()) else None

    def truncation_error(self, rank: int) -> float:
        """‖dW - [dW]_rank‖_F / ‖dW‖_F."""
        _require_rank(rank, len(self.values))
        return _ratio(float(self.values[rank:].norm()), float(self.values.norm()))

    @cached_property
    def _captured(self) -> Tensor:
        energies = self.values.double().square()
        return energies.cumsum(0) / energies.sum()


def spectrum(change: Change) -> Spectrum:
    """The singular values of dW."""
    return Spectrum(change.delta_svd[1])


@dataclass(frozen=True)
class Share:
    """A share of energy from 0 to 1, beside what random directions have of it."""

    value: float
    null: float
    """Mean over random directions."""
    null_sd: float
    """Standard deviation over random directions."""

    def __repr__(self) -> str:
        return f"{self.value:.3g} (null {self.null:.3g} ± {self.null_sd:.2g})"


@dataclass(frozen=True)
class Energy:
    """Shares of ‖dW‖_F² in k directions."""

    left: Share
    """‖U_kᵀ dW‖²: of the outputs."""
    right: Share
    """‖dW V_k‖²: of the inputs."""
    both: Share
    """‖U_kᵀ dW V_k‖²."""


@dataclass(frozen=True)
class BaseEnergy:
    """How much of dW is in W's strongest and weakest singular directions."""

    k: int
    top: Energy
    bottom: Energy


def base_energy(change: Change, k: int = 10) -> BaseEnergy:
    """Energy of dW in the k top and the k bottom of W's min(d_out, d_in) singular directions.

    The null has mean k/d_out, k/d_in and their product. Raises InputError for a k above the smaller side.
    """
    U, _, Vh = change.base_svd
    _require_rank(k, len(Vh))
    return BaseEnergy(k, energy_in(change, U[:, :k], Vh[:k].T), energy_in(change, U[:, -k:], Vh[-k:].T))


def energy_in(change: Change, left: Float[Tensor, "d_out k"], right: Float[Tensor, "d_in j"]) -> Energy:
    """Shares of dW's energy in orthonormal directions of its outputs, of its inputs, and in both at once."""
    (d_out, k), (d_in, j) = left.shape, right.shape
    seen, total = left.T @ change.delta, change.norm**2
    values = change.delta_svd[1]

    def share(part: Tensor, n_out: int, n_in: int) -> Share:
        value = _ratio(float(part.norm()) ** 2, total)
        return Share(value, *null_share(values, (d_out, d_in), n_out, n_in))

    return Energy(share(seen, k, d_in), share(change.delta @ right, d_out, j), share(seen @ right, k, j))


def null_share(
    values: Float[Tensor, " m"], shape: tuple[int, int], n_out: int, n_in: int
) -> tuple[float, float]:
    """Mean and standard deviation of ‖P dW Q‖² / ‖dW‖², where dW has the singular `values` in Haar-random directions and P, Q
    project on n_out and n_in fixed dimensions.

    With B = dWᵀ dW / ‖dW‖² and Q a random projection, Q - (n/d) I spreads evenly over the (d - 1)(d + 2)/2 dimensions of traceless
    symmetric matrices (Schur's lemma); the law of total variance over P and Q gives the rest.
    """
    d_out, d_in = shape
    energies = values.double().square()
    purity = _ratio(float(energies.square().sum()), float(energies.sum()) ** 2)  # tr B²
    kept_out, kept_in = n_out / d_out, n_in / d_in
    spread_out, spread_in = _projection_spread(n_out, d_out), _projection_spread(n_in, d_in)
    var_trace = spread_in * (purity - 1 / d_in)
    mean_square_trace = kept_in**2 + var_trace
    mean_square = kept_in**2 * purity + spread_in * ((purity + 1) / 2 - purity / d_in)
    variance = kept_out**2 * var_trace + spread_out * (mean_square - mean_square_trace / d_out)
    return kept_out * kept_in, math.sqrt(max(variance, 0.0))


def _projection_spread(n: int, d: int) -> float:
    """‖P - (n/d) I‖² of a projection on n of d dimensions, per dimension of traceless symmetric matrices."""
    return 2 * n * (d - n) / (d * (d - 1) * (d + 2)) if d > 1 else 0.0


@dataclass(frozen=True)
class Intruders:
    """Top singular directions of W + dW that are none of W's."""

    indices: tuple[int, ...]
    """Which ones, 0 being the strongest."""
    cosines: tuple[float, ...]
    """Of each top direction: the greatest |cosine| with any of W's."""

    @property
    def count(self) -> int:
        return len(self.indices)


def intruders(change: Change, k: int = 10, eps: float = 0.5) -> Intruders:
    """Of the k strongest left singular vectors of W + dW, those whose |cosine| with all of W's is below eps.

    Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228. Where singular values of W lie close together, a tiny dW turns their
    vectors within their common subspace, which this counts too: compare methods at the same k and eps.
    """
    if k < 1 or not 0 < eps <= 1:
        raise InputError(f"Intruders need k of at least 1 and eps in (0, 1], not {k} and {eps}.")
    cosines = (change.tuned_svd[0][:, :k].T @ change.base_svd[0]).abs().amax(1).tolist()
    return Intruders(tuple(i for i, cosine in enumerate(cosines) if cosine < eps), tuple(cosines))


@dataclass(frozen=True)
class MagnitudeDirection:
    """DoRA's two coordinates of a change."""

    magnitude: float
    """ΔM: the mean change of a vector's norm, absolute, in the weights' units."""
    direction: float
    """ΔD: the mean of 1 - cosine, from 0 to 2."""


def magnitude_direction(change: Change, per: Literal["output", "input"] = "output") -> MagnitudeDirection:
    """ΔM = mean_n | ‖w'_n‖ - ‖w_n‖ |, ΔD = mean_n (1 - cos(w'_n, w_n)), over the vectors w_n of W and w'_n of W + dW.

    Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 3–4. The paper writes columns of W (d × k), which are one vector per
    input; DoRA as it is implemented (peft) has a magnitude per output, which is the default here. ΔD leaves out vectors of zeros.
    """
    if per not in ("output", "input"):
        raise InputError(f"per is {per!r}; it must be 'output' or 'input'.")
    old, new = (m if per == "output" else m.T for m in (change.base, change.tuned))
    magnitude = float((new.norm(dim=1) - old.norm(dim=1)).abs().mean())
    return MagnitudeDirection(magnitude, float((2 * (_angles(old, new) / 2).sin().square()).nanmean()))


def coupling(points: Iterable[MagnitudeDirection]) -> float:
    """Pearson's correlation of ΔM and ΔD over modules (and checkpoints, as in the paper); NaN for less than three points.

    The paper's hypothesis: LoRA couples them (> 0), full fine-tuning and DoRA trade them off (< 0).
    """
    found = np.array([(point.magnitude, point.direction) for point in points], dtype=np.float64).reshape(
        -1, 2
    )
    if len(found) < 3 or not found.std(0).all():
        return math.nan
    return float(np.asarray(np.corrcoef(found.T))[0, 1])


@dataclass(frozen=True, eq=False)
class Rotation:
    """How far dW turns W's neurons, as one and each for itself. Angles in radians, from 0 to π."""

    explained: float
    """1 - ‖W R - (W + dW)‖² / ‖dW‖²: the share of dW that the best rotation accounts for."""
    null: float
    """The same for a small Gaussian dW: the dimension of {W K: Kᵀ = -K} over that of dW."""
    matrix: Float[Tensor, "d_in d_in"]
    """R, float64: of all orthogonal maps that are best, the nearest to I."""
    angles: Float[Tensor, " d_in"]
    """By which R turns, descending; each angle of a plane stands twice."""
    neuron_angles: Float[Tensor, " d_out"]
    """Between each neuron before and after; NaN for a neuron of zeros."""
    energy_before: float
    energy_after: float
    """Hyperspherical energy of W and W + dW."""

    def __repr__(self) -> str:
        return (
            f"Rotation(explains {self.explained:.3g} of dW (null {self.null:.3g}), neurons turn by "
            f"{math.degrees(float(self.neuron_angles.nanmean())):.3g}°, hyperspherical energy × "
            f"{_ratio(self.energy_after, self.energy_before):.5g})"
        )


def rotation(change: Change) -> Rotation:
    """The orthogonal R that minimises ‖W R - (W + dW)‖_F: the polar factor of Wᵀ (W + dW); OFT's view of a change.

    Qiu et al. 2023, https://arxiv.org/abs/2306.07280. A rotation of all neurons leaves their angles to each other, and so the
    hyperspherical energy, as they were. Singular directions that W has not (d_in > d_out) are turned as little as can be.
    """
    old, new = change.base.double(), change.tuned.double()
    matrix, rank = _polar_factor(old, new, torch.finfo(change.base.dtype).eps)
    d_out, d_in = old.shape
    free = (d_in * (d_in - 1) - (d_in - rank) * (d_in - rank - 1)) / 2
    # R is normal: the singular values of R - I are |exp(iθ) - 1| = 2 sin(θ/2), exact also for small angles.
    turned = torch.linalg.svdvals(matrix - torch.eye(d_in, dtype=matrix.dtype, device=matrix.device))
    return Rotation(
        explained=1 - _ratio(float((old @ matrix - new).norm()) ** 2, float((new - old).norm()) ** 2),
        null=free / (d_out * d_in),
        matrix=matrix,
        angles=2 * (turned / 2).clamp(max=1).asin(),
        neuron_angles=_angles(old, new),
        energy_before=hyperspherical_energy(old),
        energy_after=hyperspherical_energy(new),
    )


def _polar_factor(old: Tensor, new: Tensor, eps: float) -> tuple[Tensor, int]:
    """(polar factor of oldᵀ new, completed by the smallest rotation; rank of oldᵀ new)."""
    U, values, Vh = torch.linalg.svd(old.T @ new)
    cut = max(torch.finfo(values.dtype).eps, len(values) * eps**2) * len(values) * float(values[0])
    rank = int((values > cut).sum())
    # Of all U₀ Q V₀ᵀ on the rest, the polar Q of U₀ᵀ V₀ has the greatest trace, so it is the nearest to I.
    left, right = U[:, rank:], Vh[rank:].T
    a, _, bh = torch.linalg.svd(left.T @ right)
    return U[:, :rank] @ Vh[:rank] + left @ (a @ bh) @ right.T, rank


def hyperspherical_energy(weight: Float[Tensor, "d_out d_in"], rows: int = 1024) -> float:
    """Σ_{i<j} 1 / ‖ŵ_i - ŵ_j‖ over pairs of neurons, ŵ = w/‖w‖: half of Σ_{i≠j} in Qiu et al. 2023.

    Neurons of zeros are left out; two of one direction make it infinite (or huge, by rounding). Memory: `rows` × d_out.
    """
    norms = weight.double().norm(dim=1)
    units = weight.double()[norms > 0] / norms[norms > 0, None]
    total = 0.0
    for start in range(0, len(units), rows):
        block = units[start : start + rows]
        squares = 2 - 2 * block @ units[start:].T
        later = torch.ones_like(squares, dtype=torch.bool).triu(1)
        total += float(squares.clamp(min=0)[later].rsqrt().sum())
    return total


@dataclass(frozen=True)
class Gain:
    """How large dW's output is beside W's, on data."""

    gain: float
    """√(Σ‖dW x‖² / Σ‖W x‖²)."""
    isotropic: float
    """The same on white noise: ‖dW‖_F / ‖W‖_F. A gain above it means that dW acts where the data is."""
    median: float
    """Of ‖dW x‖ / ‖W x‖ over rows."""
    interval: Interval | None = None
    """Of the gain, by documents."""


def gain(
    change: Change, x: Float[Tensor, "n d_in"], documents: Shaped[np.ndarray, " n"] | None = None
) -> Gain:
    """The effective gain on inputs `x` of the map; with the document of each row, a jackknife interval over documents."""
    if x.ndim != 2 or x.shape[1] != change.base.shape[1] or not len(x):
        raise InputError(f"x has shape {tuple(x.shape)}; the map takes rows of {change.base.shape[1]}.")
    x = x.to(change.base)
    squares = torch.stack([(x @ m.T).double().square().sum(1) for m in (change.delta, change.base)], 1)
    if not squares.isfinite().all():
        raise NumericsError("x has NaN or inf: the gain on it has no value.")
    changed, whole = squares.sum(0).tolist()
    interval = None
    if documents is not None:
        sums = group_sums(squares.cpu().numpy(), documents)
        interval = jackknife(sums, lambda s: np.sqrt(s[..., 0] / s[..., 1]))
    median = float((squares[:, 0] / squares[:, 1]).sqrt().nanmedian())
    return Gain(math.sqrt(_ratio(changed, whole)), change.relative_norm, median, interval)


def layer_and_kind(path: str) -> tuple[int | None, str]:
    """'model.layers.3.self_attn.q_proj' -> (3, 'self_attn.q_proj'); (None, path) where no part is a number."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1 :])
    return None, path


def layer_norms(changes: Mapping[str, Change]) -> dict[int | None, float]:
    """Layer -> ‖dW‖ / ‖W‖ over all modules of the layer together, in the order of layers; None is for what is in no layer."""
    sums: dict[int | None, list[float]] = {}
    for path, change in changes.items():
        total = sums.setdefault(layer_and_kind(path)[0], [0.0, 0.0])
        total[0] += change.norm**2
        total[1] += float(change.base.norm()) ** 2
    ordered = sorted(sums, key=lambda layer: (layer is None, layer))
    return {layer: math.sqrt(_ratio(*sums[layer])) for layer in ordered}


def summarise(changes: Mapping[str, Change], k: int = 10, eps: float = 0.5) -> list[dict[str, Any]]:
    """One row per module for tables and JSON; None where there is no value. `k` is at most each map's smaller side.

    Angles are in degrees. `energy_*` are shares of dW in W's k top directions, beside `null_*`.
    """
    return [_row(path, change, min(k, *change.base.shape), eps) for path, change in changes.items()]


def _row(path: str, change: Change, k: int, eps: float) -> dict[str, Any]:
    layer, kind = layer_and_kind(path)
    values, energy, turned = spectrum(change), base_energy(change, k), rotation(change)
    coordinates = magnitude_direction(change)
    row = {
        "path": path,
        "layer": layer,
        "kind": kind,
        "d_out": change.base.shape[0],
        "d_in": change.base.shape[1],
        "norm": change.norm,
        "relative_norm": change.relative_norm,
        "spectral_norm": float(values.values[0]),
        "stable_rank": values.stable_rank,
        "effective_rank": values.effective_rank,
        "rank_90": values.rank_at(0.9),
        "rank_99": values.rank_at(0.99),
        **{f"energy_{side}": getattr(energy.top, side).value for side in ("left", "right", "both")},
        **{f"null_{side}": getattr(energy.top, side).null for side in ("left", "right", "both")},
        "energy_bottom": energy.bottom.both.value,
        "intruders": intruders(change, k, eps).count,
        "magnitude": coordinates.magnitude,
        "direction": coordinates.direction,
        "rotation_explained": turned.explained,
        "rotation_null": turned.null,
        "neuron_angle": math.degrees(float(turned.neuron_angles.nanmean())),
        "hyperspherical_energy_ratio": _ratio(turned.energy_after, turned.energy_before),
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _svd(matrix: Tensor) -> SVD:
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, values, Vh


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _require_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise InputError(
            f"Rank {rank} is out of range: the smaller side of the map has {most}, so 1 to {most}."
        )


def _angles(old: Float[Tensor, "n d"], new: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Angles between rows, NaN where one is all zeros. Kahan's formula, exact also for small angles."""
    a, b = (m.double() / m.double().norm(dim=1, keepdim=True) for m in (old, new))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))
