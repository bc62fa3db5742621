"""Following a model's forwards, so that an intervention knows which token of the text each position is.

`Tracker` learns from the arguments of the model's trunk what its forward is about: a whole text, or, with a cache, the tokens that
follow; and from `generate`, which is watched while the tracker is open, where the prompt ends when there is no cache.

An encoder-decoder model has a tracker for each of its stacks: the encoder's text is all prompt, the decoder's begins with what it
is given to begin with.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steerkit.errors import InputError
from steerkit.lens import is_transformer_lens
from steerkit.models import HookedModel
from steerkit.sites import first_tensor
from steerkit.steering.where import Tokens


@dataclass
class _Prompt:
    """What the first forward of a text has told."""

    columns: int
    """Its width, pads included."""
    length: Int[Tensor, "batch 1"]
    after: Int[Tensor, "batch 1"] | None
    padded_right: bool


class Tracker:
    """The tokens of the forward that is running: `tokens`, None before the first one."""

    def __init__(
        self,
        model: HookedModel,
        marker: str | Sequence[int] | None = None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        stack: str = "",
    ) -> None:
        """`stack`: `encoder` or `decoder` of a model that has both."""
        self.model, self.stack = model, stack
        self.marker = _marker_ids(model, marker)
        self.given = prompt_lengths
        self.tokens: Tokens | None = None
        self.on_prompt: Callable[[], None] = lambda: None
        """Called when a new text begins."""
        self._prompt: _Prompt | None = None
        self._generating: tuple[Tensor, Tensor | None] | None = None
        self._special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)

    @contextmanager
    def open(self) -> Iterator[Tracker]:
        thread = threading.get_ident()

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() == thread:
                self._enter(args, kwargs)

        inner: Any = self.model.model
        trunk = getattr(inner, f"get_{self.stack}")() if self.stack else self.model.trunk
        entered = _entered(trunk, enter)
        original = inner.generate if hasattr(inner, "generate") else None
        had = "generate" in vars(inner)
        if original is not None:

            @functools.wraps(original)
            def generate(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread or self._generating is not None:
                    return original(*args, **kwargs)
                ids, mask = _ids_of(args, kwargs), kwargs.get("attention_mask")
                if any(isinstance(given, str) for given in (*args, kwargs.get("input"))):
                    raise InputError("Give `generate` token ids while steering, or call HookedModel's own.")
                if self.stack == "decoder":
                    begun, mask = kwargs.get("decoder_input_ids"), None
                    ids = begun if begun is not None else None if ids is None else ids[:, :1]
                self._generating = None if ids is None else (ids, mask)
                self._prompt = None
                try:
                    return original(*args, **kwargs)
                finally:
                    self._generating = self._prompt = None

            object.__setattr__(inner, "generate", generate)
        try:
            with entered:
                yield self
        finally:
            if original is not None:
                if had:
                    object.__setattr__(inner, "generate", original)
                else:
                    vars(inner).pop("generate", None)
            self.tokens = self._prompt = None

    # one forward

    def _enter(self, args: tuple, kwargs: dict) -> None:
        ids = _ids_of(args, kwargs)
        shape = ids if ids is not None else kwargs.get("inputs_embeds")
        if shape is None:
            shape = first_tensor(args, kwargs)[1]
        assert shape is not None
        batch, columns = shape.shape[:2]
        past = _past_length(kwargs)
        device = shape.device
        if ids is None and not past and self._generating is not None:
            given = _expanded(
                self._generating[0], batch
            )  # embeddings of these: a HookedTransformer's `generate`
            ids = nn.functional.pad(given, (0, columns - given.shape[1]), value=-1)
        prompt = self._prompt
        if past and prompt is not None and not prompt.padded_right:
            length = _expanded(prompt.length, batch)
            position = length + (past - prompt.columns + torch.arange(columns, device=device))
            self.tokens = Tokens(
                position=position,
                real=position >= 0,
                bos=torch.zeros_like(position, dtype=torch.bool),
                prompt_length=length,
                after=_expanded(prompt.after, batch),
                uniform_step=past - prompt.columns + 1 if columns == 1 else None,
            )
            return
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            mask = torch.ones(batch, past + columns, dtype=torch.int64, device=device)
        mask = mask.to(device).long()
        position = (mask.cumsum(-1) - 1)[:, past:]
        real = mask[:, past:].bool()
        bos = self._is_bos(ids, position) & real
        if prompt is None or not past:
            prompt = self._begin(ids, mask, past + columns)
        length = _expanded(prompt.length, batch)
        self.tokens = Tokens(position, real, bos, length, _expanded(prompt.after, batch))

    def _begin(self, ids: Tensor | None, mask: Tensor, columns: int) -> _Prompt:
        """Take in the first forward of a text – or, while a text is generated without a cache, any."""
        if self._generating is not None and self._prompt is not None:
            return self._prompt
        lengths = mask.sum(-1, keepdim=True)
        if self._generating is not None:
            prompt_ids, prompt_mask = self._generating
            if prompt_mask is not None and prompt_mask.dim() == 2:
                lengths = prompt_mask.to(mask).sum(-1, keepdim=True)
            else:
                lengths = torch.full_like(lengths[: len(prompt_ids)], prompt_ids.shape[1])
            columns = prompt_ids.shape[1]
        if self.given is not None:
            given = torch.as_tensor(self.given, device=mask.device).view(-1, 1)
            lengths = _expanded(given, len(mask))
            assert lengths is not None
        after = None
        if self.marker is not None:
            if ids is None:
                raise InputError("A marker can only be found where the model is given token ids.")
            after = _after(ids, mask, self.marker, lengths)
        padded_right = bool((mask[:, -1] == 0).any())
        self._prompt = _Prompt(columns, lengths, after, padded_right)
        self.on_prompt()
        return self._prompt

    def _is_bos(self, ids: Tensor | None, position: Tensor) -> Tensor:
        first = position == 0
        if ids is None or not len(self._special):
            return torch.zeros_like(first)
        return first & torch.isin(ids, self._special.to(ids.device))


@contextmanager
def _entered(trunk: nn.Module, enter: Callable[[nn.Module, tuple, dict], None]) -> Iterator[None]:
    """`enter` is called before every forward; also of a HookedTransformer, whose `generate` calls `forward` past all hooks."""
    if not is_transformer_lens(trunk):
        handle = trunk.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    own, original = vars(trunk).get("forward"), trunk.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        enter(trunk, args, kwargs)
        return original(*args, **kwargs)

    object.__setattr__(trunk, "forward", forward)
    try:
        yield
    finally:
        if own is None:
            vars(trunk).pop("forward")
        else:
            object.__setattr__(trunk, "forward", own)


def _ids_of(args: tuple, kwargs: dict) -> Tensor | None:
    for key in ("input_ids", "inputs", "input"):
        if isinstance(kwargs.get(key), Tensor):
            return kwargs[key]
    first = args[0] if args else None
    return first if isinstance(first, Tensor) and not first.is_floating_point() else None


def _past_length(kwargs: dict) -> int:
    """Columns that a cache holds already."""
    cache = kwargs.get("past_key_values")
    if cache is not None:
        return int(cache.get_seq_length())
    cache = kwargs.get("past_kv_cache")
    return 0 if cache is None else int(cache[0].past_keys.shape[1])


def _expanded(rows: Tensor | None, batch: int) -> Any:
    """Rows repeated for beams and several samples of a prompt."""
    if rows is None or len(rows) == batch:
        return rows
    if batch % len(rows):
        raise InputError(f"{len(rows)} rows were announced, and the forward has {batch}.")
    return rows.repeat_interleave(batch // len(rows), dim=0)


def _marker_ids(model: HookedModel, marker: str | Sequence[int] | None) -> Tensor | None:
    if marker is None:
        return None
    if isinstance(marker, str):
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer: give the marker as token ids.")
        text, marker = marker, model.tokenizer(marker, add_special_tokens=False)["input_ids"]
        if not marker or model.tokenizer.unk_token_id in marker:
            raise InputError(f"The tokenizer of {model.name} does not know the marker {text!r}.")
    return torch.tensor(list(marker), dtype=torch.int64)


def _after(ids: Tensor, mask: Tensor, marker: Tensor, lengths: Tensor) -> Int[Tensor, "batch 1"]:
    """Position of the first token after the last marker of each row's prompt. Raises InputError where there is none."""
    n, columns = len(marker), ids.shape[1]
    marker = marker.to(ids.device)
    if columns < n:
        raise InputError("The prompt is shorter than the marker after which is to be steered.")
    position = mask[:, :columns].cumsum(-1) - 1
    found = (ids.unfold(1, n, 1) == marker).all(-1) & (position[:, n - 1 :] < lengths)
    if not bool(found.any(-1).all()):
        row = int((~found.any(-1)).nonzero()[0])
        raise InputError(f"The marker (tokens {marker.tolist()}) does not occur in prompt {row}.")
    last = found.shape[1] - 1 - found.flip(-1).int().argmax(-1)
    end = last + n - 1
    return position.gather(1, end[:, None]) + 1
