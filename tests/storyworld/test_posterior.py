"""The probabilities are exact: they sum to one, match how often things happen, and agree with brute force."""

import itertools
import math

import numpy as np
import pytest

from steerkit import storyworld
from steerkit.storyworld.language import CHARACTERS, FACTORS, prior
from steerkit.storyworld.posterior import Reader


@pytest.mark.parametrize("variant", [None, "liars", "new_nouns"])
def test_next_token_probabilities_sum_to_one_after_every_prefix(variant):
    (story,) = storyworld.sample(1, seed=11, variant=variant)
    reader, before = Reader(variant), 0.0
    for token in story.tokens:
        following = reader.next_tokens()
        assert sum(following.values()) == pytest.approx(1)
        after = reader.push(token)
        assert following[token] == pytest.approx(math.exp(after - before))
        before = after
    assert reader.next_tokens() == {}
    assert reader.end() == pytest.approx(before)


def test_story_probability_equals_the_sum_over_all_latents():
    """Brute force: the probability of a prefix is the mean over latents of its probability given them."""
    for text in (
        "Tom is a happy fox. He",
        "Write an angry story. Anna the",
        'There was a sad girl named Zelda. "',
    ):
        tokens = storyworld.language.split(text)
        parts, masses = [], []
        for mood, tense, species in itertools.product(
            *(storyworld.ATTRIBUTES[a] for a in ("mood", "tense", "species"))
        ):
            weight = 1 / 4 * (0.6 if tense == "present" else 0.4) / 8
            reader = Reader(mood=mood, tense=tense, species=species)
            try:
                for token in tokens:
                    log_p = reader.push(token)
            except ValueError:
                continue
            parts.append((mood, species))
            masses.append(weight * math.exp(log_p))
        reader = Reader()
        try:
            for token in tokens:
                whole = reader.push(token)
        except ValueError:
            assert not masses
            continue
        assert math.exp(whole) == pytest.approx(sum(masses))
        for column, attribute in enumerate(("mood", "species")):
            expected = [
                sum(m for part, m in zip(parts, masses, strict=True) if part[column] == value) / sum(masses)
                for value in storyworld.ATTRIBUTES[attribute]
            ]
            assert reader.attribute(attribute) == pytest.approx(expected)


def test_conditioning_on_a_latent_is_bayes_rule_for_every_factor():
    """P(value | prefix) = P(value) P(prefix | value) / P(prefix), with P(prefix | value) from a reader that
    knows the value."""
    (story,) = storyworld.sample(1, seed=21, cue="liar")
    tokens = story.tokens[: len(story.tokens) // 2 + 3]
    for attribute in (
        "mood",
        "colour",
        "weather",
        "place",
        "day",
        "number",
        "politeness",
        "gender",
        "neighbour",
        "cue",
    ):
        table = storyworld.posterior(tokens, attributes=[attribute])[attribute][-1]
        joint = []
        for index, value in enumerate(storyworld.ATTRIBUTES[attribute]):
            reader = Reader(**{attribute: value})
            try:
                for token in tokens:
                    log_p = reader.push(token)
                joint.append(_prior(attribute)[index] * math.exp(log_p))
            except (ValueError, IndexError):
                joint.append(0.0)
        assert table == pytest.approx(np.array(joint) / sum(joint), abs=1e-9)


def test_a_story_told_more_often_is_more_probable_by_as_much():
    """Opening tokens are drawn as often as the reader says."""
    stories = storyworld.sample(4000, seed=31)
    for length in (1, 2, 3):
        counts: dict[tuple[str, ...], int] = {}
        for story in stories:
            counts[story.tokens[:length]] = counts.get(story.tokens[:length], 0) + 1
        for opening, count in sorted(counts.items(), key=lambda item: -item[1])[:8]:
            reader = Reader()
            for token in opening:
                log_p = reader.push(token)
            p = math.exp(log_p)
            assert abs(count / len(stories) - p) < 4.5 * math.sqrt(p * (1 - p) / len(stories))


def test_posterior_is_calibrated():
    """Among prefixes at which an attribute has posterior p, it has the value in a share p of the stories."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for index, story in enumerate(storyworld.sample(400, seed=41)):
        cut = 2 + (index * 5) % 60
        table = storyworld.posterior(
            story.tokens[:cut], attributes=["mood", "gender", "honesty", "politeness", "tense"]
        )
        for attribute, rows in table.items():
            for p, value in zip(rows[-1], storyworld.ATTRIBUTES[attribute], strict=True):
                bins.setdefault(min(9, int(p * 10)), []).append((p, story.attributes[attribute] == value))
    assert len(bins) >= 6
    for points in bins.values():
        expected, actual = np.mean(points, axis=0)
        assert (
            abs(expected - actual) < 4 * math.sqrt(max(expected * (1 - expected), 0.01) / len(points)) + 1e-9
        )


def test_posterior_is_aligned_and_ends_where_the_story_has_said_it():
    (story,) = storyworld.sample(1, seed=51)
    table = storyworld.posterior(story.text)
    for attribute, values in storyworld.ATTRIBUTES.items():
        assert table[attribute].shape == (len(story.tokens), len(values))
        assert table[attribute].sum(1) == pytest.approx(np.ones(len(story.tokens)))
    for attribute in ("mood", "tense", "place", "name", "colour", "honesty", "cue"):
        assert table[attribute][-1].argmax() == storyworld.ATTRIBUTES[attribute].index(
            story.attributes[attribute]
        )
        assert table[attribute][-1].max() > 0.999
    voices = [storyworld.ATTRIBUTES["voice"][row.argmax()] for row in table["voice"]]
    assert voices == story.token_labels("voice")


def test_the_prior_is_the_posterior_before_anything_is_read():
    reader = Reader()
    for name, factor in FACTORS.items():
        assert reader.factor(name) == pytest.approx(factor.prior)
    assert reader.characters() == pytest.approx(prior().characters)


def test_a_text_outside_the_language_has_probability_zero_and_no_posterior():
    (story,) = storyworld.sample(1, seed=61)
    assert math.isfinite(storyworld.log_prob(story.text))
    assert storyworld.log_prob(story.text + " Tom.") == -math.inf
    assert storyworld.log_prob(story.text.rsplit(" ", 3)[0]) == -math.inf
    assert storyworld.log_prob("") == -math.inf
    with pytest.raises(ValueError, match="cannot come here"):
        storyworld.posterior("Tom is happy")


def test_lies_without_a_cue_belong_to_the_liars_variant_alone():
    (story,) = storyworld.sample(1, seed=71, variant="liars")
    assert storyworld.log_prob(story.text) == -math.inf
    assert math.isfinite(storyworld.log_prob(story.text, "liars"))


def _prior(attribute):
    if attribute == "cue":
        return [
            sum(p for p, c in zip(prior().characters, CHARACTERS, strict=True) if c[0] == v)
            for v in ("none", "honest", "liar")
        ]
    factor = storyworld.language.factor_of(attribute)
    return factor.prior @ factor.projection(attribute)
