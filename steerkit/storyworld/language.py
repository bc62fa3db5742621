"""StoryWorld compiled: latents, slots and templates, and the sampler of labelled stories.

A story is drawn in three steps: the latents (`Latents`, independent factors), the plan (which template
comes next; it depends on the cue alone) and the words (each slot depends on one factor; a claim also on
whether the character lies). That is what makes every probability exact in `posterior.py`.
"""

from __future__ import annotations

import itertools
import random
import re
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from steerkit.storyworld import grammar as g

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "mood": g.MOODS,
    "tense": g.TENSES,
    "number": g.NUMBERS,
    "place": g.PLACES,
    "weather": g.WEATHERS,
    "day": g.DAYS,
    "name": g.FEMALE_NAMES + g.MALE_NAMES,
    "gender": g.GENDERS,
    "species": g.SPECIES,
    "object": g.OBJECTS + g.NEW_OBJECTS,
    "colour": g.COLOURS,
    "neighbour": g.NEIGHBOURS + g.NEW_NEIGHBOURS,
    "politeness": g.POLITENESS,
    "honesty": g.HONESTY,
    "cue": g.CUES,
    "voice": g.VOICES,
}
"""Attribute -> its values. All belong to a whole story, except `voice`, which every token has for itself."""

VARIANTS = ("liars", "sad", "past", "new_nouns")
"""Shifted sets: characters without a cue who lie; sad stories; past stories; stories about nouns outside
the training set."""

WORD = re.compile(r' ?[A-Za-z]+| ?"|[.,?!]"?')
"""The tokens of a text, each with the space before it."""

_ITEM = re.compile(r'( ?)\[([^\]]+)\]|( ?[A-Za-z]+| ?"|[.,?!]"?)')


def split(text: str) -> list[str]:
    """The words of a text as the tokenizer sees them: a space belongs to the word after it, the first word
    gets one too."""
    text = text if text.startswith(" ") else " " + text
    tokens, end = [], 0
    for match in WORD.finditer(text):
        if match.start() != end:
            tokens.append(text[end : match.start()])
        tokens.append(match.group())
        end = match.end()
    if end != len(text):
        tokens.append(text[end:])
    return tokens


@dataclass(frozen=True)
class Factor:
    """One independent latent: the attributes it settles and, for each of its values, the values of those."""

    name: str
    attributes: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    prior: np.ndarray = field(repr=False, compare=False)
    """(n_values,) probabilities in the training language."""

    def projection(self, attribute: str) -> np.ndarray:
        """(n_values, n_attribute_values) of 0 and 1: which values of the factor carry which value of the
        attribute."""
        column = self.attributes.index(attribute)
        names = ATTRIBUTES[attribute]
        matrix = np.zeros((len(self.values), len(names)))
        for row, value in enumerate(self.values):
            matrix[row, names.index(value[column])] = 1.0
        return matrix


def _zipf(n: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, n + 1)
    return weights / weights.sum()


def _factors() -> dict[str, Factor]:
    def plain(name: str, known: int | None = None, prior: np.ndarray | None = None) -> Factor:
        values = ATTRIBUTES[name]
        known = len(values) if known is None else known
        prior = np.full(known, 1.0 / known) if prior is None else prior
        return Factor(name, (name,), tuple((v,) for v in values), np.pad(prior, (0, len(values) - known)))

    names = list(
        itertools.chain(((n, "female") for n in g.FEMALE_NAMES), ((n, "male") for n in g.MALE_NAMES))
    )
    name_prior = np.concatenate([_zipf(len(g.FEMALE_NAMES)), _zipf(len(g.MALE_NAMES))]) / 2
    number_prior = np.full(len(g.NUMBERS), 1.0 / len(g.NUMBERS))
    factors = (
        plain("mood"),
        Factor(
            "grammar",
            ("tense", "number"),
            tuple(itertools.product(g.TENSES, g.NUMBERS)),
            np.outer(g.TENSE_PRIOR, number_prior).ravel(),
        ),
        plain("place"),
        plain("weather"),
        plain("day"),
        Factor(
            "who",
            ("name", "gender", "species"),
            tuple((name, gender, species) for (name, gender) in names for species in g.SPECIES),
            np.outer(name_prior, np.full(len(g.SPECIES), 1.0 / len(g.SPECIES))).ravel(),
        ),
        plain("object", len(g.OBJECTS), _zipf(len(g.OBJECTS))),
        plain("colour"),
        plain("neighbour", len(g.NEIGHBOURS)),
        plain("politeness"),
    )
    return {factor.name: factor for factor in factors}


FACTORS: dict[str, Factor] = _factors()
CHARACTERS: tuple[tuple[str, str], ...] = (
    ("none", "truthful"),
    ("honest", "truthful"),
    ("liar", "liar"),
    ("none", "liar"),
)
"""(cue, honesty): what the story says of its character and what the character does. The last is told only
in `liars`."""

_FACTOR_OF = {attribute: factor for factor in FACTORS.values() for attribute in factor.attributes}


def factor_of(attribute: str) -> Factor:
    """The factor that settles an attribute (not for `honesty`, `cue` and `voice`)."""
    return _FACTOR_OF[attribute]


@dataclass(frozen=True)
class Prior:
    """A distribution over latents: one vector per factor, one over `CHARACTERS`."""

    factors: Mapping[str, np.ndarray]
    characters: np.ndarray


@cache
def prior(variant: str | None = None) -> Prior:
    """The distribution of the training language or of one of its `VARIANTS`."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"StoryWorld has no variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
    factors = {name: factor.prior for name, factor in FACTORS.items()}
    characters = np.array([g.CUE_PRIOR["none"], g.CUE_PRIOR["honest"], g.CUE_PRIOR["liar"], 0.0])
    if variant == "liars":
        characters = np.array([0.0, 0.0, 0.0, 1.0])
    elif variant == "sad":
        factors["mood"] = _only("mood", mood=("sad",))
    elif variant == "past":
        factors["grammar"] = _only("grammar", tense=("past",))
    elif variant == "new_nouns":
        for name, new in (("object", g.NEW_OBJECTS), ("neighbour", g.NEW_NEIGHBOURS)):
            factors[name] = np.array([(v in new) / len(new) for v in ATTRIBUTES[name]])
    return Prior(factors, characters)


def _only(factor: str, **allowed: tuple[str, ...]) -> np.ndarray:
    return _restrict(FACTORS[factor], FACTORS[factor].prior, {k: v[0] for k, v in allowed.items()})


def _restrict(factor: Factor, probabilities: np.ndarray, fixed: Mapping[str, str]) -> np.ndarray:
    """The distribution given the fixed attributes; a value that the distribution never draws is allowed
    when it is asked for."""
    mask = np.ones(len(factor.values))
    for attribute in factor.attributes:
        if attribute in fixed:
            mask *= factor.projection(attribute)[:, ATTRIBUTES[attribute].index(fixed[attribute])]
    restricted = probabilities * mask
    if restricted.sum() == 0:
        restricted = mask
    return restricted / restricted.sum()


def condition(base: Prior, fixed: Mapping[str, str]) -> Prior:
    """`base` given the values of some attributes; raises ValueError for an unknown attribute or value."""
    for attribute, value in fixed.items():
        if attribute not in ATTRIBUTES or attribute == "voice":
            known = ", ".join(a for a in ATTRIBUTES if a != "voice")
            raise ValueError(
                f"StoryWorld stories have no attribute {attribute!r} to fix: choose one of {known}."
            )
        if value not in ATTRIBUTES[attribute]:
            raise ValueError(
                f"{attribute!r} has no value {value!r}: choose one of {', '.join(ATTRIBUTES[attribute])}."
            )
    if not fixed:
        return base
    factors = {name: _restrict(FACTORS[name], p, fixed) for name, p in base.factors.items()}
    mask = np.array(
        [
            fixed.get("cue", cue) == cue and fixed.get("honesty", honesty) == honesty
            for cue, honesty in CHARACTERS
        ]
    )
    characters = base.characters * mask
    if characters.sum() == 0:
        characters = mask.astype(float)
    if characters.sum() == 0:
        raise ValueError(f"No character has cue {fixed.get('cue')!r} and honesty {fixed.get('honesty')!r}.")
    return Prior(factors, characters / characters.sum())


Likelihoods = tuple[tuple[str | None, np.ndarray], ...]
"""What a word says: (factor, (n_values,) P(word | value)) for each random choice behind it; no factor means
a plain number."""


@dataclass(frozen=True)
class Component:
    """One random choice inside a slot: a symbol, drawn given the value of one factor (or of none)."""

    factor: str | None
    table: tuple[tuple[tuple[str, float], ...], ...]
    """Per value of the factor (one row if there is none): the symbols with their probabilities."""

    @cached_property
    def cumulative(self) -> list[tuple[list[float], list[str]]]:
        return [([*itertools.accumulate(p for _, p in row)][:-1], [s for s, _ in row]) for row in self.table]

    def likelihood(self, symbol: str) -> np.ndarray:
        """(n_values,) P(symbol | value)."""
        return np.array([dict(row).get(symbol, 0.0) for row in self.table])


@dataclass(frozen=True)
class Slot:
    """A word to be filled in: components, and the word that their symbols spell."""

    components: tuple[Component, ...]
    spelling: Mapping[tuple[str, ...], str] = field(compare=False, repr=False)
    claim: bool = False
    """Whether the word is a claim: a liar says any other value instead, all equally likely."""

    @cached_property
    def words(self) -> dict[str, Likelihoods]:
        """Word -> its likelihoods, one (factor, vector) per component (of a truthful character)."""
        found: dict[str, Likelihoods] = {}
        for symbols, word in self.spelling.items():
            assert word not in found, f"{word!r} is spelled in two ways"
            found[word] = tuple(
                (c.factor, c.likelihood(s)) for c, s in zip(self.components, symbols, strict=True)
            )
        return found

    @cached_property
    def lies(self) -> dict[str, Likelihoods]:
        """The same for a liar."""
        if not self.claim:
            return self.words
        return {
            word: tuple((factor, (1.0 - vector) / (len(vector) - 1)) for factor, vector in parts)
            for word, parts in self.words.items()
        }


def _rows(factor: str, choose) -> tuple[tuple[tuple[str, float], ...], ...]:
    rows = []
    for value in FACTORS[factor].values:
        symbols = choose(*value)
        symbols = [symbols] if isinstance(symbols, str) else list(symbols)
        rows.append(tuple((s, 1.0 / len(symbols)) for s in symbols))
    return tuple(rows)


def _slot(*components: Component, spell=None, claim: bool = False) -> Slot:
    spell = spell or (lambda symbol: symbol)
    alphabets = [dict.fromkeys(s for row in c.table for s, _ in row) for c in components]
    return Slot(components, {symbols: spell(*symbols) for symbols in itertools.product(*alphabets)}, claim)


def _word(factor: str, choose) -> Slot:
    return _slot(Component(factor, _rows(factor, choose)))


def _uniform(symbols: list[str]) -> Component:
    return Component(None, (tuple((s, 1.0 / len(symbols)) for s in symbols),))


_MAIN_FORM = Component("grammar", _rows("grammar", lambda tense, number: tense))
_NEIGHBOUR_FORM = Component(
    "grammar", _rows("grammar", lambda tense, number: "past" if tense == "past" else f"present {number}")
)


def _main_form(lemma: str, form: str) -> str:
    return g.VERBS[lemma][form == "past"]


def _neighbour_form(lemma: str, form: str) -> str:
    return {"present plural": lemma, "present singular": g.VERBS[lemma][0], "past": g.VERBS[lemma][1]}[form]


def _noun(gender: str, species: str) -> str:
    return g.SPECIES_NOUNS[species][g.GENDERS.index(gender)] if species in g.SPECIES_NOUNS else species


def _mood(word_class: str) -> Component:
    return Component("mood", _rows("mood", lambda mood: g.MOOD_WORDS[word_class][mood].split()))


def _slots() -> dict[str, Slot]:
    slots = {
        "mood": _word("mood", lambda mood: mood),
        "a_mood": _word("mood", lambda mood: "an" if mood == "angry" else "a"),
        "mood_verb": _slot(_mood("verb"), _MAIN_FORM, spell=_main_form),
        "mood_noun": _slot(_mood("noun")),
        **{name: _slot(_mood(name)) for name in ("adjective", "adjective_an", "adverb", "exclamation")},
        "tense": _word("grammar", lambda tense, number: tense),
        "place": _word("place", lambda place: place),
        "weather": _word("weather", lambda weather: weather),
        "weather_noun": _word("weather", lambda weather: g.WEATHER_NOUNS[g.WEATHERS.index(weather)]),
        "day": _word("day", lambda day: day),
        "name": _word("who", lambda name, gender, species: name),
        "kind": _word("who", lambda name, gender, species: _noun(gender, species)),
        "object": _word("object", lambda thing: thing),
        "colour": _word("colour", lambda colour: colour),
        "neighbour": _slot(
            Component("neighbour", _rows("neighbour", lambda animal: animal)),
            Component("grammar", _rows("grammar", lambda tense, number: number)),
            spell=lambda animal, number: animal + "s" * (number == "plural"),
        ),
        "polite": _word("politeness", lambda politeness: politeness),
        "handle": _slot(_uniform(g.NEUTRAL_WORDS["handle"].split()), _MAIN_FORM, spell=_main_form),
        "+act": _slot(_uniform(g.NEUTRAL_WORDS["act"].split()), _NEIGHBOUR_FORM, spell=_neighbour_form),
        "+be": _word(
            "grammar",
            lambda tense, number: {"present": ("is", "are"), "past": ("was", "were")}[tense][
                number == "plural"
            ],
        ),
    }
    for pronoun, (female, male) in {
        "he": ("she", "he"),
        "He": ("She", "He"),
        "his": ("her", "his"),
        "His": ("Her", "His"),
    }.items():
        slots[pronoun] = _word(
            "who", lambda name, gender, species, f=female, m=male: f if gender == "female" else m
        )
    for name, words in g.POLITE_WORDS.items():
        slots[name] = _word("politeness", lambda politeness, w=words: w[politeness].split())
    for kind in g.FACT_KINDS:
        slots[kind + "!"] = Slot(slots[kind].components, slots[kind].spelling, claim=True)
    for lemma in g.VERBS:
        slots.setdefault(lemma, _slot(_MAIN_FORM, spell=lambda form, lemma=lemma: _main_form(lemma, form)))
        slots.setdefault(
            "+" + lemma, _slot(_NEIGHBOUR_FORM, spell=lambda form, lemma=lemma: _neighbour_form(lemma, form))
        )
    return slots


SLOTS: dict[str, Slot] = _slots()


@dataclass(frozen=True)
class Item:
    """One token of a template: a literal, or a slot with the space before it."""

    literal: str | None
    slot: Slot | None
    name: str
    voice: str
    space: str = " "

    @cached_property
    def table(self) -> dict[str, Likelihoods]:
        """Token -> likelihoods of its components, for a truthful character."""
        if self.slot is None:
            return {self.name: ()}
        return {self.space + word: parts for word, parts in self.slot.words.items()}

    @cached_property
    def lies(self) -> dict[str, Likelihoods]:
        """The same for a liar."""
        if self.slot is None or not self.slot.claim:
            return self.table
        return {self.space + word: parts for word, parts in self.slot.lies.items()}

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """The attributes on which the token depends."""
        if self.slot is None:
            return ()
        factors = [c.factor for c in self.slot.components if c.factor is not None]
        return tuple(a for f in factors for a in FACTORS[f].attributes) + (
            ("honesty",) if self.slot.claim else ()
        )


@dataclass(frozen=True)
class Template:
    """A kind of sentence, spelled out up to its slots."""

    kind: str
    text: str
    items: tuple[Item, ...]

    @property
    def fact(self) -> str | None:
        """The kind of fact that the sentence claims or asks for."""
        return self.kind.split("_")[1] if "_" in self.kind and not self.kind.startswith("cue") else None

    @cached_property
    def claim(self) -> int | None:
        """Position of the claim among the tokens."""
        return next(
            (i for i, item in enumerate(self.items) if item.slot is not None and item.slot.claim), None
        )


def _spell_out(text: str) -> list[tuple[str, float]]:
    """A template with its subjects and its speaker filled in: all wordings with their probabilities."""
    for verbs, macro in ((("say",), "<say>"), (("answer", "reply"), "<answer>")):
        if macro in text:
            return [
                (spelled, p * weight / len(verbs))
                for verb in verbs
                for form, p in (
                    (f"[{verb}] [name]", 0.5),
                    (f"[{verb}] the [kind]", 0.25),
                    (f"[he] [{verb}]", 0.25),
                )
                for spelled, weight in _spell_out(text.replace(macro, form))
            ]
    for macro, forms in g.SUBJECTS.items():
        if macro in text:
            return [(text.replace(macro, form), p) for form, p in forms]
    return [(text, 1.0)]


def _items(text: str) -> tuple[Item, ...]:
    items, quoted = [], False
    for match in _ITEM.finditer(text if text.startswith(" ") else " " + text):
        space, slot_name, literal = match.groups()
        opens = literal is not None and literal.strip() == '"'
        voice = "speech" if quoted or opens else "narration"
        quoted = opens or (quoted and not (literal or "").endswith('"'))
        if slot_name is not None:
            items.append(Item(None, SLOTS[slot_name], slot_name, voice, space))
        else:
            items.append(Item(literal, None, literal, voice))
    return tuple(items)


@cache
def templates() -> dict[str, tuple[tuple[Template, float], ...]]:
    """Kind of sentence -> its templates with their probabilities."""
    return {
        kind: tuple(
            (Template(kind, wording, _items(wording)), p / len(texts))
            for text in texts
            for wording, p in _spell_out(text)
        )
        for kind, texts in g.SENTENCES.items()
    }


@cache
def all_templates() -> tuple[Template, ...]:
    return tuple(template for group in templates().values() for template, _ in group)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token of the language, sorted."""
    return tuple(
        sorted({token for template in all_templates() for item in template.items for token in item.table})
    )


State = tuple[int, str | None]
"""Where a story stands: the next beat and, after a question, the kind of fact that the next sentence
answers."""

START: State = (0, None)
END: State = (len(g.BEATS), None)


@cache
def sentence_kinds(state: State, cue: str) -> tuple[tuple[str, State, float], ...]:
    """What may come next, as (kind of sentence, next state, probability); nothing at the end of the story."""
    beat, awaited = state
    if awaited is not None:
        return ((f"answer_{awaited}", (beat, None), 1.0),)
    options: list[tuple[str, State, float]] = []
    remaining = 1.0
    for index in range(beat, len(g.BEATS)):
        total = 0.0
        for kind, p in g.BEATS[index]:
            if kind == "cue":
                if cue == "none":
                    continue
                kind = f"cue_{cue}"
            total += p
            if kind in ("statement", "question"):
                facts = [f for f in g.FACT_KINDS if cue == "none" or f != g.HELD_OUT_KIND]
                for fact in facts:
                    after = (index + 1, fact if kind == "question" else None)
                    options.append((f"{kind}_{fact}", after, remaining * p / len(facts)))
            else:
                options.append((kind, (index + 1, None), remaining * p))
        remaining *= 1.0 - total
        if remaining < 1e-12:
            break
    return tuple(options)


@cache
def _arcs(state: State, cue: str) -> tuple[list[float], list[tuple[Template, State]]]:
    arcs = [
        (p * weight, template, after)
        for kind, after, p in sentence_kinds(state, cue)
        for template, weight in templates()[kind]
    ]
    return [*itertools.accumulate(p for p, _, _ in arcs)][:-1], [
        (template, after) for _, template, after in arcs
    ]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a story: its text, where it stands among the story's tokens, and the template it came
    from."""

    text: str
    start: int
    end: int
    template: Template = field(repr=False)

    @property
    def kind(self) -> str:
        return self.template.kind


@dataclass(frozen=True)
class Story:
    """A story with everything that its generator knows about it."""

    text: str
    attributes: dict[str, str]
    """Attribute -> value, for the whole story; whether the text says so is another question (see
    `posterior`)."""
    tokens: tuple[str, ...] = field(repr=False)
    """The words, aligned one to one with the tokenizer's tokens (without BOS and EOS)."""
    sentences: tuple[Sentence, ...] = field(repr=False)

    def token_labels(self, attribute: str) -> list[str]:
        """The attribute's value at every token."""
        if attribute == "voice":
            return [item.voice for sentence in self.sentences for item in sentence.template.items]
        return [self.attributes[attribute]] * len(self.tokens)

    def mentions(self, attribute: str) -> list[bool]:
        """Whether each token was drawn depending on the attribute: which words carry it."""
        return [
            attribute in item.attributes for sentence in self.sentences for item in sentence.template.items
        ]


def draw_latents(rng: random.Random, distribution: Prior) -> tuple[dict[str, int], int]:
    """Indices of the values of every factor, and of the character."""
    values = {name: _draw(rng, tuple(p)) for name, p in distribution.factors.items()}
    return values, _draw(rng, tuple(distribution.characters))


@cache
def _cumulative(probabilities: tuple[float, ...]) -> tuple[list[int], list[float]]:
    support = [i for i, p in enumerate(probabilities) if p > 0]
    return support, [*itertools.accumulate(probabilities[i] for i in support)][:-1]


def _draw(rng: random.Random, probabilities: tuple[float, ...]) -> int:
    support, cumulative = _cumulative(probabilities)
    return support[bisect(cumulative, rng.random())]


def draw_plan(rng: random.Random, cue: str) -> list[Template]:
    """The templates of a story, from its first sentence to its last."""
    plan, state = [], START
    while state != END:
        cumulative, arcs = _arcs(state, cue)
        template, state = arcs[bisect(cumulative, rng.random())]
        plan.append(template)
    return plan


def tell(plan: list[Template], values: Mapping[str, int], character: int, rng: random.Random) -> Story:
    """Fill in the words. With the same plan and the same `rng`, other latents change only the words that
    depend on them."""
    lies = CHARACTERS[character][1] == "liar"
    tokens: list[str] = []
    sentences: list[Sentence] = []
    uniform = rng.random
    for template in plan:
        start = len(tokens)
        for item in template.items:
            slot = item.slot
            if slot is None:
                tokens.append(item.name)
                continue
            symbols = []
            for component in slot.components:
                cumulative, alphabet = component.cumulative[
                    0 if component.factor is None else values[component.factor]
                ]
                symbols.append(alphabet[bisect(cumulative, uniform())] if cumulative else alphabet[0])
            if slot.claim:
                u = uniform()
                if lies:
                    others = [s for s in ATTRIBUTES[template.fact or ""] if s != symbols[0]]
                    symbols[0] = others[int(u * len(others))]
            tokens.append(item.space + slot.spelling[tuple(symbols)])
        text = "".join(tokens[start:])[1:]
        sentences.append(Sentence(text, start, len(tokens), template))
    return Story("".join(tokens)[1:], describe(values, character), tuple(tokens), tuple(sentences))


def describe(values: Mapping[str, int], character: int) -> dict[str, str]:
    """Attribute -> value for indices of factors and character."""
    found = dict(zip(("cue", "honesty"), CHARACTERS[character], strict=True))
    for name, factor in FACTORS.items():
        found.update(zip(factor.attributes, factor.values[values[name]], strict=True))
    return {attribute: found[attribute] for attribute in ATTRIBUTES if attribute in found}


def stream(seed: int, variant: str | None = None, start: int = 0, **fixed: str) -> Iterator[Story]:
    """Endless stories from number `start` on; a story depends on its number and the other arguments alone.

    `fixed` holds attributes, such as `mood="happy"`.
    """
    distribution = condition(prior(variant), fixed)
    name = f"{variant or 'storyworld'}:{','.join(f'{k}={fixed[k]}' for k in sorted(fixed))}:{seed}"
    for index in itertools.count(start):
        rng = random.Random(f"{name}:{index}")
        values, character = draw_latents(rng, distribution)
        plan = draw_plan(rng, CHARACTERS[character][0])
        yield tell(plan, values, character, rng)


def sample(n: int, *, seed: int, variant: str | None = None, **fixed: str) -> list[Story]:
    """The first `n` stories of `stream`."""
    return list(itertools.islice(stream(seed, variant, 0, **fixed), n))
