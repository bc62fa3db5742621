"""Settings that must fit the matrices they go into: ranks, and blocks that divide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from steerkit.adapters.slots import Slot
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.sites import is_transposed


def check_rank(
    method: str, rank: int, slots: Sequence[Slot], sides: Iterable[str] = ("d_out", "d_in")
) -> None:
    """Raises InputError for a rank below 1, or above a side of a matrix that it goes into."""
    if rank < 1:
        raise InputError(f"rank is {rank}; {method} takes 1 or more.")
    for slot in slots:
        greatest = min(getattr(slot, side) for side in sides)
        if rank > greatest:
            raise InputError(
                f"rank is {rank}, but {slot.path} is {slot.d_out} × {slot.d_in}: {method} takes at most {greatest} there."
            )


def check_upright(method: str, model: HookedModel, slots: Sequence[Slot]) -> None:
    """Raises InputError for a weight that is kept as (d_in, d_out), GPT-2's Conv1D, where peft would take it for the other."""
    for slot in slots:
        if is_transposed(model.model.get_submodule(slot.path)):
            raise InputError(
                f"{slot.path} is a Conv1D, whose weight lies on its side: peft's {method} does not take it."
            )


def greatest_divisor(limit: int, sizes: Iterable[int], what: str, multiple_of: int = 1) -> int:
    """The greatest number up to `limit` that divides all sizes and is a multiple of `multiple_of`. Raises InputError where there is
    none but 1."""
    common = math.gcd(*sizes)
    found = [b for b in range(2, min(limit, common) + 1) if common % b == 0 and b % multiple_of == 0]
    if not found:
        raise InputError(
            f"{what} is {limit}: no block of 2 to {limit} divides {common}, the greatest common divisor of the sizes"
            f"{f', and is a multiple of {multiple_of}' if multiple_of > 1 else ''}. Take a greater one, or fewer modules."
        )
    return found[-1]
