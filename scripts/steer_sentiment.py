"""A small TinyStories model steered from sad to happy and back, by every method that fits it, judged without a language model.

    python scripts/steer_sentiment.py --model DIR --bert DIR --sst2 FILE.tsv --out runs/sentiment [--quick]

Pairs are written by the model itself: continuations of the same opening after a happy and after a sad sentence, kept where a
word list agrees. Success is a sentiment classifier's: logistic regression on a sentence encoder's mean state, trained on SST-2
(columns `sentence` and `label`); its held-out accuracy is printed. The word list stands beside it. Each direction is one sweep with
its own report (OUT/happy, OUT/sad); the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerkit import HookedModel, steering
from steerkit.data import load_documents
from steerkit.steering import Bench, Scored, SteeringVector, Words
from steerkit.steering.sweep import SweepConfig, sweep, vector_file
from steerkit.steering.sweep_report import write_report

HAPPY = Words({"happy", "glad", "smiled", "laughed", "fun", "joy", "proud", "excited", "hugged", "loved"})
SAD = Words({"sad", "cried", "scared", "angry", "upset", "hurt", "lost", "sorry", "afraid", "tears"})
NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Lucy")
SCENES = (
    "One day, {} went to the park.",
    "{} had a red ball.",
    "{} saw a big dog.",
    "{} was in the house with mom.",
    "One day, {} found a box.",
    "{} and a friend played outside.",
)


def embed(model: HookedModel, texts: Sequence[str], batch: int = 64) -> np.ndarray:
    """Mean of the final states of each text's tokens."""
    found = []
    for first in range(0, len(texts), batch):
        rows = [
            model.tokenizer(text or " ", truncation=True, max_length=128)["input_ids"]
            for text in texts[first : first + batch]
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            states = model.final(ids, mask)
        found.append(((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy())
    return np.concatenate(found)


def classifier(
    encoder: HookedModel, path: str, n: int
) -> tuple[Callable[[Sequence[str]], np.ndarray], float]:
    """(probability that a text is positive, accuracy on held-out sentences)."""
    from sklearn.linear_model import LogisticRegression

    texts = load_documents(path, text_column="sentence")[: n + 500]
    labels = np.array([int(v) for v in load_documents(path, text_column="label")[: n + 500]])
    states = embed(encoder, texts)
    head = LogisticRegression(max_iter=2000, C=1.0).fit(states[:-500], labels[:-500])
    accuracy = float(head.score(states[-500:], labels[-500:]))
    return lambda texts: head.predict_proba(embed(encoder, texts))[:, 1], accuracy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--bert", required=True, help="directory of the sentence encoder")
    parser.add_argument("--sst2", required=True, help="tab-separated, sentence and label")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    started = time.monotonic()
    model, encoder = HookedModel.from_pretrained(arguments.model), HookedModel.from_pretrained(arguments.bert)
    positive, accuracy = classifier(encoder, arguments.sst2, 1000 if arguments.quick else 4000)
    print(f"classifier: {accuracy:.3f} of 500 held-out sentences right")
    openings = [scene.format(name) for scene, name in itertools.product(SCENES, NAMES)]
    learned, tried = openings[::2], openings[1::2]
    pairs = steering.generated_pairs(
        model, "They were very happy. They smiled and laughed.", "They were very sad. They cried and cried.",
        learned, keep=HAPPY, samples=6 if arguments.quick else 16, seed=arguments.seed,
    )  # fmt: skip
    print(f"{len(pairs)} pairs, such as {pairs[0]}")
    found: dict[str, Any] = {"accuracy": accuracy, "n_pairs": len(pairs)}
    for name, own, sign, words in (("happy", pairs, 1, HAPPY), ("sad", pairs.swapped(), -1, SAD)):
        effect = Scored(
            f"{name} (classifier)",
            lambda prompts, texts, sign=sign: (sign * (positive(texts) - 0.5) > 0).astype(float),
            binary=True,
        )
        config = SweepConfig(
            methods=tuple(arguments.methods), n_pairs=192, samples=1 if arguments.quick else 3, seed=arguments.seed,
            kl_targets=(1.0, 4.0, 12.0), kl_budget=12.0, shuffled=("mean_diff",), study=None,
        )  # fmt: skip
        out = arguments.out / name
        result = sweep(
            model,
            own,
            effect,
            tried[::3],
            [p for i, p in enumerate(tried) if i % 3],
            out,
            config,
            resume=True,
            quiet=False,
        )
        write_report(result, out / "report.html")
        bench = Bench(
            model,
            [p for i, p in enumerate(tried) if i % 3],
            words,
            samples=config.samples,
            seed=arguments.seed + 1,
        )
        print(
            f"\n| {name} | classifier | words | KL, nats a sequence | perplexity, times base | repeated 4-grams |"
        )
        print("|---|---|---|---|---|---|")
        base = result.base
        print(
            f"| unsteered | {_cell(base)} | {bench.base.effect.estimate:.0%} | 0 | 1 | {base['repetition']:.1%} |"
        )
        for method, record in sorted(result.best.items(), key=lambda item: -(item[1].get("effect") or -1)):
            if "reason" in record:
                print(f"| {method} | {record['reason']} | | | | |")
                continue
            if "shuffled" in method:
                measured = None
            elif "prefix" in record:
                measured = bench.measure_prompted(record["prefix"])
            else:
                path = out / "vectors" / vector_file(method, record["site"])
                measured = bench.measure(SteeringVector.load(path), record["strength"])
            record["words"] = None if measured is None else measured.effect.estimate
            shown = "–" if measured is None else f"{measured.effect.estimate:.0%}"
            figures = f"{record['kl']:.1f} | {record['perplexity_ratio']:.2f} | {record['repetition']:.1%}"
            print(f"| {method} | {_cell(record)} | {shown} | {figures} |")
        found[name] = {"base": base, "best": result.best}
    found["seconds"] = time.monotonic() - started
    print(json.dumps(found))


def _cell(record: dict[str, Any]) -> str:
    low, high = record["effect_ci"]
    return f"{record['effect']:.0%} [{low:.0%}, {high:.0%}]"


if __name__ == "__main__":
    main()
