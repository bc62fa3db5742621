"""AntiPaSTO: singular dimensions of the residual writers, turned one way for one pole of a persona and the other way for the other.

    y ← y + x V [R(α) diag(S + α dS) - diag(S)] Uᵀ,   α from -1 to 1        (`SingularRotate` says how R is made and bounded)

    d(α) = h+ - h-   of the two sides of a pair at α, mean over their last n tokens, at the site;   d = d(0)
    δ±               d(±1) - d, or with moved="sides" (ours): δ+ the change of h- at α = 1, δ- that of h+ at α = -1
    separation       mean of s + relu(s)²,   s = 30 cos(Lδ+, Ld) cos(Lδ-, Ld) (focus+ focus-)^¾,   focus = ‖Lδ‖ / ‖δ‖
    coherence        v = relu(TV(p_0, p_α) - 0.9 √(H + 0.02)),  mean of log1p(10 v)² + v;  α = 1 on positive sides, else -1
    monotone         G(α): change of log p(positive side) - log p(negative side);   t = √H/2 + 0.04;
                     relu(t - G(1)) + relu(t + G(-1)) or the opposite order, whichever is smaller on average over the batch
    loss             separation + ramp (10 coherence + 30 monotone)

AntiPaSTO, 2026, https://arxiv.org/abs/2601.07473. Rows of L are the first principal directions of the pairs' d (each of unit
norm, not centred), H the entropies of the unsteered next-token distributions; the ramp goes over the first fifth of the steps.
Pairs are meant to be one unfinished suffix after opposite persona prefixes: nothing but the prefixes says which is which. The
loss leaves open which sign of α is the positive pole: pairs that were held out of the training tell.

The published δ± are blind to which side moves: that the positive pole draws the negative side over (and the other pole only widens
the gap), and that the negative pole draws the positive side over, are equally good. A fit ends in one or the other, by its seed.
With "sides" each pole has to draw the other side over.

Defaults are those of the published code (r 64, n 3, weights 30, 10 and 30; 8 rows of L as in the paper), but for two. So few
steps on a small model need a learning rate of 1e-2 (published: 2e-3 for 30 epochs). θ_max is π/2: published are π/4 to π/2, as
a bound on the elements of A, under which the planes of a large r turn by much more; here it bounds the angles themselves. Left
out are what L is intersected with there (what later blocks suppress, what the writers can write) and the subsampling of
modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from steerkit.errors import InputError
from steerkit.finetune import Example, frozen, optimise, padded
from steerkit.models import HookedModel
from steerkit.sites import weight_of
from steerkit.steering.edits import SingularRotate
from steerkit.steering.methods.base import register
from steerkit.steering.methods.learning import Make, PairExample, Trained, detached, encode_pairs, sides_of
from steerkit.steering.pairs import Pairs
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

WRITERS = ("attn.hook_z", "mlp.hook_post")
"""Sites whose modules end attention or MLP: they read there and write to the residual stream."""
MOVED = ("gap", "sides")
RAMP = 0.2
"""Share of the steps over which coherence and monotone come in."""
READ_BATCH = 32


@register
@dataclass(frozen=True)
class AntiPaSTO(Trained):
    """Rotations of the linear modules that write to the residual stream before the one site, at which the sides are told apart."""

    rank: int = 64
    """r, the most singular dimensions of a module: a third each that the positive sides, the negative sides and their differences
    excite most."""
    max_angle: float = math.pi / 2
    """θ_max in radians: no plane turns by more at α from -1 to 1. Strengths beyond are possible and unbounded."""
    skip: float = 0.1
    """Share of the blocks, the first ones, that are left as they are."""
    n_tokens: int = 3
    """n: the last tokens of a side that are looked at."""
    moved: str = "gap"
    """What δ± are the changes of: the `gap` between the sides (published), or the side that is drawn over, `sides`."""
    subspace: int = 8
    """Rows of L."""
    separation: float = 30.0
    coherence: float = 10.0
    monotone: float = 30.0
    calibration: float = 0.2
    """Share of the pairs that is held out to tell the sign."""
    lr: float = 1e-2
    epochs: float = 4
    batch_size: int = 8
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    name: ClassVar[str] = "antipasto"
    of_sites: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is not None:
            raise InputError("antipasto's loss is not one of texts: it takes no reference model.")
        for name in ("rank", "n_tokens", "subspace"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("separation", "coherence", "monotone"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; a weight is not negative.")
        if self.moved not in MOVED:
            raise InputError(f"moved is {self.moved!r}; it is one of {', '.join(MOVED)}.")
        if not 0 < self.max_angle < math.pi:
            raise InputError(
                f"max_angle is {self.max_angle}; it is in radians, above 0 and below π ({math.pi:.4f})."
            )
        if not (0 <= self.skip < 1 and 0 < self.calibration < 1):
            raise InputError(
                f"skip is {self.skip} and calibration {self.calibration}: shares from 0, and above 0, to below 1."
            )

    def fit(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> SteeringVector:
        """Raises InputError for less than 2 pairs, several sites, or a site before which no linear module writes."""
        sites = sites or [f"blocks.{(model.n_layers - 1) // 2}.hook_resid_post"]
        if len(sites) != 1:
            raise InputError(
                f"antipasto tells the sides apart at one site, and {len(sites)} were given: choose one."
            )
        (site,) = sites
        modules = writers(model, site, self.skip)
        if len(pairs) < 2:
            raise InputError("antipasto needs at least 2 pairs: one to train on and one to tell the sign by.")
        held_out = min(max(1, round(self.calibration * len(pairs))), len(pairs) - 1)
        train, rest = pairs.split(1 - held_out / len(pairs), seed=self.seed)
        examples, calibration = encode_pairs(model, train), encode_pairs(model, rest)
        n = min([self.n_tokens, *(len(s) - s.start for e in examples + calibration for s in sides_of([e]))])
        make, trained = self._parts(model, examples, modules, n)
        provenance = self.provenance(model, pairs, sites)

        def vector() -> SteeringVector:
            return SteeringVector(make().edits, provenance, Where.every_token())

        with frozen(model):
            loss = _Loss(self, model, site, n, vector, examples, self.steps(len(examples)))
            optimise(trained, examples, loss, self, title=self.name, quiet=self.quiet)
        found = detached(vector())
        return found if positive_pull(model, found, calibration, n, site) > 0 else _opposite(found)

    def _parts(
        self, model: HookedModel, examples: Sequence[PairExample], modules: dict[str, str], n: int
    ) -> tuple[Make, list[Tensor]]:
        """How the vector is made of the tensors that are trained, and those."""
        generator = torch.Generator().manual_seed(self.seed)
        inputs = _inputs(model, examples, list(modules.values()), n)
        edits = []
        for path, site in modules.items():
            U, S, V = _svd(_weight(model, path))
            positive, negative = (x.to(V) for x in inputs[site])
            chosen = select(positive, negative, V, S, self.rank)
            r = len(chosen)
            P = 0.003 * torch.randn(r, r, generator=generator)
            dS = 4e-4 + 4e-4 * torch.randn(r, generator=generator)
            P, dS = (t.to(model.device).requires_grad_() for t in (P, dS))
            U, S, V = (t.to(model.device) for t in (U[:, chosen], S[chosen], V[:, chosen]))
            edits.append(SingularRotate(path, V, S, U, P, dS, max_angle=self.max_angle))

        def make() -> SteeringVector:
            return SteeringVector(tuple(replace(edit) for edit in edits))

        return make, [t for edit in edits for t in (edit.P, edit.dS)]


# where


def writers(model: HookedModel, site: str, skip: float = 0.0) -> dict[str, str]:
    """Path -> input site of the linear modules that write to the residual stream before `site`, without the first blocks.

    Raises InputError when there are none.
    """
    names, end = list(model.sites), model.site(site).name
    before = names[: names.index(end)] if end in names else []
    linear = model.linear_modules()
    found = {}
    for name in before:
        own = model.sites[name]
        if own.verified and name.endswith(WRITERS) and linear.get(own.path, -1) >= int(skip * model.n_layers):
            found[own.path] = name
    if not found:
        raise InputError(
            f"No linear module of {model.name} writes to the residual stream before {site} (skip {skip:g}): "
            "give a later site, such as hook_resid_post of the middle block."
        )
    return found


def _weight(model: HookedModel, path: str) -> Float[Tensor, "d_out d_in"]:
    module: Any = model.model.get_submodule(path)
    if not module.weight.is_floating_point():
        raise InputError(f"{path} of {model.name} is quantised: its singular values cannot be taken.")
    return weight_of(module).detach().float()


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U, S, Vh.T


def select(
    positive: Float[Tensor, "n d_in"],
    negative: Float[Tensor, "n d_in"],
    V: Float[Tensor, "d_in k"],
    S: Float[Tensor, " k"],
    rank: int,
) -> list[int]:
    """The singular dimensions that inputs of the two sides excite most, in ascending order: at most `rank`.

    In turn the next best by the mean |excitation| of the positive sides, of the negative ones, and by |mean difference|.
    """
    scores = [
        S * (positive @ V).abs().mean(0),
        S * (negative @ V).abs().mean(0),
        S * ((positive - negative) @ V).mean(0).abs(),
    ]
    orders = [iter(score.argsort(descending=True).tolist()) for score in scores]
    chosen: set[int] = set()
    while len(chosen) < min(rank, len(S)):
        for order in orders:
            if len(chosen) < min(rank, len(S)):
                chosen.add(next(i for i in order if i not in chosen))
    return sorted(chosen)


def _inputs(
    model: HookedModel, examples: Sequence[PairExample], sites: Sequence[str], n: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> activations of the (positive, negative) sides' last n tokens, (n_pairs * n, width), on the CPU."""
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in _batches(examples):
        ids, mask = padded(model, sides_of(batch))
        last = _last(sides_of(batch), n, ids.device)
        with torch.no_grad():
            acts = model.run(ids, mask, sites=sites)
        for site in sites:
            parts[site].append(_at(acts[site], last).float().cpu())
    found = {}
    for site, rows in parts.items():
        halves = [part.chunk(2) for part in rows]
        found[site] = tuple(torch.cat([h[i] for h in halves]).flatten(0, 1) for i in (0, 1))
    return found  # type: ignore[return-value]


# what is looked at


@dataclass(frozen=True)
class _Reading:
    """Of the last n tokens of each row."""

    h: Float[Tensor, "rows d_model"]
    """Mean of the activations at the site."""
    log_p: Float[Tensor, "rows n d_vocab"]
    """Of the token that follows."""
    own: Float[Tensor, " rows"]
    """Log-probability of the tokens themselves."""

    def part(self, rows: slice) -> _Reading:
        return _Reading(self.h[rows], self.log_p[rows], self.own[rows])


def _read(model: HookedModel, site: str, sides: Sequence[Example], n: int, copies: int = 1) -> _Reading:
    ids, mask = padded(model, sides)
    ids, mask = ids.repeat(copies, 1), mask.repeat(copies, 1)
    last = _last(sides, n, ids.device).repeat(copies, 1)
    store: list[Tensor] = []
    with model.hooks({site: lambda act: store.append(act)}):
        logits = model.logits(ids, mask)
    before = torch.cat([last[:, :1] - 1, last], dim=1)
    log_p = _at(logits, before).float().log_softmax(-1)
    own = log_p[:, :-1].gather(2, ids.gather(1, last)[..., None])[..., 0].sum(1)
    return _Reading(_at(store[0], last).float().mean(1), log_p[:, 1:], own)


def _batches(examples: Sequence[PairExample]) -> Iterator[Sequence[PairExample]]:
    return (examples[i : i + READ_BATCH] for i in range(0, len(examples), READ_BATCH))


def _last(sides: Sequence[Example], n: int, device: torch.device) -> Tensor:
    """(rows, n): columns of the last n tokens."""
    ends = torch.tensor([len(side) for side in sides], device=device)
    return ends[:, None] - torch.arange(n, 0, -1, device=device)


def _at(rows: Float[Tensor, "b pos w"], columns: Tensor) -> Float[Tensor, "b n w"]:
    columns = columns.to(rows.device)
    return rows.gather(1, columns[..., None].expand(-1, -1, rows.shape[-1]))


# the loss


class _Loss:
    """The loss of a batch of pairs; it counts the steps for the ramp."""

    def __init__(
        self,
        config: AntiPaSTO,
        model: HookedModel,
        site: str,
        n: int,
        make: Make,
        examples: Sequence[PairExample],
        n_steps: int,
    ) -> None:
        self.config, self.model, self.site, self.n, self.make = config, model, site, n, make
        self.ramp = _ramp(n_steps)
        rows = []
        for batch in _batches(examples):
            positive, negative = self.base(batch).h.chunk(2)
            rows.append(F.normalize(positive - negative, dim=1))
        _, _, Vh = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        self.L = Vh[: config.subspace]

    def base(self, batch: Sequence[PairExample]) -> _Reading:
        with torch.no_grad():
            return _read(self.model, self.site, sides_of(batch), self.n)

    def __call__(self, batch: Sequence[PairExample]) -> Tensor:
        b = len(batch)
        base = self.base(batch)
        with self.model.steer(self.make(), strength=torch.tensor([1.0, -1.0]).repeat_interleave(2 * b)):
            both = _read(self.model, self.site, sides_of(batch), self.n, copies=2)
        up, down = both.part(slice(0, 2 * b)), both.part(slice(2 * b, None))
        config, ramp = self.config, next(self.ramp)
        entropy = -(base.log_p.exp() * base.log_p).sum(-1)
        steered = torch.cat([up.log_p[:b], down.log_p[b:]])
        gained, lost = (gap(reading.own) - gap(base.own) for reading in (up, down))
        threshold = 0.5 * entropy.mean(1).sqrt() + 0.04
        return (
            separation(gap(base.h), *self.changes(base.h, up.h, down.h), self.L, config.separation)
            + ramp * config.coherence * coherence(base.log_p, steered, entropy)
            + ramp * config.monotone * monotone(gained, lost, 0.5 * (threshold[:b] + threshold[b:]))
        )

    def changes(self, base: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """δ+ and δ-."""
        if self.config.moved == "gap":
            return gap(up) - gap(base), gap(down) - gap(base)
        b = len(base) // 2
        return (up - base)[b:], (down - base)[:b]


def _ramp(n_steps: int) -> Iterator[float]:
    step = 0
    while True:
        yield min(1.0, step / max(1.0, RAMP * n_steps))
        step += 1


def gap(sides: Float[Tensor, "two_b ..."]) -> Float[Tensor, "b ..."]:
    """Positive minus negative."""
    positive, negative = sides.chunk(2)
    return positive - negative


def separation(
    d: Float[Tensor, "b d_model"],
    up: Float[Tensor, "b d_model"],
    down: Float[Tensor, "b d_model"],
    L: Float[Tensor, "k d_model"],
    weight: float,
) -> Tensor:
    """Small when δ+ (`up`) and δ- (`down`) are antiparallel along d and lie in the rows of L."""
    aligned = torch.ones(len(d), device=d.device)
    for delta in (up, down):
        inside = delta @ L.T
        focus = inside.norm(dim=1) / delta.norm(dim=1).clamp_min(1e-8)
        aligned = aligned * F.cosine_similarity(inside, d @ L.T, dim=1) * focus.clamp_min(1e-8) ** 0.75
    s = weight * aligned
    return (s + s.relu() ** 2).mean()


def coherence(
    base: Float[Tensor, "rows n v"], steered: Float[Tensor, "rows n v"], entropy: Float[Tensor, "rows n"]
) -> Tensor:
    """A barrier: 0 as long as the total variation of each next-token distribution stays below what its entropy allows."""
    tv = 0.5 * (steered.exp() - base.exp()).abs().sum(-1)
    above = (tv - 0.9 * (entropy + 0.02).sqrt()).relu()
    return ((10 * above).log1p() ** 2 + above).mean()


def monotone(up: Float[Tensor, " b"], down: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> Tensor:
    """0 when the preference changes by more than t, one way at α = 1 and the other way at -1."""
    forward = (t - up).relu() + (t + down).relu()
    backward = (t + up).relu() + (t - down).relu()
    return torch.minimum(forward.mean(), backward.mean())


# the sign


def positive_pull(
    model: HookedModel, vector: SteeringVector, examples: Sequence[PairExample], n: int, site: str
) -> float:
    """How much nearer, in nats, each side's next-token distributions come to the other's when it is steered there than when away.

    The cross-entropy of the unsteered positive side with the negative one at α = -1, less that at α = 1, and likewise the other way
    about; the mean over tokens and pairs. Above 0, α = 1 is the positive pole.
    """
    total = 0.0
    for batch in _batches(examples):
        b = len(batch)
        with torch.no_grad():
            base = _read(model, site, sides_of(batch), n).log_p.exp()
            with model.steer(vector, strength=torch.tensor([1.0, -1.0]).repeat_interleave(2 * b)):
                both = _read(model, site, sides_of(batch), n, copies=2).log_p
        up, down = both.chunk(2)
        other = torch.cat([base[b:], base[:b]])
        nearer = (other * (up - down)).sum(-1).mean(1)
        total += float(nearer[b:].sum() - nearer[:b].sum())
    return total / (2 * len(examples))


def _opposite(vector: SteeringVector) -> SteeringVector:
    """α and -α exchanged, in the tensors: the strength that is asked for stays what `Where` and files say."""
    edits = [replace(e, P=-e.P, dS=-e.dS) for e in vector.edits if isinstance(e, SingularRotate)]
    return replace(vector, edits=tuple(edits))
