"""A model and a fine-tuned copy of it, read on the same tokens.

    pair = ModelPair(base, tuned)
    stream = ActivationStream(pair, documents, both("blocks.2.hook_resid_post"))      # sites base:blocks.2… and tuned:blocks.2…

Wherever activations are read, a pair is a model whose sites are those of either, with `base:` or `tuned:` before the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.errors import InputError, SiteError
from steerkit.models import HookedModel
from steerkit.sites import Site

BASE, TUNED = "base", "tuned"


def both(site: str) -> tuple[str, str]:
    """A site's names in either model of a pair."""
    return f"{BASE}:{site}", f"{TUNED}:{site}"


class ModelPair:
    """Two models with one vocabulary; the base model's tokenizer and special tokens are used for both."""

    def __init__(self, base: HookedModel, tuned: HookedModel) -> None:
        if base.d_vocab != tuned.d_vocab or base.is_causal != tuned.is_causal:
            raise InputError(
                f"{base.name} and {tuned.name} do not read the same tokens: a pair is a model and a tuned copy of it."
            )
        self.base, self.tuned = base, tuned
        self.name, self.revision = base.name, base.revision
        self.tokenizer, self.special_ids = base.tokenizer, base.special_ids
        self.context = min(base.context, tuned.context)
        self.d_vocab, self.is_causal = base.d_vocab, base.is_causal
        self.bos_id, self.pad_id = base.bos_id, base.pad_id

    @classmethod
    def of(cls, base: HookedModel, tuned: Any) -> ModelPair:
        """The pair of a model and a tuned copy of it: a name, a directory or a loaded model."""
        if not isinstance(tuned, HookedModel):
            tuned = HookedModel.from_pretrained(
                tuned, tokenizer=base.tokenizer, device=base.device, dtype=base.dtype
            )
        return cls(base, tuned)

    def __repr__(self) -> str:
        return f"ModelPair({self.base!r}, {self.tuned!r})"

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def at(self, site: str) -> tuple[HookedModel, str]:
        """The model that a site belongs to, and its name there."""
        which, colon, name = site.partition(":")
        models = {BASE: self.base, TUNED: self.tuned}
        if not colon or which not in models:
            raise SiteError(f"Site {site!r} of a pair of models needs {BASE}: or {TUNED}: before its name.")
        return models[which], name

    def site(self, name: str) -> Site:
        """The site of that name. SiteError says why there is none."""
        model, own = self.at(name)
        return model.site(own)

    def run(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        sites: Sequence[str],
        stop: bool = True,
    ) -> dict[str, Float[Tensor, "batch pos width"]]:
        """The activations at `sites`, on the base model's device."""
        found: dict[str, Tensor] = {}
        for model in (self.base, self.tuned):
            own = {name: self.at(name)[1] for name in sites if self.at(name)[0] is model}
            if own:
                acts = model.run(input_ids, attention_mask, sites=list(own.values()), stop=stop)
                found |= {name: acts[site].to(self.device) for name, site in own.items()}
        return {name: found[name] for name in sites}


def at(model: Any, site: str) -> tuple[HookedModel, str]:
    """The model that a site belongs to, and its name there, for a model or a pair."""
    return model.at(site) if isinstance(model, ModelPair) else (model, site)
