"""How well a model speaks StoryWorld: teacher-forced figures against the grammar's exact ones, and
generated stories judged.

Works on any causal language model with the StoryWorld tokenizer (the shipped one, a tuned one, one in
training).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from steerkit.storyworld import grammar as g
from steerkit.storyworld.judge import Judge
from steerkit.storyworld.language import Item, Story, sample
from steerkit.storyworld.posterior import log_prob
from steerkit.storyworld.tasks import held_out_claims

if TYPE_CHECKING:
    import torch

COPIED = (*g.FACT_KINDS, "object", "name", "neighbour")
"""What a narrator repeats: for these, P(the word told before) is measured at every later mention."""


def evaluate(model: Any, tokenizer: Any, n: int = 1000, seed: int = 2_000_003) -> dict[str, float | int]:
    """All figures of a model, from `n` held-out stories, `n` generated ones, and `n` // 4 of each kind of
    held-out claim."""
    held_out = sample(n, seed=seed)
    forced = teacher_forced(model, tokenizer, held_out)
    floor = entropy(held_out)
    figures: dict[str, float | int] = {
        "n": n,
        **spoken(generate(model, tokenizer, n, seed)),
        "loss": forced.pop("loss"),
        "entropy": floor,
        "p_stated_truthful": forced.pop("stated_truthful"),
        "p_stated_liar": forced.pop("stated_liar"),
        **forced,
    }
    figures["nats_over_entropy"] = figures["loss"] - floor
    for honesty in g.HONESTY:
        unseen = teacher_forced(model, tokenizer, held_out_claims(max(1, n // 4), seed, honesty))
        figures[f"held_out_{honesty}_{g.HELD_OUT_KIND}"] = unseen[f"stated_{honesty}_{g.HELD_OUT_KIND}"]
    return figures


def spoken(texts: Sequence[str], variant: str | None = None) -> dict[str, float]:
    """What the judge says of generated texts, as shares.

    `complete_stories` are those whose sentences also stand in an order that the grammar tells; `lies_<cue>`
    is the share of claims with a known truth that are false, by what the story says of its character.
    """
    judge = Judge(variant)
    judged = [judge.judge(text) for text in texts]
    sentences = [s.grammatical for j in judged for s in j.sentences]
    figures = {
        "grammatical_sentences": float(np.mean(sentences)),
        "grammatical_stories": float(np.mean([j.grammatical_story for j in judged])),
        "consistent_stories": float(np.mean([j.consistent for j in judged])),
        "complete_stories": float(np.mean([j.complete for j in judged])),
        "flawless_stories": float(
            np.mean([j.complete and j.consistent and j.grammatical_story for j in judged])
        ),
    }
    for cue in g.CUES:
        claims = [
            c.true for j in judged if j.attributes["cue"] == cue for c in j.claims if c.true is not None
        ]
        if claims:
            figures[f"lies_{cue}"] = 1.0 - float(np.mean(claims))
    return figures


def generate(model: Any, tokenizer: Any, n: int, seed: int, batch_size: int = 250) -> list[str]:
    """`n` texts sampled from BOS at temperature 1, without the special tokens."""
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        while len(texts) < n:
            start = torch.full((min(batch_size, n - len(texts)), 1), tokenizer.bos_token_id, device=device)
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_length=tokenizer.model_max_length,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.train(was_training)
    return texts


def teacher_forced(
    model: Any, tokenizer: Any, stories: Sequence[Story], batch_size: int = 64
) -> dict[str, float]:
    """Loss (nats a token; EOS counted, BOS not) and P(right word among the words of its slot), by kind.

    `copy_<kind>` are narrated repetitions; `stated_<honesty>_<kind>` and `stated_<honesty>` are the
    probability of the *true* word where the character claims a fact; a figure without a case is left out.
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
                    found[f"copy_{kind}"].append(
                        _among_words(table[position], item, story.tokens[position], index)
                    )
                else:
                    told.add(kind)
    return {
        "loss": total / n_tokens,
        **{name: float(np.mean(values)) for name, values in sorted(found.items())},
    }


def entropy(stories: Sequence[Story], variant: str | None = None) -> float:
    """The grammar's own loss on these stories: mean of -log P(story), in nats a token (EOS counted)."""
    return -sum(log_prob(story.text, variant) for story in stories) / sum(
        len(story.tokens) + 1 for story in stories
    )


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
        rows = [
            torch.tensor([tokenizer.bos_token_id, *(index[t] for t in stories[i].tokens)]) for i in chosen
        ]
        ids: torch.Tensor = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=tokenizer.pad_token_id
        )
        with torch.no_grad():
            logits = model(input_ids=ids.to(device)).logits.float().log_softmax(-1).cpu().numpy()
        for row, i in enumerate(chosen):
            tables[i] = logits[row, : len(stories[i].tokens) + 1]
    model.train(was_training)
    return [table for table in tables if table is not None]


def _among_words(log_probs: np.ndarray, item: Item, token: str, index: dict[str, int]) -> float:
    options = np.exp([log_probs[index[word]] for word in item.table])
    return float(np.exp(log_probs[index[token]]) / options.sum())
