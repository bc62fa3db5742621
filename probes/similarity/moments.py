"""Measures that are functions of second moments: one pass over the rows, memory flat in their number.

Kept, about a provisional mean (that of the first batch; raw moments would lose most digits to a large mean), in blocks of
documents: n, Σx, Σ|x|² of every site, and of every pair of sites

    X'Y,  Σ|x|²|y|²,  X'|y|²,  Y'|x|²          from one product of all sites of a with all sites of b a batch

A site's own moments are those of the pair with itself. From them follow, exactly, the centred scatter X'Y - n m_x m_y' and all
that the debiased HSIC needs. A jackknife subtracts a block's sums from the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.similarity.base import Estimate, Fitter, Measure, Settings, SitePair, constant
from steerkit.errors import InputError

Key = tuple[str, str]
"""("a" or "b", site)"""


@dataclass(frozen=True)
class PairSums:
    """Sums over some rows of a pair of sites, about their provisional means."""

    n: float
    sum_x: Float[Tensor, " d_x"]
    sum_y: Float[Tensor, " d_y"]
    squares_x: Float[Tensor, ""]
    """Σ|x|²"""
    squares_y: Float[Tensor, ""]
    cross: Float[Tensor, "d_x d_y"]
    """Σ x y'"""
    squares_xy: Float[Tensor, ""]
    """Σ|x|²|y|²"""
    x_by_y: Float[Tensor, " d_x"]
    """Σ x |y|²"""
    y_by_x: Float[Tensor, " d_y"]
    """Σ y |x|²"""

    @property
    def scatter(self) -> Float[Tensor, "d_x d_y"]:
        """Σ (x - m_x)(y - m_y)'"""
        return torch.addr(self.cross, self.sum_x, self.sum_y, alpha=-1 / self.n)

    @property
    def trace_x(self) -> Float[Tensor, ""]:
        """Σ|x - m_x|²"""
        return self.squares_x - self.sum_x.square().sum() / self.n

    @property
    def trace_y(self) -> Float[Tensor, ""]:
        return self.squares_y - self.sum_y.square().sum() / self.n

    @property
    def centred_squares(self) -> Float[Tensor, ""]:
        """Σ|x - m_x|²|y - m_y|²"""
        mean_x, mean_y = self.sum_x / self.n, self.sum_y / self.n
        square_x, square_y = mean_x @ mean_x, mean_y @ mean_y
        return (
            self.squares_xy
            - 2 * (self.y_by_x @ mean_y + self.x_by_y @ mean_x)
            + square_y * self.squares_x
            + square_x * self.squares_y
            + 4 * (mean_x @ self.cross @ mean_y)
            - 3 * self.n * square_x * square_y
        )


class _Joint:
    """Sums for each of some sites with each of some others, a row of memory per block."""

    def __init__(
        self, left: Sequence[Key], right: Sequence[Key], widths: dict[Key, int], blocks: int, like: Tensor
    ) -> None:
        self.left, self.right = _slices(left, widths), _slices(right, widths)
        d_x, d_y = sum(widths[key] for key in left), sum(widths[key] for key in right)
        self.cross = like.new_zeros(blocks, d_x, d_y)
        self.squares = like.new_zeros(blocks, len(left), len(right))
        self.x_by_y = like.new_zeros(blocks, d_x, len(right))
        self.y_by_x = like.new_zeros(blocks, d_y, len(left))
        self._totals: tuple[Tensor, ...] | None = None

    def add(self, block: int, rows: dict[Key, Tensor], squares: dict[Key, Tensor]) -> None:
        self._totals = None
        x, y = _beside(rows, self.left), _beside(rows, self.right)
        square_x, square_y = (
            torch.stack([squares[key] for key in side], 1) for side in (self.left, self.right)
        )
        self.cross[block].addmm_(x.T, y)
        self.squares[block].addmm_(square_x.T, square_y)
        self.x_by_y[block].addmm_(x.T, square_y)
        self.y_by_x[block].addmm_(y.T, square_x)

    def parts(
        self, x: Key, y: Key, blocks: list[int], without: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cross, squares, x_by_y, y_by_x) of a pair over some blocks, or over all `without` them."""
        sums = (self.cross, self.squares, self.x_by_y, self.y_by_x)
        if self._totals is None:
            self._totals = tuple(kept.sum(0) for kept in sums)
        i, j = list(self.left).index(x), list(self.right).index(y)

        def part(kept: Tensor, total: Tensor, rows: Any, columns: Any) -> Tensor:
            found = total[rows, columns] if without else torch.zeros_like(total[rows, columns])
            for block in blocks:
                found = found.add(kept[block, rows, columns], alpha=-1 if without else 1)
            return found

        cross, squares, x_by_y, y_by_x = zip(sums, self._totals)
        return (
            part(*cross, self.left[x], self.right[y]),
            part(*squares, i, j),
            part(*x_by_y, self.left[x], j),
            part(*y_by_x, self.right[y], i),
        )


class Moments:
    """The sums of all sites and of the pairs that are asked for."""

    def __init__(
        self,
        first_a: dict[str, Tensor],
        first_b: dict[str, Tensor],
        pairs: Sequence[SitePair],
        blocks: int,
        dtype: torch.dtype,
    ) -> None:
        first = _keyed(first_a, first_b)
        self.shift = {key: acts.to(dtype).mean(0) for key, acts in first.items()}
        widths = {key: acts.shape[1] for key, acts in first.items()}
        like = next(iter(self.shift.values()))
        self.rows = torch.zeros(blocks, dtype=torch.float64)
        self.sums = {key: like.new_zeros(blocks, width) for key, width in widths.items()}
        self.squares = {key: like.new_zeros(blocks) for key in widths}
        self._joints: dict[tuple[Key, Key], _Joint] = {
            (key, key): _Joint([key], [key], widths, blocks, like) for key in widths
        }
        self._distinct = list(self._joints.values())
        for left, right in _products(pairs):
            joint = _Joint(left, right, widths, blocks, like)
            self._distinct.append(joint)
            self._joints.update({(x, y): joint for x in left for y in right})

    def add(self, a: dict[str, Tensor], b: dict[str, Tensor], block: Int[Tensor, " n"]) -> None:
        """Take in rows and the block of each."""
        for number in block.unique().tolist():
            chosen = (block == number).nonzero().flatten()
            rows = {
                key: (acts if len(chosen) == len(acts) else acts[chosen.to(acts.device)]).to(shift) - shift
                for (key, acts), shift in zip(_keyed(a, b).items(), self.shift.values())
            }
            squares = {key: acts.square().sum(1) for key, acts in rows.items()}
            self.rows[number] += len(chosen)
            for key, acts in rows.items():
                self.sums[key][number] += acts.sum(0)
                self.squares[key][number] += squares[key].sum()
            for joint in self._distinct:
                joint.add(number, rows, squares)

    @property
    def blocks(self) -> list[int]:
        """Those that have rows."""
        return self.rows.nonzero().flatten().tolist()

    def pair(self, x: Key, y: Key, *, without: Sequence[int] = (), only: Sequence[int] = ()) -> PairSums:
        """Sums of a pair over all rows, over those not in the blocks `without`, or over those in `only`."""

        def part(kept: Tensor) -> Tensor:
            return kept[list(only)].sum(0) if only else kept.sum(0) - kept[list(without)].sum(0)

        blocks = list(only or without)
        cross, squares, x_by_y, y_by_x = self._joints[x, y].parts(x, y, blocks, without=not only)
        return PairSums(
            float(part(self.rows)),
            part(self.sums[x]),
            part(self.sums[y]),
            part(self.squares[x]),
            part(self.squares[y]),
            cross,
            squares,
            x_by_y,
            y_by_x,
        )

    def refuse_constants(self) -> None:
        """Raise InputError for a site whose rows differ by no more than rounding."""
        for key, shift in self.shift.items():
            own = self.pair(key, key)
            rounding = 8 * torch.finfo(shift.dtype).eps
            if float(own.trace_x) <= own.n * float(shift @ shift) * rounding**2:
                raise constant(key[1])


@dataclass(frozen=True)
class MomentMeasure(Measure):
    """A measure that is a function of a pair's sums."""

    def of_site(self, own: PairSums) -> Any:
        """What of a site does not depend on what it is compared with, from its sums with itself."""
        raise NotImplementedError

    def of_pair(self, x: Any, y: Any, joint: PairSums) -> Tensor:
        """The value, from what `of_site` gave for the two. Raises InputError where there are too few rows."""
        raise NotImplementedError

    def expected_null(self, x: Any, y: Any, joint: PairSums) -> float | None:
        """Mean value over all permutations of one side's rows, where there is a closed form."""
        return None

    def note(self, x: Any, y: Any, joint: PairSums) -> str:
        """What there is to be said against the value, or nothing."""
        return ""

    def fitter(self, **settings: Any) -> Fitter:
        return MomentFitter(self, Settings(**settings))


class MomentFitter(Fitter):
    """Streams rows into `Moments`. Rows are in the block of their document's number modulo `blocks`."""

    measure: MomentMeasure

    def __init__(self, measure: MomentMeasure, settings: Settings) -> None:
        super().__init__(measure, settings)
        self._moments: Moments | None = None
        self._blocks = settings.blocks if settings.interval else 1

    @property
    def moments(self) -> Moments:
        assert self._moments is not None
        return self._moments

    def _add(self, a: dict[str, Tensor], b: dict[str, Tensor], documents: Int[Tensor, " n"]) -> None:
        if self._moments is None:
            self._moments = Moments(a, b, self.pairs, self._blocks, self.settings.dtype)
        self._moments.add(a, b, documents % self._blocks)

    def _units(self) -> int:
        return len(self.moments.blocks)

    def _estimates(self) -> dict[SitePair, Estimate]:
        self.moments.refuse_constants()
        values, expected, notes = self._of_all()
        left_out = [self._of_all([block])[0] for block in self.moments.blocks] if self._units() > 1 else []
        return {
            sites: Estimate(
                self.interval(value, np.array([found[sites] for found in left_out])),
                expected[sites],
                notes[sites],
            )
            for sites, value in values.items()
        }

    def _of_all(
        self, without: Sequence[int] = ()
    ) -> tuple[dict[SitePair, float], dict[SitePair, float | None], dict[SitePair, str]]:
        """(value, expected null, note) of each pair; the last two only over all rows."""
        own = {
            key: self.measure.of_site(self.moments.pair(key, key, without=without))
            for key in self.moments.sums
        }
        values: dict[SitePair, float] = {}
        expected: dict[SitePair, float | None] = {}
        notes: dict[SitePair, str] = {}
        for a, b in self.pairs:
            x, y, joint = own["a", a], own["b", b], self.moments.pair(("a", a), ("b", b), without=without)
            try:
                values[a, b] = float(self.measure.of_pair(x, y, joint))
            except InputError as error:
                raise InputError(f"{a} – {b}: {error}") from None
            if not without:
                expected[a, b] = self.measure.expected_null(x, y, joint)
                notes[a, b] = self.measure.note(x, y, joint)
        return values, expected, notes


def _keyed(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[Key, Tensor]:
    return {
        **{("a", site): acts for site, acts in a.items()},
        **{("b", site): acts for site, acts in b.items()},
    }


def _products(pairs: Sequence[SitePair]) -> list[tuple[list[Key], list[Key]]]:
    """One product for all pairs where all of a is compared with all of b, else one a pair."""
    sites_a, sites_b = dict.fromkeys(a for a, _ in pairs), dict.fromkeys(b for _, b in pairs)
    if len(set(pairs)) == len(sites_a) * len(sites_b):
        return [([("a", a) for a in sites_a], [("b", b) for b in sites_b])]
    return [([("a", a)], [("b", b)]) for a, b in dict.fromkeys(pairs)]


def _slices(keys: Sequence[Key], widths: dict[Key, int]) -> dict[Key, slice]:
    ends = np.cumsum([widths[key] for key in keys]).tolist()
    return {key: slice(end - widths[key], end) for key, end in zip(keys, ends)}


def _beside(rows: dict[Key, Tensor], keys: dict[Key, slice]) -> Tensor:
    chosen = [rows[key] for key in keys]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)
