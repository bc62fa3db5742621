"""What all measures of similarity between representations share: their settings, results, and the checks of what they are fed.

    fitter = LinearCKA().fitter(pairs="all")
    for batch_a, batch_b, documents in batches:                  # {site: (n, d)} each, the same rows on both sides
        fitter.update(batch_a, batch_b, documents)
    fitter.result()                                              # a Similarity: every pair with interval and expected null

Rows are tokens (or sentences). Every value is a similarity: 1 for representations that are the same up to what the
measure is invariant to. Tokens of a document resemble each other, so intervals leave out documents, never rows.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.runs import write_json
from steerkit.stats import Interval, jackknife_of

Side = Mapping[str, Float[Tensor, "*rows d"]] | Float[Tensor, "*rows d"]
"""One side's activations by site, or those of one site that needs no name."""
SitePair = tuple[str, str]
Documents = Int[Tensor, "*rows"] | Int[np.ndarray, "*rows"]


class SimilarityWarning(UserWarning):
    """A similarity that says less than it seems to, usually for want of rows."""


@dataclass(frozen=True)
class Invariances:
    """What may be done to either side's rows without changing the value."""

    orthogonal: bool
    """Rotations and reflections."""
    scaling: bool
    """Multiplication of all rows by one number, not zero."""
    linear: bool
    """Any invertible linear map."""
    translation: bool
    """Adding one vector to all rows."""


@dataclass(frozen=True)
class Null:
    """What the value would be if rows of the two sides did not belong together."""

    expected: float
    """Mean over permutations of one side's rows: in closed form, or over those that were drawn."""
    permutations: int = 0
    """How many were drawn; 0: the expectation is the closed form over all permutations of rows."""
    high: float | None = None
    """95 % of drawn permutations lie below."""
    p_value: float | None = None
    """Share of permutations, the true order among them, that reach the value found."""


@dataclass(frozen=True)
class Pair:
    """The similarity of one site of side a with one of side b."""

    a: str
    b: str
    interval: Interval
    """The value with its interval; the ends are NaN where there was no second document, or none was asked for."""
    null: Null | None = None
    note: str = ""
    """What there is to be said against the value."""

    @property
    def value(self) -> float:
        return self.interval.estimate


@dataclass(frozen=True)
class Similarity:
    """All pairs of sites that were compared by one measure."""

    measure: Measure
    pairs: dict[SitePair, Pair]
    sites_a: tuple[str, ...]
    sites_b: tuple[str, ...]
    n_rows: int
    """Rows compared."""
    n_documents: int
    """Units that intervals were made from: documents, or blocks of them; 0 without intervals."""
    notes: tuple[str, ...] = ()
    n_sinks: int = 0
    """Rows whose norm stands out at any site; see `probes.similarity.pairwise`."""
    without_sinks: Similarity | None = field(default=None, repr=False)
    """The same without those rows, where there are any."""

    def __getitem__(self, sites: SitePair) -> Pair:
        return self.pairs[sites]

    @property
    def matrix(self) -> Float[np.ndarray, "sites_a sites_b"]:
        """The values; NaN for pairs that were not compared."""
        values = np.full((len(self.sites_a), len(self.sites_b)), math.nan)
        for (a, b), pair in self.pairs.items():
            values[self.sites_a.index(a), self.sites_b.index(b)] = pair.value
        return values

    def changed_by_sinks(self, tolerance: float = 0.05) -> list[SitePair]:
        """Pairs whose value differs by more than `tolerance` when the rows of outstanding norm are left out."""
        if self.without_sinks is None:
            return []
        other = self.without_sinks.pairs
        return [
            sites for sites, pair in self.pairs.items() if abs(pair.value - other[sites].value) > tolerance
        ]

    def __repr__(self) -> str:
        title = (
            f"{self.measure.name} of {len(self.sites_a)} × {len(self.sites_b)} sites, {self.n_rows:,} rows, "
            f"{self.n_documents:,} units of the interval"
        )
        shown = [p for p in self.pairs.values() if p.a == p.b] or list(self.pairs.values())
        lines = [f"  {p.a} – {p.b}: {p.interval!r}" for p in shown[:24]]
        if len(shown) < len(self.pairs) or len(shown) > 24:
            lines.append(f"  … {len(self.pairs)} pairs in all")
        return "\n".join([title, *lines, *(f"  note: {note}" for note in self.notes)])

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat row a pair, for tables."""
        return [
            {
                "a": pair.a,
                "b": pair.b,
                **pair.interval.to_dict(),
                **({} if pair.null is None else {f"null_{k}": v for k, v in asdict(pair.null).items()}),
                "note": pair.note,
            }
            for pair in self.pairs.values()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "measure": self.measure.name,
            "settings": asdict(self.measure),
            "n_rows": self.n_rows,
            "n_documents": self.n_documents,
            "notes": list(self.notes),
            "n_sinks": self.n_sinks,
            "pairs": self.to_rows(),
            "without_sinks": None if self.without_sinks is None else self.without_sinks.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, self.to_dict())


@dataclass(frozen=True)
class Settings:
    """How a fitter goes about it, whatever it measures."""

    pairs: Literal["all", "matched"] | Sequence[SitePair] = "all"
    """Every site of a with every site of b, sites of one name with each other, or those listed."""
    interval: bool = True
    """Make jackknife intervals. Without them sums over rows are kept once, not once a block."""
    blocks: int = 20
    """Blocks of documents (id modulo this) that a streaming fitter keeps apart and leaves out by turns."""
    level: float = 0.95
    dtype: torch.dtype = torch.float64
    """In which products and sums are held. float32 is faster, the more so on most GPUs, and good to about 1e-5."""

    def __post_init__(self) -> None:
        if self.blocks < 2 or not 0 < self.level < 1:
            raise InputError(
                f"blocks is {self.blocks} and level {self.level}: at least 2, and between 0 and 1."
            )

    def chosen(self, sites_a: Sequence[str], sites_b: Sequence[str]) -> list[SitePair]:
        """The pairs to compare. Raises InputError when there are none, or for a site that is not there."""
        if self.pairs == "all":
            return [(a, b) for a in sites_a for b in sites_b]
        if self.pairs == "matched":
            common = [(site, site) for site in sites_a if site in sites_b]
            if not common:
                raise InputError(
                    f"No site is on both sides ({_some(sites_a)}; {_some(sites_b)}): compare all pairs, or list pairs."
                )
            return common
        if not self.pairs:
            raise InputError("The list of pairs is empty: name at least one, or compare all pairs.")
        for a, b in self.pairs:
            if a not in sites_a or b not in sites_b:
                raise InputError(
                    f"The pair {a} – {b} cannot be compared: there are {_some(sites_a)} and {_some(sites_b)}."
                )
        return list(self.pairs)


@dataclass(frozen=True)
class Estimate:
    """What a measure finds for a pair, before permutations."""

    interval: Interval
    expected_null: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """Settings of one measure; its file opens with paper, equation and defaults."""

    name: ClassVar[str] = ""
    invariances: ClassVar[Invariances]

    def fitter(self, **settings: Any) -> Fitter:
        """What sees the rows batch by batch; `settings` are fields of `Settings`."""
        raise NotImplementedError


class Stream(ABC):
    """Takes in batches of rows, checked. What is kept of them is its subclasses' business."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.n_rows = 0
        self.widths_a: dict[str, int] = {}
        self.widths_b: dict[str, int] = {}
        self.pairs: list[SitePair] = []

    def update(
        self,
        batch_a: Side,
        batch_b: Side,
        documents: Documents | None = None,
        mask: Bool[Tensor, "*rows"] | None = None,
    ) -> None:
        """Take in rows: (..., d) a site, the same rows on both sides.

        `documents` (...) numbers each row's document; without it every row stands for itself. `mask` (...) is true for
        rows that count. Raises InputError when shapes or sites do not match, NumericsError on NaN or inf.
        """
        a, b = rows_of(batch_a, mask), rows_of(batch_b, mask)
        n = common_length(a, b)
        if not n:
            return
        ids = self._document_ids(documents, mask, n)
        self._same_sites(a, b)
        device = next(iter(a.values())).device
        a = {site: a[site].to(device) for site, _ in self.pairs}
        self._add(a, {site: b[site].to(device) for _, site in self.pairs}, ids)
        self.n_rows += n

    def interval(self, estimate: float, left_out: Float[np.ndarray, " g"]) -> Interval:
        """The jackknife's; its ends are NaN where there are none to leave out, or leaving one out leaves nothing."""
        if len(left_out) < 2 or not np.isfinite(left_out).all():
            return Interval(estimate, math.nan, math.nan, math.nan, self.settings.level)
        return jackknife_of(estimate, left_out, level=self.settings.level)

    def require_rows(self) -> None:
        if self.n_rows < 4:
            raise InputError(f"{self.n_rows} rows: a similarity needs at least four.")

    def _document_ids(self, documents: Documents | None, mask: Tensor | None, n: int) -> Int[Tensor, " n"]:
        if documents is None:
            return torch.arange(self.n_rows, self.n_rows + n)
        ids = torch.as_tensor(documents).cpu()
        if ids.is_floating_point() or ids.is_complex():
            raise InputError(f"Documents are numbered by integers, not {ids.dtype}.")
        ids = ids.flatten() if mask is None else ids[mask.cpu()]
        if len(ids) != n:
            raise InputError(f"{len(ids)} document numbers for {n} rows: each row needs its own.")
        return ids.long()

    def _same_sites(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        widths_a = {site: acts.shape[1] for site, acts in a.items()}
        widths_b = {site: acts.shape[1] for site, acts in b.items()}
        if not self.pairs:
            self.widths_a, self.widths_b = widths_a, widths_b
            self.pairs = self.settings.chosen(list(a), list(b))
        elif (widths_a, widths_b) != (self.widths_a, self.widths_b):
            raise InputError(
                f"A batch has other sites or widths than those before: {widths_a}, {widths_b}; "
                f"not {self.widths_a}, {self.widths_b}."
            )

    @abstractmethod
    def _add(self, a: dict[str, Tensor], b: dict[str, Tensor], documents: Int[Tensor, " n"]) -> None: ...


class Fitter(Stream):
    """Gives a Similarity of the rows that it has taken in."""

    def __init__(self, measure: Measure, settings: Settings) -> None:
        super().__init__(settings)
        self.measure = measure

    def result(self) -> Similarity:
        """What the rows so far say; more may follow. Raises InputError when there are too few, or for a constant site."""
        estimates = self.estimates()
        notes = _in_one_line({sites: estimate.note for sites, estimate in estimates.items()})
        for note in notes:
            warnings.warn(note, SimilarityWarning, stacklevel=2)
        return Similarity(
            self.measure,
            {(a, b): _pair(a, b, found) for (a, b), found in estimates.items()},
            tuple(self.widths_a),
            tuple(self.widths_b),
            self._n_compared(),
            self._units() if self.settings.interval else 0,
            notes,
        )

    def estimates(self) -> dict[SitePair, Estimate]:
        """The pairs' values; raises as `result` does."""
        self.require_rows()
        found = self._estimates()
        for (a, b), estimate in found.items():
            if math.isnan(estimate.interval.estimate):
                raise InputError(
                    f"{a} – {b}: 0 / 0, since all rows of one of them are equally unlike each other; give more rows."
                )
        return found

    @abstractmethod
    def _estimates(self) -> dict[SitePair, Estimate]: ...

    @abstractmethod
    def _units(self) -> int:
        """How many units the jackknife leaves out."""

    def _n_compared(self) -> int:
        return self.n_rows


def rows_of(side: Side, mask: Bool[Tensor, "*rows"] | None = None) -> dict[str, Float[Tensor, "n d"]]:
    """A side's rows that count, by site. Raises InputError for shapes that do not fit, NumericsError on NaN or inf."""
    rows = {}
    for site, acts in ({"x": side} if isinstance(side, Tensor) else side).items():
        if acts.ndim < 2 or not acts.shape[-1]:
            raise InputError(f"Activations at {site} have the shape {tuple(acts.shape)}, not (rows, width).")
        if mask is not None and mask.shape != acts.shape[:-1]:
            raise InputError(
                f"The mask's shape {tuple(mask.shape)} is not that of the rows at {site}, {tuple(acts.shape[:-1])}."
            )
        kept = acts.detach().flatten(0, -2) if mask is None else acts.detach()[mask.bool().to(acts.device)]
        wrong = ~kept.isfinite().all(1)
        if wrong.any():
            raise NumericsError(
                f"NaN or inf at {site} in {int(wrong.sum())} of {len(kept)} rows: mask them out, or run the model in "
                "float32 or bfloat16."
            )
        rows[site] = kept
    if not rows:
        raise InputError("No site is given: a side needs at least one.")
    return rows


def as_groups(documents: Shaped[np.ndarray, " n"]) -> Int[Tensor, " n"]:
    """Documents by any name, numbered from 0 in the order of their names."""
    return torch.from_numpy(np.unique(documents, return_inverse=True)[1])


def constant(site: str) -> InputError:
    return InputError(
        f"Activations at {site} are constant: they have no similarity to anything; leave the site out."
    )


def common_length(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    """How many rows all sites have. Raises InputError if they differ."""
    lengths = {len(acts) for acts in (*a.values(), *b.values())}
    if len(lengths) > 1:
        raise InputError(
            f"Sites have {sorted(lengths)} rows: both sides need the same tokens, row by row (models whose tokenizers "
            "differ can be compared on sentences, one row each)."
        )
    return lengths.pop()


def _pair(a: str, b: str, found: Estimate) -> Pair:
    """No similarity is above 1, so neither is the end of its interval."""
    interval = replace(found.interval, high=min(found.interval.high, max(1.0, found.interval.estimate)))
    null = None if found.expected_null is None else Null(found.expected_null)
    return Pair(a, b, interval, null, found.note)


def _in_one_line(notes: Mapping[SitePair, str]) -> tuple[str, ...]:
    """The first note, and how many there are."""
    given = [(sites, note) for sites, note in notes.items() if note]
    if not given:
        return ()
    (a, b), note = given[0]
    others = f" (and for {len(given) - 1} other pairs)" if len(given) > 1 else ""
    return (f"{a} – {b}: {note}{others}",)


def _some(sites: Sequence[str]) -> str:
    return ", ".join(sites[:3]) + (f", … ({len(sites)} in all)" if len(sites) > 3 else "")
