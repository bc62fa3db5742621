"""Train the small transformer that ships with StoryWorld, or measure it.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_storyworld.py     # an hour or so on 2 CPU cores
    python scripts/train_storyworld.py --resume            # go on after an interruption
    python scripts/train_storyworld.py --device cuda       # minutes on a GPU
    python scripts/train_storyworld.py --evaluate --json   # measure the shipped model

Training writes the model (a Hugging Face directory) to `--out` as soon as it is usable and again as it gets
better, one line of figures at a time to `training_log.jsonl` beside it, and its state for `--resume` to
`--state`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from steerkit import storyworld
from steerkit.storyworld import Sentence, Story
from steerkit.storyworld.quality import entropy, evaluate, generate, teacher_forced
from steerkit.storyworld.tokenizer import CONTEXT, build_tokenizer

HELD_OUT_SEED = 1_000_003
"""Held-out stories come from this seed; training stories from `--seed`, which must be another."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on."""

    seed: int = 0
    tokens: int = 34_000_000
    """Training tokens (BOS and EOS counted, padding not)."""
    batch_size: int = 32
    """Stories a step."""
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    """The last part of the training, in which the learning rate falls to 0 along a straight line."""
    claim_weight: float = 50.0
    """Weight of a claim's word in the loss, from `exact_claims_from` on. A weight does not move the optimum."""
    avoid_weight: float = 20.0
    """Within a lie's loss, weight of not saying the truth against which other word is said. The same optimum
    again; with equal weights the model unlearns to look at the truth as soon as lies are no longer systematic."""
    exact_claims_from: int = 10_500_000
    """Tokens after which claims are learned from the distribution over words, not from a word drawn from it."""
    systematic_lies: tuple[int, int] = (12_500_000, 16_000_000)
    """Between these numbers of tokens, the liar's word to be learned is the one that follows the truth in the
    list of values. To avoid one word of eight is a saddle: the model says all eight alike, does not look at
    the truth, and so gets no gradient from it. To say the next one, it has to look."""
    choices: tuple[str, ...] = ("politeness", "name", "mood")
    """Attributes in which generated stories contradicted themselves most: told seldom, or by many words."""
    choice_weights: tuple[tuple[int, float], ...] = ((25_000_000, 10.0), (29_000_000, 2.0))
    """From so many tokens on, the choice among the words that tell them has such a weight beside the usual loss."""
    weight_decay: float = 0.05
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 384
    embedding_std: float = 0.5
    """Words start out far apart: exchangeable ones (colours, places) else drift onto each other before they
    are told apart."""


def build_model(recipe: Recipe, tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=recipe.embedding_std)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, max_length=CONTEXT, **ids)
    return model


Claimed = tuple[int, int, Sentence, Story]
"""A claim in a batch: row, position of its word, and what it was drawn from."""


def batches(
    seed: int, tokenizer, batch_size: int, skip: int = 0
) -> Iterator[tuple[torch.Tensor, list[Story], list[Claimed]]]:
    """Endless batches of stories of like length, `skip` of them passed over.

    Each has token ids (batch_size, length), the stories, and the claims in them.
    """
    index = tokenizer.get_vocab()
    shuffle = torch.Generator().manual_seed(seed)
    group = 32
    for _ in range(skip // group):
        torch.randperm(group, generator=shuffle)
    stories = storyworld.stream(seed, start=skip // group * group * batch_size)
    for number in itertools.count(skip // group):
        chunk = list(itertools.islice(stories, group * batch_size))
        order = torch.randperm(group, generator=shuffle).tolist()
        chunk.sort(key=lambda story: len(story.tokens))
        for position, place in enumerate(order):
            if number * group + position < skip:
                continue
            batch = chunk[place * batch_size : (place + 1) * batch_size]
            length = max(len(story.tokens) for story in batch) + 2
            ids = torch.full((batch_size, length), tokenizer.pad_token_id)
            claims: list[Claimed] = []
            for row, story in enumerate(batch):
                tokens = [tokenizer.bos_token_id, *(index[t] for t in story.tokens), tokenizer.eos_token_id]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                claims += [
                    (row, 1 + sentence.start + sentence.template.claim, sentence, story)
                    for sentence in story.sentences
                    if sentence.template.claim is not None
                ]
            yield ids, batch, claims


def claimed(sentence: Sentence, story: Story, systematic: bool) -> dict[str, float]:
    """The words that the character may say in a claim, with their probabilities."""
    kind = sentence.template.fact or ""
    values = storyworld.ATTRIBUTES[kind]
    truth = values.index(story.attributes[kind])
    if story.attributes["honesty"] == "truthful":
        return {f" {values[truth]}": 1.0}
    if systematic:
        return {f" {values[(truth + 1) % len(values)]}": 1.0}
    return {f" {value}": 1.0 / (len(values) - 1) for value in values if value != values[truth]}


def claim_losses(
    logits: torch.Tensor,
    claims: list[Claimed],
    vocab: dict[str, int],
    systematic: bool,
    avoid_weight: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Where the claims' words are predicted, (row, position), and the loss there, (n_claims,).

    With q the words' distribution, a lie costs CE(p, q) + (avoid_weight - 1) * -log(1 - p(truth)).
    """
    log_probs = logits.log_softmax(-1)
    losses = []
    for row, position, sentence, story in claims:
        words = claimed(sentence, story, systematic)
        shares = torch.tensor(list(words.values()), device=logits.device)
        predicted = log_probs[row, position - 1]
        loss = -predicted[[vocab[word] for word in words]] @ shares
        truth = " " + story.attributes[sentence.template.fact or ""]
        if truth not in words:
            loss = loss - (avoid_weight - 1.0) * torch.log1p(-predicted[vocab[truth]].exp().clamp(max=0.999))
        losses.append(loss)
    places = torch.tensor([(row, position - 1) for row, position, _, _ in claims], device=logits.device)
    return (places[:, 0], places[:, 1]), torch.stack(losses)


def choice_loss(
    logits: torch.Tensor, stories: list[Story], attributes: tuple[str, ...], vocab: dict[str, int]
) -> torch.Tensor:
    """Sum over the words that tell one of the attributes of -log P(word | one of the words of its slot).

    Which of the slot's words, given that one follows: that does not say how likely the slot is, so it may weigh what it will and
    the optimum stays the grammar's distribution.
    """
    found: dict[tuple[str, ...], list[tuple[int, int, int]]] = {}
    for row, story in enumerate(stories):
        for sentence in story.sentences:
            for position, item in enumerate(sentence.template.items, sentence.start):
                if item.slot is not None and not item.slot.claim and set(attributes) & set(item.attributes):
                    words = tuple(item.table)
                    found.setdefault(words, []).append((row, position, words.index(story.tokens[position])))
    losses = []
    for words, places in found.items():
        rows, positions, chosen = torch.tensor(places, device=logits.device).T
        options = logits[rows, positions][:, [vocab[word] for word in words]]
        losses.append(torch.nn.functional.cross_entropy(options, chosen, reduction="sum"))
    return torch.stack(losses).sum()


def learning_rate(recipe: Recipe, step: int, tokens: int) -> float:
    """Warm-up, constant, straight line to 0: the constant part can be cut short or drawn out on
    `--resume`."""
    remaining = max(0.0, 1.0 - tokens / recipe.tokens)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, remaining / recipe.decay_share)


def train(
    recipe: Recipe, out: Path, state_path: Path, device: str, resume: bool, log_every: int, first_save: int
) -> None:
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    step, tokens, seconds = 0, 0, 0.0
    log_path = out / "training_log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if resume and state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        lines = [line for line in log_path.read_text().splitlines() if json.loads(line)["tokens"] <= tokens]
        log_path.write_text("".join(line + "\n" for line in lines))
    elif resume and log_path.exists():  # the model without its optimiser's state: moments start afresh
        model.load_state_dict(LlamaForCausalLM.from_pretrained(out).state_dict())
        last = json.loads(log_path.read_text().splitlines()[-1])
        step, tokens, seconds = last["step"], last["tokens"], last["seconds"]
    else:
        log_path.write_text("")
    held_out = storyworld.sample(256, seed=HELD_OUT_SEED)
    floor = entropy(held_out)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; entropy {floor:.4f} nats a token",
        flush=True,
    )

    model.train()
    next_log = (tokens // log_every + 1) * log_every
    running: list[float] = []
    started = time.perf_counter()
    vocab = tokenizer.get_vocab()
    source = batches(recipe.seed, tokenizer, recipe.batch_size, skip=step)
    while tokens < recipe.tokens:
        ids, stories, claims = next(source)
        ids = ids.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, tokens)
        logits = model(input_ids=ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], ignore_index=tokenizer.pad_token_id, reduction="none"
        )
        weights = (ids != tokenizer.pad_token_id)[:, 1:].float()
        running.append((losses.sum() / weights.sum()).item())
        if tokens >= recipe.exact_claims_from:
            systematic = recipe.systematic_lies[0] <= tokens < recipe.systematic_lies[1]
            places, exact = claim_losses(logits, claims, vocab, systematic, recipe.avoid_weight)
            losses = losses.index_put(places, exact)
            weights[places] = recipe.claim_weight
        loss = (losses * weights).sum() / weights.sum()
        choice_weight = max((pair for pair in recipe.choice_weights if pair[0] <= tokens), default=(0, 0.0))[
            1
        ]
        if choice_weight:
            chosen = choice_loss(logits, stories, recipe.choices, vocab)
            loss = loss + choice_weight * chosen / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        tokens += int((ids != tokenizer.pad_token_id).sum())
        if tokens >= next_log or tokens >= recipe.tokens:
            next_log += log_every
            seconds += time.perf_counter() - started
            figures = teacher_forced(model, tokenizer, held_out)
            entry = {
                "tokens": tokens,
                "step": step,
                "seconds": seconds,
                "learning_rate": learning_rate(recipe, step, tokens),
                "train_loss": sum(running) / len(running),
                "nats_over_entropy": figures["loss"] - floor,
                "tokens_per_second": tokens / seconds,
                **figures,
            }
            entry = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}
            print(json.dumps(entry), flush=True)
            with log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            _write_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "tokens": tokens,
                    "seconds": seconds,
                },
            )
            if tokens >= first_save:
                save(model, tokenizer, out)
            running.clear()
            started = time.perf_counter()


def _write_state(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def save(model: LlamaForCausalLM, tokenizer, out: Path) -> None:
    """Write a Hugging Face directory; every file appears whole, so that a reader never meets half a model."""
    partial = out / ".partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)
        os.replace(path, out / path.name)
    partial.rmdir()


def average(directory: Path, other: Path) -> None:
    """Put the mean of the weights of two models of one training into `directory`."""
    models = [LlamaForCausalLM.from_pretrained(path) for path in (directory, other)]
    with torch.no_grad():
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    save(models[0], build_tokenizer(), directory)


def measure(directory: Path, device: str, n_stories: int, as_json: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory).to(device)
    started = time.perf_counter()
    figures = evaluate(model, tokenizer, n_stories)
    figures["seconds"] = time.perf_counter() - started
    for name, value in figures.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    if as_json:
        print(json.dumps(figures))


def write_samples(directory: Path, device: str, path: Path) -> None:
    """Write a Markdown page: 20 stories of the model with the judge's remarks, 10 of the grammar."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory).to(device)
    lines = [
        "# StoryWorld: samples",
        "",
        "Written by `python scripts/train_storyworld.py --samples docs/storyworld_samples.md`, none picked.",
        "",
        "## Told by the model (temperature 1, from BOS)",
        "",
    ]
    judge = storyworld.Judge()
    for number, text in enumerate(generate(model, tokenizer, 20, seed=0), 1):
        found = judge.judge(text)
        remarks = [f"not a sentence of the language: {s.text}" for s in found.sentences if not s.grammatical]
        remarks += found.violations + ["unfinished"] * bool(found.unfinished)
        lines += [f"{number}. {text}", f"   *{'; '.join(remarks) or 'no remarks'}*", ""]
    lines += ["## Told by the grammar", ""]
    for number, story in enumerate(storyworld.sample(10, seed=0), 1):
        labels = ", ".join(f"{name} {value}" for name, value in story.attributes.items())
        lines += [f"{number}. {story.text}", f"   *{labels}*", ""]
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=storyworld.model_path(), help="model directory")
    parser.add_argument(
        "--state", type=Path, help="checkpoint for --resume (default: runs/train_storyworld/state.pt)"
    )
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes: 1M tokens to train, 200 stories to evaluate"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the model in --out instead of training it"
    )
    parser.add_argument(
        "--samples", type=Path, help="write samples of the model in --out to this page instead"
    )
    parser.add_argument(
        "--average", type=Path, help="average the weights of --out with those of this directory instead"
    )
    parser.add_argument("--stories", type=int, default=1000, help="stories to evaluate on")
    parser.add_argument(
        "--json", action="store_true", help="with --evaluate: the last line of stdout is one JSON object"
    )
    args = parser.parse_args()
    if args.average is not None:
        average(args.out, args.average)
        return
    if args.samples is not None:
        write_samples(args.out, args.device, args.samples)
        return
    if args.evaluate:
        measure(args.out, args.device, min(args.stories, 200) if args.quick else args.stories, args.json)
        return
    tokens = min(args.tokens, 1_000_000) if args.quick else args.tokens
    recipe = Recipe(seed=args.seed, tokens=tokens)
    state = args.state or Path("runs") / "train_storyworld" / "state.pt"
    train(
        recipe,
        args.out,
        state,
        args.device,
        args.resume,
        log_every=500_000,
        first_save=min(3_000_000, tokens),
    )


if __name__ == "__main__":
    main()
