"""HookedModel: one face over Hugging Face, PEFT and TransformerLens models.

    model = HookedModel.from_pretrained("storyworld")        # an id, a directory, or a model that is
    already loaded acts = model.run(input_ids, sites=["blocks.2.hook_resid_post"]) with
    model.hooks({"blocks.2.hook_resid_post": lambda act: act + vector}):
        model.generate("The fox")

Hooks are plain torch hooks on the model's own modules (`steerkit.sites` says which). A hook function gets the
activation (batch, pos, width) and returns its replacement, or None to leave it. Outside of the contexts
nothing remains: no hooks, the same `state_dict`, the same training flags. Hooks act only on forwards of the
thread that opened them, so that a forward that runs beside in another thread is neither stopped nor
steered.

Under gradient checkpointing a hook function runs again when the backward pass recomputes its block: it must
depend on its argument alone. `torch.compile`d models run uncompiled while hooks are open.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.activations import Activations, collect
from steerkit.backends import HuggingFaceBackend
from steerkit.errors import InputError, SiteError, did_you_mean
from steerkit.lens import TransformerLensBackend, is_transformer_lens
from steerkit.loading import Loaded, load, quiet
from steerkit.sites import ALIASES, ActivationHook, Site, attach, first_tensor, uncompiled


class Steerable(Protocol):
    """What can be applied to a model: a `steerkit.steering.SteeringVector`."""

    @property
    def applied_to(self) -> Callable[..., AbstractContextManager[None]]: ...


class HookedModel:
    """A language model whose activations can be read and written at named sites."""

    def __init__(self, loaded: Loaded) -> None:
        self.name = loaded.name
        self.revision = loaded.revision
        self.model: nn.Module = loaded.model
        self.tokenizer = loaded.tokenizer
        self.special_ids = _special_ids(self.tokenizer)
        self._backend: HuggingFaceBackend | TransformerLensBackend
        if is_transformer_lens(self.model):
            self._backend = TransformerLensBackend(self.model, special_ids=self.special_ids)
        elif hasattr(self.model, "base_model"):
            self._backend = HuggingFaceBackend(
                self.model, special_ids=self.special_ids, head=loaded.has_lm_head
            )
        else:
            raise InputError(
                f"{type(self.model).__name__} is no model that steerkit knows: give a PreTrainedModel, "
                "a PeftModel, a TransformerBridge or a HookedTransformer."
            )
        backend = self._backend
        self.sites: dict[str, Site] = backend.sites
        """Every named site, also the refused ones (`verified=False`, with the reason)."""
        self.n_layers: int = backend.n_layers
        """Blocks of the (first) stack: the encoder's for a model with two."""
        self.d_model: int = backend.d_model
        self.d_vocab: int = backend.d_vocab
        self.n_heads: int = backend.n_heads
        limit = getattr(self.tokenizer, "model_max_length", None) or backend.context
        self.context: int = int(min(backend.context, limit))
        """The most tokens in a row, special ones included."""
        self.is_causal: bool = backend.is_causal
        """Whether a position depends on earlier ones only; False for encoders and encoder-decoders."""
        self.has_lm_head: bool = backend.has_lm_head
        self.bos_id: int | None = getattr(self.tokenizer, "bos_token_id", None)
        names = ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id")
        pads = [*(getattr(self.tokenizer, name, None) for name in names), *backend.pad_candidates, 0]
        self.pad_id: int = next(i for i in pads if isinstance(i, int) and 0 <= i < self.d_vocab)
        """What rows are filled up with, always masked: the pad token, or another that does no harm."""

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        device_map: Any = None,
        other_model: bool = False,
    ) -> HookedModel:
        """Wrap `source`: 'storyworld', a Hugging Face id, a directory (of a model or a PEFT adapter), or a
        loaded PreTrainedModel, PeftModel, TransformerBridge or HookedTransformer.

        `tokenizer` is an object or the name of one; without it the model's own is used. `dtype` None keeps
        the checkpoint's, `device` None means CUDA if there is one (a loaded model stays where it is).
        Weights are read from safetensors only. Raises InputError when there is no such model, or when an
        adapter was made for another than its base is now (it may be with `other_model`), CheckpointError when
        weights are incomplete.
        """
        if isinstance(source, HookedModel):
            return source
        loaded = load(
            source,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            revision=revision,
            device_map=device_map,
        )
        model = cls(loaded)
        if loaded.origin is not None and not other_model:
            loaded.origin.require(model.fingerprint, model.name)
        return model

    @property
    def trunk(self) -> nn.Module:
        """The module that turns token ids into final states: every forward goes through it (but T5's encoder in `generate`)."""
        return self._backend.trunk

    @cached_property
    def fingerprint(self) -> str:
        """Tells whether two models are the same but for fine-tuning: of sizes and some embeddings, wherever the files lie."""
        weight = self._backend.embedding_weight().detach()
        rows = weight[:: max(1, len(weight) // 64)][:64, :64].to("cpu", torch.bfloat16).view(torch.int16)
        sizes = f"{self.n_layers} {self.d_model} {self.d_vocab} {self.n_heads}".encode()
        return hashlib.sha256(sizes + rows.contiguous().numpy().tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name!r}, {type(self.model).__name__}, {self.n_layers} layers, "
            f"d_model {self.d_model}, {self.dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where inputs go. The activations of a model split over devices stay where their layer is."""
        return self._backend.device

    @property
    def dtype(self) -> torch.dtype:
        return self._backend.dtype

    # sites

    def site(self, name: str) -> Site:
        """The site of that name, alias or module path. SiteError says why there is none."""
        site = self._find_site(name)
        if site is None:
            raise SiteError(f"Site {name!r} does not exist: {self._what_exists(name)}")
        if not site.verified:
            raise SiteError(f"Site {name!r} of {self.name} is refused: {site.reason}.")
        return site

    def linear_modules(self) -> dict[str, int]:
        """Path -> layer of the linear modules inside the blocks: what low-rank weight changes act on."""
        found = {}
        for path, site in self._backend.raw.items():
            weight = getattr(self.model.get_submodule(path), "weight", None)
            if site.layer is not None and site.verified and isinstance(weight, Tensor) and weight.dim() == 2:
                found[path] = site.layer
        return found

    def _find_site(self, name: str) -> Site | None:
        for alias, canonical in ALIASES.items():
            if name == alias or name.endswith("." + alias):
                name = name[: len(name) - len(alias)] + canonical
        prefixed = self._backend.default_prefix + name
        return self.sites.get(name) or self.sites.get(prefixed) or self._backend.raw.get(name)

    def _what_exists(self, name: str) -> str:
        layers = sorted({s.layer for s in self.sites.values() if s.layer is not None})
        if not name:
            return "the name is empty."
        near = did_you_mean(name, [*self.sites, *self._backend.raw])
        try:
            module = self.model.get_submodule(name) is not None
        except AttributeError:
            module = False
        if module:
            return f"the module {name} does not run in a forward pass.{near}"
        return f"{self.name} has layers {layers[0]}–{layers[-1]}.{near}"

    # reading and writing

    @contextmanager
    def hooks(self, functions: Mapping[str, ActivationHook]) -> Iterator[None]:
        """Apply each function at its site in every forward inside; contexts nest, the inner one acting last.

        A function gets (batch, pos, width) and returns a replacement or None. With `generate` and its cache
        it is called with the whole prompt first, then with one position a step.
        """
        hooks = _Hooks(self.model, [(self.site(name), fn) for name, fn in functions.items()])
        with hooks.open():
            yield

    def steer(self, vector: Steerable, **options: Any) -> AbstractContextManager[None]:
        """Inside, every forward is changed as `vector` says; afterwards nothing is left behind.

        `strength`, `where` and the other options are those of `SteeringVector.applied_to`.
        """
        return vector.applied_to(self, **options)

    def run(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        sites: Sequence[str],
        stop: bool = True,
    ) -> dict[str, Float[Tensor, "batch pos width"]]:
        """The activations at `sites`. With `stop` the forward ends as soon as the last of them is there.

        Gradients flow if they are enabled: wrap in `torch.no_grad()` or `torch.inference_mode()` for plain
        reading. The decoder of an encoder-decoder model reads the same text, shifted by one.
        """
        wanted = {name: self.site(name) for name in dict.fromkeys(sites)}
        ids, mask = self._checked(input_ids, attention_mask)
        store: dict[str, Tensor] = {}
        if torch.is_grad_enabled() and self.model.training:
            stop = False  # a block that is left by an exception can't be recomputed by gradient checkpointing
        end = _Stop() if stop else None

        def keep(name: str) -> ActivationHook:
            def fn(act: Tensor) -> None:
                store[name] = act
                if end is not None and len(store) == len(wanted):
                    raise end

            return fn

        hooks = _Hooks(self.model, [(site, keep(name)) for name, site in wanted.items()], keep=True)
        try:
            with hooks.open():
                self._backend.hidden(ids, mask)
        except _Stop as stopped:
            if stopped is not end:
                raise
        if len(store) < len(wanted):
            missing = next(name for name in wanted if name not in store)
            raise SiteError(f"Site {missing!r} was not reached by the forward pass of {self.name}.")
        return {name: store[name] for name in wanted}

    def activations(self, texts: Any, sites: Sequence[str], **tokenization: Any) -> Activations:
        """Activations of texts, without pads and special tokens, with ids and positions: see `collect`."""
        return collect(self, texts, sites, **tokenization)

    # outputs

    def logits(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits (masked-token logits for an encoder). InputError without an LM head."""
        self._need_head()
        return self._backend.logits(*self._checked(input_ids, attention_mask))

    def final(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The last hidden state, after the final norm where there is one."""
        return self._backend.final(*self._checked(input_ids, attention_mask))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix."""
        self._need_head()
        return self._backend.output_weight().T

    def unembed(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of final states (after the final norm), so that `unembed(final(ids)) == logits(ids)`."""
        self._need_head()
        return self._backend.unembed(resid)

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 40, **options: Any) -> Any:
        """Continue a prompt, or each of several: the new text only. `options` go to the model's own."""
        self._need_head()
        if self._backend.continues_prompt and not self.is_causal:
            raise InputError(f"{self.name} is an encoder: it fills in masked tokens and generates nothing.")
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [self._prompt_ids(text) for text in prompts]
        longest = max(map(len, rows))
        if self.is_causal and longest + max_new_tokens > self.context:
            raise InputError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                f"{self.name} ({self.context})."
            )
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        with torch.no_grad(), quiet():
            out = self._backend.generate(ids, mask, max_new_tokens, pad_token_id=self.pad_id, **options)
        new = out[:, longest:] if self._backend.continues_prompt else out
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts[0] if isinstance(prompt, str) else texts

    def _prompt_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        if self.is_causal and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids and self.bos_id is not None:
            ids = [self.bos_id]
        if not ids:
            raise InputError("The prompt is empty: give at least one token.")
        return ids

    def randomized(self, seed: int = 0) -> HookedModel:
        """The same architecture and tokenizer with fresh weights: the baseline for what training did."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._backend.fresh()
        if (next(model.parameters()).device, next(model.parameters()).dtype) != (self.device, self.dtype):
            model = model.to(device=self.device, dtype=self.dtype)
        model.eval()
        name = f"{self.name} (random weights, seed {seed})"
        return HookedModel(Loaded(model, self.tokenizer, name, self.revision, self.has_lm_head))

    # checks

    def _need_head(self) -> None:
        if not self.has_lm_head:
            raise InputError(f"{self.name} has no language-model head: it gives hidden states, not logits.")

    def _checked(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """On the model's device, and no mask when nothing is masked: that is the model's fast path."""
        if ids.dim() != 2 or not ids.numel():
            raise InputError(
                f"input_ids must be (batch, pos) with at least one token, not {tuple(ids.shape)}."
            )
        if ids.shape[1] > self.context:
            raise InputError(f"{ids.shape[1]} tokens exceed the context of {self.name} ({self.context}).")
        if ids.device.type == "cpu" and not (int(ids.min()) >= 0 and int(ids.max()) < self.d_vocab):
            raise InputError(f"A token id lies outside the vocabulary of {self.name} (0–{self.d_vocab - 1}).")
        if mask is not None:
            if mask.shape != ids.shape:
                raise InputError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
            mask = None if bool(mask.all()) else mask.to(self.device)
        return ids.to(self.device), mask


class _Stop(BaseException):
    """Ends a forward that has given what it was run for. Not an Exception, lest a handler swallow it."""


class _Hooks:
    """Functions at sites, attached while open, for the thread that opened them and for recomputation."""

    def __init__(
        self, model: nn.Module, functions: Sequence[tuple[Site, ActivationHook]], keep: bool = False
    ) -> None:
        self.model = model
        self.keep = keep
        self.threads: set[int] = set()
        self.functions = [(site, self._mine(fn)) for site, fn in functions]

    def _mine(self, fn: ActivationHook) -> ActivationHook:
        def guarded(act: Tensor) -> Tensor | None:
            return fn(act) if threading.get_ident() in self.threads else None

        return guarded

    @contextmanager
    def open(self) -> Iterator[None]:
        with ExitStack() as stack:
            modules = (m for site, _ in self.functions for m in _modules_around(self.model, site.path))
            stack.enter_context(uncompiled(modules))
            if torch.is_grad_enabled() and self.model.training:
                stack.enter_context(self._recomputing())
            stack.enter_context(self.attached())
            yield

    @contextmanager
    def attached(self, rows: tuple[int, ...] = ()) -> Iterator[None]:
        """The hooks, for this thread; nothing to do if it has them already. `rows` as in `sites.attach`."""
        thread = threading.get_ident()
        if thread in self.threads:
            yield
            return
        handles: list[torch.utils.hooks.RemovableHandle] = []
        self.threads.add(thread)
        try:
            for site, fn in self.functions:
                handles.extend(attach(self.model, site, fn, keep=self.keep, rows=rows))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.threads.discard(thread)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Let checkpointed blocks be recomputed with these hooks, also after this has closed."""

        def wrap(checkpoint: Any) -> Any:
            def checkpointed(fn: Callable, *args: Any, **kwargs: Any) -> Any:
                def hooked(*inner: Any, **options: Any) -> Any:
                    state = first_tensor(inner, options)[1]
                    with self.attached(rows=() if state is None else tuple(state.shape[:2])):
                        return fn(*inner, **options)

                return checkpoint(hooked, *args, **kwargs)

            return checkpointed

        patched = [m for m in self.model.modules() if "_gradient_checkpointing_func" in vars(m)]
        originals: list[Any] = [vars(m)["_gradient_checkpointing_func"] for m in patched]
        try:
            for module, original in zip(patched, originals):
                module._gradient_checkpointing_func = wrap(original)
            yield
        finally:
            for module, original in zip(patched, originals):
                module._gradient_checkpointing_func = original


def _modules_around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at `path` and those that contain it."""
    module = model
    yield module
    for name in path.split("."):
        module = module.get_submodule(name)
        yield module


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for no text: BOS, EOS, CLS, SEP, pad, mask and the like, but not the unknown word."""
    if tokenizer is None:
        return frozenset()
    names = {tokenizer.convert_ids_to_tokens(i): i for i in tokenizer.all_special_ids}
    others = [token for key, token in tokenizer.special_tokens_map.items() if key != "unk_token"]
    kept = {str(t) for value in others for t in (value if isinstance(value, list) else [value])}
    return frozenset(i for token, i in names.items() if token != tokenizer.unk_token or token in kept)
