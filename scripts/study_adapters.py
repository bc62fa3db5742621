"""The full study of adapters: methods and places, on the built-in model and on real ones, and what it says about their claims.

    python scripts/study_adapters.py --out runs/adapters                                    # the built-in model
    python scripts/study_adapters.py --out runs/adapters --bert DIR --sst2 sst2_train.tsv     # a sentence encoder on SST-2
    python scripts/study_adapters.py --out runs/adapters --llama DIR --stories FILE.txt       # a small Llama on its sad stories

Parts (`--only`): storyworld, storyworld-placement, sst2, sst2-placement, llama. Each is a directory of --out with report.html and
results.json; runs that are done are not repeated. `hypotheses.html` and `hypotheses.md` tie what was measured to what the methods
claim.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerkit.adapters.bench import BenchConfig, BenchResult, bench
from steerkit.adapters.bench_report import write_report
from steerkit.adapters.hypotheses import write_hypotheses
from steerkit.adapters.placement import placement_study
from steerkit.adapters.tasks import Task, file_task, storyworld_task
from steerkit.data import load_documents
from steerkit.models import HookedModel
from steerkit.objectives import LanguageModelling

MAIN = (
    "lora", "lora(rank=1)", "dora", "delora", "pissa", "svft", "shira", "ssvd", "antipasto", "psoft", "oft", "hra", "ether+",
    "goft", "ia3", "ln_tuning", "bitfit", "randlora", "c3a", "miss", "fourierft", "vera", "tied_lora", "loreft", "houlsby",
    "parallel", "full",
)  # fmt: skip
REAL = ("lora", "dora", "pissa", "svft", "ia3", "full")
PARTS = ("storyworld", "storyworld-placement", "sst2", "sst2-placement", "llama")
SAD = re.compile(r"\b(sad|cried|cry|crying|tears|scared|hurt|lonely|sorry)\b", re.IGNORECASE)
"""What tells a sad story, by its words."""


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    config = BenchConfig(seeds=options.seeds, extend=3, dtype=options.dtype)
    wanted = options.only or [part for part in PARTS if available(part, options)]
    results: dict[str, BenchResult] = {}
    for part in wanted:
        results[part] = run(part, options, config)
        write_report(results[part], options.out / part / "report.html")
        print(f"{part}: {options.out / part / 'report.html'}")
        for row in results[part].rows:
            sd = "" if row["metric_sd"] is None else f" ± {row['metric_sd']:.4f}"
            print(
                f"  {row['method']:<24}{row['trainable_params']:>10,}  lr {row['lr']:.2g}  {row['metric']} "
                f"{row['metric_mean']:.4f}{sd}"
            )
    write_hypotheses(options.out)


def available(part: str, options: argparse.Namespace) -> bool:
    needs = {"sst2": (options.bert, options.sst2), "llama": (options.llama, options.stories)}
    return all(needs.get(part.partition("-")[0], ()))


def run(part: str, options: argparse.Namespace, config: BenchConfig) -> BenchResult:
    name, _, placed = part.partition("-")
    model, task = {"storyworld": storyworld, "sst2": sst2, "llama": llama}[name](options)
    out: Any = options.out / part
    if placed:
        return placement_study(model, task, "lora(rank=4)", config, out=out, quiet=False)
    methods = REAL if name == "sst2" else MAIN
    return bench(model, task, replace(config, methods=methods), out=out, quiet=False)


def storyworld(options: argparse.Namespace) -> tuple[HookedModel, Task]:
    model = HookedModel.from_pretrained("storyworld")
    return model, storyworld_task(model, "liars", n_train=600)


def sst2(options: argparse.Namespace) -> tuple[HookedModel, Task]:
    model = HookedModel.from_pretrained(options.bert)
    return model, file_task(model, options.sst2, groups="phrases", n_train=4000, n_test=1000)


def llama(options: argparse.Namespace) -> tuple[HookedModel, Task]:
    """Sad stories against the others: perplexity of held-out sad ones, and what that does to the rest."""
    model = HookedModel.from_pretrained(options.llama)
    stories = list(load_documents(options.stories))
    sad = [text for text in stories if len(SAD.findall(text)) >= 2]
    others = [text for text in stories if not SAD.search(text)]
    n = len(sad)
    parts = sad[: int(0.7 * n)], sad[int(0.7 * n) : int(0.8 * n)], sad[int(0.8 * n) :]
    objective = LanguageModelling(model, *parts)
    print(f"llama: {n} sad stories, {len(others)} others")
    return model, Task(
        "sad stories",
        objective,
        "loss",
        False,
        lambda tuned: {"test": objective.evaluate(tuned, "test")["loss"]},
        LanguageModelling(model, None, test=others[:300]),
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--bert", help="directory of an encoder")
    parser.add_argument("--sst2", help="SST-2's rows: sentence, label")
    parser.add_argument("--llama", help="directory of a small causal model")
    parser.add_argument("--stories", help="its text, one document a line")
    parser.add_argument("--only", nargs="*", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dtype", help="of the products, bf16 where the processor is faster with it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
