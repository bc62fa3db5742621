"""How well a model speaks StoryWorld: teacher-forced figures against the grammar's exact ones, and generated stories judged.

Works on any causal language model with the StoryWorld tokenizer (the shipped one, a tuned one, one in training).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import grammar as g
from .language import Item, Story
from .posterior import log_prob

if TYPE_CHECKING:
    import torch

COPIED = (*g.FACT_KINDS, "object", "name", "neighbour")
"""What a narrator repeats: for these, P(the word told before) is measured at every later mention."""


def teacher_forced(model: Any, tokenizer: Any, stories: Sequence[Story], batch_size: int = 64) -> dict[str, float]:
    """Loss (nats a token; EOS counted, BOS not) and P(right word among the words of its slot), by kind.

    `copy_<kind>` are narrated repetitions; `stated_<honesty>_<kind>` and `stated_<honesty>` are the probability of the *true* word
    where the character claims a fact; a figure without a case is left out.
    """
    log_probs = _log_probs(model, tokenizer, stories, batch_size)
    index = tokenizer.get_vocab()
    total, n_tokens = 0.0, 0
    found: dict[str, list[float]] = defaultdict(list)
    for story, table in zip(stories, log_probs, strict=True):
        ids = [*(index[token] for token in story.tokens), tokenizer.eos_token_id]
        total -= float(table[np.arange(len(ids)), ids].sum())
        n_tokens += len(ids)
        told: set[str] = set()
        for sentence in story.sentences:
            for position, item in enumerate(sentence.template.items, sentence.start):
                if item.slot is None or item.name.removesuffix("!") not in COPIED:
                    continue
                kind = item.name.removesuffix("!")
                if item.slot.claim:
                    p = _among_words(table[position], item, item.space + story.attributes[kind], index)
                    honesty = story.attributes["honesty"]
                    found[f"stated_{honesty}_{kind}"].append(p)
                    found[f"stated_{honesty}"].append(p)
                elif kind in told:
                    found[f"copy_{kind}"].append(_among_words(table[position], item, story.tokens[position], index))
                else:
                    told.add(kind)
    return {"loss": total / n_tokens, **{name: float(np.mean(values)) for name, values in sorted(found.items())}}


def entropy(stories: Sequence[Story], variant: str | None = None) -> float:
    """The grammar's own loss on these stories: mean of -log P(story), in nats a token (EOS counted)."""
    return -sum(log_prob(story.text, variant) for story in stories) / sum(len(story.tokens) + 1 for story in stories)


def _log_probs(model: Any, tokenizer: Any, stories: Sequence[Story], batch_size: int) -> list[np.ndarray]:
    """Per story (n_tokens + 1, n_vocab) log probabilities of the next token, from BOS on."""
    import torch

    index = tokenizer.get_vocab()
    device = next(model.parameters()).device
    tables: list[np.ndarray | None] = [None] * len(stories)
    order = sorted(range(len(stories)), key=lambda i: len(stories[i].tokens))
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [torch.tensor([tokenizer.bos_token_id, *(index[t] for t in stories[i].tokens)]) for i in chosen]
        ids: torch.Tensor = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(input_ids=ids.to(device)).logits.float().log_softmax(-1).cpu().numpy()
        for row, i in enumerate(chosen):
            tables[i] = logits[row, : len(stories[i].tokens) + 1]
    model.train(was_training)
    return [table for table in tables if table is not None]


def _among_words(log_probs: np.ndarray, item: Item, token: str, index: dict[str, int]) -> float:
    options = np.exp([log_probs[index[word]] for word in item.table])
    return float(np.exp(log_probs[index[token]]) / options.sum())
