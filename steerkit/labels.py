"""Labels of tokens, to stand beside their activations.

    labels = TokenLabels.of(documents, ("mood=happy", "weather=rainy"))       # StoryWorld's attributes, or columns of a table
    labels = TokenLabels.of(texts, ("toxic", "polite"), lambda text: [0.9, 0.1])             # or a function of the text
    labels(document, position)["toxic"]                                   # (n,), NaN where it is unknown
    stream = ActivationStream(model, documents, site, columns=labels)     # batches have the labels by their names, too

A label is one for a whole document, which all its tokens have, or one for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.data import Documents
from steerkit.errors import InputError, did_you_mean

LabelFunction = Callable[[str], Any]
"""Text -> its labels, (n_labels,), or those of its tokens, (n_tokens, n_labels); from 0 to 1, NaN: unknown."""

_LOOKED_AT = 10_000
"""Documents that are searched for a value, so that a slip of the pen does not become a label that is always 0."""


@dataclass(frozen=True, eq=False)
class TokenLabels:
    """Labels of documents' tokens. Use `TokenLabels.of`."""

    names: tuple[str, ...]
    of_document: Callable[[int], Float[np.ndarray, "... n_labels"]]
    """Index of a document -> (n_labels,) or (n_tokens, n_labels)."""

    @classmethod
    def of(
        cls, documents: Documents, names: Sequence[str], function: LabelFunction | None = None
    ) -> TokenLabels:
        """Labels by `column=value`, or by a function of the text, whose labels `names` only name.

        Raises InputError for a column or a value that the documents do not have.
        """
        names = tuple(names)
        if function is not None:
            given = function
            return cls(names, lambda index: _checked(given(documents[index]), len(names)))
        labels = [_by_column(documents, name) for name in names]
        return cls(names, lambda index: _side_by_side([label(index) for label in labels]))

    def __call__(
        self, document: Int[np.ndarray, " n"], position: Int[np.ndarray, " n"]
    ) -> dict[str, Float[Tensor, " n"]]:
        """The labels of tokens, by name. Raises InputError when a document has more tokens than labels."""
        found = np.full((len(document), len(self.names)), np.nan, dtype=np.float32)
        order = np.argsort(document, kind="stable")
        indices, starts = np.unique(document[order], return_index=True)
        for index, rows in zip(indices.tolist(), np.split(order, starts[1:])):
            values = self.of_document(index)
            if values.ndim == 1:
                found[rows] = values
                continue
            where = position[rows]
            if where.max() >= len(values):
                raise InputError(
                    f"Document {index} has {len(values)} tokens by its labels, and {where.max() + 1} or more by the model's "
                    "tokenizer: labels of tokens must be of the same tokens."
                )
            found[rows[where >= 0]] = values[where[where >= 0]]
        return {name: torch.from_numpy(found[:, i].copy()) for i, name in enumerate(self.names)}


def _by_column(documents: Documents, name: str) -> Callable[[int], Any]:
    """Index of a document -> whether its `column` is `value` (of each token, if it is a list)."""
    column, equals, value = name.partition("=")
    if not equals or not column or not value:
        raise InputError(f"A label is named column=value, such as mood=happy; {name!r} is not.")
    values = documents.column(column)
    seen = set()
    for index in range(min(len(documents), _LOOKED_AT)):
        here = values(index)
        seen |= set(here) if isinstance(here, list) else {here}
        if value in seen:
            break
    else:
        known = sorted(seen - {""})
        raise InputError(
            f"No document of {documents.name} has {name}.{did_you_mean(value, known)} "
            f"{column} is {', '.join(known[:8])}{' and more' if len(known) > 8 else ''}."
        )

    def label(index: int) -> Any:
        here = values(index)
        if isinstance(here, list):
            return np.array([_is(value, one) for one in here], dtype=np.float32)
        return _is(value, here)

    return label


def _is(value: str, here: str) -> float:
    return float("nan") if here == "" else float(here == value)


def _side_by_side(labels: Sequence[Any]) -> np.ndarray:
    lengths = {len(label) for label in labels if isinstance(label, np.ndarray)}
    if not lengths:
        return np.array(labels, dtype=np.float32)
    (n,) = lengths
    return np.stack([np.broadcast_to(np.asarray(label, dtype=np.float32), n) for label in labels], axis=1)


def _checked(labels: Any, n_labels: int) -> np.ndarray:
    found = np.asarray(labels, dtype=np.float32)
    if found.ndim not in (1, 2) or found.shape[-1] != n_labels:
        raise InputError(
            f"The labels' function gave an array {found.shape}: it must be ({n_labels},) for a text, or (n_tokens, {n_labels})."
        )
    known = found[~np.isnan(found)]
    if known.size and not (known.min() >= 0 and known.max() <= 1):
        raise InputError(
            f"The labels' function gave {known.min():g} to {known.max():g}: labels lie between 0 and 1, NaN if unknown."
        )
    return found
