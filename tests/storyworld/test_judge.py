"""The judge accepts what the grammar tells, reads it right, and rejects what is broken – and only for what
is broken."""

import random

import pytest

from steerkit import storyworld
from steerkit.storyworld import Judge
from steerkit.storyworld.language import vocabulary

STORIES = storyworld.sample(300, seed=101)


def test_gold_stories_are_accepted_with_their_attributes():
    judge = Judge()
    for story in STORIES:
        found = judge.judge(story.text)
        assert _flawless(found), found.violations
        assert [s.text for s in found.sentences] == [s.text for s in story.sentences]
        assert [story.text[s.start : s.end] for s in found.sentences] == [s.text for s in story.sentences]
        assert [s.kind for s in found.sentences] == [s.kind for s in story.sentences]
        for attribute, value in found.attributes.items():
            assert value in (story.attributes[attribute], None)
        for attribute in (
            "mood",
            "tense",
            "place",
            "weather",
            "day",
            "name",
            "gender",
            "species",
            "object",
            "colour",
            "cue",
            "honesty",
        ):
            assert found.attributes[attribute] == story.attributes[attribute]


@pytest.mark.parametrize("variant", storyworld.VARIANTS)
def test_gold_stories_of_a_variant_are_accepted_by_its_judge(variant):
    judge = Judge(variant)
    for story in storyworld.sample(50, seed=102, variant=variant):
        found = judge.judge(story.text)
        assert found.grammatical_story
        assert found.complete
        assert found.consistent
        assert found.attributes["honesty"] == story.attributes["honesty"]


def test_lies_without_a_cue_are_read_as_lies_and_as_a_contradiction():
    for story in storyworld.sample(50, seed=103, variant="liars"):
        found = Judge().judge(story.text)
        assert found.grammatical_story
        assert not found.consistent
        assert found.attributes["honesty"] == "liar"
        assert found.attributes["cue"] == "none"
        assert {v.attribute for v in found.contradictions} == {"honesty"}


def test_judge_and_grammar_agree_on_what_is_a_story():
    """A text is flawless to the judge if and only if the grammar gives it a probability."""
    rng = random.Random(0)
    words = vocabulary()
    flawless = 0
    for story in STORIES:
        tokens = list(story.tokens)
        for _ in range(2):
            tokens[rng.randrange(len(tokens))] = rng.choice(words if rng.random() < 0.5 else tokens)
        text = "".join(tokens).removeprefix(" ")
        found = Judge().judge(text)
        possible = storyworld.log_prob(text) > float("-inf")
        if possible:
            assert _flawless(found), text
            flawless += 1
        elif (
            "squirrel" not in text
            and "beaver" not in text
            and not set(storyworld.ATTRIBUTES["object"][25:]) & set(text.split())
        ):
            days = [c for c in found.claims if c.kind == "day"]
            assert not _flawless(found) or days, text
    assert flawless < len(STORIES) / 4


def test_a_swapped_word_is_rejected():
    rng = random.Random(1)
    judge, caught = Judge(), 0
    for story in STORIES:
        sentence = rng.choice(story.sentences)
        place = rng.randrange(sentence.start, sentence.end - 2)
        tokens = list(story.tokens)
        tokens[place], tokens[place + 1] = tokens[place + 1], tokens[place]
        found = judge.judge("".join(tokens).removeprefix(" "))
        caught += tokens == list(story.tokens) or not found.grammatical_story
    assert caught == len(STORIES)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("The rabbits near the sunny park sleep.", "The rabbits near the sunny park sleeps."),
        ("The rabbit near the sunny park sleeps.", "The rabbit near the sunny park sleep."),
        ("The birds from the park were not far away.", "The birds from the park was not far away."),
        ('"Where are we?" ask the ducks.', '"Where are we?" asks the ducks.'),
        ("He feels glad and smiles.", "He feels glad and smiled."),
        ("Write an angry story.", "Write a angry story."),
        ("Write a sad story.", "Write an sad story."),
        ("Tom is a happy fox.", "tom is a happy fox."),
        ("Tom is a happy fox.", "Tom is a happy fox"),
        ('"The ball is red," says Tom.', '"The ball is red" says Tom.'),
        ('"The ball is red," says Tom.', '"The ball is rainy," says Tom.'),
        ("Tom has a red ball.", "Tom has a ball red."),
    ],
)
def test_a_sentence_must_agree_with_itself(good, bad):
    assert Judge().judge(good).grammatical_story
    assert not Judge().judge(bad).grammatical_story


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ("Tom is a happy fox. Tom weeps sadly.", "mood"),
        ("Tom is a happy fox. Tom smiled loudly.", "tense"),
        ("Tom has a red ball. Tom takes the blue ball loudly.", "colour"),
        ("Tom has a red ball. Tom takes the red hat loudly.", "object"),
        ("Tom is a happy fox. She giggles loudly.", "gender"),
        ("Tom is a happy fox. The bear giggles loudly.", "species"),
        ("Tom is a happy fox. Ben giggles loudly.", "name"),
        ("One rainy Monday, Tom visits the park. It is still rainy in the market.", "place"),
        ("One rainy Monday, Tom visits the park. It is still sunny in the park.", "weather"),
        ("One rainy Monday, Tom visits the park. Every Friday, Tom comes to the park.", "day"),
        ("The ducks near the sunny park play. The duck plays in the sun.", "number"),
        ("The ducks near the sunny park play. The goats play in the sun.", "neighbour"),
        (
            "On this Monday, he politely greets the ducks. In the sunny park, he rudely turns to the ducks.",
            "politeness",
        ),
        ('Tom never lies. Tom has a red ball. "The ball is blue," says Tom.', "honesty"),
        ('Tom always lies. Tom has a red ball. "The ball is red," says Tom.', "honesty"),
        ('Tom has a red ball. "The ball is red," says Tom. "My ball is blue," says Tom.', "honesty"),
        ("Tom never lies. Tom always lies.", "cue"),
    ],
)
def test_a_contradiction_is_found_and_named(text, attribute):
    found = Judge().judge(text)
    assert found.grammatical == 1.0
    assert {v.attribute for v in found.contradictions} == {attribute}
    assert not found.consistent
    assert attribute in ("honesty", "cue") or found.attributes[attribute] is None
    assert all(violation.startswith(f"{attribute}: ") for violation in found.violations)


def test_a_claim_is_no_evidence_for_the_fact():
    found = Judge().judge('Tom always lies. Tom has a red ball. "The ball is blue," says Tom.')
    assert found.consistent
    assert found.attributes["colour"] == "red"
    assert found.attributes["honesty"] == "liar"
    (claim,) = found.claims
    assert (claim.kind, claim.said, claim.truth, claim.true) == ("colour", "blue", "red", False)


def test_counting_can_start_after_a_prompt():
    prompt = "Tom is a sad fox."
    found = Judge().judge(prompt + " Tom smiles happily. He giggles loudly. The the", start=len(prompt))
    assert found.evidence["mood"] == {"happy": 3}
    assert found.share("mood", "happy") == 1.0
    assert found.grammatical == 1.0
    assert found.unfinished == "The the"
    assert not found.grammatical_story
    assert Judge().judge(prompt + " Tom smiles happily.").share("mood", "sad") == pytest.approx(1 / 3)


@pytest.mark.parametrize("text", ["", "   ", "...", "?", "<unk>", "Ωμέγα is a fox.", "Tom\nis a happy fox."])
def test_any_text_can_be_judged(text):
    found = Judge().judge(text)
    assert not found.grammatical_story
    assert not found.complete


def _flawless(found):
    return found.grammatical_story and found.complete and found.consistent
