"""Weights of a model by part, and models that for a while have others.

    parts(model)                                     # {"embeddings": (…), 0: (…), …, 3: (…), "final_norm": (…), "head": (…)}
    with weights_set(model, {"model.norm.weight": other}):           # afterwards the model has its own, bit for bit
        …
    with preserved(model, objective):                # train inside: weights and head come back
        finetune(model, objective)

What is put in stands on copies: whatever is done to it inside, neither the model nor the giver notices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import InputError
from steerkit.finetuning import layers
from steerkit.models import HookedModel
from steerkit.objectives import Objective
from steerkit.sites import evaluating, uncompiled

EMBEDDINGS, FINAL_NORM, HEAD = "embeddings", "final_norm", "head"
Part = int | str
"""A block by its index, or `embeddings`, `final_norm`, `head`."""
Weights = Mapping[str, Tensor]
"""Parameters by their names in `model.model`."""


def parts(model: HookedModel) -> dict[Part, tuple[str, ...]]:
    """Names of the parameters of each part, in the order of a forward pass; parts without any are left out.

    `embeddings` is what stands before the first block, `final_norm` what the trunk has after it (BERT's pooler too), `head`
    what is outside of the trunk. A head that is tied to the embeddings is part of those.
    Raises InputError for a model whose second stack is deeper than its first.
    """
    deepest = max(site.layer or 0 for site in model.sites.values())
    if deepest >= model.n_layers:
        raise InputError(
            f"{model.name} has a second stack of {deepest + 1} blocks beside its first of {model.n_layers}: "
            "blocks of both are paired by index, which needs stacks of one depth."
        )
    blocks: dict[Part, Sequence[str]] = {i: tuple(layers(i)(model)) for i in range(model.n_layers)}
    inside = {name for names in blocks.values() for name in names}
    outside, early = _outside_trunk(model), _acting_first(model, inside)
    found: dict[str, list[str]] = {EMBEDDINGS: [], FINAL_NORM: [], HEAD: []}
    for name, parameter in model.model.named_parameters():
        if name not in inside:
            part = HEAD if name in outside else EMBEDDINGS if id(parameter) in early else FINAL_NORM
            found[part].append(name)
    ordered: dict[Part, Sequence[str]] = {
        EMBEDDINGS: found[EMBEDDINGS],
        **blocks,
        FINAL_NORM: found[FINAL_NORM],
        HEAD: found[HEAD],
    }
    return {part: tuple(names) for part, names in ordered.items() if names}


@torch.no_grad()
def _acting_first(model: HookedModel, inside: set[str]) -> set[int]:
    """Parameters (their ids) of modules that run before the blocks, whose own are `inside`.

    The order of registration does not tell: OPT's final norm comes before its blocks there.
    """
    blocks = {id(p) for name, p in model.model.named_parameters() if name in inside}
    early: set[int] = set()
    reached: list[bool] = []

    def note(module: nn.Module, args: Any) -> None:
        own = {id(p) for p in module.parameters(recurse=False)}
        if own & blocks:
            reached.append(True)
        if not reached:
            early.update(own)

    handles = [module.register_forward_pre_hook(note) for module in model.model.modules()]
    try:
        with evaluating(model.model), uncompiled(model.model.modules()):
            model.final(torch.tensor([[model.pad_id]]))
    finally:
        for handle in handles:
            handle.remove()
    return early


def _outside_trunk(model: HookedModel) -> set[str]:
    """Parameters of what is computed from final states."""
    trunk = {id(p) for p in model.trunk.parameters()}
    inner: Any = model.model
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    head: set[int] = set()
    if output is not None:
        tied = {id(p) for p in inner.get_input_embeddings().parameters()}
        head = {id(p) for p in output.parameters()} - tied
    return {
        name
        for name, p in model.model.named_parameters()
        if id(p) not in trunk or id(p) in head or name.startswith("unembed.")  # TransformerLens: all is trunk
    }


def names_of(model: HookedModel, chosen: Iterable[Part]) -> list[str]:
    """Parameters of some parts. Raises InputError for a part that the model does not have."""
    own = parts(model)
    found: list[str] = []
    for part in chosen:
        if part not in own:
            raise InputError(f"{model.name} has no part {part!r}; it has {', '.join(map(str, own))}.")
        found += own[part]
    return found


def weights_of(source: HookedModel | Weights) -> dict[str, Tensor]:
    """A model's parameters by name, tied ones under all of their names; weights that are given stay as they are. No copies."""
    if not isinstance(source, HookedModel):
        return dict(source)
    return {name: p.detach() for name, p in source.model.named_parameters(remove_duplicate=False)}


def matched(model: HookedModel, other: HookedModel | Weights, names: Iterable[str]) -> dict[str, Tensor]:
    """The other model's weights of those names, on the device of the model's own.

    Raises InputError where the other has no such weight, or one of another shape or dtype, and for weights that are packed or
    offloaded.
    """
    given, found = weights_of(other), {}
    own = dict(model.model.named_parameters())
    wanted = list(names)
    if not any(name in given for name in wanted):
        raise InputError(
            f"Nothing of {model.name} ({wanted[0] if wanted else 'no weights'}, …) is in the other model: "
            "both must be of one architecture."
        )
    for name in wanted:
        weight = own[name]
        if name not in given:
            raise InputError(
                f"{model.name} has {name}, the other model has not: both must be of one architecture."
            )
        if given[name].shape != weight.shape or given[name].dtype != weight.dtype:
            raise InputError(
                f"{name} is {weight.dtype} {tuple(weight.shape)} in {model.name} and {given[name].dtype} "
                f"{tuple(given[name].shape)} in the other model: give two of one architecture and dtype."
            )
        if weight.is_meta or given[name].is_meta or not weight.is_floating_point():
            raise InputError(f"{name} is packed or offloaded: load the model in float32 or bfloat16.")
        found[name] = given[name].to(weight.device)
    return found


@contextmanager
def weights_set(model: HookedModel, weights: Weights) -> Iterator[None]:
    """Inside, the parameters of these names have copies of these values; afterwards their own, bit for bit.

    An adapter is compared with its base through its effective weights, set in the base. Raises InputError for names that the
    model has not, and for other shapes or dtypes.
    """
    own = dict(model.model.named_parameters())
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise InputError(f"{model.name} has no parameter {unknown[0]!r}.")
    if not weights:
        yield
        return
    new = matched(model, weights, weights)
    before = {name: own[name].data for name in new}
    try:
        for name, value in new.items():
            own[name].data = value.detach().clone()
        yield
    finally:
        for name, value in before.items():
            own[name].data = value


@contextmanager
def preserved(model: HookedModel, objective: Objective[Any] | None = None) -> Iterator[None]:
    """Inside, the model stands on copies of its weights and buffers; afterwards it has its own, and the objective its head."""
    tensors = [*model.model.parameters(), *model.model.buffers()]
    before = [tensor.data for tensor in tensors]
    head = None if objective is None else objective.head
    try:
        for tensor in tensors:
            tensor.data = tensor.data.clone()
        yield
    finally:
        for tensor, value in zip(tensors, before):
            tensor.data = value
        if objective is not None and head is not None:
            objective.head = head


@torch.no_grad()
def relative_change(tuned: HookedModel, base: HookedModel | Weights) -> dict[Part, float]:
    """‖tuned - base‖ / ‖base‖ of each part's weights together, in the Frobenius norm."""
    own, found = weights_of(tuned), {}
    for part, names in parts(tuned).items():
        other = matched(tuned, base, names)
        moved = sum(float((own[name].double() - other[name].double()).square().sum()) for name in names)
        size = sum(float(other[name].double().square().sum()) for name in names)
        found[part] = (moved / size) ** 0.5 if size else float("inf") if moved else 0.0
    return found
