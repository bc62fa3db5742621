"""Pairs from templates and from the model's own writing."""

import pytest

from steerkit import HookedModel, steering
from steerkit.errors import InputError
from steerkit.steering.effects import StoryAttribute


def test_templates_multiply_words_and_suffixes():
    pairs = steering.template_pairs("The {} fox", ["happy", "glad"], ["sad", "grim"], ["went out.", "sat."])
    assert len(pairs) == 4
    assert pairs[1].texts() == ("The happy fox sat.", "The sad fox sat.")
    assert pairs[2].texts() == ("The glad fox went out.", "The grim fox went out.")
    with pytest.raises(InputError, match="needs one"):
        steering.template_pairs("The fox", ["a"], ["b"])
    with pytest.raises(InputError, match="2 positive and 1 negative"):
        steering.template_pairs("{}", ["a", "b"], ["c"])


def test_the_model_writes_pairs_under_opposite_instructions():
    model = HookedModel.from_pretrained("storyworld")
    openings = ["There is a fox named Anna.", "There is a bear named Tom."]
    effect = StoryAttribute("mood", "happy")
    texts = ("Write a happy story.", "Write a sad story.")
    pairs = steering.generated_pairs(model, *texts, openings, keep=effect, samples=4, max_new_tokens=48)
    assert 0 < len(pairs) <= 8
    assert {pair.prompt for pair in pairs} <= set(openings)
    prompts = [pair.prompt for pair in pairs]
    assert (effect(prompts, [" " + pair.positive for pair in pairs]) == 1).all()
    assert (effect(prompts, [" " + pair.negative for pair in pairs]) == 0).all()
    again = steering.generated_pairs(model, *texts, openings, keep=effect, samples=4, max_new_tokens=48)
    assert again.fingerprint() == pairs.fingerprint()
    with pytest.raises(InputError, match="is left"):
        steering.generated_pairs(model, texts[1], texts[1], openings, max_new_tokens=3)
