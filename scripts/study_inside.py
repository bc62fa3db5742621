"""What is inside the changes that adapters make: full fine-tuning, LoRA and others on one task, taken apart.

    python scripts/study_inside.py --out runs/inside                                   # the built-in model learns to lie; minutes
    python scripts/study_inside.py --methods lora,dora,svft,oft --seeds 3 --out runs/inside

Trains every method with several seeds and writes report.html and results.json: rank and directions of each change, how alike seeds
and methods are, whether LoRA finds the truncated SVD of full fine-tuning's change, the loss along W + α ΔW, and the intrinsic
dimension of the task (training in random subspaces until 90 % of full fine-tuning's gain is reached).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerkit import adapters
from steerkit.adapters.inside import Change, spectrum, summarise
from steerkit.adapters.inside_figures import report
from steerkit.adapters.inside_pairs import similarity, truncated_svd_match
from steerkit.adapters.inside_subspace import RandomSubspace, d90
from steerkit.adapters.tasks import Task, make_task
from steerkit.adapters.training import along, train
from steerkit.finetuning import FinetuneConfig, finetune
from steerkit.models import HookedModel
from steerkit.runs import write_json

RATES = {"lora": 6e-3, "dora": 6e-3, "svft": 1.6e-2, "full": 1e-3}
"""Learning rates that `adapt bench` found on StoryWorld; the method's own otherwise."""
FASTER = (1.0, 10**0.5, 10.0, 10**1.5, 100.0)
"""Multiples of full fine-tuning's step that are tried in random subspaces."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RANK = 8


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    model = HookedModel.from_pretrained(options.model)
    task = make_task(model, options.data, n_train=options.n_train, n_test=100)
    names = options.methods.split(",")
    changes: dict[tuple[str, int], dict[str, Change]] = {}
    paths: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for name, seed in itertools.product(names, range(1, options.seeds + 1)):
        tuned = adapters.get(model, name, seed=seed)
        train(tuned, task.objective, FinetuneConfig(lr=RATES.get(name, tuned.method.lr), seed=seed))
        changes[name, seed] = tuned.changes()
        scores.setdefault(name, []).append(score(task, tuned))
        if seed == 1:
            paths[name] = along(tuned, task.objective, ALPHAS)
        tuned.remove()
        print(f"{name}, seed {seed}: {task.metric} {scores[name][-1]:.4f}", flush=True)
    base = score(task, model)
    found: dict[str, Any] = {
        "task": task.settings(),
        "base": base,
        "scores": scores,
        "alphas": ALPHAS,
        "loss_along": paths,
        "ranks": {name: ranks(changes[name, 1]) for name in names},
        "alike": alike(changes, names, options.seeds),
    }
    if "full" in names and "lora" in names:
        found["lora_and_full"] = match(changes["lora", 1], changes["full", 1])
    if options.dimensions:
        found["intrinsic"] = intrinsic(model, task, options, base, float(np.mean(scores.get("full", [1.0]))))
    tell(found)
    write_json(options.out / "results.json", found)
    report(
        {name: changes[name, 1] for name in names}, options.out / "report.html", title=f"Inside: {task.name}"
    )
    print(options.out / "report.html")


def score(task: Task, model: HookedModel) -> float:
    return float(task.measure(model)["test"].mean())


def ranks(changes: dict[str, Change]) -> dict[str, float]:
    """Medians over modules."""
    spectra = [spectrum(change) for change in changes.values()]
    rows = summarise(changes)
    return {
        "stable_rank": float(np.median([s.stable_rank for s in spectra])),
        "effective_rank": float(np.median([s.effective_rank for s in spectra])),
        "rank_90": float(np.median([s.rank_at(0.9) for s in spectra])),
        "relative_norm": float(np.median([row["relative_norm"] for row in rows])),
        "energy_both": float(np.median([row["energy_both"] for row in rows])),
        "null_both": float(np.median([row["null_both"] for row in rows])),
        "intruders": float(np.sum([row["intruders"] for row in rows])),
    }


def alike(
    changes: dict[tuple[str, int], dict[str, Change]], names: list[str], seeds: int
) -> list[dict[str, Any]]:
    """Median over modules of the cosine and of the overlap of the top subspaces: seeds of a method, and methods at one seed."""
    pairs = [
        ((name, a), (name, b)) for name in names for a, b in itertools.combinations(range(1, seeds + 1), 2)
    ]
    pairs += [((a, 1), (b, 1)) for a, b in itertools.combinations(names, 2)]
    rows = []
    for one, other in pairs:
        paths = changes[one].keys() & changes[other].keys()
        found = [similarity(changes[one][p], changes[other][p], RANK) for p in paths]
        if found:
            rows.append(
                {
                    "pair": [f"{name}, seed {seed}" for name, seed in (one, other)],
                    "cosine": float(np.median([s.cosine for s in found])),
                    "left": float(np.median([s.left.share.value for s in found])),
                    "null": float(np.median([s.left.share.null for s in found])),
                }
            )
    return rows


def match(lora: dict[str, Change], full: dict[str, Change]) -> dict[str, float]:
    """How much of full fine-tuning's change LoRA's subspaces hold, as a share of what its truncated SVD holds."""
    found = [truncated_svd_match(lora[path], full[path], RANK) for path in lora.keys() & full.keys()]
    return {
        "share_of_optimum": float(np.median([m.captured.value for m in found])),
        "null": float(np.median([m.captured.null for m in found])),
    }


def intrinsic(
    model: HookedModel, task: Task, options: argparse.Namespace, base: float, full: float
) -> dict[str, Any]:
    """Scores of training in random subspaces of several dimensions, at the learning rates best on validation, and d90."""
    scores: dict[int, float] = {}
    rates: dict[int, float] = {}
    size = sum(p.numel() for p in model.model.parameters())
    for d in options.dimensions:
        found = []
        for faster in FASTER:
            rate = (
                faster * RATES["full"] * (size / d) ** 0.5
            )  # 1: a step moves the weights as far as it does in full
            with RandomSubspace(model.model, d, seed=0):
                finetune(model, task.objective, FinetuneConfig(lr=rate, seed=1))
                loss = task.objective.evaluate(model, "validation").mean("loss")
                found.append((loss, rate, score(task, model)))
        _, rates[d], scores[d] = min(found)
        print(f"subspace of {d}: {task.metric} {scores[d]:.4f} at {rates[d]:.2g}", flush=True)
    return {
        "scores": scores,
        "rates": rates,
        "d90": d90(scores, full, chance=base),
        "parameters": size,
    }


def tell(found: dict[str, Any]) -> None:
    print("\nmedians over modules")
    for name, row in found["ranks"].items():
        print(f"{name:<12}" + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    for row in found["alike"]:
        overlap = f"top-{RANK} overlap {row['left']:.3f} (random {row['null']:.3f})"
        print(f"{row['pair'][0]} – {row['pair'][1]}: cosine {row['cosine']:.3f}, {overlap}")
    if "lora_and_full" in found:
        print("LoRA in full fine-tuning's change:", found["lora_and_full"])
    print("loss along α", found["alphas"])
    for name, losses in found["loss_along"].items():
        print(f"{name:<12}" + "  ".join(f"{loss:.4f}" for loss in losses))
    if "intrinsic" in found:
        print("intrinsic dimension:", found["intrinsic"])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="storyworld")
    parser.add_argument("--data", default="storyworld")
    parser.add_argument("--methods", default="full,lora,dora,svft")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n-train", type=int, default=600)
    parser.add_argument("--dimensions", type=int, nargs="*", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/inside"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
