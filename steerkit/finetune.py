"""The one training loop for what is put into a model: vectors, low-rank edits, adapters.

    examples = encode_texts(model, texts)
    losses = optimise([v], examples, lambda batch: -log_probs(model, batch).mean(), OptimiseConfig(lr=1e-2))

The model itself stays as it is: its weights get no gradients while `frozen(model)` is open, and what is trained acts through hooks
or an adapter that the loss opens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.runs import progress

_WINDOW = 16
"""Batches that are sorted by length together, so that few pads are computed."""
SCHEDULES = ("linear", "cosine", "constant")


class Sized(Protocol):
    """What is trained on: it says how long it is, in tokens."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Example:
    """A text to be predicted, from the token `start` on."""

    ids: tuple[int, ...]
    start: int = 1
    reference: float = math.nan
    """Its log-probability under a reference model, where there is one (`with_reference`)."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class OptimiseConfig:
    """Settings of the loop."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    epochs: float = 1.0
    """Times that every example is seen."""
    batch_size: int = 16
    schedule: str = "linear"
    """How the rate falls to 0 after the warm-up: `linear`, `cosine`, or `constant` (it does not)."""
    warmup: float = 0.05
    """Share of the steps over which it rises."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Greatest norm of the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    """Order of the examples."""

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive.")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to 1.")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule is {self.schedule!r}; it is one of {', '.join(SCHEDULES)}.")

    def steps(self, n_examples: int) -> int:
        """Steps of a run."""
        return max(1, math.ceil(self.epochs * n_examples / self.batch_size))

    def factor(self, step: int, n_steps: int) -> float:
        """Factor of the rate at `step`, from 0."""
        warmup = round(self.warmup * n_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, n_steps - warmup)
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


T = TypeVar("T", bound=Sized)


def optimise(
    parameters: Iterable[Tensor],
    examples: Sequence[T],
    loss: Callable[[list[T]], Tensor],
    config: OptimiseConfig,
    *,
    before_step: Callable[[], Any] | None = None,
    after_step: Callable[[], Any] | None = None,
    title: str = "training",
    quiet: bool = True,
) -> list[float]:
    """Train `parameters` so that `loss`, of a batch of examples, is small; the losses, step by step.

    `before_step`, with the gradients there, and `after_step` are for constraints. Raises InputError without examples,
    NumericsError – before the step has changed anything – when the loss is NaN or infinite.
    """
    if not examples:
        raise InputError("There are no examples to train on.")
    trained = list(parameters)
    optimiser = torch.optim.AdamW(
        trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    n_steps = config.steps(len(examples))
    batches = batch_order(list(map(len, examples)), config.batch_size, config.seed)
    losses: list[float] = []
    with progress(n_steps, title, "steps", quiet=quiet) as bar:
        for step in range(n_steps):
            value = loss([examples[i] for i in next(batches)])
            number = float(value.detach())
            if not math.isfinite(number):
                raise NumericsError(
                    f"The loss is {number} at step {step} of {title}: lower lr ({config.lr}), or look at the examples."
                )
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            if before_step is not None:
                with torch.no_grad():
                    before_step()
            nn.utils.clip_grad_norm_(trained, config.clip)
            for group in optimiser.param_groups:
                group["lr"] = config.lr * config.factor(step, n_steps)
            optimiser.step()
            if after_step is not None:
                with torch.no_grad():
                    after_step()
            losses.append(number)
            bar.advance(1, loss=number)
    return losses


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end, of indices: every example once an epoch, in random order, those of like length together."""
    rng = random.Random(seed)
    size = min(batch_size, len(lengths))
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for first in range(0, len(order), _WINDOW * size):
            window = sorted(order[first : first + _WINDOW * size], key=lambda i: lengths[i])
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(batches)
        yield from batches


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Inside, no weight of the model takes a gradient and no dropout acts; afterwards all is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.model.parameters()]
    training = [module for module in model.model.modules() if module.training]
    model.model.requires_grad_(False)
    model.model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def encode_texts(model: HookedModel, texts: Iterable[str]) -> list[Example]:
    """Whole texts as examples. Raises InputError for one that is too long or has no token to predict."""
    found = []
    for text in texts:
        ids = tuple(model.tokenizer(text)["input_ids"])
        if not 2 <= len(ids) <= model.context:
            raise InputError(
                f"A text of {len(ids)} tokens cannot be learned from: {model.name} takes 2 to {model.context}. {text[:60]!r}"
            )
        found.append(Example(ids))
    return found


def padded(
    model: HookedModel, examples: Sequence[Example]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """(ids, mask), filled up on the right."""
    longest = max(map(len, examples))
    ids = torch.tensor([[*e.ids, *[model.pad_id] * (longest - len(e))] for e in examples])
    mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in examples])
    return ids.to(model.device), mask.to(model.device)


def token_log_probs(
    model: HookedModel, examples: Sequence[Example]
) -> tuple[Float[Tensor, "batch pos_less_1"], Float[Tensor, "batch pos_less_1"]]:
    """(log-probability of each token but the first given those before it, 1 where it counts: from `start` on, no pads)."""
    ids, mask = padded(model, examples)
    logits = at_least_float32(model.logits(ids, mask)[:, :-1])
    found = -nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    starts = torch.tensor([e.start for e in examples], device=ids.device)[:, None]
    places = torch.arange(1, ids.shape[1], device=ids.device)[None]
    counted = (places >= starts) & mask[:, 1:].bool()
    return found * counted, counted.to(found.dtype)


def at_least_float32(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The same in float32, unless it is in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_probs(model: HookedModel, examples: Sequence[Example]) -> Float[Tensor, " batch"]:
    """Log-probability of each example's tokens from `start` on, in nats."""
    return token_log_probs(model, examples)[0].sum(1)


Reduction = Callable[[Float[Tensor, " batch"], Sequence[Example]], Tensor]
"""From the losses of a batch's examples to the one that is trained on."""


def mean(losses: Float[Tensor, " batch"], examples: Sequence[Example]) -> Tensor:
    """Every example alike."""
    return losses.mean()


class DRRho:
    """Reweighting by excess loss over a reference model: what the reference finds easy and the model does not yet, counts most.

        loss = Σ_i w_i l_i / n,   w_i = exp((l_i - l_ref,i) / τ) / u      (no gradient through w)
        u ← (1 - γ) u + γ mean_i exp((l_i - l_ref,i) / τ)

    l are losses per counted token. Wei et al. 2025, https://arxiv.org/abs/2505.06699: distributionally robust optimisation around
    the reference, its Kullback-Leibler dual; u estimates the normaliser of all data from one batch after another. τ → ∞ is the
    plain mean. Examples need their `reference`.
    """

    def __init__(self, tau: float = 0.5, gamma: float = 0.9) -> None:
        if not tau > 0 or not 0 < gamma <= 1:
            raise InputError(f"tau is {tau} and gamma {gamma}; tau is positive, gamma above 0 and at most 1.")
        self.tau, self.gamma = tau, gamma
        self.log_normaliser: float | None = None

    def excess(
        self, losses: Float[Tensor, " batch"], reference: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """(l - l_ref) / τ, without gradient: the logarithm of w_i u."""
        return (losses.detach() - reference.to(losses)) / self.tau

    def move(self, log_mean: float) -> float:
        """log u, moved on by a batch's log mean_i exp((l_i - l_ref,i) / τ)."""
        if self.log_normaliser is None:
            self.log_normaliser = log_mean
        else:
            before = math.log1p(-self.gamma) + self.log_normaliser if self.gamma < 1 else -math.inf
            both = torch.tensor([before, math.log(self.gamma) + log_mean], dtype=torch.float64)
            self.log_normaliser = float(both.logsumexp(0))
        return self.log_normaliser

    def weights(
        self, losses: Float[Tensor, " batch"], examples: Sequence[Example]
    ) -> Float[Tensor, " batch"]:
        """w_i, and u moved on by this batch. Raises InputError for examples without a reference."""
        reference = torch.tensor([-e.reference / max(1, len(e) - e.start) for e in examples])
        if not reference.isfinite().all():
            raise InputError(
                "DRRho needs every example's log-probability under a reference model: with_reference."
            )
        return self.of_excess(losses, reference)

    def of_excess(
        self, losses: Float[Tensor, " batch"], reference: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """w_i of losses of any kind beside the reference's, and u moved on by this batch."""
        excess = self.excess(losses, reference)
        return (excess - self.move(float(excess.logsumexp(0)) - math.log(len(excess)))).exp()

    def __call__(self, losses: Float[Tensor, " batch"], examples: Sequence[Example]) -> Tensor:
        return (self.weights(losses, examples) * losses).mean()


def cross_entropy(
    model: HookedModel, examples: Sequence[Example], reduction: Reduction = mean
) -> Float[Tensor, ""]:
    """Mean over the examples, or another reduction, of their losses: nats a counted token."""
    found, counted = token_log_probs(model, examples)
    return reduction(-found.sum(1) / counted.sum(1).clamp_min(1), examples)


def with_reference(model: HookedModel, examples: Sequence[Example]) -> list[Example]:
    """The examples with their log-probabilities under `model`."""
    return [
        replace(e, reference=value) for e, value in zip(examples, all_log_probs(model, examples).tolist())
    ]


def all_log_probs(
    model: HookedModel, examples: Sequence[Example], batch_tokens: int = 8192
) -> Float[Tensor, " n"]:
    """`log_probs` of many examples, without gradients, in batches of like length; on the CPU."""
    found = torch.empty(len(examples), dtype=torch.promote_types(model.dtype, torch.float32))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    with torch.no_grad():
        while order:
            size = max(1, batch_tokens // max(1, len(examples[order[-1]])))
            part, order = order[-size:], order[:-size]
            found[part] = log_probs(model, [examples[i] for i in part]).cpu()
    return found
