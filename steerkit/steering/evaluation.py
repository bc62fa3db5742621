"""Evaluating steering without a judge model: what it brings about, what it costs in nats, and what else it changes.

    bench = Bench(model, prompts, StoryAttribute("mood", "happy"))
    found = bench.measure(vector, strength=2.0)
    found.effect, found.kl, found.floor, found.side_effects["tense"]         # intervals; bench.base is the unsteered model's

**Divergence** is KL(steered ‖ base) on the model's own steered samples: of the full next-token distributions at temperature 1 given
the same text, from a forward of each, summed over the generated tokens, the end of the text included. Its mean over samples is an
unbiased estimate, less noisy than log q - log p, of the divergence of the distributions of texts (when sampled at temperature 1).

Intervals are of a bootstrap over prompts: samples of one prompt resemble each other. All measurements of a bench draw alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.runs import jsonable
from steerkit.stats import Interval, Statistic, bootstrap, group_sums
from steerkit.steering.effects import Effect, StoryAttribute, apply_effect
from steerkit.steering.pairs import join
from steerkit.steering.propensity import QUANTITIES, Preferences, Propensity
from steerkit.steering.sampling import (
    Changed,
    Divergence,
    Ids,
    Samples,
    divergence,
    encode_prompts,
    sample,
    unchanged,
)
from steerkit.steering.story import READ, StoryTally, speaks_storyworld, tally
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

REPETITIVE = 0.9
"""Share of repeated 4-grams from which samples count as destroyed."""
UNKNOWN = Interval(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class SideEffect:
    """How far the values of an attribute that was not meant have moved."""

    tv: Interval
    """Total variation distance, 0 to 1, between the steered and the base model's distributions of values."""
    null: float
    """What it would be on average if steering changed nothing: finitely many samples always differ."""


@dataclass(frozen=True, repr=False)
class Measurement:
    """What a change of the model does to the texts it writes. Intervals without a value are NaN."""

    effect: Interval
    """Mean of the effect over the samples where it is known; of a propensity, over its pairs."""
    effect_base: Interval
    """The same of the unsteered model."""
    change: Interval
    """effect - effect_base, prompt by prompt."""
    known: float
    """Share of the samples (of a propensity: of the pairs) where it is known."""
    kl: Interval
    """KL(steered ‖ base) in nats a sequence."""
    kl_per_token: Interval
    kl_p95: Interval
    """95th percentile over tokens."""
    floor: Interval
    """For a binary effect: kl(q‖p), times the share known: the least divergence with which any change moves the success rate from
    p to q. p is taken as at least half a sample's share."""
    cost: Interval
    """kl - floor: the nats that were spent on something else."""
    perplexity_ratio: Interval
    """Perplexity under the unsteered model of the samples, over that of its own samples."""
    repetition: Interval
    """Share of a text's 4-grams of tokens that it has had before."""
    distinct_2: Interval
    """Different 2-grams among all 2-grams of a prompt's samples."""
    grammaticality: Interval
    """StoryWorld: share of the finished sentences that are grammatical."""
    consistency: Interval
    """StoryWorld: share of the texts, prompt included, that contradict themselves in no attribute but that of the effect."""
    side_effects: dict[str, SideEffect]
    """StoryWorld: every attribute but that of the effect."""
    propensity: dict[str, Interval]
    """Of a `Propensity`: preferred, log_odds, log_prob, each the mean over pairs."""
    destroyed: str | None
    """Why the model can be said to be broken (NaN or inf, nothing but repetition); None: it is not."""
    n: int
    """Samples."""
    n_prompts: int
    n_tokens: int
    """Generated tokens."""
    base: Measurement | None = field(repr=False)
    """The unsteered model's; None for that itself."""
    texts: tuple[tuple[str, str], ...] = field(repr=False)
    """(prompt, continuation) of every sample."""

    def __repr__(self) -> str:
        broken = f", destroyed: {self.destroyed}" if self.destroyed else ""
        return (
            f"Measurement(effect {self.effect} from {self.effect_base.estimate:.3g}, kl {self.kl}, "
            f"floor {self.floor.estimate:.3g}, perplexity × {self.perplexity_ratio.estimate:.3g}, n = {self.n}{broken})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same keys whatever the method; null where there is no value.

        effect, effect_ci, effect_base, change, change_ci, known; kl, kl_ci (nats a sequence), kl_per_token, kl_p95, floor, cost;
        perplexity_ratio, repetition, repetition_base, distinct_2, distinct_2_base; grammaticality, grammaticality_base,
        consistency, consistency_base; side_effects: {attribute: {tv, tv_ci, null}}; propensity: {quantity: {estimate, ci}};
        destroyed; n, n_prompts, n_tokens.
        """
        base = self.base or self
        return jsonable(
            {
                "effect": self.effect.estimate,
                "effect_ci": _ends(self.effect),
                "effect_base": self.effect_base.estimate,
                "change": self.change.estimate,
                "change_ci": _ends(self.change),
                "known": self.known,
                "kl": self.kl.estimate,
                "kl_ci": _ends(self.kl),
                "kl_per_token": self.kl_per_token.estimate,
                "kl_p95": self.kl_p95.estimate,
                "floor": self.floor.estimate,
                "cost": self.cost.estimate,
                "perplexity_ratio": self.perplexity_ratio.estimate,
                "repetition": self.repetition.estimate,
                "repetition_base": base.repetition.estimate,
                "distinct_2": self.distinct_2.estimate,
                "distinct_2_base": base.distinct_2.estimate,
                "grammaticality": self.grammaticality.estimate,
                "grammaticality_base": base.grammaticality.estimate,
                "consistency": self.consistency.estimate,
                "consistency_base": base.consistency.estimate,
                "side_effects": {
                    name: {"tv": found.tv.estimate, "tv_ci": _ends(found.tv), "null": found.null}
                    for name, found in self.side_effects.items()
                },
                "propensity": {
                    name: {"estimate": found.estimate, "ci": _ends(found)}
                    for name, found in self.propensity.items()
                },
                "destroyed": self.destroyed,
                "n": self.n,
                "n_prompts": self.n_prompts,
                "n_tokens": self.n_tokens,
            }
        )


class Bench:
    """Measures changes of one model by the texts it writes after the same prompts, with the same draws."""

    def __init__(
        self,
        model: HookedModel,
        prompts: Sequence[str],
        effect: Effect | Propensity,
        max_new_tokens: int = 40,
        samples: int = 4,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        """Raises InputError for no prompts, a blank effect, settings that are not positive, or a model that can't be sampled."""
        if isinstance(prompts, str) or not len(prompts):
            raise InputError("A bench needs a list of at least one prompt.")
        usable = isinstance(effect, Propensity) or (callable(effect) and hasattr(effect, "binary"))
        if not usable or not str(getattr(effect, "name", "")).strip():
            raise InputError(
                f"The effect is {effect!r}: give one with a name, such as Words({{'happy'}}), or Scored(name, function)."
            )
        for name, value in [
            ("max_new_tokens", max_new_tokens),
            ("samples", samples),
            ("batch_size", batch_size),
        ]:
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature is {temperature}; it must be positive.")
        self.model, self.prompts, self.effect = model, tuple(prompts), effect
        self.max_new_tokens, self.samples, self.temperature = max_new_tokens, samples, temperature
        self.seed, self.batch_size = seed, batch_size
        self._ids = encode_prompts(model, self.prompts)
        self._group = np.unique(self.prompts, return_inverse=True)[1]
        self._judged = speaks_storyworld(model)
        self._meant = effect.attribute if isinstance(effect, StoryAttribute) else None

    @cached_property
    def base(self) -> Measurement:
        """The unsteered model."""
        return self._figures(self._base, self._base)

    def measure(
        self,
        vector: SteeringVector,
        strength: float = 1.0,
        where: Where | None = None,
        *,
        other_model: bool = False,
    ) -> Measurement:
        """The model steered by a vector: the same tokens are steered when the distributions are compared as in generation."""

        def steered(prompt_lengths: Sequence[int]) -> AbstractContextManager[None]:
            lengths = list(prompt_lengths)
            return self.model.steer(
                vector, strength=strength, where=where, prompt_lengths=lengths, other_model=other_model
            )

        return self._measured(steered)

    def measure_with(self, context: Callable[[], AbstractContextManager[Any]]) -> Measurement:
        """The model inside of `context()`, which is opened for every batch: an adapter, tuned weights, hooks."""
        return self._measured(lambda prompt_lengths: context())

    def measure_prompted(self, prefix: str) -> Measurement:
        """Prompting: the same model with `prefix` before each prompt, against the model with the bare prompt."""
        if not prefix.strip():
            raise InputError("The prefix is blank.")
        return self._measured(unchanged, prefix)

    def __repr__(self) -> str:
        return (
            f"Bench({self.model.name!r}, {len(self.prompts)} prompts, {self.effect.name!r}, {self.samples} samples of "
            f"{self.max_new_tokens} tokens each)"
        )

    @cached_property
    def _base(self) -> _Tally:
        return self._tally(unchanged)

    def _measured(self, changed: Changed, prefix: str = "") -> Measurement:
        return self._figures(self._tally(changed, prefix), self._base)

    def _tally(self, changed: Changed, prefix: str = "") -> _Tally:
        drawn = sample(
            self.model,
            encode_prompts(self.model, [join(prefix, p) for p in self.prompts]) if prefix else self._ids,
            changed,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        bare = [self._ids[i] for i in drawn.prompt_index]
        scores = divergence(self.model, drawn, changed, base_prompts=bare, batch_size=self.batch_size)
        preferences = None
        if isinstance(self.effect, Propensity):
            preferences = self.effect.measure(self.model, changed, prefix=prefix, batch_size=self.batch_size)
        return self._counted(drawn, bare, scores, preferences)

    def _counted(
        self, drawn: Samples, bare: Sequence[Ids], scores: Divergence, preferences: Preferences | None
    ) -> _Tally:
        group = self._group[drawn.prompt_index]
        prompts = [self.prompts[i] for i in drawn.prompt_index]
        texts = [self._text(before, new) for before, new in zip(bare, drawn.new)]
        if isinstance(self.effect, Propensity):
            assert preferences is not None
            wanted = {name: _known_sums(preferences.values(name), preferences.group) for name in QUANTITIES}
            effect, n_effects = wanted[self.effect.quantity], len(preferences.group)
        else:
            wanted, n_effects = {}, len(group)
            effect = _known_sums(apply_effect(self.effect, prompts, texts), group)
        tokens = group[scores.row]
        rows = [[i for i in new if i not in self.model.special_ids] for new in drawn.new]
        by_prompt: dict[int, list[Sequence[int]]] = {}
        for prompt, row in zip(group.tolist(), rows):
            by_prompt.setdefault(prompt, []).append(row)
        broken = np.unique(scores.row[~np.isfinite(scores.own)])
        return _Tally(
            texts=tuple(zip(prompts, texts)),
            n_broken=len(broken),
            effect=effect,
            n_effects=n_effects,
            propensity=wanted,
            n=group_sums(np.ones((len(group), 1)), group),
            token_kl=scores.kl,
            token_group=tokens,
            tokens=_sums_of(
                np.stack([scores.kl, -scores.base, np.ones(len(tokens))], 1), tokens, int(group.max()) + 1
            ),
            repetition=group_sums(np.array([repeated(row, 4) for row in rows]), group),
            distinct=np.array([different(by_prompt[i], 2) for i in sorted(by_prompt)], dtype=np.float64),
            story=_grouped(tally(prompts, texts, self._meant), group) if self._judged else None,
        )

    def _text(self, before: Ids, new: Ids) -> str:
        """The continuation as it stands after the prompt, its leading space included."""
        decode = self.model.tokenizer.decode
        head, whole = (
            decode(before, skip_special_tokens=True),
            decode([*before, *new], skip_special_tokens=True),
        )
        return whole[len(head) :] if whole.startswith(head) else decode(new, skip_special_tokens=True)

    def _figures(self, own: _Tally, base: _Tally) -> Measurement:
        is_base = own is base
        n = int(own.n.sum())
        destroyed = None
        if own.propensity and own.effect[:, 1].sum() < own.n_effects:
            destroyed = "NaN or infinite logits for some of the pairs"
        if own.n_broken:
            destroyed = f"NaN or infinite logits in {own.n_broken} of {n} samples"
        fine = destroyed is None

        def interval(*sums: Float[np.ndarray, "g _"], of: Statistic) -> Interval:
            return _bootstrap(np.concatenate(sums, 1), of, self.seed) if fine else UNKNOWN

        p_least = 0.5 / n
        floor, cost = UNKNOWN, UNKNOWN
        if self.effect.binary and not own.propensity:
            floor = interval(own.effect, base.effect, own.n, of=lambda s: _floor(s, p_least))
            columns = (own.effect, base.effect, own.n, own.tokens[:, :1])
            cost = interval(*columns, of=lambda s: s[..., 5] / s[..., 4] - _floor(s, p_least))
        repetition = interval(own.repetition, of=_ratio)
        if fine and repetition.estimate >= REPETITIVE:
            destroyed = f"nothing but repetition: {repetition.estimate:.0%} of the 4-grams are repeated"
        effect = _rate(own.effect, self.effect.binary, self.seed) if fine else UNKNOWN
        return Measurement(
            effect=effect,
            effect_base=effect if is_base else self.base.effect,
            change=interval(own.effect, base.effect, of=lambda s: _ratio(s[..., :2]) - _ratio(s[..., 2:])),
            known=float(own.effect[:, 1].sum() / own.n_effects),
            kl=interval(own.tokens[:, :1], own.n, of=_ratio),
            kl_per_token=interval(own.tokens[:, [0, 2]], of=_ratio),
            kl_p95=_quantile(own.token_kl, own.token_group, 0.95, self.seed) if fine else UNKNOWN,
            floor=floor,
            cost=cost,
            perplexity_ratio=interval(
                own.tokens[:, 1:],
                base.tokens[:, 1:],
                of=lambda s: np.exp(s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3]),
            ),
            repetition=repetition,
            distinct_2=interval(own.distinct, of=_ratio),
            grammaticality=interval(own.story.grammar, of=_ratio) if own.story else UNKNOWN,
            consistency=interval(own.story.consistent, of=_ratio) if own.story else UNKNOWN,
            side_effects=self._side_effects(own, base) if fine else {},
            propensity={name: _rate(sums, False, self.seed) for name, sums in own.propensity.items()}
            if fine
            else {},
            destroyed=destroyed,
            n=n,
            n_prompts=len(self.prompts),
            n_tokens=int(own.tokens[:, 2].sum()),
            base=None if is_base else self.base,
            texts=own.texts,
        )

    def _side_effects(self, own: _Tally, base: _Tally) -> dict[str, SideEffect]:
        if own.story is None or base.story is None:
            return {}
        return {
            name: total_variation(own.story.values[name], base.story.values[name], self.seed)
            for name in READ
            if name != self._meant
        }


# of texts


def repeated(tokens: Sequence[Any], n: int) -> tuple[int, int]:
    """(n-grams that occurred before in the text, n-grams)."""
    grams = _grams(tokens, n)
    return len(grams) - len(set(grams)), len(grams)


def different(texts: Sequence[Sequence[Any]], n: int) -> tuple[int, int]:
    """(different n-grams in all of the texts, n-grams): their ratio is distinct-n (Li et al. 2016)."""
    counts = Counter(gram for text in texts for gram in _grams(text, n))
    return len(counts), counts.total()


def _grams(tokens: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


# of distributions


def binary_kl(q: Float[np.ndarray, "..."], p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """kl(q‖p) = q log q/p + (1 - q) log (1-q)/(1-p) of two success rates, in nats; infinite where p rules out what q allows."""
    from scipy.special import rel_entr

    return rel_entr(q, p) + rel_entr(1 - np.asarray(q), 1 - np.asarray(p))


def total_variation(
    own: Float[np.ndarray, "g k"], base: Float[np.ndarray, "g k"], seed: int = 0, permutations: int = 200
) -> SideEffect:
    """Half the sum of absolute differences of two distributions, given as sums of shares in the same groups.

    The null exchanges steered and base samples of random groups.
    """
    k = own.shape[1]

    def distance(sums: np.ndarray) -> np.ndarray:
        first, second = sums[..., :k], sums[..., k:]
        with np.errstate(divide="ignore", invalid="ignore"):
            return 0.5 * np.abs(
                first / first.sum(-1, keepdims=True) - second / second.sum(-1, keepdims=True)
            ).sum(-1)

    found = _bootstrap(np.concatenate([own, base], 1), distance, seed)
    if math.isnan(found.estimate):
        return SideEffect(UNKNOWN, math.nan)
    swap = np.random.default_rng(seed).random((permutations, len(own))) < 0.5
    mixed = np.concatenate([swap @ own + ~swap @ base, swap @ base + ~swap @ own], -1)
    return SideEffect(found, float(distance(mixed).mean()))


# sums by prompt, and intervals of what they make


@dataclass(frozen=True)
class _Tally:
    """What was counted in the samples of a model, summed by prompt."""

    texts: tuple[tuple[str, str], ...]
    n_broken: int
    effect: Float[np.ndarray, "g 2"]
    """Sum where known, number known; of a propensity, by the pairs' prompts."""
    n_effects: int
    propensity: dict[str, Float[np.ndarray, "g 2"]]
    n: Float[np.ndarray, "g 1"]
    token_kl: Float[np.ndarray, " tokens"]
    token_group: Int[np.ndarray, " tokens"]
    tokens: Float[np.ndarray, "g 3"]
    """Nats of KL, -log p under the base model, number of tokens."""
    repetition: Float[np.ndarray, "g 2"]
    distinct: Float[np.ndarray, "g 2"]
    story: StoryTally | None


def _grouped(story: StoryTally, group: Int[np.ndarray, " n"]) -> StoryTally:
    return StoryTally(
        group_sums(story.grammar, group),
        group_sums(story.consistent, group),
        {name: group_sums(rows, group) for name, rows in story.values.items()},
    )


def _known_sums(values: Float[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> Float[np.ndarray, "g 2"]:
    known = np.isfinite(values)
    return group_sums(np.stack([np.where(known, values, 0.0), known], 1), group)


def _sums_of(
    values: Float[np.ndarray, "n k"], group: Int[np.ndarray, " n"], n_groups: int
) -> Float[np.ndarray, "g k"]:
    """Like group_sums, with a row for groups that have no values."""
    return np.stack([np.bincount(group, weights=column, minlength=n_groups) for column in values.T], axis=1)


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _floor(sums: np.ndarray, least: float) -> np.ndarray:
    """From steered (sum, known), base (sum, known), n."""
    q = _ratio(sums[..., 0:2])
    p = np.clip(_ratio(sums[..., 2:4]), np.minimum(least, q), 1 - np.minimum(least, 1 - q))
    return sums[..., 1] / sums[..., 4] * binary_kl(q, p)


def _bootstrap(sums: Float[np.ndarray, "g k"], statistic: Statistic, seed: int) -> Interval:
    """Over groups; one group has an estimate and no interval."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if len(sums) < 2:
            return Interval(float(statistic(sums.sum(0))), math.nan, math.nan, math.nan)
        return bootstrap(sums, statistic, seed=seed)


def _rate(sums: Float[np.ndarray, "g 2"], binary: bool, seed: int) -> Interval:
    """Mean of an effect over the prompts that have one; for a rate of 0 or 1, which never varies, Clopper and Pearson's."""
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return UNKNOWN
    found = _bootstrap(sums, _ratio, seed)
    if not binary or found.estimate not in (0.0, 1.0):
        return found
    reach = 1 - (0.5 * (1 - found.level)) ** (1 / len(sums))
    low, high = (0.0, reach) if found.estimate == 0.0 else (1 - reach, 1.0)
    return Interval(found.estimate, low, high, found.standard_error)


def _quantile(
    values: Float[np.ndarray, " n"], group: Int[np.ndarray, " n"], share: float, seed: int
) -> Interval:
    """The least value that `share` of the values do not exceed, to within a thousandth of them."""
    if not len(values):
        return UNKNOWN
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 1001), method="inverted_cdf"))
    _, group = np.unique(group, return_inverse=True)
    counts = np.zeros((int(group.max()) + 1, len(edges)))
    np.add.at(counts, (group, np.searchsorted(edges, values)), 1.0)

    def statistic(sums: np.ndarray) -> np.ndarray:
        reached = np.cumsum(sums, -1)
        return edges[(reached >= share * reached[..., -1:] - 1e-9).argmax(-1)]

    return _bootstrap(counts, statistic, seed)
