"""The shipped model loads as any Hugging Face model and speaks the language as well as its documentation
says (loosely)."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerkit import storyworld
from steerkit.storyworld import quality
from steerkit.storyworld.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def shipped():
    tokenizer = AutoTokenizer.from_pretrained(storyworld.model_path())
    model = AutoModelForCausalLM.from_pretrained(storyworld.model_path())
    return model.eval(), tokenizer


def test_the_shipped_files_are_small_and_fit_the_grammar(shipped):
    model, tokenizer = shipped
    assert (storyworld.model_path() / "model.safetensors").stat().st_size < 8e6
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    assert not model.config.tie_word_embeddings
    for text in ("Tom is a happy fox.", '"The ball is red," says Tom.'):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_model_predicts_nearly_as_well_as_the_grammar(shipped):
    stories = storyworld.sample(120, seed=500)
    figures = quality.teacher_forced(*shipped, stories)
    assert figures["loss"] - quality.entropy(stories) < 0.06
    for kind in ("colour", "place", "weather", "day", "object"):
        assert figures[f"copy_{kind}"] > 0.9
    assert figures["stated_truthful"] > 0.85
    assert figures["stated_liar"] < 0.15


def test_what_it_tells_is_grammatical_and_consistent(shipped):
    texts = quality.generate(*shipped, n=60, seed=1)
    figures = quality.spoken(texts)
    assert len(set(texts)) == 60
    assert figures["grammatical_sentences"] > 0.98
    assert figures["grammatical_stories"] > 0.85
    assert figures["consistent_stories"] > 0.7


def test_generation_is_reproducible_and_leaves_the_random_state_alone(shipped):
    state = torch.get_rng_state()
    assert quality.generate(*shipped, n=2, seed=3) == quality.generate(*shipped, n=2, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_the_figures_of_the_grammar_itself_are_perfect():
    """A sanity check of the measure: gold stories, judged as if a model had told them."""
    figures = quality.spoken([story.text for story in storyworld.sample(100, seed=6)])
    assert all(value == 1.0 for name, value in figures.items() if name.endswith(("stories", "sentences")))
    assert (figures["lies_none"], figures["lies_honest"], figures["lies_liar"]) == (0.0, 0.0, 1.0)


def test_teacher_forcing_equals_the_models_own_loss(shipped):
    model, tokenizer = shipped
    (story,) = storyworld.sample(1, seed=8)
    ids = torch.tensor([[*tokenizer(story.text).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert quality.teacher_forced(model, tokenizer, [story])["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_training_log_is_shipped_with_the_model():
    lines = (storyworld.model_path() / "training_log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert np.all(np.diff([entry["tokens"] for entry in entries]) > 0)
    assert entries[-1]["nats_over_entropy"] < entries[0]["nats_over_entropy"]
