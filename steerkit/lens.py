"""What HookedModel needs from TransformerLens: `TransformerBridge` (3.x, 4.x), `HookedTransformer` (3.x).

Sites are TransformerLens's own hook points, hook_z flat. They pass the same algebra and the same write
probe as those of Hugging Face models; `transformer_lens` itself is never imported here.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.sites import (
    BLOCK_SITES,
    Block,
    Call,
    Found,
    Site,
    evaluating,
    failed_writes,
    probe_ids,
    raw_sites,
    refuse,
    same,
    trace,
)


def is_transformer_lens(model: nn.Module) -> bool:
    """Whether the model is one of TransformerLens's two."""
    return any(
        kind.__module__.startswith("transformer_lens")
        and kind.__name__ in ("HookedTransformer", "TransformerBridge")
        for kind in type(model).__mro__
    )


class TransformerLensBackend:
    """A decoder-only model with TransformerLens's hook points."""

    is_encoder_decoder = False
    continues_prompt = True
    is_causal = True
    has_lm_head = True
    default_prefix = ""

    def __init__(self, model: Any, *, special_ids: frozenset[int] = frozenset()) -> None:
        self.model = model
        self.config = model.cfg
        self.n_layers: int = self.config.n_layers
        self.d_model: int = self.config.d_model
        self.d_vocab: int = self.config.d_vocab
        self.n_heads: int = self.config.n_heads
        self.context: int = self.config.n_ctx
        self.pad_candidates: tuple[int | None, ...] = ()
        with torch.no_grad(), evaluating(model):
            self._discover(special_ids)

    @property
    def trunk(self) -> nn.Module:
        """What every forward goes through, with token ids, mask and cache as its arguments."""
        return self.model

    def embedding_weight(self) -> Tensor:
        return self.model.W_E

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def hidden(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None
    ) -> Any:
        """Run the model; it has no separate trunk."""
        return self.model(input_ids, attention_mask=attention_mask)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch pos d_vocab"]:
        return self.model(input_ids, attention_mask=attention_mask, return_type="logits")

    def final(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "batch pos d_model"]:
        states: list[Tensor] = []
        handle = self.model.ln_final.register_forward_hook(lambda module, args, output: states.append(output))
        try:
            self.hidden(input_ids, attention_mask)
        finally:
            handle.remove()
        return states[0]

    def output_weight(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.model.W_U.T

    def unembed(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        out = self.model.unembed(resid.reshape(1, -1, self.d_model)).reshape(*resid.shape[:-1], -1)
        cap = getattr(self.config, "output_logits_soft_cap", -1.0) or -1.0
        return cap * torch.tanh(out / cap) if cap > 0 else out

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any
    ) -> Tensor:
        """Row by row: TransformerLens's `generate` takes no mask in all its versions."""
        pad = options.pop("pad_token_id")
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            out = self.model.generate(
                ids[mask.bool()][None],
                max_new_tokens=max_new_tokens,
                return_type="tokens",
                verbose=False,
                **{"stop_at_eos": self.model.tokenizer is not None, **options},
            )
            rows.append(torch.cat([ids[~mask.bool()], out[0]]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def fresh(self) -> nn.Module:
        """A HookedTransformer of the same configuration; of a bridge, its Hugging Face model's class."""
        if hasattr(self.model, "original_model"):
            original = self.model.original_model
            return type(original)(copy.deepcopy(original.config))
        config = copy.deepcopy(self.config)
        config.init_weights, config.seed = True, None
        return type(self.model)(config, tokenizer=self.model.tokenizer)

    def _discover(self, special_ids: frozenset[int]) -> None:
        ids = probe_ids(self.d_vocab, special_ids, length=max(2, min(7, self.context - 2))).to(self.device)
        calls, _ = trace(self.model, (ids.shape[0], ids.shape[1]), lambda: self.hidden(ids, None))
        by_path: dict[str, Call] = {call.path: call for call in calls}
        paths = {id(module): path for path, module in self.model.named_modules()}

        def found(name: str) -> Found:
            point = self.model.hook_dict.get(name)
            call = None if point is None else by_path.get(paths[id(point)])
            if call is None or call.y is None:
                return Found(
                    reason="TransformerLens has no such hook point in this model, or it does not fire"
                )
            return Found(call)

        self.raw = raw_sites(calls, {f"blocks.{i}": i for i in range(self.n_layers)})
        self.sites: dict[str, Site] = {"hook_embed": _site("hook_embed", found("hook_embed"), None)}
        blocks: list[Block] = []
        for i in range(self.n_layers):
            at = f"blocks.{i}."
            points = {kind: found(at + kind) for kind in BLOCK_SITES}
            blocks.append(
                _block(points, points["hook_resid_pre"], parallel=bool(self.config.parallel_attn_mlp))
            )
            self.sites |= {at + kind: _site(at + kind, point, i) for kind, point in points.items()}
            for kind, reason in self._broken_algebra(
                i, points, following=found(f"blocks.{i + 1}.hook_resid_pre")
            ):
                self.sites[at + kind] = refuse(self.sites[at + kind], reason)
        self.sites["ln_final"] = _site("ln_final", Found(by_path.get("ln_final")), None)

        def run() -> Any:
            return self.hidden(ids, None)

        # Where only the branch reads the hook point, writing in place reaches the skip connection too.
        for name in failed_writes(self.model, blocks, self.sites, "", run):
            if name.endswith("hook_resid_mid"):
                self.sites[name] = replace(self.sites[name], shared=True)
        for name, reason in failed_writes(self.model, blocks, self.sites, "", run).items():
            self.sites[name] = refuse(self.sites[name], reason)

    def _broken_algebra(
        self, layer: int, points: dict[str, Found], following: Found
    ) -> list[tuple[str, str]]:
        pre, attn, mid, mlp, post = (
            points[f"hook_{kind}"].value
            for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        if pre is None or attn is None or mlp is None or post is None:
            return []
        broken = []
        if mid is not None:
            if not same(mid, pre + attn, attn):
                broken += [
                    (kind, "pre + attn_out is not mid") for kind in ("hook_attn_out", "hook_resid_mid")
                ]
            if not same(post, mid + mlp, mlp):
                broken += [
                    (kind, "mid + mlp_out is not post") for kind in ("hook_mlp_out", "hook_resid_post")
                ]
        elif not any(
            same(post, total, attn) for total in ((pre + attn) + mlp, (attn + mlp) + pre, (pre + mlp) + attn)
        ):
            broken += [
                (kind, "pre + attn_out + mlp_out is not post") for kind in ("hook_attn_out", "hook_mlp_out")
            ]
        if following.value is not None and not same(following.value, post):
            broken.append(("hook_resid_post", "the next block does not begin with this"))
        block = self.model.blocks[layer]
        for kind, added, part, weight, bias in (
            ("attn.hook_z", attn, block.attn, "W_O", "b_O"),
            ("mlp.hook_post", mlp, block.mlp, "W_out", "b_out"),
        ):
            x = points[kind].value
            if x is None:
                continue
            w = getattr(part, weight, None)
            if w is None:
                broken.append((kind, f"the model shows no {weight} to check this against"))
                continue
            b = getattr(part, bias, None)
            y = x.float() @ w.reshape(-1, self.d_model).float().cpu() + (0 if b is None else b.float().cpu())
            name = {"attn.hook_z": "ln1_post", "mlp.hook_post": "ln2_post"}[kind]
            if hasattr(block, name):
                y = getattr(block, name)(y.to(self.device, self.dtype)).float().cpu()
            error = float((y - added.float()).abs().max())
            if error > 50 * torch.finfo(self.dtype).eps * float(y.abs().max()):
                broken.append(
                    (kind, f"{weight} of this is not hook_{'attn' if 'attn' in kind else 'mlp'}_out")
                )
        return broken


def _block(points: dict[str, Found], pre: Found, parallel: bool) -> Block:
    sums: list[tuple[str, str, Call | None]] = []
    mid = points["hook_resid_mid"].call
    if mid is not None:
        sums = [("hook_resid_pre", "hook_attn_out", mid), ("hook_resid_mid", "hook_mlp_out", None)]
    assert pre.call is not None
    return Block(pre.call, points, sums, parallel=parallel and mid is None)


def _site(name: str, found: Found, layer: int | None) -> Site:
    if found.call is None or found.call.y is None:
        return Site(name, "", 0, layer, False, found.reason or "the model has no such module")
    call = found.call
    return Site(name, call.path, found.call.y.shape[-1], layer, volatile=call.y_volatile)
