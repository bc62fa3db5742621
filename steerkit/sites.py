"""Hook sites: TransformerLens's names found in any Hugging Face model by its structure, and checked.

    blocks.i.hook_resid_pre     what enters block i                             (batch, pos, d_model)
    blocks.i.hook_attn_out      what attention adds to the residual stream, after a post-norm if there is one
    blocks.i.hook_resid_mid     what enters the MLP's half of the block
    blocks.i.hook_mlp_out       what the MLP adds to the residual stream, after a post-norm if there is one
    blocks.i.hook_resid_post    what leaves block i
    blocks.i.attn.hook_z        the heads' outputs, flat: the input of attention's output projection
    blocks.i.mlp.hook_post      the neurons: the input of the MLP's output projection
    hook_embed, ln_final        token embeddings (no positions yet); the stream after the final norm

No family is known by name. A short probe runs with every module recorded, and the sites are the tensors that
obey the algebra of a transformer block, bit for bit in the model's own arithmetic:

    sequential (GPT-2, Llama, Gemma)    mid = pre + attn_out,        post = mid + mlp_out
    parallel (NeoX, Phi)                post = pre + attn_out + mlp_out            (there is no mid)
    post-norm (BERT)                    mid = LN(pre + attn_out),    post = LN(mid + mlp_out)
    cross-attention (T5's decoder)      mid = pre + attn_out,        mid_cross = mid + cross_attn_out,
                                        post = mid_cross + mlp_out

    output_projection(hook_z) and down_projection(hook_post) give attn_out and mlp_out, or what a post-norm
    turns into them.

A second probe writes noise at every site and checks that the model computes on with what was written. What
fails is listed with `verified=False` and a reason, and is refused when asked for.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.errors import InputError

ActivationHook = Callable[[Float[Tensor, "batch pos width"]], "Float[Tensor, 'batch pos width'] | None"]
"""What is called at a site: gets the activation, returns its replacement or None."""

ALIASES = {
    "ln_final.hook_normalized": "ln_final",
    "embed.hook_out": "hook_embed",
    "hook_in": "hook_resid_pre",
}
"""Other names that TransformerLens uses for the same tensors."""

BLOCK_SITES = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The sites of every block, in the order in which a forward pass meets them."""

CROSS_SITES = ("cross_attn.hook_z", "hook_cross_attn_out", "hook_resid_mid_cross")
"""What a decoder block with cross-attention has besides."""


@dataclass(frozen=True)
class Site:
    """A place in the model where activations are read and written; always (batch, pos, width)."""

    name: str
    path: str
    """The module that carries it, as in `model.get_submodule(path)`."""
    width: int
    layer: int | None = None
    verified: bool = True
    reason: str = ""
    """Why the site is refused; empty when it is verified."""
    side: str = "out"
    """'in': the module's first tensor argument; 'out': its output, or the first tensor of a tuple."""
    shared: bool = False
    """Skip connection and branch read this one tensor: written in place, so that both see the change."""
    rows: str = ""
    """The module sees (batch * pos, width); the input of this module (a block) tells batch and pos."""
    volatile: bool = False
    """The model overwrites the tensor later in its forward pass: what is kept is a copy."""


@dataclass
class Call:
    """One call of one module during the probe; tensors are copies on the CPU, shaped (batch, pos, width)."""

    path: str
    start: int
    end: int = -1
    x: Tensor | None = None
    y: Tensor | None = None
    x_flat: bool = False
    y_flat: bool = False
    x_volatile: bool = False
    y_volatile: bool = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module's own training flag put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def uncompiled(modules: Iterable[Any]) -> Iterator[None]:
    """If one of the modules is compiled: no compiled code in here, because it does not see new hooks."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


@contextmanager
def leaving_no_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the forward hooks that `output_hidden_states` makes transformers install for good."""
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    marks = {module for module in model.modules() if "_output_capturing_hooks_installed" in vars(module)}
    try:
        yield
    finally:
        for module in model.modules():
            for key in set(module._forward_hooks) - hooks.get(module, set()):
                del module._forward_hooks[key]
            if "_output_capturing_hooks_installed" in vars(module) and module not in marks:
                del module._output_capturing_hooks_installed


def first_tensor(args: tuple, kwargs: dict) -> tuple[int | str | None, Tensor | None]:
    """Where a module's input stands in its arguments (a position or a keyword), and the input."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return i, value
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states", kwargs["hidden_states"]
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return key, value
    return None, None


def output_tensor(output: Any) -> Tensor | None:
    """A module's output, or the first element of a tuple, list or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) or hasattr(output, "to_tuple"):
        first = output[0] if len(output) else None
        return first if isinstance(first, Tensor) else None
    return None


def trace(model: nn.Module, shape: tuple[int, int], forward: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Run `forward` and record every module's calls, as far as they take or give (batch, pos, width)."""
    calls: list[Call] = []
    open_calls: dict[nn.Module, list[Call]] = {}
    watched: list[tuple[Call, str, Tensor, int]] = []
    clock = iter(range(10**9))

    def record(call: Call, side: str, tensor: Tensor | None) -> None:
        if tensor is None or not tensor.is_floating_point() or tensor.is_meta:
            return
        watched.append((call, side, tensor, tensor._version))
        value = tensor.detach().to("cpu", copy=True)
        if value.dim() == 2 and value.shape[0] == shape[0] * shape[1]:
            value, flat = value.view(*shape, -1), True
        else:
            flat = False
        if value.dim() == 4:  # TransformerLens keeps the heads apart
            value = value.flatten(2)
        if value.dim() == 3 and value.shape[:2] == shape:
            setattr(call, side, value)
            setattr(call, f"{side}_flat", flat)

    def before(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = Call(path, next(clock))
            record(call, "x", first_tensor(args, kwargs)[1])
            open_calls.setdefault(module, []).append(call)

        return hook

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        call = open_calls[module].pop()
        call.end = next(clock)
        record(call, "y", output_tensor(output))
        calls.append(call)

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        output = forward()
    finally:
        for handle in handles:
            handle.remove()
    for call, side, tensor, version in watched:
        setattr(call, f"{side}_volatile", tensor._version != version)
    return calls, output


@dataclass
class Stack:
    """The blocks of one stack, each with its call during the probe."""

    prefix: str
    """'' for a model with one stack, 'encoder.' or 'decoder.' for one with two."""
    blocks: list[Call]


def find_stacks(model: nn.Module, calls: Sequence[Call]) -> list[Stack]:
    """The module list whose members hand the hidden state on to each other; or encoder's and decoder's."""
    once = called_once(calls)
    chains: dict[str, list[Call]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(block.path + ".") for chain in chains.values() for block in chain):
            continue
        inner = (
            "._orig_mod" if hasattr(child, "_orig_mod") else "" for child in module
        )  # torch.compile's wrapper
        paths = [f"{path}.{name}{more}" for name, more in zip(module._modules, inner)]
        blocks = [once[p] for p in paths if p in once]
        shaped = len(blocks) == len(module) and all(
            b.x is not None and b.y is not None and b.x.shape == b.y.shape for b in blocks
        )
        if shaped and all(torch.equal(a.y, b.x) for a, b in itertools.pairwise(blocks)):  # type: ignore[arg-type]
            chains[path] = blocks
    found = sorted(chains.values(), key=len, reverse=True)
    names = {
        path.split(".")[0]
        for chain in found
        for path in re.findall(r"\b(?:encoder|decoder)\b", chain[0].path)
    }
    if len(found) >= 2 and names == {"encoder", "decoder"}:
        stacks = [
            Stack(side + ".", next(c for c in found if re.search(rf"\b{side}\b", c[0].path)))
            for side in ("encoder", "decoder")
        ]
        return stacks
    return [Stack("", found[0])] if found else []


def called_once(calls: Sequence[Call]) -> dict[str, Call]:
    """The calls of modules that run exactly once in a forward pass, by path, in order of completion."""
    by_path: dict[str, list[Call]] = {}
    for call in sorted(calls, key=lambda c: c.end):
        by_path.setdefault(call.path, []).append(call)
    return {path: group[0] for path, group in by_path.items() if len(group) == 1}


def same(lhs: Tensor | None, rhs: Tensor | None, part: Tensor | None = None) -> bool:
    """Equal, bit for bit; or to rounding in float32, if `part`, the summand at issue, stands far above it."""
    if lhs is None or rhs is None or lhs.shape != rhs.shape:
        return False
    if torch.equal(lhs, rhs):
        return part is None or bool(part.abs().max() > 0)
    if part is None or lhs.dtype not in (torch.float32, torch.float64) or lhs.dtype != rhs.dtype:
        return False
    rounding = 8 * torch.finfo(lhs.dtype).eps * float(lhs.abs().max())
    return float(part.abs().max()) > 100 * rounding and bool((lhs - rhs).abs().max() <= rounding)


def is_projection(module: nn.Module) -> bool:
    """A linear map: nn.Linear, GPT-2's Conv1D, their quantised kin, or a PEFT layer around one."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    if hasattr(module, "base_layer"):
        return isinstance(module.base_layer, nn.Module) and is_projection(module.base_layer)
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as (d_in, d_out): GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: Any) -> Float[Tensor, "d_out d_in"]:
    """The weight of a linear map, the same memory."""
    return module.weight.T if is_transposed(module) else module.weight


def takes_mask(module: nn.Module) -> bool:
    """Whether a module's forward takes an attention mask: what tells attention from the rest of a block."""
    return any("mask" in name for name in inspect.signature(type(module).forward).parameters)


@dataclass
class Found:
    """Where a site is: the call of a module and the side of it; or why it was not found."""

    call: Call | None = None
    side: str = "out"
    shared: bool = False
    reason: str = ""

    @property
    def value(self) -> Tensor | None:
        if self.call is None:
            return None
        return self.call.x if self.side == "in" else self.call.y


@dataclass
class Block:
    """The sites of one block, and what the write probe needs to know about how they add up."""

    call: Call
    sites: dict[str, Found]
    sums: list[tuple[str, str, Call | None]]
    """(stream, addend, call whose input is their sum; None if the sum is the block's output), in order."""
    parallel: bool = False
    inner: str = ""
    """Path of the block itself where an adapter is around it: what it gives is what the sums are about."""


def analyse_block(model: nn.Module, block: Call, calls: Sequence[Call]) -> Block:
    """Find a block's sites among the calls inside it, by algebra alone."""
    inside = list(called_once([c for c in calls if c.path.startswith(block.path + ".")]).values())
    attentions: list[str] = []
    for path in sorted((c.path for c in inside), key=lambda p: p.count(".")):
        if takes_mask(model.get_submodule(path)) and not any(path.startswith(a + ".") for a in attentions):
            attentions.append(path)
    start = {c.path: c.start for c in inside}
    attentions.sort(key=lambda p: start[p])
    found = Block(block, {"hook_resid_pre": Found(block, "in"), "hook_resid_post": Found(block, "out")}, [])
    if len(attentions) not in (1, 2):
        return _refuse_rest(
            found, f"no single attention module in {block.path} ({len(attentions)} take a mask)"
        )

    outs = [_last_projection(model, inside, block, [path]) for path in attentions]
    if any(out is None for out in outs):
        return _refuse_rest(found, f"no output projection in {attentions[0]}")
    down = _last_projection(model, [c for c in inside if not _under(c.path, attentions)], block, [block.path])

    parallel = len(attentions) == 1 and _add(inside, block.x, outs[0]) is None
    if parallel and (pair := _parallel(block, inside, outs[0], attentions)):
        attn, mlp = pair
        found.parallel = True
        found.sites["hook_attn_out"], found.sites["hook_mlp_out"] = Found(attn), Found(mlp)
        found.sites["hook_resid_mid"] = Found(
            reason="attention and MLP run in parallel in this model: no state lies between them"
        )
        _projections(found, inside, outs, down)
        return found

    streams = [("hook_resid_mid", "hook_attn_out"), ("hook_resid_mid_cross", "hook_cross_attn_out")]
    stream, name = block.x, "hook_resid_pre"
    for out, (mid_name, add_name) in zip(outs, streams):
        step = _add(inside, stream, out)
        if step is None:
            return _refuse_rest(found, f"no sum of {name} and an output of {block.path}'s attention is found")
        addend, use = step
        found.sites[add_name] = Found(addend)
        found.sums.append((name, add_name, use))
        nxt = outs[outs.index(out) + 1] if out is not outs[-1] else None
        options = [Found(use, "in", shared=True), Found(use, "out")]
        for option in options:
            if nxt is not None:
                good = _add(inside, option.value, nxt) is not None
            else:
                good = _mlp(block, inside, option.value, use) is not None
            if good:
                found.sites[mid_name], stream, name = option, option.value, mid_name
                break
        else:
            return _refuse_rest(found, f"the second half of {block.path} is not a sum with its first half")
    last = _mlp(block, inside, stream, found.sums[-1][2])
    assert last is not None
    mlp, norm = last
    found.sites["hook_mlp_out"] = Found(mlp)
    found.sums.append((name, "hook_mlp_out", norm))
    _projections(found, inside, outs, down)
    return found


def _refuse_rest(block: Block, reason: str) -> Block:
    for name in BLOCK_SITES:
        block.sites.setdefault(name, Found(reason=reason))
    return block


def _under(path: str, parents: Sequence[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def _last_projection(
    model: nn.Module, calls: Sequence[Call], block: Call, under: Sequence[str]
) -> Call | None:
    """The last linear map that gives the stream's width, not counting those inside another (PEFT's)."""
    found = None
    for call in calls:
        if call.x is None or call.y is None or call.y.shape != block.x.shape or not _under(call.path, under):  # type: ignore[union-attr]
            continue
        parent = call.path.rpartition(".")[0]
        parents = [
            model.get_submodule(".".join(parent.split(".")[:n])) for n in range(1, parent.count(".") + 2)
        ]
        if is_projection(model.get_submodule(call.path)) and not any(is_projection(p) for p in parents):
            found = call
    return found


def _add(inside: Sequence[Call], stream: Tensor | None, out: Call | None) -> tuple[Call, Call] | None:
    """The last output `a`, from `out` on, such that a later module's input is stream + a; and that module."""
    assert stream is not None
    assert out is not None
    late = [c for c in inside if c.end >= out.end and c.y is not None and c.y.shape == stream.shape]
    users = sorted((c for c in inside if c.x is not None and c.start > out.end), key=lambda c: c.start)
    for a in reversed(late):
        total = stream + a.y  # type: ignore[operator]
        for user in users:
            if user.start > a.end and same(user.x, total, a.y):
                return a, user
    return None


def _mlp(
    block: Call, inside: Sequence[Call], stream: Tensor | None, since: Call | None
) -> tuple[Call, Call | None] | None:
    """The last output m with post = stream + m (then None), or post = norm(stream + m) (and the norm)."""
    assert stream is not None
    assert since is not None
    late = [c for c in inside if c.end > since.start and c.y is not None and c.y.shape == stream.shape]
    for m in reversed(late):
        total = stream + m.y  # type: ignore[operator]
        if same(block.y, total, m.y):
            return m, None
        for norm in late:
            if norm.start > m.end and same(norm.x, total, m.y) and same(norm.y, block.y):
                return m, norm
    return None


def _parallel(
    block: Call, inside: Sequence[Call], out: Call | None, attentions: Sequence[str]
) -> tuple[Call, Call] | None:
    """Outputs a of the attention and m of the rest with post = pre + a + m, in whichever order."""
    assert out is not None
    x = block.x
    whole = [c for c in inside if c.y is not None and c.y.shape == x.shape]  # type: ignore[union-attr]
    from_attention = [c for c in whole if c.end >= out.end and (same(c.y, out.y) or same(c.x, out.y))]
    others = [c for c in whole if not _under(c.path, attentions) and c not in from_attention]
    for a in reversed(from_attention):
        for m in reversed(others):
            sums = ((x + a.y) + m.y, (a.y + m.y) + x, (x + m.y) + a.y)  # type: ignore[operator]
            if any(same(block.y, total, a.y) and same(block.y, total, m.y) for total in sums):
                return a, m
    return None


def _projections(
    found: Block, inside: Sequence[Call], outs: Sequence[Call | None], down: Call | None
) -> None:
    """Place hook_z and hook_post at the inputs of the projections that give what is added to the stream."""

    def leads_to(projection: Call, added: Tensor | None) -> bool:
        return same(projection.y, added) or any(same(c.x, projection.y) and same(c.y, added) for c in inside)

    for name, added_name, projection in (
        ("attn.hook_z", "hook_attn_out", outs[0]),
        ("cross_attn.hook_z", "hook_cross_attn_out", outs[1] if len(outs) == 2 else None),
        ("mlp.hook_post", "hook_mlp_out", down),
    ):
        added = found.sites.get(added_name)
        if added is None:
            continue
        if projection is not None and leads_to(projection, added.value):
            found.sites[name] = Found(projection, "in")
        else:
            found.sites[name] = Found(
                reason=f"{added_name} does not come from one linear map (a mixture of experts?)"
            )


def block_sites(stack: Stack, blocks: Sequence[Block]) -> dict[str, Site]:
    """Name the sites of a stack's blocks."""
    sites: dict[str, Site] = {}
    for i, block in enumerate(blocks):
        order = [*BLOCK_SITES[:4], *CROSS_SITES, *BLOCK_SITES[4:]]
        for kind in order:
            found = block.sites.get(kind)
            if found is None:
                continue
            name = f"{stack.prefix}blocks.{i}.{kind}"
            if found.call is None:
                sites[name] = Site(name, "", 0, i, verified=False, reason=found.reason)
                continue
            inward = found.side == "in"
            flat = found.call.x_flat if inward else found.call.y_flat
            volatile = found.call.x_volatile if inward else found.call.y_volatile
            width = found.value.shape[-1]  # type: ignore[union-attr]
            sites[name] = Site(
                name,
                found.call.path,
                width,
                i,
                side=found.side,
                shared=found.shared,
                rows=block.call.path if flat else "",
                volatile=volatile,
            )
    return sites


def raw_sites(calls: Sequence[Call], blocks: Mapping[str, int]) -> dict[str, Site]:
    """A site for the output of every module that ran, under its path; `blocks` gives the blocks' layers."""
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    sites = {}
    for call in calls:
        if not call.path:
            continue
        block = next((path for path in blocks if f"{call.path}.".startswith(path + ".")), "")
        layer = blocks.get(block)
        if call.y is None:
            reason = "its output is not (batch, pos, width)"
            site = Site(call.path, call.path, 0, layer, verified=False, reason=reason)
        else:
            rows = block if call.y_flat else ""
            site = Site(call.path, call.path, call.y.shape[-1], layer, rows=rows, volatile=call.y_volatile)
        if counts[call.path] > 1:
            site = refuse(site, f"it runs {counts[call.path]} times in a forward pass")
        sites[call.path] = site
    return sites


def refuse(site: Site, reason: str) -> Site:
    """The site, listed but not given out."""
    return replace(site, verified=False, reason=reason)


def probe_ids(
    d_vocab: int, avoid: frozenset[int], batch: int = 2, length: int = 7
) -> Int[Tensor, "batch pos"]:
    """A few different, ordinary token ids, the same ones every time."""
    stride = max(1, d_vocab // (batch * length + 1))
    usual = [i for i in range(stride // 2, d_vocab, stride) if i not in avoid] or [0]
    return torch.tensor([usual[i % len(usual)] for i in range(batch * length)]).view(batch, length)


def attach(
    model: nn.Module, site: Site, fn: ActivationHook, *, keep: bool = False, rows: tuple[int, ...] = ()
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `fn` on the site's activation in every forward; what it returns, if not None, takes its place.

    `keep` says that `fn` only keeps the tensor and is the last to see it; it is then not copied without need.
    `rows` gives (batch, pos) where no block is entered that would tell, as when backward recomputes one.
    """
    module = model.get_submodule(site.path)
    shape = list(rows)
    handles = []
    copied = site.volatile or (site.shared and not keep)

    def apply(tensor: Tensor) -> Tensor | None:
        # Heads apart (TransformerLens) or batch and positions together (OPT) become (batch, pos, width).
        act = tensor.view(*shape, tensor.shape[-1]) if site.rows else tensor.flatten(2)
        new = fn(act.clone() if copied else act)
        if new is None:
            return None
        if new.shape != act.shape:
            raise InputError(
                f"The hook at {site.name} gave {tuple(new.shape)} for activations of {tuple(act.shape)}."
            )
        new = new.to(device=tensor.device, dtype=tensor.dtype).reshape(tensor.shape)
        if not site.shared:
            return new.clone() if site.volatile else new
        tensor.copy_(new)
        return None

    def inward(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        place, tensor = first_tensor(args, kwargs)
        new = None if tensor is None else apply(tensor)
        if new is None:
            return None
        if isinstance(place, int):
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: new}

    def outward(module: nn.Module, args: tuple, output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output_tensor(output)
        new = None if tensor is None else apply(tensor)
        if new is None:
            return None
        if isinstance(output, Tensor):
            return new
        if isinstance(output, (tuple, list)):
            return type(output)([new, *output[1:]])
        changed = copy.copy(output)
        changed[next(iter(changed.keys()))] = new
        return changed

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shape[:] = first_tensor(args, kwargs)[1].shape[:2]  # type: ignore[union-attr]

    if site.rows:
        handles.append(model.get_submodule(site.rows).register_forward_pre_hook(enter, with_kwargs=True))
    if site.side == "in":
        handles.append(module.register_forward_pre_hook(inward, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(outward))
    return handles


def failed_writes(
    model: nn.Module,
    blocks: Sequence[Block],
    sites: Mapping[str, Site],
    prefix: str,
    forward: Callable[[], Any],
) -> dict[str, str]:
    """Write noise at every site in one forward, and name the sites whose writes do not go through."""
    generator = torch.Generator().manual_seed(0)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    inputs: dict[tuple[str, str], Tensor] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def noisy(name: str) -> ActivationHook:
        def fn(act: Tensor) -> Tensor:
            noise = torch.randn(act.shape, generator=generator).to(act.device, act.dtype)
            before[name] = act.cpu().clone()
            new = act + noise * act.std()
            after[name] = new.cpu().clone()
            return new

        return fn

    def noting(name: str) -> ActivationHook:
        def fn(act: Tensor) -> None:
            before[name] = act.cpu().clone()

        return fn

    def watch(what: str, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[what, name] = first_tensor(args, kwargs)[1].cpu().clone()  # type: ignore[union-attr]

        return hook

    names = [
        [f"{prefix}blocks.{i}.{kind}" for kind in block.sites if sites[f"{prefix}blocks.{i}.{kind}"].verified]
        for i, block in enumerate(blocks)
    ]
    try:
        for block in blocks:
            for path in {use.path for *_, use in block.sums if use is not None}:
                hook = watch("sum", path)
                handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        for i, block in enumerate(blocks):
            post = sites[f"{prefix}blocks.{i}.hook_resid_post"]
            if post.path:  # a block's own output is a witness even where it is refused as a site
                witness = replace(post, path=block.inner or post.path)
                handles.extend(attach(model, witness, noting(f"{prefix}blocks.{i}.own")))
        for name in (name for group in names for name in group):
            handles.extend(attach(model, sites[name], noisy(name)))
            if sites[name].side == "in":  # registered later, so it sees what the hook wrote
                handles.append(
                    model.get_submodule(sites[name].path).register_forward_pre_hook(
                        watch("written", name), with_kwargs=True
                    )
                )
        forward()
    finally:
        for handle in handles:
            handle.remove()

    bad: dict[str, str] = {}
    for i, block in enumerate(blocks):
        at = f"{prefix}blocks.{i}."
        for name in names[i]:
            seen = inputs.get(("written", name))
            if seen is not None and not same(seen.reshape(after[name].shape), after[name]):
                bad[name] = "the module does not compute on with what is written here"
        for stream, addend, use in block.sums:
            if not {at + stream, at + addend} <= set(after):
                continue
            total = after[at + stream] + after[at + addend]
            seen = before.get(at + "own") if use is None else inputs["sum", use.path].reshape(total.shape)
            if not same(seen, total, after[at + addend]):
                bad[at + stream] = bad[at + addend] = (
                    "what is written here does not reach the residual stream"
                )
        if block.parallel:
            x, a, m = (after[at + k] for k in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
            if not any(same(before.get(at + "own"), t, a) for t in ((x + a) + m, (a + m) + x, (x + m) + a)):
                for kind in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"):
                    bad[at + kind] = "what is written here does not reach the residual stream"
        following = f"{prefix}blocks.{i + 1}.hook_resid_pre"
        if following in before and not same(before[following], after[at + "hook_resid_post"]):
            bad[at + "hook_resid_post"] = "the next block does not read what is written here"
    return bad


def value_chain(
    calls: Sequence[Call], value: Tensor | None, done: Callable[[Tensor], bool], since: int, depth: int = 6
) -> list[Call] | None:
    """The outermost modules that, one after the other, turn `value` into a tensor that is `done`."""
    if value is None or depth == 0:
        return None
    takers = sorted((c for c in calls if c.start > since and same(c.x, value)), key=lambda c: c.start)
    for call in takers:
        if call.y is None or same(call.y, call.x):
            continue
        if done(call.y):
            return [call]
        rest = value_chain(calls, call.y, done, call.end, depth - 1)
        if rest is not None:
            return [call, *rest]
    return None
