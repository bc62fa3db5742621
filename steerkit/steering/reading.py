"""Activations of both sides of pairs, batch by batch: what the methods that need no training are made from.

    for positive, negative in read_pairs(model, pairs, sites, read="mean"):
        fitter.update(positive[site], negative[site])             # (b, width) each

Sides are read in batches of like length, equal texts once, and the model stops after the last site; memory does not grow with the
number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.steering.pairs import Pair, Pairs, join

Sides = tuple[dict[str, Float[Tensor, "b width"]], dict[str, Float[Tensor, "b width"]]]

READS = ("last", "mean")
BATCH_TOKENS = 4096
_WINDOW = 64
"""Batches that are sorted by length together."""


def read_pairs(
    model: HookedModel,
    pairs: Pairs,
    sites: Sequence[str],
    *,
    read: str | int = "mean",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Sides]:
    """({site: (b, width)} of the positive sides, the same of the negative ones), float32, of all pairs once.

    `read` is the tokens of a side – after the prompt, special ones left out – that are read: their `mean`, the `last`, or an index
    among them (negative: from the end). Raises InputError for a side that has no such token or is too long, NumericsError on NaN.
    """
    if read not in READS and not isinstance(read, int):
        raise InputError(f"read is {read!r}; it is 'mean', 'last' or an index of a token.")
    for group in _groups(model, pairs, batch_tokens):
        texts = list(dict.fromkeys(side for rows in group for side in rows))
        place = {text: i for i, text in enumerate(texts)}
        longest = max(len(ids) for ids, _ in texts)
        ids = torch.tensor([[*ids, *[model.pad_id] * (longest - len(ids))] for ids, _ in texts])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts])
        weights = torch.zeros(ids.shape)
        for row, (own, start) in enumerate(texts):
            weights[row, _chosen(model, own, start, read)] = 1.0
        weights /= weights.sum(1, keepdim=True)
        with torch.inference_mode():
            acts = model.run(ids, mask, sites=sites)
            found = {
                site: torch.einsum("bp,bpd->bd", weights.to(act.device), act.float())
                for site, act in acts.items()
            }
        for site, rows in found.items():
            if not rows.isfinite().all():
                raise NumericsError(f"{model.name} has NaN or inf at {site} for one of {pairs.name}.")
        index = torch.tensor([[place[positive], place[negative]] for positive, negative in group]).T
        yield (
            {site: rows[index[0].to(rows.device)].clone() for site, rows in found.items()},
            {site: rows[index[1].to(rows.device)].clone() for site, rows in found.items()},
        )


def collect_pairs(
    model: HookedModel, pairs: Pairs, sites: Sequence[str], **options: Any
) -> dict[str, tuple[Float[Tensor, "n width"], Float[Tensor, "n width"]]]:
    """Site -> (positive, negative) of all pairs, for methods that need them all at once; in no particular order."""
    parts = list(read_pairs(model, pairs, sites, **options))
    return {
        site: (torch.cat([p[site] for p, _ in parts]), torch.cat([n[site] for _, n in parts]))
        for site in sites
    }


def encode_side(model: HookedModel, prompt: str, side: str) -> tuple[tuple[int, ...], int]:
    """(token ids of prompt and side, where the side begins)."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
    ids = tuple(model.tokenizer(join(prompt, side))["input_ids"])
    if len(ids) > model.context:
        raise InputError(
            f"A side of {len(ids)} tokens exceeds the context of {model.name} ({model.context}): {side[:60]!r}."
        )
    start = 0
    if prompt:
        for own, whole in zip(model.tokenizer(prompt)["input_ids"], ids):
            if own != whole:
                break
            start += 1
    return ids, min(start, len(ids) - 1)


Side = tuple[tuple[int, ...], int]


def _groups(model: HookedModel, pairs: Pairs, batch_tokens: int) -> Iterator[list[tuple[Side, Side]]]:
    """Pairs of encoded sides, in batches of at most `batch_tokens` tokens, pads included."""
    window: list[tuple[Side, Side]] = []
    size = 0
    for number, pair in enumerate(pairs):
        encoded = _encoded(model, pair)
        window.append(encoded)
        size += 2 * max(len(ids) for ids, _ in encoded)
        if size >= _WINDOW * batch_tokens or number == len(pairs) - 1:
            yield from _cut(window, batch_tokens)
            window, size = [], 0


def _encoded(model: HookedModel, pair: Pair) -> tuple[Side, Side]:
    return encode_side(model, pair.prompt, pair.positive), encode_side(model, pair.prompt, pair.negative)


def _cut(window: list[tuple[Side, Side]], batch_tokens: int) -> Iterator[list[tuple[Side, Side]]]:
    def length(encoded: tuple[Side, Side]) -> int:
        return max(len(ids) for ids, _ in encoded)

    group: list[tuple[Side, Side]] = []
    for encoded in sorted(window, key=length):
        if group and 2 * (len(group) + 1) * length(encoded) > batch_tokens:
            yield group
            group = []
        group.append(encoded)
    if group:
        yield group


def _chosen(model: HookedModel, ids: Sequence[int], start: int, read: str | int) -> list[int]:
    """Columns of a side that are read."""
    own = [i for i in range(start, len(ids)) if ids[i] not in model.special_ids]
    if not own:
        raise InputError(f"A side has no tokens of its own beside special ones: ids {list(ids)[-8:]}.")
    if read == "mean":
        return own
    index = -1 if read == "last" else int(read)
    if not -len(own) <= index < len(own):
        raise InputError(f"A side of {len(own)} tokens has no token {index} to read.")
    return [own[index]]
