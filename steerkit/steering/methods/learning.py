"""What trained steering methods share: pairs as examples, and the training of an edit's tensors through the steered model.

The model is frozen; what is trained are tensors inside a `SteeringVector` that is made anew for every forward, so that gradients
reach them through `model.steer`. Of a pair only what follows the tokens that its sides have in common is learned.

With a `reference` model, examples are weighed by their excess loss over it (`finetune.DRRho`): of a cross-entropy, a side's nats a
token; of a preference loss, -log σ(β s Δ) less -log σ(β Δ_ref), Δ_ref being the reference's Δ. A reference prefers one side; its
loss is taken as if it preferred the other for s = -1, so that a pair counts alike in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerkit import finetune
from steerkit.errors import InputError
from steerkit.finetune import DRRho, Example, OptimiseConfig, Reduction
from steerkit.models import HookedModel
from steerkit.steering.methods.base import Method
from steerkit.steering.methods.below import Below, standing_in
from steerkit.steering.pairs import Pairs
from steerkit.steering.reading import encode_side
from steerkit.steering.vector import SteeringVector, Strengths

Make = Callable[[], SteeringVector]


@dataclass(frozen=True)
class PairExample:
    """Both sides of a pair; their `start` is where they begin to differ."""

    positive: Example
    negative: Example
    margin: float = math.nan
    """Δ of a reference model, where there is one: how much further than the model as it is it prefers the positive side."""

    def __len__(self) -> int:
        return max(len(self.positive), len(self.negative))


def encode_pairs(model: HookedModel, pairs: Pairs) -> list[PairExample]:
    """Pairs as examples. Raises InputError for sides that are too long, or of which one is the beginning of the other."""
    found = []
    for i, pair in enumerate(pairs):
        (positive, start), (negative, _) = (
            encode_side(model, pair.prompt, side) for side in (pair.positive, pair.negative)
        )
        same = next((j for j, (a, b) in enumerate(zip(positive, negative)) if a != b), None)
        if same is None:
            raise InputError(
                f"One side of pair {i} of {pairs.name} is the beginning of the other: there is nothing to tell them apart by."
            )
        start = max(1, start, same)
        found.append(PairExample(Example(positive, start), Example(negative, start)))
    return found


def sides_of(examples: Sequence[PairExample]) -> list[Example]:
    """Positive sides, then negative ones."""
    return [e.positive for e in examples] + [e.negative for e in examples]


def preference(
    model: HookedModel,
    make: Make,
    batch: Sequence[PairExample],
    *,
    beta: float,
    signs: Tensor | None = None,
    below: Below | None = None,
    weigh: DRRho | None = None,
    likelihood: float = 0.0,
) -> Tensor:
    """-log σ(β s Δ), mean over pairs; Δ = log π(y+)/π(y-) - log π_ref(y+)/π_ref(y-), `signs` s of ±1 for each pair or all +1.

    `weigh` weighs the pairs by their excess over a reference's loss, from their `margin`; `likelihood` times the cross-entropy of
    the sides that s asks for, in nats a token, is added. The examples carry π_ref. Rafailov et al. 2023, https://arxiv.org/abs/2305.18290,
    bidirectional as in Cao et al. 2024.
    """
    examples = sides_of(batch)
    strength = torch.ones(len(batch)) if signs is None else signs
    with standing_in(below, examples):
        found = steered_log_probs(model, make(), examples, torch.cat([strength, strength]))
    positive, negative = found.chunk(2)
    reference = torch.tensor([_gap(e) for e in batch]).to(found)
    margin = beta * strength.to(found) * (positive - negative - reference)
    losses = -torch.nn.functional.logsigmoid(margin)
    fluent = 0.0 * losses
    if likelihood:
        lengths = torch.tensor([len(e) - e.start for e in examples]).to(found)
        own, other = (-found / lengths).chunk(2)
        fluent = likelihood * torch.where(strength.to(found) > 0, own, other)
    if weigh is None:
        return (losses + fluent).mean()
    reached = -torch.nn.functional.logsigmoid(beta * torch.tensor([e.margin for e in batch]).to(losses))
    return (weigh.of_excess(losses, reached) * losses + fluent).mean()


def steered_log_probs(
    model: HookedModel,
    vector: SteeringVector,
    examples: Sequence[Example],
    strength: Strengths = 1.0,
) -> Tensor:
    """Log-probability of each example's tokens from `start` on, what comes before being the prompt; (batch,)."""
    lengths = torch.tensor([e.start for e in examples])
    with model.steer(vector, strength=strength, prompt_lengths=lengths):
        return finetune.log_probs(model, examples)


def steered_cross_entropy(
    model: HookedModel,
    vector: SteeringVector,
    examples: Sequence[Example],
    reduction: Reduction = finetune.mean,
    below: Below | None = None,
) -> Tensor:
    """`finetune.cross_entropy` of the steered model, what comes before `start` being the prompt."""
    lengths = torch.tensor([e.start for e in examples])
    with standing_in(below, examples), model.steer(vector, prompt_lengths=lengths):
        return finetune.cross_entropy(model, examples, reduction)


def with_references(model: HookedModel, examples: Sequence[PairExample]) -> list[PairExample]:
    """The pairs with both sides' log-probabilities under the model as it is: once, not at every step."""
    sides = finetune.with_reference(model, sides_of(examples))
    return [PairExample(*pair) for pair in zip(sides[: len(examples)], sides[len(examples) :])]


def with_margins(reference: HookedModel, examples: Sequence[PairExample]) -> list[PairExample]:
    """The pairs, which carry the model's own log-probabilities, with the Δ of a reference model."""
    theirs = with_references(reference, examples)
    return [replace(own, margin=_gap(other) - _gap(own)) for own, other in zip(examples, theirs)]


def _gap(example: PairExample) -> float:
    return example.positive.reference - example.negative.reference


@dataclass(frozen=True)
class Trained(OptimiseConfig, Method):
    """A method that trains what it puts into the model: the settings of the loop are its own."""

    quiet: bool = True
    """False: show progress on stderr."""
    reference: Any = None
    """A model, or the name of one, with the same tokens: examples are weighed by their excess loss over it."""
    tau: float = 0.5
    """τ of these weights, in nats of the loss: the smaller, the more the greatest excess counts; ∞: all alike."""

    needs_lm_head: ClassVar[bool] = True

    def weigh(self) -> DRRho | None:
        """The weights of a training run that begins; None without a reference."""
        return None if self.reference is None else DRRho(self.tau)

    def examples(self, model: HookedModel, pairs: Pairs, *, preferences: bool = False) -> list[PairExample]:
        """The pairs with the log-probabilities that a loss needs, of preferences or of cross-entropies.

        Raises InputError for a reference model of other tokens.
        """
        found = encode_pairs(model, pairs)
        if preferences:
            found = with_references(model, found)
        if self.reference is None:
            return found
        given = self.reference
        judge = given if isinstance(given, HookedModel) else HookedModel.from_pretrained(given)
        if judge.d_vocab != model.d_vocab or not judge.has_lm_head:
            raise InputError(
                f"The reference {judge.name} does not predict the {model.d_vocab} tokens of {model.name}: "
                "take a language model with the same tokenizer."
            )
        return with_margins(judge, found) if preferences else with_references(judge, found)

    def provenance(self, model: HookedModel, pairs: Pairs, sites: Sequence[str]) -> dict[str, Any]:
        found = super().provenance(model, pairs, sites)
        found["settings"].pop("quiet")
        if isinstance(self.reference, HookedModel):
            found["settings"]["reference"] = self.reference.name
        return {**found, "seed": self.seed}


def detached(vector: SteeringVector) -> SteeringVector:
    """The trained vector as a value: copies on the CPU, float32, out of the graph."""
    edits = []
    for edit in vector.edits:
        tensors: dict[str, Any] = {
            name: tensor.detach().cpu().float().clone() for name, tensor in edit.tensors().items()
        }
        edits.append(replace(edit, **tensors))
    return replace(vector, edits=tuple(edits))
