"""Running a batch again with a change at a site, from that site on.

    replay = Replay(model, "blocks.2.hook_resid_post")
    acts, clean = replay.run(input_ids, attention_mask)      # activations at the site, final states
    changed = replay.again(lambda act: act + vector)         # the same batch; blocks 0–2 are not computed
    again

What the site cannot change need not be computed twice: in `again` the blocks before the site hand back what
the last of them gave in `run`. Whether the model allows that is found out on the first batch: final states
must come out equal, bit for bit, or every run is a whole one. The model is left as it was after each call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.models import HookedModel
from steerkit.sites import ActivationHook


class Replay:
    """Runs of one batch after the other, each as often as asked with changes at one site."""

    def __init__(self, model: HookedModel, site: str) -> None:
        self.model, self.site = model, site
        self._skipped = _blocks_before(model, site)
        self._checked = not self._skipped
        self._given: Any = None
        self._batch: tuple[Tensor, Tensor | None] | None = None

    @property
    def skips(self) -> int:
        """How many blocks `again` does not compute."""
        return len(self._skipped)

    @torch.no_grad()
    def run(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch pos width"], Float[Tensor, "batch pos d_model"]]:
        """(activations at the site, final states) of a batch as it is."""
        found: list[Tensor] = []

        def read(act: Tensor) -> None:
            found.append(act.clone())

        self._batch = (input_ids, attention_mask)
        with self._recording(), self.model.hooks({self.site: read}):
            final = self.model.final(*self._batch)
        if not self._checked:
            self._checked = True
            if not self._gives(final):
                self._skipped = []
        return found[-1], final

    @torch.no_grad()
    def again(self, change: ActivationHook, copies: int = 1) -> Float[Tensor, "copies*batch pos d_model"]:
        """Final states of the last batch, or of `copies` of it laid end to end, with `change` at the site."""
        if self._batch is None:
            raise RuntimeError("Replay.again needs a batch: call run first.")
        ids, mask = self._batch
        mask = None if mask is None else mask.repeat(copies, 1)
        with self._replaying(copies), self.model.hooks({self.site: change}):
            return self.model.final(ids.repeat(copies, 1), mask)

    def _gives(self, final: Tensor) -> bool:
        """Whether a run without the skipped blocks ends in the same final states."""
        try:
            return torch.equal(self.again(lambda act: None), final)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
            return False  # a model that looks at more of its blocks than what they return

    @contextmanager
    def _recording(self) -> Iterator[None]:
        if not self._skipped:
            yield
            return
        thread = threading.get_ident()

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                self._given = _copied(output)

        # Before all other hooks: those act on what the block gives in every replay too.
        handle = self._skipped[-1].register_forward_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _replaying(self, copies: int) -> Iterator[None]:
        """The skipped blocks give what the last of them gave, so many times, to this thread."""
        thread = threading.get_ident()
        rows = 0 if self._batch is None else len(self._batch[0])

        def instead(forward: Any) -> Any:
            def given(*args: Any, **kwargs: Any) -> Any:
                mine = threading.get_ident() == thread
                return _copied(self._given, copies, rows) if mine else forward(*args, **kwargs)

            return given

        own = [vars(block).get("forward") for block in self._skipped]
        try:
            for block in self._skipped:
                block.forward = instead(block.forward)
            yield
        finally:
            for block, forward in zip(self._skipped, own):
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward


def _blocks_before(model: HookedModel, name: str) -> list[nn.Module]:
    """The blocks whose outputs a change at the site cannot touch but the last of which leads to it."""
    site = model.site(name)
    if site.layer is None:
        return []
    path = ""
    for part in site.path.split("."):
        parent = model.model.get_submodule(path)
        path = f"{path}.{part}".lstrip(".")
        if isinstance(parent, nn.ModuleList) and part == str(site.layer):
            leaves = path == site.path and site.side == "out"
            return list(parent)[: site.layer + leaves]
    return []


def _copied(output: Any, copies: int = 1, rows: int = 0) -> Any:
    """A block's output with tensors of its own, which the rest of the model may overwrite; what has `rows` rows, so many times."""
    if isinstance(output, Tensor):
        batched = copies > 1 and output.shape[:1] == (rows,)  # a bias of positions is of all rows alike
        return output.repeat(copies, *[1] * (output.dim() - 1)) if batched else output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_copied(item, copies, rows) for item in output)
    return output
