"""StoryWorld: a small labelled language with a grammar, a judge, exact probabilities and a transformer
trained on it."""

from __future__ import annotations

from pathlib import Path

from steerkit.storyworld.judge import Claim, Judge, JudgedSentence, Judgement, Violation
from steerkit.storyworld.language import ATTRIBUTES, VARIANTS, Sentence, Story, sample, stream
from steerkit.storyworld.posterior import Reader, log_prob, posterior
from steerkit.storyworld.tasks import held_out_claims, instruction, labelled, openings, pairs, persona_pairs

__all__ = [
    "ATTRIBUTES",
    "VARIANTS",
    "Claim",
    "Judge",
    "JudgedSentence",
    "Judgement",
    "Reader",
    "Sentence",
    "Story",
    "Violation",
    "held_out_claims",
    "instruction",
    "labelled",
    "log_prob",
    "model_path",
    "openings",
    "pairs",
    "persona_pairs",
    "posterior",
    "sample",
    "stream",
]


def model_path() -> Path:
    """The directory of the shipped model and its tokenizer, in Hugging Face's layout."""
    return Path(__file__).parent / "model"
