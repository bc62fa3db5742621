"""The judge: reads any text back into attributes and says how grammatical it is.

    judgement = Judge().judge("Tom is a happy fox. ...")
    judgement.grammatical, judgement.attributes["mood"], judgement.consistent, judgement.violations

It is made from the grammar's own tables. A sentence is grammatical if it is one of the language's templates
and agrees with itself in tense, number and article; what it says may be untrue or contradict the rest. That
is what `consistent` and `violations` are for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from steerkit.storyworld.language import (
    ATTRIBUTES,
    CHARACTERS,
    END,
    FACTORS,
    START,
    Item,
    State,
    Template,
    all_templates,
    prior,
    sentence_kinds,
    split,
)


@dataclass(frozen=True)
class JudgedSentence:
    """One sentence of a judged text, at `text[start:end]`."""

    text: str
    start: int
    end: int
    grammatical: bool
    kind: str | None
    """The kind of sentence in the grammar; None if it is no sentence of the language."""


@dataclass(frozen=True)
class Claim:
    """What a character says about a fact."""

    kind: str
    """The kind of fact: colour, place, weather or day."""
    said: str
    truth: str | None
    """What the narrator says; None if the narrator does not say, or contradicts himself."""

    @property
    def true(self) -> bool | None:
        return None if self.truth is None else self.said == self.truth


@dataclass(frozen=True)
class Violation:
    """A word that contradicts what came before, or a character who does not do as the cue says."""

    attribute: str
    sentence: int
    word: str

    def __str__(self) -> str:
        return f"{self.attribute}: {self.word!r} in sentence {self.sentence + 1} contradicts the rest"


@dataclass(frozen=True)
class Judgement:
    """What the judge found in a text."""

    sentences: tuple[JudgedSentence, ...]
    grammatical: float
    """Share of the sentences that are grammatical, an unfinished last one not counted; NaN without a
    sentence."""
    attributes: dict[str, str | None]
    """Attribute -> the one value that the text leaves possible; None if it leaves several, or contradicts
    itself."""
    consistent: bool
    """No contradictions. Says nothing of ungrammatical sentences, which are not read."""
    contradictions: tuple[Violation, ...]
    claims: tuple[Claim, ...]
    evidence: dict[str, dict[str, int]] = field(repr=False)
    """Attribute -> value -> number of words that can only mean this value (claims are not counted)."""
    unfinished: str = ""
    """What stands after the last full stop."""
    complete: bool = False
    """Whether the sentences are a whole story in an order that the grammar can tell."""

    @property
    def violations(self) -> list[str]:
        """The contradictions, in words."""
        return [str(violation) for violation in self.contradictions]

    @property
    def grammatical_story(self) -> bool:
        """Every sentence grammatical, the last one finished."""
        return self.grammatical == 1.0 and not self.unfinished

    def share(self, attribute: str, value: str) -> float:
        """Share of an attribute's evidence that speaks for one value; NaN without evidence."""
        counts = self.evidence[attribute]
        total = sum(counts.values())
        return counts.get(value, 0) / total if total else float("nan")


class Judge:
    """Judges texts by the training language, or by one of its variants (`liars` expects lies from
    characters without a cue)."""

    def __init__(self, variant: str | None = None):
        self._characters = [c for c, p in zip(CHARACTERS, prior(variant).characters, strict=True) if p > 0]

    def judge(self, text: str, start: int = 0) -> Judgement:
        """Judge a text; with `start`, grammar and evidence are counted from that character on (after a
        prompt, say).

        The whole text is read for attributes and violations all the same.
        """
        reading = _Reading()
        sentences: list[JudgedSentence] = []
        unfinished, offset, tokens = "", 0, []
        for token in split(text):
            tokens.append(token)
            if token != ".":
                continue
            spoken = "".join(tokens)
            end = offset + len(spoken) - (offset == 0 and not text.startswith(" "))
            found = parse(tokens)
            if found is not None:
                reading.add(found, tokens, len(sentences), offset, start)
            body = text[offset:end]
            begin = offset + len(body) - len(body.lstrip())
            kind = None if found is None else found.kind
            sentences.append(JudgedSentence(body.strip(), begin, end, found is not None, kind))
            offset, tokens = end, []
        if tokens and text.strip():
            unfinished = text[offset:].strip()
        counted = [s.grammatical for s in sentences if s.end > start]
        attributes, claims, violations = reading.conclude(self._characters)
        return Judgement(
            sentences=tuple(sentences),
            grammatical=float(np.mean(counted)) if counted else float("nan"),
            attributes=attributes,
            consistent=not violations,
            contradictions=tuple(violations),
            claims=tuple(claims),
            evidence=reading.evidence,
            unfinished=unfinished,
            complete=not unfinished and _in_order([s.kind for s in sentences]),
        )


@cache
def _by_opening() -> dict[tuple[int, str], tuple[Template, ...]]:
    found: dict[tuple[int, str], list[Template]] = {}
    for template in all_templates():
        for token in template.items[0].table:
            found.setdefault((len(template.items), token), []).append(template)
    return {key: tuple(group) for key, group in found.items()}


def parse(tokens: list[str]) -> Template | None:
    """The template of a sentence, if it has one and agrees with itself in tense, number and article."""
    for template in _by_opening().get((len(tokens), tokens[0]), ()):
        if all(token in item.table for item, token in zip(template.items, tokens, strict=True)):
            return template if _agrees(template, tokens) else None
    return None


def _agrees(template: Template, tokens: list[str]) -> bool:
    forms = np.ones(len(FACTORS["grammar"].values))
    article = np.ones(len(FACTORS["mood"].values))
    for position, (item, token) in enumerate(zip(template.items, tokens, strict=True)):
        for factor, likelihood in item.table[token]:
            if factor == "grammar":
                forms = forms * likelihood
            elif item.name == "a_mood":
                (_, noun), *_ = template.items[position + 1].table[tokens[position + 1]]
                article = likelihood * noun
    return bool(forms.any() and article.any())


class _Reading:
    """What the narrator has said so far: per factor, which values are still possible."""

    def __init__(self) -> None:
        self.possible = {name: np.ones(len(factor.values), bool) for name, factor in FACTORS.items()}
        self.evidence: dict[str, dict[str, int]] = {
            a: {} for a in ATTRIBUTES if a not in ("honesty", "voice")
        }
        self.violations: list[Violation] = []
        self.said: list[tuple[str, str, int]] = []
        self.cues: list[tuple[str, int]] = []

    def add(self, template: Template, tokens: list[str], sentence: int, offset: int, start: int) -> None:
        if template.kind.startswith("cue_"):
            cue = template.kind.removeprefix("cue_")
            self.cues.append((cue, sentence))
            if offset + sum(map(len, tokens)) > start:
                _count(self.evidence["cue"], cue)
        for item, token in zip(template.items, tokens, strict=True):
            if item.slot is not None and item.slot.claim:
                self.said.append((item.name.removesuffix("!"), token.strip(), sentence))
            else:
                self._narrate(item, token, sentence, counted=offset >= start)
            offset += len(token)

    def _narrate(self, item: Item, token: str, sentence: int, counted: bool) -> None:
        for name, likelihood in item.table[token]:
            if name is None:
                continue
            allowed = likelihood > 0
            if allowed.all():
                continue
            for attribute in FACTORS[name].attributes:
                values = _values(name, attribute, allowed)
                if counted and len(values) == 1:
                    _count(self.evidence[attribute], values[0])
            if (self.possible[name] & allowed).any():
                self.possible[name] = self.possible[name] & allowed
            else:
                self.violations.append(Violation(self._contradicted(name, allowed), sentence, token.strip()))

    def _contradicted(self, name: str, allowed: np.ndarray) -> str:
        """The attribute that cannot be both what the word and what the story says: the one about which the
        word says most."""
        disjoint = {}
        for attribute in FACTORS[name].attributes:
            said = _values(name, attribute, allowed)
            if not set(said) & set(_values(name, attribute, self.possible[name])):
                disjoint[attribute] = len(said)
        return min(disjoint, key=lambda a: disjoint[a]) if disjoint else FACTORS[name].attributes[-1]

    def conclude(
        self, characters: list[tuple[str, str]]
    ) -> tuple[dict[str, str | None], list[Claim], list[Violation]]:
        violations = list(self.violations)
        contradicted = {v.attribute for v in violations}
        attributes: dict[str, str | None] = {}
        for name, factor in FACTORS.items():
            for attribute in factor.attributes:
                values = _values(name, attribute, self.possible[name])
                attributes[attribute] = (
                    values[0] if len(values) == 1 and attribute not in contradicted else None
                )
        claims = [Claim(kind, said, attributes[kind]) for kind, said, _ in self.said]
        cue = self.cues[0][0] if self.cues else "none"
        violations += [Violation("cue", sentence, other) for other, sentence in self.cues if other != cue]
        attributes["cue"] = cue if len({c for c, _ in self.cues}) <= 1 else None
        expected = [honesty for told, honesty in characters if told == cue] or [h for _, h in characters]
        behaviour = {claim.true for claim in claims} - {None}
        if behaviour:
            attributes["honesty"] = (
                "truthful" if behaviour == {True} else "liar" if behaviour == {False} else None
            )
        else:
            attributes["honesty"] = None if cue == "none" else {"honest": "truthful", "liar": "liar"}[cue]
        lead = attributes["honesty"] if attributes["honesty"] in expected else expected[0]
        for claim, (_, said, sentence) in zip(claims, self.said, strict=True):
            if claim.true is not None and claim.true != (lead == "truthful"):
                violations.append(Violation("honesty", sentence, said))
        order = [a for a in ATTRIBUTES if a in attributes]
        return {a: attributes[a] for a in order}, claims, sorted(violations, key=lambda v: v.sentence)


@cache
def _projections(attribute: str, factor: str) -> np.ndarray:
    return FACTORS[factor].projection(attribute)


def _values(factor: str, attribute: str, allowed: np.ndarray) -> list[str]:
    possible = allowed.astype(float) @ _projections(attribute, factor)
    return [value for value, p in zip(ATTRIBUTES[attribute], possible, strict=True) if p > 0]


def _count(counts: dict[str, int], value: str) -> None:
    counts[value] = counts.get(value, 0) + 1


def _in_order(kinds: list[str | None]) -> bool:
    cues = [k.removeprefix("cue_") for k in kinds if k is not None and k.startswith("cue_")]
    cue = cues[0] if cues else "none"
    places: set[State] = {START}
    for kind in kinds:
        places = {
            after for place in places for option, after, _ in sentence_kinds(place, cue) if option == kind
        }
    return END in places
