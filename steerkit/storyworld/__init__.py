"""StoryWorld: a small labelled language with a grammar, a judge, exact probabilities and a transformer trained on it."""

from __future__ import annotations

from pathlib import Path

from .language import ATTRIBUTES, VARIANTS, Sentence, Story, sample, stream
from .posterior import log_prob, posterior

__all__ = ["ATTRIBUTES", "VARIANTS", "Sentence", "Story", "log_prob", "model_path", "posterior", "sample", "stream"]


def model_path() -> Path:
    """The directory of the shipped model and its tokenizer, in Hugging Face's layout."""
    return Path(__file__).parent / "model"
