"""The blocks below the first steered site, run once instead of at every step: what is trained does not reach them.

    below = Below.of(model, examples, sites)            # None where it cannot be done: then every forward is a whole one
    with standing_in(below, batch), model.steer(vector): …

While it stands in, those blocks hand on what they are given, and the activations that were kept take its place after the last of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.finetune import Example, padded
from steerkit.models import HookedModel

MEMORY = 1 << 30
"""Bytes that may be kept."""
_BATCH = 16
_POST = "hook_resid_post"


@dataclass(frozen=True)
class Below:
    """Activations after a block, of every example."""

    model: HookedModel
    site: str
    blocks: tuple[nn.Module, ...]
    tuples: bool
    """Whether blocks give a tuple."""
    kept: dict[tuple[int, ...], Float[Tensor, "pos width"]]

    @classmethod
    def of(
        cls, model: HookedModel, examples: Sequence[Example], sites: Sequence[str], memory: int = MEMORY
    ) -> Below | None:
        """None where nothing lies below, it would take more than `memory` bytes, or blocks cannot be left out on this model."""
        layer = _last_untouched(model, sites)
        if layer is None or not model.is_causal:
            return None
        names = [f"blocks.{i}.{_POST}" for i in range(layer + 1)]
        if not all(
            n in model.sites and model.sites[n].verified and model.sites[n].side == "out" for n in names
        ):
            return None
        own = {e.ids: e for e in examples}
        size = sum(map(len, own)) * model.d_model * torch.finfo(model.dtype).bits // 8
        blocks = tuple(model.model.get_submodule(model.sites[n].path) for n in names)
        if size > memory or len(set(blocks)) < len(blocks) or any("forward" in vars(b) for b in blocks):
            return None
        kinds: list[Any] = []
        handles = [b.register_forward_hook(lambda m, a, out: kinds.append(out)) for b in blocks]
        site = names[-1]
        kept: dict[tuple[int, ...], Tensor] = {}
        try:
            ordered = sorted(own.values(), key=len)
            for first in range(0, len(ordered), _BATCH):
                batch = ordered[first : first + _BATCH]
                with torch.no_grad():
                    acts = model.run(*padded(model, batch), sites=[site])[site]
                kept |= {e.ids: act[: len(e)].clone() for e, act in zip(batch, acts)}
                for handle in handles:
                    handle.remove()
        finally:
            for handle in handles:
                handle.remove()
        if not all(isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == 1) for out in kinds):
            return None
        found = cls(model, site, blocks, isinstance(kinds[0], tuple), kept) if kinds else None
        return found if found is not None and found._is_exact(ordered[:2]) else None

    def _is_exact(self, batch: Sequence[Example]) -> bool:
        """Whether the logits are those of whole forwards."""
        ids, mask = padded(self.model, batch)
        with torch.no_grad():
            whole = self.model.logits(ids, mask)
            try:
                with standing_in(self, batch):
                    part = self.model.logits(ids, mask)
            except (RuntimeError, TypeError, AttributeError):
                return False
        return torch.allclose(whole[mask.bool()], part[mask.bool()], rtol=1e-4, atol=1e-4)


@contextmanager
def standing_in(below: Below | None, batch: Sequence[Example]) -> Iterator[None]:
    """Inside, forwards of just this batch begin after the blocks below; of any, if there is no `below`."""
    if below is None:
        yield
        return
    longest = max(map(len, batch))
    first = below.kept[batch[0].ids]
    whole = first.new_zeros(len(batch), longest, first.shape[1])
    for row, example in zip(whole, batch):
        row[: len(example)] = below.kept[example.ids]

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if below.tuples else hidden

    with ExitStack() as stack:
        for block in below.blocks:
            block.forward = hand_on
            stack.callback(vars(block).pop, "forward")
        stack.enter_context(below.model.hooks({below.site: lambda h: whole}))
        yield


def _last_untouched(model: HookedModel, sites: Sequence[str]) -> int | None:
    """The last block after which nothing has been steered yet, but perhaps at its very end."""
    layers = [model.site(name).layer for name in sites]
    if not layers or any(layer is None for layer in layers):
        return None
    first = min(layer for layer in layers if layer is not None)
    ends = all(name.endswith(_POST) for name, layer in zip(sites, layers) if layer == first)
    last = first if ends else first - 1
    return last if last >= 0 else None
