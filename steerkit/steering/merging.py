"""Merging a steering vector into a model's weights: a plain Hugging Face checkpoint that needs no hooks.

    merge(model, vector, strength=4.0, out="happy-model", bos=True)

    h + s v            at every token: a bias of the linear map that writes there
    h - Qᵀ Q h         after every writer of the residual stream: W becomes (I - Qᵀ Q) W of each (directional ablation)
    W + s B A          the weight itself, also where the delta is that of a rotation at s (AntiPaSTO)

A bias that the model has not is added where its configuration has a flag for it (Llama's mlp_bias, Qwen3's attention_bias), tied
embeddings are untied where only one of them changes. What is not exactly the same is refused: each place is tried out with random
activations first, and the checkpoint is read back and compared with the steered model before it appears.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import InputError, SiteError, SteerkitError
from steerkit.loading import quiet
from steerkit.models import HookedModel
from steerkit.runs import atomic_path, write_json
from steerkit.sites import is_transposed, probe_ids
from steerkit.steering.edits import Add, Project, WeightDelta, as_delta
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

RECORD = "steering.json"
"""What was merged, and where it came from; Hugging Face does not read it."""


@dataclass(frozen=True)
class Merged:
    """What was done."""

    path: Path
    changed: tuple[str, ...]
    """Names of the parameters that are not the model's."""
    config: Mapping[str, Any]
    """Settings of the configuration that are not the model's."""
    difference: float
    """The greatest difference between logits of the checkpoint and of the steered model, on a few random tokens."""
    notes: tuple[str, ...] = ()


@dataclass
class _Plan:
    """The new weights, and the configuration that has a place for them."""

    model: HookedModel
    config: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def plain(self) -> Any:
        return self.model.model

    def parameter(self, name: str) -> Tensor:
        """A parameter as it is by now, in float32 on the CPU."""
        found = self.tensors.get(name)
        return self.plain.get_parameter(name).detach().float().cpu() if found is None else found

    def set(self, name: str, value: str | bool) -> None:
        setattr(self.config, name, value)
        self.settings[name] = value


def merge(
    model: HookedModel,
    vector: SteeringVector,
    strength: float = 1.0,
    out: str | Path = "merged",
    *,
    bos: bool = False,
    other_model: bool = False,
    force: bool = False,
) -> Merged:
    """Write the directory `out`: `model` as `vector` steers it, in the model's own layout, with its tokenizer.

    Weights act on every token. A vector that leaves BOS alone – the default – is merged with `bos` only, and then steers BOS too.
    `force` replaces a directory that holds a model. Raises InputError or SiteError where weights cannot do the same, and says why;
    SteerkitError, and writes nothing, when what was written computes something else.
    """
    out = Path(out)
    _require_free(out, force)
    if not math.isfinite(strength):
        raise InputError(f"strength is {strength}; it must be finite.")
    vector.require_fit(model, other_model=other_model)
    _require_plain(model)
    steered = _at_every_token(vector, bos) * strength
    edits = [as_delta(edit) for edit in steered.edits]
    plan = _Plan(model, copy.deepcopy(model.model.config))
    if not vector.where.bos:
        plan.notes.append("BOS is steered too, which the vector leaves alone.")
    kinds = {type(edit) for edit in edits}
    for edit in edits:
        if not isinstance(edit, (Add, Project, WeightDelta)):
            raise InputError(
                f"The {edit.name} edit at {edit.site} is none of weights: additions, projections and weight deltas are."
            )
    if {Add, Project} <= kinds:
        raise InputError("Additions and projections in one vector depend on their order: merge one alone.")
    with torch.no_grad():
        _merge_deltas(plan, [edit for edit in edits if isinstance(edit, WeightDelta)])
        if Add in kinds:
            _merge_additions(plan, SteeringVector(tuple(e for e in edits if isinstance(e, Add))))
        if Project in kinds:
            _merge_projections(plan, [edit for edit in edits if isinstance(edit, Project)])
        with atomic_path(out) as temporary:
            difference = _write(plan, steered, temporary)
            merged = Merged(out, tuple(sorted(plan.tensors)), plan.settings, difference, tuple(plan.notes))
            write_json(temporary / RECORD, _record(model, vector, strength, merged))
    return merged


def _record(model: HookedModel, vector: SteeringVector, strength: float, merged: Merged) -> dict[str, Any]:
    """Where the checkpoint came from."""
    edits = [{"kind": edit.name, "site": edit.site, "scale": edit.scale} for edit in vector.edits]
    came_from = {"model": model.name, "revision": model.revision, "strength": strength, "edits": edits}
    done = {"changed": merged.changed, "config": merged.config, "notes": merged.notes}
    return {**came_from, "vector": vector.provenance, **done, "difference": merged.difference}


def _require_free(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise InputError(f"{out} holds something else than a model: give --out another directory.")
    if not force:
        raise InputError(
            f"{out} is not empty: give --out another directory, or --force to replace the model."
        )


def _require_plain(model: HookedModel) -> None:
    plain: Any = model.model
    if hasattr(plain, "peft_config"):
        raise InputError(
            f"{model.name} has an adapter on it: merge that first (peft's merge_and_unload), then the vector."
        )
    if not (hasattr(plain, "save_pretrained") and hasattr(plain, "config")):
        raise InputError(
            f"{model.name} is a {type(plain).__name__}: only Hugging Face models can be merged into."
        )
    if any(parameter.is_meta for parameter in plain.parameters()):
        raise InputError(f"Some of {model.name} is offloaded: load it without device_map to merge into it.")
    if getattr(plain.config, "quantization_config", None) is not None:
        raise InputError(f"{model.name} is quantised: merge into the model that it was made from.")


def _at_every_token(vector: SteeringVector, bos: bool) -> SteeringVector:
    if vector.condition is not None:
        raise InputError("The vector steers under a condition only, and weights act always.")
    if vector.where not in (Where(), Where.every_token()):
        raise InputError(
            "The vector is for some tokens or steps only, and weights act on all of them: "
            "set its `where` to Where(bos=True) if that is meant."
        )
    if not (vector.where.bos or bos):
        raise InputError(
            "The vector leaves BOS alone, which weights cannot: give bos=True (--merge-bos) to steer BOS as well."
        )
    return SteeringVector(vector.edits, vector.provenance, Where.every_token())


# weights


def _merge_deltas(plan: _Plan, deltas: Sequence[WeightDelta]) -> None:
    for edit in deltas:
        name = f"{edit.site}.weight"
        module = plan.plain.get_submodule(edit.site)
        change = edit.scale * edit.B.detach().float().cpu() @ edit.A.detach().float().cpu()
        change = change.T if is_transposed(module) else change
        weight = plan.parameter(name)
        if weight.shape != change.shape:
            raise InputError(
                f"The weight of {edit.site} is {tuple(weight.shape)}, the delta {tuple(change.shape)}."
            )
        _untie_if(plan, module)
        plan.tensors[name] = weight + change


def _untie_if(plan: _Plan, module: nn.Module) -> None:
    """Give embedding and unembedding weights of their own where one of them changes."""
    inputs, outputs = plan.plain.get_input_embeddings(), plan.plain.get_output_embeddings()
    if outputs is None or inputs.weight is not outputs.weight or module not in (inputs, outputs):
        return
    if "tie_word_embeddings" not in plan.settings:
        plan.set("tie_word_embeddings", False)
        plan.notes.append("Embedding and unembedding were tied and are two matrices now.")


# additions


def _merge_additions(plan: _Plan, vector: SteeringVector) -> None:
    for site, added in vector.directions.items():
        path, inward = _writer(plan.model, site)
        module = plan.plain.get_submodule(path)
        change = added.detach().float().cpu()
        if inward:
            weight = plan.parameter(f"{path}.weight")
            change = change @ (weight if is_transposed(module) else weight.T)
        else:
            _require_same(plan.model, site, path)
        if isinstance(module, nn.Embedding):
            _untie_if(plan, module)
            name = f"{path}.weight"
        else:
            name = _bias(plan, path, site)
        plan.tensors[name] = plan.parameter(name) + change


def _writer(model: HookedModel, name: str) -> tuple[str, bool]:
    """The path of the linear map or embedding whose output is what an addition at a site adds to; whether it is added at its input.

    Raises SiteError where there is none.
    """
    site = model.site(name)
    found = re.fullmatch(r"((?:\w+\.)?blocks\.)(\d+)\.([\w.]+)", site.name)
    if found is None:
        if site.name.endswith("hook_embed"):
            return site.path, False
        raise SiteError(f"No weight alone writes to {name}: merge additions at sites of blocks.")
    stack, block, kind = found[1], int(found[2]), found[3]
    if kind == "hook_resid_pre" and block:
        return _writer(model, f"{stack}{block - 1}.hook_resid_post")
    if kind == "hook_resid_pre":
        return model.site(f"{stack.removesuffix('blocks.')}hook_embed").path, False
    half = "mlp.hook_post" if kind in ("hook_resid_post", "hook_mlp_out", "mlp.hook_post") else "attn.hook_z"
    if kind.startswith(("cross_attn", "hook_cross")) or kind == "hook_resid_mid_cross":
        half = "cross_attn.hook_z"
    return model.site(f"{stack}{block}.{half}").path, kind == half


def _bias(plan: _Plan, path: str, site: str) -> str:
    """The name of a module's bias; made, where the configuration has a flag for it, with the zeros that come with it."""
    name = f"{path}.bias"
    if name in plan.tensors or getattr(plan.plain.get_submodule(path), "bias", None) is not None:
        return name
    own = plan.plain.state_dict().keys()
    for flag in vars(plan.config):
        if "bias" not in flag or getattr(plan.config, flag) is not False:
            continue
        config = copy.deepcopy(plan.config)
        setattr(config, flag, True)
        with torch.device("meta"):
            state = type(plan.plain)(config).state_dict()
        new = state.keys() - own
        if name in new and all(key.endswith(".bias") for key in new):
            plan.set(flag, True)
            for key in new:
                plan.tensors.setdefault(key, torch.zeros(state[key].shape))
            return name
    raise SiteError(
        f"An addition at {site} needs a bias of {path}, which {type(plan.plain).__name__} has not and its "
        "configuration has no flag for: steer at another site, with hooks, or as a GGUF control vector."
    )


def _require_same(model: HookedModel, site: str, path: str) -> None:
    """Raise SiteError unless adding at the site does the same as adding to what the weights of the module give."""
    module, ids = model.model.get_submodule(path), _probe(model)
    if isinstance(module, nn.Embedding) and not torch.equal(module(ids), module.weight[ids]):
        raise SiteError(
            f"{model.name} scales its embeddings, so that an addition at {site} is none to {path}."
        )
    if model.site(path).width != model.site(site).width:
        raise SiteError(f"Another map stands between {path} and {site}: no bias does the same.")
    acts = model.run(ids, sites=[site])[site]
    noise = torch.randn(acts.shape[-1], generator=torch.Generator().manual_seed(0)) * float(
        acts.float().std()
    )
    at_site, at_module = (_output(model, ids, {place: lambda h: h + noise.to(h)}) for place in (site, path))
    if not _alike(at_site, at_module, _output(model, ids), model.dtype):
        raise SiteError(
            f"An addition at {site} is not one at the output of {path}: a norm or a scale stands between them, "
            "so that no bias does the same. Steer with hooks, or as a GGUF control vector."
        )


# projections


def _merge_projections(plan: _Plan, edits: Sequence[Project]) -> None:
    """Every writer of the stream, where the stream is projected after each of them."""
    model = plan.model
    sites = {model.site(edit.site).name for edit in edits}
    needed = ["blocks.0.hook_resid_pre"]
    for block in range(model.n_layers):
        mid = model.sites.get(f"blocks.{block}.hook_resid_mid")
        needed += [mid.name] if mid is not None and mid.verified else []
        needed.append(f"blocks.{block}.hook_resid_post")
    missing = [name for name in needed if name not in sites]
    if missing:
        raise InputError(
            "A projection is the same as one of the weights only where all that writes to the residual stream is projected: "
            f"the vector has none at {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}. "
            "It needs blocks.0.hook_resid_pre, and hook_resid_mid and hook_resid_post of every block."
        )
    if extra := sorted(name for name in sites - set(needed) if not _in_stream(name)):
        raise InputError(f"A projection at {extra[0]} is not one of the residual stream: merge without it.")
    projector = edits[0].directions.T @ edits[0].directions
    for edit in edits:
        if edit.scale != 1.0:
            raise InputError(f"Projections are merged at strength 1 only; this is {edit.scale:g}.")
        if not torch.allclose(edit.directions.T @ edit.directions, projector, atol=1e-5):
            raise InputError("The projections take out different directions: merge one alone.")
    writers = {
        path: module
        for path, module in plan.plain.named_modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == model.d_model
    }
    for block in range(model.n_layers):
        for kind in ("attn.hook_z", "mlp.hook_post"):
            path = model.site(f"blocks.{block}.{kind}").path
            writers[path] = plan.plain.get_submodule(path)

    def project(h: Tensor) -> Tensor:
        return h - h @ projector.to(h)

    ids = _probe(model)
    at_sites = _output(model, ids, dict.fromkeys(needed, project))
    with ExitStack() as stack:
        for module in writers.values():
            handle = module.register_forward_hook(lambda _, args, written: project(written))
            stack.callback(handle.remove)
        at_writers = _output(model, ids)
    if not _alike(at_sites, at_writers, _output(model, ids), model.dtype):
        raise InputError(
            f"In {model.name} norms or scales stand between what writes and the residual stream: "
            "a projection of the stream is none of the weights."
        )
    for path, module in writers.items():
        name = f"{path}.weight"
        _untie_if(plan, module)
        weight = plan.parameter(name)
        outward = isinstance(module, nn.Embedding) or is_transposed(module)
        plan.tensors[name] = project(weight) if outward else project(weight.T).T.contiguous()
        if getattr(module, "bias", None) is not None:
            plan.tensors[f"{path}.bias"] = project(plan.parameter(f"{path}.bias"))


def _in_stream(site: str) -> bool:
    """Whether a projection there changes nothing where the stream is projected already."""
    return bool(re.fullmatch(r"hook_embed|blocks\.\d+\.hook_(?:resid_\w+|attn_out|mlp_out)", site))


# trying out


def _probe(model: HookedModel) -> Tensor:
    return probe_ids(model.d_vocab, model.special_ids).to(model.device)


def _output(model: HookedModel, ids: Tensor, functions: Mapping[str, Any] | None = None) -> Tensor:
    with model.hooks(functions or {}):
        return model.final(ids).float()


def _alike(one: Tensor, other: Tensor, base: Tensor, dtype: torch.dtype) -> bool:
    """Whether two outputs differ by rounding alone, as measured by what they change."""
    return float((one - other).norm()) <= 4 * torch.finfo(dtype).eps ** 0.5 * float((one - base).norm())


# files


def _write(plan: _Plan, steered: SteeringVector, out: Path) -> float:
    """The checkpoint, read back and compared; the greatest difference of logits."""
    plain, model = plan.plain, plan.model
    state = dict(plain.state_dict())
    for name, tensor in plan.tensors.items():
        like = state.get(name, next(plain.parameters()))
        state[name] = tensor.to(like).contiguous()
    with quiet():
        with torch.device("meta"):
            shell = type(plain)(plan.config)
        shell.load_state_dict(state, strict=True, assign=True)
        shell.generation_config = getattr(plain, "generation_config", None)
        shell.save_pretrained(out)
        for file in out.iterdir():  # safetensors makes files that only their owner can read
            file.chmod((out / "config.json").stat().st_mode)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(out)
        read = type(plain).from_pretrained(out, dtype=model.dtype, use_safetensors=True)
    found = HookedModel.from_pretrained(read.eval(), tokenizer=model.tokenizer, device=model.device)
    ids = _probe(model)
    base, got = _logits(model, ids), _logits(found, ids)
    with model.steer(steered, other_model=True):
        wanted = _logits(model, ids)
    difference = float((wanted - got).abs().max())
    rounding = 8 * torch.finfo(model.dtype).eps * float(wanted.abs().max())
    if difference > rounding and not _alike(wanted, got, base, model.dtype):
        raise SteerkitError(
            f"The checkpoint does not compute what the steered model does (a difference of {difference:.2g}): "
            f"{type(plain).__name__} cannot be merged into this way. Nothing was written."
        )
    return difference


def _logits(model: HookedModel, ids: Tensor) -> Tensor:
    """Logits, or final states of a model without a head."""
    return (model.logits(ids) if model.has_lm_head else model.final(ids)).float()
