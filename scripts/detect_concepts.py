"""Held-out concept detection by the directions of steering methods, as a Markdown table.

    python scripts/detect_concepts.py --bert DIR --facts facts_true_false.csv --axbench TRAIN.parquet EVAL.parquet

`--bert` is any model that steerkit loads. Facts (`statement`, `label`) are split in half at random. Of AxBench's files (`output`,
`concept_id`, `concept_genre`, `category`) each concept's texts in TRAIN, against the concept-free ones of its genre, make the
directions, and its texts in EVAL are told from its negatives and hard negatives. A direction is fitted on the mean over each text's
tokens; positives and negatives are paired at random. A text scores the maximum over its tokens, or their mean (`--pool mean`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steerkit import HookedModel
from steerkit.stats import Interval, jackknife
from steerkit.steering import load_pairs
from steerkit.steering.detection import POOLS, detect
from steerkit.steering.fitting import get
from steerkit.steering.methods.base import Direction
from steerkit.steering.reading import read_pairs

METHODS = ("mean_diff", "lda", "logistic", "whitened", "pca", "random")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bert", required=True, metavar="DIR", help="a model: a directory or an id")
    parser.add_argument("--facts", type=Path, help="a table with the columns statement and label")
    parser.add_argument(
        "--axbench", type=Path, nargs=2, metavar=("TRAIN", "EVAL"), help="AxBench's parquet files"
    )
    parser.add_argument("--site", help="default: the residual stream after the middle block")
    parser.add_argument("--pool", choices=POOLS, default="max")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.facts or arguments.axbench):
        parser.error("give --facts, --axbench or both")
    model = HookedModel.from_pretrained(arguments.bert)
    site = arguments.site or f"blocks.{(model.n_layers - 1) // 2}.hook_resid_post"
    start = time.perf_counter()
    columns: dict[str, dict[str, Interval]] = {}
    if arguments.facts:
        columns["facts"] = facts(model, site, arguments.facts, arguments.pool, arguments.seed)
    if arguments.axbench:
        columns |= axbench(model, site, *arguments.axbench, arguments.pool, arguments.seed)
    print(
        f"Site {site}, {arguments.pool} over tokens, seed {arguments.seed}, {time.perf_counter() - start:.0f} s.\n"
    )
    print(f"| method | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for method in METHODS:
        cells = (
            f"{found[method].estimate:.3f} [{found[method].low:.3f}, {found[method].high:.3f}]"
            for found in columns.values()
        )
        print(f"| `{method}` | {' | '.join(cells)} |")


def facts(model: HookedModel, site: str, path: Path, pool: str, seed: int) -> dict[str, Interval]:
    """AUROC on the half that was held out, with intervals over statements."""
    table = pd.read_csv(path).drop_duplicates("statement").sample(frac=1.0, random_state=seed)
    train, test = table[: len(table) // 2], table[len(table) // 2 :]
    directions = fitted(
        model, site, *(train.statement[train.label == label].tolist() for label in (1, 0)), seed
    )
    found = detect(model, directions, test.statement.tolist(), test.label.to_numpy(), site, pool=pool)
    return {name: detection.auroc for name, detection in found.items()}


def axbench(
    model: HookedModel, site: str, train_path: Path, eval_path: Path, pool: str, seed: int
) -> dict[str, dict[str, Interval]]:
    """Mean AUROC over concepts, with intervals over concepts."""
    train, test = pd.read_parquet(train_path), pd.read_parquet(eval_path)
    areas: dict[str, dict[str, list[float]]] = {}
    for concept, own in train[train.concept_id >= 0].groupby("concept_id"):
        genre = own.concept_genre.iloc[0]
        free = train[(train.concept_id < 0) & (train.concept_genre == genre)]
        directions = fitted(model, site, own.output.tolist(), free.output.tolist(), seed)
        texts = test[test.concept_id == concept]
        labels = (texts.category == "positive").to_numpy()
        detections = detect(
            model, directions, texts.output.tolist(), labels, site, texts.category.tolist(), pool=pool
        )
        for method, detection in detections.items():
            for kind, interval in detection.by_group.items():
                areas.setdefault(f"AxBench, {kind}s", {}).setdefault(method, []).append(interval.estimate)
    return {
        kind: {
            method: jackknife(
                np.stack([values, np.ones(len(values))], 1), lambda s: s[..., 0] / s[..., 1]
            ).clipped(0, 1)
            for method, values in of_method.items()
        }
        for kind, of_method in areas.items()
    }


def fitted(
    model: HookedModel, site: str, positives: Sequence[str], negatives: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """Method -> direction, all from one pass over the texts, each in a pair once (those left over are not used)."""
    generator = np.random.default_rng(seed)
    n = min(len(positives), len(negatives))
    drawn = [[texts[i] for i in generator.permutation(len(texts))[:n]] for texts in (positives, negatives)]
    pairs = load_pairs(list(zip(*drawn)))
    fitters = {}
    for name in METHODS:
        method = get(name)()
        assert isinstance(method, Direction)
        fitters[name] = method.fitter(model.site(site).width)
    for positive, negative in read_pairs(model, pairs, [site], read="mean"):
        for fitter in fitters.values():
            fitter.update(positive[site].cpu(), negative[site].cpu())
    return {name: fitter.direction() for name, fitter in fitters.items()}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
