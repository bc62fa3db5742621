"""What the model would say after each layer: the logit lens and the tuned lens.

    logit lens    softmax(unembed(norm(h_l)))                         norm: the model's final norm
    tuned lens    softmax(unembed(norm(h_l + W_l h_l + b_l)))         W_l, b_l fitted to KL(final ‖ lens)

    found = read_lens(model, prompts, answers="red")       # at the last token; rank and probability of the answer
    found = read_lens(model, texts, max_tokens=4096)       # at every token; the answer is the next token
    tuned = fit_tuned_lens(model, texts);  tuned.save("lens.safetensors")
    found = read_lens(model, held_out, lens=tuned)

nostalgebraist 2020, “interpreting GPT: the logit lens”; Belrose et al. 2023, https://arxiv.org/abs/2303.08112. A
translator begins as the identity, so that an unfitted tuned lens is the logit lens. The paper fits by SGD with
Nesterov momentum on 2^18 tokens a step; the default here is Adam at 1e-3 with linear decay, for batches that fit a small
machine. After the last block there is nothing to translate: its KL is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from probes.contrasts import Answers, Prompt, Run, answer_ids
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.sites import evaluating
from steerkit.stats import Interval, group_sums, jackknife
from steerkit.tokens import BATCH_TOKENS, TokenBatch, Tokenization, token_batches
from steerkit.value_files import read_values, write_values

FORMAT = "steerkit tuned lens 1"
_LOGITS = 2**25
"""Logits computed at a time."""


class TunedLens(nn.Module):
    """An affine translator for the stream before and after every block but the last."""

    def __init__(self, n_layers: int, d_model: int, fingerprint: str = "") -> None:
        super().__init__()
        self.fingerprint = fingerprint
        """Of the model that it was fitted to."""
        self.weight = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(n_layers, d_model))

    def translate(self, resid: Float[Tensor, "... d_model"], layer: int) -> Float[Tensor, "... d_model"]:
        """The stream at the `layer`-th of `lens_sites`, as the final norm is to read it. The last stays as it is."""
        if layer == len(self.bias):
            return resid
        h = resid.to(self.weight)
        return (h + h @ self.weight[layer].T + self.bias[layer]).to(resid)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        return write_values(path, self.state_dict(), {"format": FORMAT, "model": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what `save` wrote. Raises InputError for a missing or foreign file, CheckpointError for a damaged one."""
        tensors, known = read_values(path, "tuned lens", FORMAT)
        n_layers, d_model = tensors["bias"].shape
        lens = cls(n_layers, d_model, known["model"])
        lens.load_state_dict(tensors)
        return lens

    def __repr__(self) -> str:
        return f"TunedLens({len(self.bias)} translators, d_model {self.bias.shape[1]})"


@dataclass(frozen=True)
class LensReading:
    """What a lens shows, site by site, at every token that was read."""

    sites: tuple[str, ...]
    kl: Float[np.ndarray, "sites n"] = field(repr=False)
    """KL(final ‖ lens), nats."""
    top: Int[np.ndarray, "sites n"] = field(repr=False)
    """The token that the lens finds most likely."""
    probability: Float[np.ndarray, "sites n"] | None = field(repr=False)
    """Of the answer; None where there is none (masked language models without answers)."""
    rank: Int[np.ndarray, "sites n"] | None = field(repr=False)
    """How many tokens are more likely than the answer."""
    document: Int[np.ndarray, " n"] = field(repr=False)
    tuned: bool

    def mean(self, what: str = "kl") -> list[Interval]:
        """Mean over tokens of `kl`, `probability` or `rank` at each site; intervals over documents, two at least."""
        values = getattr(self, what)
        if values is None:
            raise InputError(f"There is no {what}: give answers to read_lens.")
        ones = np.ones(len(self.document))
        return [
            jackknife(group_sums(np.stack([row, ones], 1), self.document), lambda s: s[..., 0] / s[..., 1])
            for row in values
        ]

    def to_dict(self) -> dict[str, Any]:
        found = {"sites": list(self.sites), "tokens": self.kl.shape[1], "kl": self.kl.mean(1).tolist()}
        if self.probability is not None and self.rank is not None:
            found |= {
                "probability": self.probability.mean(1).tolist(),
                "median_rank": np.median(self.rank, axis=1).tolist(),
            }
        return found

    def __repr__(self) -> str:
        lines = [f"{'tuned' if self.tuned else 'logit'} lens on {self.kl.shape[1]} tokens"]
        for i, site in enumerate(self.sites):
            line = f"  {site}: KL to the final {self.kl[i].mean():.4g}"
            if self.probability is not None and self.rank is not None:
                line += (
                    f", answer p {self.probability[i].mean():.4g}, median rank {np.median(self.rank[i]):.0f}"
                )
            lines.append(line)
        return "\n".join(lines)

    def figure(self) -> Any:
        """KL by site, and the answer's probability where there is one; bars are 95 % intervals over documents."""
        from plotly.subplots import make_subplots

        shown = [("kl", "KL to the final, nats")]
        if self.probability is not None:
            shown.append(("probability", "probability of the answer"))
        figure = make_subplots(rows=1, cols=len(shown))
        for column, (what, label) in enumerate(shown, 1):
            means = getattr(self, what).mean(1)
            bars = None
            if len(set(self.document.tolist())) > 1:
                bars = {"array": [i.high - i.estimate for i in self.mean(what)]}
            figure.add_scatter(
                x=list(self.sites), y=means, error_y=bars, mode="lines+markers", row=1, col=column,
                hovertemplate="%{x}: %{y:.4f}<extra></extra>",
            )  # fmt: skip
            figure.update_yaxes(title={"text": label}, row=1, col=column)
        figure.update_layout(showlegend=False, height=400)
        return figure


def lens_sites(model: HookedModel) -> list[str]:
    """The stream before the first block and after every block. Raises SiteError where it cannot be read."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.n_layers))]
    return [model.site(name).name for name in names]


@torch.no_grad()
def read_lens(
    model: HookedModel,
    texts: Documents | Sequence[Prompt] | str,
    *,
    answers: Answers | None = None,
    lens: TunedLens | None = None,
    tokenization: Tokenization | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> LensReading:
    """Read prompts at their last token (or mask token), or, without answers, texts at every token.

    Raises InputError for a model without a plain unembedding, a lens of another model, and an answer of
    several tokens; NumericsError on NaN.
    """
    reader = _Reader(model, lens)
    batches = (
        _token_rows(model, texts, tokenization, max_tokens, batch_tokens)
        if answers is None
        else _prompt_rows(model, texts, answers)
    )
    found: list[list[np.ndarray]] = []
    with evaluating(model.model):
        for rows in batches:
            streams, final = reader.streams(rows.ids, rows.mask)
            acts = [stream[rows.where] for stream in streams]
            states = final[rows.where]
            for part in torch.arange(len(states)).split(max(1, _LOGITS // model.d_vocab)):
                if not len(part):
                    continue
                target = None if rows.answers is None else rows.answers[part]
                found.append(reader.measure([act[part] for act in acts], states[part], target))
                found[-1].append(rows.document[part].numpy())
    if not found:
        raise InputError("No token of the texts is followed by another: give longer ones, or answers.")
    columns = [np.concatenate(parts, axis=-1) for parts in zip(*found)]
    kl, top, document = columns[0], columns[1], columns[-1]
    probability, rank = columns[2:4] if len(columns) == 5 else (None, None)
    return LensReading(tuple(reader.sites), kl, top, probability, rank, document, lens is not None)


def fit_tuned_lens(
    model: HookedModel,
    texts: Documents | Sequence[str] | str,
    *,
    steps: int = 250,
    batch_tokens: int = 2048,
    learning_rate: float = 1e-3,
    tokenization: Tokenization | None = None,
    seed: int = 0,
) -> TunedLens:
    """Fit translators to KL(final ‖ lens) on text, which is read again from its beginning where it ends.

    Raises NumericsError when the loss is NaN.
    """
    lens = TunedLens(model.n_layers, model.d_model, model.fingerprint).to(model.device)
    reader = _Reader(model, lens)
    parameters = list(lens.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    stream = _endless(model, load_documents(texts), tokenization, batch_tokens, seed)
    with evaluating(model.model):
        for step, batch in enumerate(itertools.islice(stream, steps)):
            with torch.no_grad():
                streams, final = reader.streams(batch.input_ids, batch.attention_mask)
                target = model.unembed(final[batch.keep]).float().log_softmax(-1)
            with torch.enable_grad():
                loss = torch.zeros((), device=target.device)
                for layer, act in enumerate(streams[:-1]):
                    loss = loss + _kl(target, reader.log_probabilities(act[batch.keep], layer)).mean()
                gradients = torch.autograd.grad(loss, parameters)  # none for the model's own weights
            if not bool(loss.isfinite()):
                raise NumericsError(
                    f"The tuned lens's loss is NaN or inf in step {step}: lower learning_rate."
                )
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()
            decay.step()
    lens.zero_grad()
    return lens.requires_grad_(False).eval()


def final_norm(model: HookedModel) -> Callable[[Tensor], Tensor]:
    """The norm between the last block and the unembedding; nothing where there is none."""
    site = model.sites.get("ln_final")
    return model.model.get_submodule(site.path) if site is not None and site.verified else lambda x: x


def next_tokens(batch: TokenBatch) -> tuple[Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """(tokens that are followed by one that counts, ids of those that follow)."""
    followed = batch.keep & F.pad(batch.keep[:, 1:], (0, 1))
    return followed, batch.input_ids.roll(-1, dims=1)


class _Reader:
    """The streams that a lens reads, and what it makes of them."""

    def __init__(self, model: HookedModel, lens: TunedLens | None) -> None:
        self.model, self.lens, self.norm = model, lens, final_norm(model)
        self.sites = lens_sites(model)
        self._checked = False
        if not model.has_lm_head:
            raise InputError(f"{model.name} has no language-model head: a lens has nothing to read with.")
        if lens is not None and (
            lens.fingerprint != model.fingerprint or lens.bias.shape != (model.n_layers, model.d_model)
        ):
            raise InputError(f"The tuned lens was fitted to another model than {model.name}: fit one to it.")

    def streams(self, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """(activations at every site, final states). InputError where final states are not norm(stream)."""
        acts = self.model.run(ids, mask, sites=self.sites)
        streams = [acts[site].to(self.model.device) for site in self.sites]
        final = self.norm(streams[-1])
        if not self._checked:
            true = self.model.final(ids, mask)
            if not bool(true[mask.bool()].isfinite().all()):
                raise NumericsError(f"The final states of {self.model.name} are NaN or inf.")
            if final.shape != true.shape or not torch.allclose(final, true, rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"{self.model.name} has more than a norm between its last block and its unembedding: "
                    "a lens would leave that out."
                )
            self._checked = True
        return streams, final

    def log_probabilities(self, act: Float[Tensor, "n d_model"], layer: int) -> Float[Tensor, "n d_vocab"]:
        h = act if self.lens is None else self.lens.translate(act, layer)
        return self.model.unembed(self.norm(h)).float().log_softmax(-1)

    def measure(
        self, acts: Sequence[Tensor], final: Tensor, answers: Int[Tensor, " n"] | None
    ) -> list[np.ndarray]:
        """[kl, top, probability and rank if there are answers], (sites, n) each."""
        target = self.model.unembed(final).float().log_softmax(-1)
        columns: list[list[Tensor]] = [[], [], [], []]
        for layer, act in enumerate(acts):
            found = self.log_probabilities(act, layer)
            columns[0].append(_kl(target, found))
            columns[1].append(found.argmax(-1))
            if answers is not None:
                own = found.gather(-1, answers.to(found.device)[:, None])
                columns[2].append(own[:, 0].exp())
                columns[3].append((found > own).sum(-1))
        if not bool(torch.stack(columns[0]).isfinite().all()):
            raise NumericsError(f"The lens on {self.model.name} gives NaN or inf.")
        return [torch.stack(column).cpu().numpy() for column in columns if column]


@dataclass
class _Rows:
    """A batch, and which of its tokens are read."""

    ids: Tensor
    mask: Tensor
    where: tuple[Tensor, Tensor]
    answers: Tensor | None
    document: Tensor


def _token_rows(
    model: HookedModel,
    texts: Any,
    tokenization: Tokenization | None,
    max_tokens: int | None,
    batch_tokens: int,
) -> Iterator[_Rows]:
    for batch in token_batches(model, texts, tokenization, batch_tokens=batch_tokens, max_tokens=max_tokens):
        followed, following = next_tokens(batch)
        read = followed if model.is_causal else batch.keep
        row, position = read.nonzero(as_tuple=True)
        answers = following[row, position] if model.is_causal else None
        document = batch.token_document[row, position].cpu()
        yield _Rows(batch.input_ids, batch.attention_mask, (row, position), answers, document)


def _prompt_rows(model: HookedModel, prompts: Any, answers: Answers) -> Iterator[_Rows]:
    run = Run.of(model, [prompts] if isinstance(prompts, str) else list(prompts))
    rows = torch.arange(len(run), device=run.read.device)
    yield _Rows(run.ids, run.mask, (rows, run.read), answer_ids(model, answers, len(run)), rows.cpu())


def _endless(
    model: HookedModel,
    documents: Documents,
    tokenization: Tokenization | None,
    batch_tokens: int,
    seed: int,
) -> Iterator[TokenBatch]:
    """Batches of the documents, shuffled anew each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        yield from token_batches(model, documents, tokenization, batch_tokens=batch_tokens, order=order)


def _kl(target: Float[Tensor, "n d_vocab"], found: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    return F.kl_div(found, target, reduction="none", log_target=True).sum(-1)
