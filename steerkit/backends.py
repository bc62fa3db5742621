"""What HookedModel needs from a model, for Hugging Face models (plain, PEFT, split over devices).

A backend knows the model's sites and sizes, runs its trunk and its head, and generates. It finds all this
out at load from the structure of the model and a few forwards of 14 tokens (see `steerkit.sites`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.errors import InputError
from steerkit.sites import (
    Block,
    Call,
    Found,
    Site,
    Stack,
    analyse_block,
    block_sites,
    called_once,
    evaluating,
    failed_writes,
    find_stacks,
    is_projection,
    leaving_no_hooks,
    probe_ids,
    raw_sites,
    refuse,
    same,
    trace,
    uncompiled,
    value_chain,
)


class HuggingFaceBackend:
    """A PreTrainedModel, or a PeftModel around one, run with its adapters active."""

    def __init__(self, model: Any, *, special_ids: frozenset[int] = frozenset(), head: bool = True) -> None:
        self.model: Any = model
        self.inner: Any = self.model.get_base_model() if _is_peft(model) else model
        if _is_peft(model) and self.model.active_peft_config.is_prompt_learning:
            raise InputError(
                f"{self.model.active_peft_config.peft_type.value} adds virtual tokens that shift positions: "
                "such adapters can't be hooked, LoRA and its kin can."
            )
        self.base: Any = self.inner.base_model
        self.config: Any = self.inner.config
        self.text_config: Any = self.config.get_text_config()
        self.is_encoder_decoder = bool(self.config.is_encoder_decoder)
        self.has_lm_head = head and self.inner.get_output_embeddings() is not None
        self._accepts = frozenset(inspect.signature(self.base.forward).parameters)
        self._head_accepts = frozenset(inspect.signature(self.inner.forward).parameters)
        self._positions_from_mask = False
        self._unembedding: list[str] | None = None
        self._scale, self._cap = 1.0, 0.0
        with torch.no_grad(), evaluating(model), leaving_no_hooks(model), uncompiled(model.modules()):
            self._discover(special_ids)
            self.trunk = self._find_trunk()

    # sizes

    @property
    def embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def _find_trunk(self) -> nn.Module:
        """What every forward goes through, with token ids, mask and cache as its arguments."""
        if self.base is self.inner or self.is_encoder_decoder:
            return self.base
        ran: list[bool] = []
        handle = self.base.register_forward_pre_hook(lambda module, args: ran.append(True))
        try:
            self.inner(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        finally:
            handle.remove()
        return self.base if ran else self.base.get_decoder()  # OPT's head calls the decoder inside directly

    def embedding_weight(self) -> Tensor:
        return self.embeddings.weight

    @property
    def device(self) -> torch.device:
        weight = self.embeddings.weight
        if weight.is_meta:  # offloaded by accelerate, which runs the module on its execution device
            return torch.device(self.embeddings._hf_hook.execution_device)
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def n_heads(self) -> int:
        return int(self.text_config.num_attention_heads)

    @property
    def d_vocab(self) -> int:
        return int(self.embeddings.weight.shape[0])

    @property
    def context(self) -> int:
        """The most positions: the configuration's, less what RoBERTa's padding index uses up."""
        names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
        positions = next((int(v) for n in names if (v := getattr(self.text_config, n, None))), 1 << 30)
        tables = [m for m in self.base.modules() if isinstance(m, nn.Embedding) and m is not self.embeddings]
        for table in tables:
            if table.padding_idx is not None and table.num_embeddings == positions:
                return positions - table.padding_idx - 1
        return positions

    @property
    def is_causal(self) -> bool:
        return self._causal and not self.is_encoder_decoder

    @property
    def pad_candidates(self) -> tuple[int | None, ...]:
        return (self.text_config.pad_token_id, self.text_config.eos_token_id)

    # forwards

    def hidden(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None
    ) -> Any:
        """Run the trunk, without the LM head."""
        return self.base(**self._inputs(input_ids, attention_mask, self._accepts))

    def final(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch pos d_model"]:
        if not (self.base is self.inner and self.is_encoder_decoder and hasattr(self.inner, "lm_head")):
            return self.hidden(input_ids, attention_mask)[0]
        states: list[Tensor] = []  # T5 with a head has no trunk module: its decoder's output is wanted
        decoder = self.inner.get_decoder()
        handle = decoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
        try:
            self.hidden(input_ids, attention_mask)
        finally:
            handle.remove()
        return states[0]

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch pos d_vocab"]:
        return self.model(**self._inputs(input_ids, attention_mask, self._head_accepts)).logits

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Token ids, the prompt's included for decoder-only models."""
        return self.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **options
        )

    @property
    def continues_prompt(self) -> bool:
        return not self.is_encoder_decoder

    def fresh(self) -> nn.Module:
        """A new model of the same class and configuration, without adapters, from torch's generator."""
        return type(self.inner)(copy.deepcopy(self.config))

    def _inputs(self, input_ids: Tensor, mask: Tensor | None, accepts: frozenset[str]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if mask is not None:
            inputs["attention_mask"] = mask
            if self._positions_from_mask:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_(min=0)
        if self.is_encoder_decoder and "decoder_input_ids" in accepts:
            inputs["decoder_input_ids"] = self._shifted(input_ids, mask)
            inputs["decoder_attention_mask"] = mask
        if "use_cache" in accepts:
            inputs["use_cache"] = False
        return inputs

    def _shifted(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The same text for the decoder, one to the right behind its start token."""
        start = self.config.decoder_start_token_id
        start = self.config.pad_token_id if start is None else start
        shifted = input_ids.roll(1, dims=1)
        shifted[:, 0] = start or 0
        if mask is not None:
            shifted = shifted.masked_fill(mask.roll(1, dims=1) == 0, start or 0)
        return shifted

    # the head

    def output_weight(self) -> Float[Tensor, "d_vocab d_model"]:
        head = self.inner.get_output_embeddings()
        return head._hf_hook.weights_map["weight"] if head.weight.is_meta else head.weight

    def unembed(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        if self._unembedding is None:
            raise InputError(
                f"{type(self.inner).__name__} has no plain head from final state to logits: use logits()."
            )
        out = resid * self._scale
        for path in self._unembedding:
            out = self.model.get_submodule(path)(out)
        return self._cap * torch.tanh(out / self._cap) if self._cap else out

    # discovery

    def _discover(self, special_ids: frozenset[int]) -> None:
        length = max(2, min(7, self.context - 2))
        ids = probe_ids(self.d_vocab, special_ids | _config_ids(self.text_config), length=length).to(
            self.device
        )
        run = self.logits if self.has_lm_head else self.final
        outputs: list[Any] = []

        def forward() -> None:
            accepts = self._head_accepts if self.has_lm_head else self._accepts
            target = self.model if self.has_lm_head else self.base
            outputs.append(
                target(**self._inputs(ids, None, accepts), output_hidden_states=True, return_dict=True)
            )

        calls, _ = trace(self.model, tuple(ids.shape), forward)  # type: ignore[arg-type]
        output = outputs[0]
        stacks = find_stacks(self.model, calls)
        if not stacks:
            raise InputError(
                f"{type(self.inner).__name__} is not supported: no list of blocks hands on a hidden state."
            )
        self.sites: dict[str, Site] = {}
        self.n_layers = len(stacks[0].blocks)
        self.d_model = int(stacks[0].blocks[0].x.shape[-1])  # type: ignore[union-attr]
        self._embed_site(calls, ids, stacks)
        for stack in stacks:
            self._stack_sites(stack, calls, output, lambda: run(ids, None))
        self.default_prefix = stacks[0].prefix
        self.raw = raw_sites(calls, {b.path: i for stack in stacks for i, b in enumerate(stack.blocks)})
        self._causal = self._is_causal(ids)
        self._positions_from_mask = self._needs_positions(ids)
        if self.has_lm_head:
            self._find_head(calls, output, stacks)

    def _embed_site(self, calls: Sequence[Call], ids: Tensor, stacks: Sequence[Stack]) -> None:
        path = next(p for p, m in self.model.named_modules() if m is self.embeddings)
        call = called_once(calls).get(path)
        if call is None or call.y is None:
            reason = "the token embedding runs more than once in a forward: use blocks.0.hook_resid_pre"
            self.sites["hook_embed"] = Site("hook_embed", path, 0, verified=False, reason=reason)
            return
        site = Site("hook_embed", path, call.y.shape[-1], volatile=call.y_volatile)
        weight = self.embeddings.weight
        if isinstance(weight, Tensor) and not weight.is_meta and not hasattr(self.embeddings, "base_layer"):
            rows = weight[ids.to(weight.device)].float().cpu()
            scale = float(getattr(self.embeddings, "embed_scale", 1.0))
            if not torch.allclose(call.y.float(), rows * scale, rtol=1e-2, atol=1e-6):
                site = refuse(site, "the output of the token embedding is not its weight's rows")
        self.sites["hook_embed"] = site

    def _stack_sites(
        self, stack: Stack, calls: Sequence[Call], output: Any, forward: Callable[[], Any]
    ) -> None:
        once = called_once(calls)
        own = [once.get(f"{b.path}.base_layer", b) for b in stack.blocks]
        inside = [[c for c in calls if c.path.startswith(b.path + ".")] for b in own]
        blocks: list[Block] = [analyse_block(self.model, b, c) for b, c in zip(own, inside)]
        for found, whole in zip(blocks, stack.blocks):
            if found.call is not whole:  # an adapter is around the block, and acts on what it gives
                found.sites["hook_resid_post"], found.inner = Found(whole, "out"), found.call.path
        sites = block_sites(stack, blocks)
        last = stack.blocks[-1]
        outside = [c for c in calls if not any(c.path.startswith(b.path) for b in stack.blocks)]
        states = _hidden_states(output, stack.prefix)
        if states is None or len(states) != len(blocks) + 1:
            for name in [n for n in sites if "hook_resid_p" in n]:
                sites[name] = refuse(sites[name], "the model gives no hidden states to check this against")
        else:
            end = states[-1].cpu()
            norm = [] if same(last.y, end) else value_chain(outside, last.y, lambda y: same(y, end), last.end)
            for i, (block, before, after) in enumerate(zip(own, states, states[1:])):
                at = f"{stack.prefix}blocks.{i}."
                ends = i == len(blocks) - 1 and norm
                read = (
                    own[i - 1].y if i else block.x
                )  # a block reads what the one before it gives: `find_stacks`
                for kind, good in (
                    ("hook_resid_pre", same(read, before.cpu())),
                    ("hook_resid_post", ends or same(block.y, after.cpu())),
                ):
                    if not good:
                        sites[at + kind] = refuse(sites[at + kind], "differs from output_hidden_states")
            name = stack.prefix + "ln_final"
            if norm and not is_projection(self.model.get_submodule(norm[0].path)):
                first = norm[0]
                width = first.y.shape[-1]  # type: ignore[union-attr]
                sites[name] = Site(name, first.path, width, volatile=first.y_volatile)
            else:
                post = f"{stack.prefix}blocks.{len(blocks) - 1}.hook_resid_post"
                reason = f"this model has no norm after its last block: use {post}"
                sites[name] = Site(name, "", 0, verified=False, reason=reason)
        for name, reason in failed_writes(self.model, blocks, sites, stack.prefix, forward).items():
            sites[name] = refuse(sites[name], reason)
        self.sites.update(sites)

    def _is_causal(self, ids: Tensor) -> bool:
        """Whether a later token leaves earlier positions as they were."""
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        full, changed = self.final(ids, None)[:, 0], self.final(other, None)[:, 0]
        return bool((full - changed).abs().max() <= 1e-4 * full.abs().max())

    def _needs_positions(self, ids: Tensor) -> bool:
        """Whether a left-padded row needs position ids from the mask to give what it gives unpadded."""
        if self.is_encoder_decoder or "position_ids" not in self._accepts:
            return False
        pad = next((p for p in self.pad_candidates if isinstance(p, int) and 0 <= p < self.d_vocab), 0)
        padded = torch.cat([torch.full_like(ids[:, :2], pad), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :2] = 0
        truth = self.final(ids, None)
        errors = []
        for derived in (False, True):
            self._positions_from_mask = derived
            errors.append(float((self.final(padded, mask)[:, 2:] - truth).abs().max()))
        rounding = 100 * torch.finfo(truth.dtype).eps * float(truth.abs().max())
        return errors[1] <= max(errors[0], rounding)

    def _find_head(self, calls: Sequence[Call], output: Any, stacks: Sequence[Stack]) -> None:
        logits = output.logits.cpu()
        end = _hidden_states(output, stacks[-1].prefix)[-1].cpu()  # type: ignore[index]
        since = stacks[-1].blocks[-1].end
        cap = getattr(self.text_config, "final_logit_softcapping", None) or 0.0
        for scale, bound in itertools.product((1.0, self.d_model**-0.5), {0.0, float(cap)}):

            def done(y: Tensor, bound: float = bound) -> bool:
                return same(bound * torch.tanh(y / bound) if bound else y, logits)

            chain = value_chain(calls, end * scale, done, since)
            if chain is not None:
                self._unembedding = [c.path for c in chain]
                self._scale, self._cap = scale, bound
                return


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _config_ids(config: Any) -> frozenset[int]:
    ids = (getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "decoder_start"))
    return frozenset(i for i in ids if isinstance(i, int))


def _hidden_states(output: Any, prefix: str) -> tuple[Tensor, ...] | None:
    if prefix == "encoder.":
        return getattr(output, "encoder_hidden_states", None) or getattr(output, "hidden_states", None)
    if prefix == "decoder.":
        return getattr(output, "decoder_hidden_states", None)
    return getattr(output, "hidden_states", None)
