"""What a latent does when it is steered: greedy continuations of one prompt, and how far they are from the unsteered model.

    x → x + s · max_i · d_i          at the site (a transcoder's target), on every token of the prompt and of what follows

so that strength s = 1 is the largest activation that the latent had on the text. The divergence is KL(steered ‖ unsteered) of the
full next-token distributions, mean over the generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.architectures.base import SAE
from sae.dashboard.content import short
from sae.latents import LatentStats
from steerkit.errors import InputError
from steerkit.lens import is_transformer_lens
from steerkit.loading import quiet
from steerkit.models import HookedModel

STRENGTHS = (-1.0, 1.0, 2.0, 4.0)
NEW_TOKENS = 24
_PROMPT_TOKENS = 6
_ELEMENTS = 1 << 25
_ROWS = 256


class Preview:
    """Steered continuations of `prompt` (by default the first words of a text) for the latents that it is called with."""

    def __init__(self, model: HookedModel, sae: SAE, stats: LatentStats, prompt: str | None = None) -> None:
        if not (model.is_causal and model.has_lm_head):
            raise InputError(f"{model.name} continues no text: there is nothing to preview steering on.")
        self.model, self.sae, self.stats = model, sae, stats
        self.site = sae.config.outputs(stats.info["site"])[0]
        self.prompt = prompt if prompt is not None else _first_words(model, stats)
        self.ids = torch.tensor([prompt_ids(model, self.prompt)], device=model.device)
        if self.ids.shape[1] + NEW_TOKENS > model.context:
            raise InputError(
                f"The prompt has {self.ids.shape[1]} tokens: with {NEW_TOKENS} new ones it exceeds {model.name}'s context."
            )
        self.unsteered = self._texts(self._continued(self.ids))[0]

    @torch.no_grad()
    def __call__(self, latents: Sequence[int]) -> list[dict[str, Any] | None]:
        """The records of the latents; None for one that was never active."""
        living = [i for i in latents if self.stats.maximum[i] > 0]
        pairs = [(i, s) for i in living for s in STRENGTHS]
        length = self.ids.shape[1] + NEW_TOKENS
        step = max(1, min(_ROWS, _ELEMENTS // (length * self.model.d_vocab)))
        found = [
            row for start in range(0, len(pairs), step) for row in self._steered(pairs[start : start + step])
        ]
        rows = {i: found[n * len(STRENGTHS) : (n + 1) * len(STRENGTHS)] for n, i in enumerate(living)}
        return [self._record(i, rows[i]) if i in rows else None for i in latents]

    def _record(self, latent: int, rows: list[tuple[float, str, float]]) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "unit": f"times its largest activation ({self.stats.maximum[latent]:.4g})",
            "rows": [[0, self.unsteered, 0.0], *map(list, rows)],
        }

    def _steered(self, pairs: Sequence[tuple[int, float]]) -> list[tuple[float, str, float]]:
        """(strength, text, nats of KL a token) of each (latent, strength)."""
        latent = torch.tensor([i for i, _ in pairs])
        size = torch.tensor([s * float(self.stats.maximum[i]) for i, s in pairs])
        step = self.sae.W_dec[latent.to(self.sae.device)].float() * size.to(self.sae.device)[:, None]

        def push(act: Tensor) -> Tensor:
            return act + step[:, None].to(act.device, act.dtype)

        prompts = self.ids.expand(len(pairs), -1)
        with self.model.hooks({self.site: push}):
            rows = self._continued(prompts)
            own = self._log_probs(rows)
        base = self._log_probs(rows)
        kl = torch.where(own > -torch.inf, own.exp() * (own - base), 0.0).sum(-1).clamp_min(0)
        counted = self._generated(rows)
        mean = ((kl * counted).sum(1) / counted.sum(1)).tolist()
        return [(s, text, short(k)) for (_, s), text, k in zip(pairs, self._texts(rows), mean)]

    def _log_probs(self, rows: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows new d_vocab"]:
        """Of the next token, where each generated one follows."""
        logits = self.model.logits(rows)[:, self.ids.shape[1] - 1 : -1]
        return (
            logits.double().log_softmax(-1) if logits.device.type != "mps" else logits.float().log_softmax(-1)
        )

    def _generated(self, rows: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows new"]:
        """1 for the tokens up to the first that ends the text, with it."""
        new = rows[:, self.ids.shape[1] :]
        ended = torch.isin(new, torch.tensor(end_ids(self.model), device=new.device, dtype=new.dtype))
        return (ended.cumsum(1) - ended.int() == 0).double()

    def _texts(self, rows: Int[Tensor, "rows pos"]) -> list[str]:
        counts = self._generated(rows).sum(1).int().tolist()
        new = [row[:n] for row, n in zip(rows[:, self.ids.shape[1] :].tolist(), counts)]
        return self.model.tokenizer.batch_decode(new, skip_special_tokens=True)

    @torch.no_grad()
    def _continued(self, rows: Int[Tensor, "rows pos"]) -> Int[Tensor, "rows longer"]:
        """Rows with the likeliest tokens after them, `NEW_TOKENS` each, filled up after an end."""
        if is_transformer_lens(self.model.model):
            for _ in range(NEW_TOKENS):
                rows = torch.cat([rows, self.model.logits(rows)[:, -1:].argmax(-1).to(rows.device)], 1)
            return rows
        inner: Any = self.model.model
        with quiet():
            out = inner.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=NEW_TOKENS,
                pad_token_id=self.model.pad_id,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
            )
        missing = rows.shape[1] + NEW_TOKENS - out.shape[1]
        return torch.nn.functional.pad(out, (0, missing), value=self.model.pad_id)


def _first_words(model: HookedModel, stats: LatentStats) -> str:
    """The beginning of the first row of text that is kept."""
    ids = [i for i in stats.row(0).tolist() if i not in model.special_ids]
    return model.tokenizer.decode(ids[:_PROMPT_TOKENS]).strip()


def prompt_ids(model: HookedModel, prompt: str) -> list[int]:
    """As `generate` reads it: with BOS if the tokenizer adds one, without an end."""
    ids = list(model.tokenizer(prompt)["input_ids"])
    if len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise InputError("The prompt to steer on is empty: give some text.")
    return ids


def end_ids(model: HookedModel) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those that `generate` stops at."""
    own = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    several = own if isinstance(own, (list, tuple)) else [own]
    return sorted({i for i in (*several, model.tokenizer.eos_token_id) if isinstance(i, int)})
