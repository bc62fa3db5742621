"""Exact probabilities under the grammar: of a text, of the next word, and of every attribute given a prefix.

Given the character (cue and honesty, four cases), the latents are independent, the plan does not look at
them, and every slot depends on one of them. So a belief is, for each character, one vector per factor and a
distribution over places in the plan; a sentence that is not finished adds a list of the templates that
still fit. Nothing is sampled and nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from steerkit.storyworld.language import (
    ATTRIBUTES,
    CHARACTERS,
    END,
    FACTORS,
    START,
    Likelihoods,
    State,
    Template,
    condition,
    factor_of,
    prior,
    sentence_kinds,
    split,
    templates,
)


@dataclass
class _Hypothesis:
    """A template that fits the sentence so far."""

    template: Template
    weight: float
    """P(template) times the likelihood of the words that depend on no factor."""
    after: dict[State, float]
    likelihoods: dict[str, np.ndarray] = field(default_factory=dict)
    mass: float = 0.0


@dataclass
class _Case:
    """What is believed if the character is the one given."""

    cue: str
    lies: bool
    log_weight: float
    beliefs: dict[str, np.ndarray]
    places: dict[State, float]
    hypotheses: list[_Hypothesis] = field(default_factory=list)


@cache
def _expansions(state: State, cue: str) -> tuple[tuple[Template, float, State], ...]:
    return tuple(
        (template, p * weight, after)
        for kind, after, p in sentence_kinds(state, cue)
        for template, weight in templates()[kind]
    )


class Reader:
    """Reads a story token by token and keeps the exact belief; `push` raises ValueError at a token that
    cannot come next."""

    def __init__(self, variant: str | None = None, **fixed: str):
        distribution = condition(prior(variant), fixed)
        self.cases = [
            _Case(cue, honesty == "liar", math.log(p), dict(distribution.factors), {START: 1.0})
            for (cue, honesty), p in zip(CHARACTERS, distribution.characters, strict=True)
            if p > 0
        ]
        self._characters = [i for i, p in enumerate(distribution.characters) if p > 0]
        self._position = 0
        """Tokens of the present sentence that have been read."""

    def push(self, token: str) -> float:
        """Read one token; returns the log probability (nats) of everything read so far."""
        if self._position == 0:
            for case in self.cases:
                case.hypotheses = _openings(case.places, case.cue)
        for case in self.cases:
            self._filter(case, token)
        alive = [i for i, case in enumerate(self.cases) if case.hypotheses]
        if not alive:
            raise ValueError(f"Not in the language: {token!r} cannot come here.")
        self.cases = [self.cases[i] for i in alive]
        self._characters = [self._characters[i] for i in alive]
        self._position += 1
        total = _log_sum(
            [case.log_weight + math.log(sum(h.mass for h in case.hypotheses)) for case in self.cases]
        )
        if token == ".":
            self._finish()
        return total

    def end(self) -> float:
        """Log probability (nats) of the story, its end included; -inf where a story cannot end."""
        if self._position:
            return -math.inf
        weights = [
            case.log_weight + math.log(p) for case in self.cases if (p := case.places.get(END, 0.0)) > 0
        ]
        return _log_sum(weights) if weights else -math.inf

    def next_tokens(self) -> dict[str, float]:
        """Token -> its probability as the next one, exactly; what is missing from 1 is the end of the
        story."""
        found: dict[str, float] = {}
        top = max(case.log_weight for case in self.cases)
        total = 0.0
        for case in self.cases:
            scale = math.exp(case.log_weight - top)
            total += scale * (sum(h.mass for h in case.hypotheses) if self._position else 1.0)
            for h in case.hypotheses if self._position else _openings(case.places, case.cue):
                item = h.template.items[self._position]
                for token, parts in (item.lies if case.lies else item.table).items():
                    likelihoods, weight = _joined(h, parts)
                    mass = scale * _mass(case, weight, likelihoods)
                    if mass > 0:
                        found[token] = found.get(token, 0.0) + mass
        return {token: mass / total for token, mass in found.items()}

    def _filter(self, case: _Case, token: str) -> None:
        kept = []
        for h in case.hypotheses:
            if self._position >= len(h.template.items):
                continue
            item = h.template.items[self._position]
            parts = (item.lies if case.lies else item.table).get(token)
            if parts is None:
                continue
            h.likelihoods, h.weight = _joined(h, parts)
            h.mass = _mass(case, h.weight, h.likelihoods)
            if h.mass > 0:
                kept.append(h)
        case.hypotheses = kept

    def _finish(self) -> None:
        for case in self.cases:
            (found,) = case.hypotheses  # the templates are unambiguous once the sentence is complete
            case.log_weight += math.log(found.mass)
            for factor, likelihood in found.likelihoods.items():
                belief = case.beliefs[factor] * likelihood
                case.beliefs[factor] = belief / belief.sum()
            total = sum(found.after.values())
            case.places = {state: p / total for state, p in found.after.items()}
            case.hypotheses = []
        self._position = 0

    def factor(self, name: str) -> np.ndarray:
        """(n_values,) the belief about one factor."""
        total = np.zeros(len(FACTORS[name].values))
        for weight, belief in self._mixture(name):
            total += weight * belief
        return total / total.sum()

    def characters(self) -> np.ndarray:
        """(4,) the belief about `CHARACTERS`."""
        total = np.zeros(len(CHARACTERS))
        top = max(case.log_weight for case in self.cases)
        for index, case in zip(self._characters, self.cases, strict=True):
            total[index] = math.exp(case.log_weight - top) * (
                sum(h.mass for h in case.hypotheses) if self._position else 1.0
            )
        return total / total.sum()

    def attribute(self, name: str) -> np.ndarray:
        """(n_values,) the belief about one attribute (all but `voice`, which belongs to a token)."""
        if name in ("cue", "honesty"):
            column = ("cue", "honesty").index(name)
            belief = self.characters()
            return np.array(
                [
                    sum(p for p, c in zip(belief, CHARACTERS, strict=True) if c[column] == v)
                    for v in ATTRIBUTES[name]
                ]
            )
        factor = factor_of(name)
        return self.factor(factor.name) @ factor.projection(name)

    def voice(self) -> np.ndarray:
        """(2,) the belief about the voice of the token just read, before a full stop closes its sentence."""
        total = np.zeros(2)
        top = max(case.log_weight for case in self.cases)
        for case in self.cases:
            for h in case.hypotheses:
                voice = h.template.items[self._position - 1].voice
                total[ATTRIBUTES["voice"].index(voice)] += math.exp(case.log_weight - top) * h.mass
        return total / total.sum() if self._position else np.array([1.0, 0.0])

    def _mixture(self, name: str):
        top = max(case.log_weight for case in self.cases)
        for case in self.cases:
            scale = math.exp(case.log_weight - top)
            if not self._position:
                yield scale, case.beliefs[name]
            for h in case.hypotheses:
                belief = case.beliefs[name]
                if name in h.likelihoods:
                    belief = belief * h.likelihoods[name]
                    belief = belief / belief.sum()
                yield scale * h.mass, belief


def log_prob(text: str, variant: str | None = None) -> float:
    """Log probability (nats) that the grammar tells exactly this story; -inf for a text outside the
    language."""
    reader = Reader(variant)
    try:
        for token in split(text):
            reader.push(token)
    except ValueError:
        return -math.inf
    return reader.end()


def posterior(
    text: str | Sequence[str], variant: str | None = None, attributes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """P(attribute | prefix) after every token: attribute -> (n_tokens, n_values), aligned with the
    tokenizer's tokens without BOS.

    `text` is a story or the beginning of one (or its tokens, as `Story.tokens`). Raises ValueError at the
    first token that the language does not allow; `variant` and fewer `attributes` (less work) are optional.
    """
    names = list(ATTRIBUTES if attributes is None else attributes)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    reader = Reader(variant)
    for token in split(text) if isinstance(text, str) else text:
        reader.push(token)
        for name in names:
            rows[name].append(reader.voice() if name == "voice" else reader.attribute(name))
    return {name: np.array(found).reshape(-1, len(ATTRIBUTES[name])) for name, found in rows.items()}


def _openings(places: dict[State, float], cue: str) -> list[_Hypothesis]:
    found: dict[str, _Hypothesis] = {}
    for place, p in places.items():
        for template, weight, after in _expansions(place, cue):
            key = template.kind + template.text
            h = found.setdefault(key, _Hypothesis(template, 0.0, {}))
            h.weight += p * weight
            h.after[after] = h.after.get(after, 0.0) + p * weight
    return list(found.values())


def _joined(h: _Hypothesis, parts: Likelihoods) -> tuple[dict[str, np.ndarray], float]:
    """The likelihoods of a hypothesis after one more token."""
    likelihoods, weight = dict(h.likelihoods), h.weight
    for factor, vector in parts:
        if factor is None:
            weight *= float(vector[0])
        else:
            likelihoods[factor] = likelihoods[factor] * vector if factor in likelihoods else vector
    return likelihoods, weight


def _mass(case: _Case, weight: float, likelihoods: dict[str, np.ndarray]) -> float:
    for factor, likelihood in likelihoods.items():
        weight *= float(case.beliefs[factor] @ likelihood)
    return weight


def _log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
