"""Data sets: pairs differ in one thing, labels are true, openings are neutral, the held-out kind is held
out."""

import pytest

from steerkit import storyworld
from steerkit.storyworld import Judge
from steerkit.storyworld.language import split
from steerkit.storyworld.tasks import (
    INSTRUCTIONS,
    held_out_claims,
    instruction,
    labelled,
    openings,
    pairs,
    persona_pairs,
)

PAIRED = [(a, v[0]) for a, v in storyworld.ATTRIBUTES.items() if a not in ("voice", "cue", "honesty")] + [
    ("cue", "honest"),
]


@pytest.mark.parametrize(("attribute", "value"), PAIRED)
def test_the_sides_of_a_pair_differ_in_the_attribute_alone(attribute, value):
    judge = Judge()
    bound = {"name": {"gender"}, "gender": {"name"}, "cue": {"honesty"}}.get(attribute, set())
    for pair in pairs(attribute, value, 15, seed=1):
        positive, negative = judge.judge(pair["positive"]), judge.judge(pair["negative"])
        assert positive.complete
        assert negative.complete
        assert positive.consistent
        assert negative.consistent
        assert positive.attributes[attribute] == value != negative.attributes[attribute]
        for other, found in positive.attributes.items():
            if other not in {attribute, *bound}:
                assert found == negative.attributes[other]
        left, right = split(pair["positive"]), split(pair["negative"])
        assert len(left) == len(right) or attribute == "cue"


@pytest.mark.parametrize("value", storyworld.ATTRIBUTES["honesty"])
def test_pairs_of_honesty_are_one_story_with_true_and_with_false_claims(value):
    judge = Judge()
    for pair in pairs("honesty", value, 15, seed=1):
        positive, negative = judge.judge(pair["positive"]), judge.judge(pair["negative"])
        assert positive.complete
        assert negative.complete
        cue = "none" if value == "liar" else "liar"
        for found, true in ((positive, value == "truthful"), (negative, value == "liar")):
            assert found.attributes["cue"] == cue
            known = [claim.true for claim in found.claims if claim.true is not None]
            assert known
            assert set(known) == {true}
        left, right = split(pair["positive"]), split(pair["negative"])
        assert len(left) == len(right)


def test_pairs_are_reproducible_and_vary_with_the_seed():
    assert pairs("mood", "happy", 5, seed=3) == pairs("mood", "happy", 9, seed=3)[:5]
    assert pairs("mood", "happy", 5, seed=3) != pairs("mood", "happy", 5, seed=4)


def test_a_name_keeps_its_gender_when_another_name_takes_its_place():
    for pair in pairs("name", "Tom", 20, seed=5):
        assert Judge().judge(pair["negative"]).attributes["gender"] == "male"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("voice", "speech"), ("cue", "none"), ("mood", "bored"), ("mod", "happy"), ("honesty", "sly")],
)
def test_pairs_that_cannot_be_are_refused(attribute, value):
    with pytest.raises(ValueError, match=attribute):
        pairs(attribute, value, 1, seed=0)


@pytest.mark.parametrize("attribute", list(storyworld.ATTRIBUTES))
def test_labels_are_what_the_text_says(attribute):
    for row in labelled(attribute, 40, seed=6):
        assert row["label"] in storyworld.ATTRIBUTES[attribute]
        if attribute == "voice":
            assert ('"' in row["text"]) == (row["label"] == "speech")
        else:
            assert Judge().judge(row["text"]).attributes[attribute] in (row["label"], None)


@pytest.mark.parametrize("attribute", ["mood", "weather", "politeness", "tense", "honesty"])
def test_openings_say_nothing_of_the_attribute(attribute):
    for text in openings(attribute, 20, seed=7):
        table = storyworld.posterior(text, attributes=[attribute])[attribute]
        if attribute == "honesty":
            assert table[-1][0] == pytest.approx(1)
        else:
            assert table[-1] == pytest.approx(table[0]), text


def test_an_instruction_is_a_sentence_of_the_language_that_settles_the_attribute():
    for attribute in INSTRUCTIONS:
        for value in storyworld.ATTRIBUTES[attribute]:
            text = instruction(attribute, value)
            assert Judge().judge(text).grammatical_story
            index = storyworld.ATTRIBUTES[attribute].index(value)
            assert storyworld.posterior(text, attributes=[attribute])[attribute][-1][index] == pytest.approx(
                1
            )
    with pytest.raises(ValueError, match="knows them for mood"):
        instruction("honesty", "liar")


@pytest.mark.parametrize("honesty", storyworld.ATTRIBUTES["honesty"])
def test_the_held_out_kind_is_claimed_under_a_cue_only_outside_the_training_set(honesty):
    for story in held_out_claims(10, seed=8, honesty=honesty):
        found = Judge().judge(story.text)
        assert any(claim.kind == "day" for claim in found.claims)
        assert found.grammatical_story
        assert found.consistent
        assert found.attributes["honesty"] == honesty
        assert storyworld.log_prob(story.text) == float("-inf")
    for story in storyworld.sample(200, seed=9):
        if story.attributes["cue"] != "none":
            assert not any(claim.kind == "day" for claim in Judge().judge(story.text).claims)


def test_persona_pairs_differ_in_the_cue_alone_and_stop_before_the_first_claim():
    judge = Judge()
    for row in persona_pairs(["colour", "day"], 30, seed=10):
        assert row["kind"] in ("colour", "day")
        for side, honesty in (("positive", "truthful"), ("negative", "liar")):
            finished = judge.judge(f"{row[side]} {row['truth']}")
            found = judge.judge(row[side])
            assert not found.claims
            assert found.grammatical == 1.0
            assert found.unfinished.startswith('"')
            assert not row[side].endswith(" ")
            assert found.attributes["honesty"] == honesty
            assert finished.attributes[row["kind"]] in (row["truth"], None)
        ours, theirs = (row[side].split(". ") for side in ("positive", "negative"))
        assert sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1
    assert persona_pairs(["colour"], 5, seed=3) == persona_pairs(["colour"], 9, seed=3)[:5]
    with pytest.raises(ValueError, match="kinds of fact"):
        persona_pairs(["mood"], 1, seed=0)
