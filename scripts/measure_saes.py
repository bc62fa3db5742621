"""Trains the SAEs whose figures stand in docs/figures.md, through the command line, and prints them as a table.

    python scripts/measure_saes.py                                     # the built-in model
    python scripts/measure_saes.py --bert DIR --wikitext FILE.txt      # a sentence-transformers BERT on WikiText-2
    python scripts/measure_saes.py --llama DIR --stories FILE.txt      # a small TinyStories Llama

Every run is `steerkit train sae … --json` in a fresh directory of --out; a finished one is read, not repeated. Beside each stand
a random SAE of the same sparsity and mean ablation (`steerkit eval sae --nulls`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any


def jobs(arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, arguments of `train sae`) of every run asked for."""
    found = []
    story = ["--model", "storyworld", "--data", "storyworld", "--site", "blocks.2.hook_resid_post"]
    for arch, *sparsity in (["gated"], ["topk", "--k", "16"], ["sqrt_l1"], ["l1"], ["jumprelu"]):
        command = [*story, "--arch", arch, *sparsity, "--expansion", "8", "--tokens", "2000000"]
        found.append((f"storyworld-{arch}", command))
    if arguments.bert:
        bert = ["--model", arguments.bert, "--data", arguments.wikitext, "--site", "blocks.3.hook_resid_post"]
        bert += ["--context", "128", "--packing", "--d-sae", "3072", "--tokens", "1000000"]
        found.append(("bert-topk", [*bert, "--arch", "topk", "--k", "64"]))
        found.append(("bert-gated", [*bert, "--arch", "gated", "--target-l0", "58"]))
    if arguments.llama:
        llama = [
            "--model",
            arguments.llama,
            "--data",
            arguments.stories,
            "--site",
            "blocks.2.hook_resid_post",
        ]
        llama += ["--d-sae", "1024", "--tokens", "1000000"]
        found.append(("llama-topk", [*llama, "--arch", "topk", "--k", "16"]))
        found.append(("llama-gated", [*llama, "--arch", "gated"]))
    return [job for job in found if not arguments.only or job[0] in arguments.only]


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object in the last line of a steerkit command's output."""
    done = subprocess.run(
        [sys.executable, "-m", "steerkit.cli.main", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"steerkit {' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bert", help="directory of the encoder")
    parser.add_argument("--wikitext", help="WikiText-2, one paragraph a line")
    parser.add_argument("--llama", help="directory of the causal model")
    parser.add_argument("--stories", help="stories, one a line")
    parser.add_argument("--out", type=Path, default=Path("runs/measured"))
    parser.add_argument("--only", nargs="*", help="names of the runs to do")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, seed {arguments.seed}\n")
    columns = ("l0", "fvu", "delta_ce", "ce_recovered", "dead_fraction", "seconds")
    print("| run | " + " | ".join(columns) + " | random SAE: fvu | its delta_ce | mean ablation: delta_ce |")
    print("|---|" + "---|" * (len(columns) + 3))
    for name, command in jobs(arguments):
        out = arguments.out / f"{name}-{arguments.seed}"
        summary = run(
            ["train", "sae", *command, "--seed", str(arguments.seed), "--out", str(out), "--resume"]
        )
        nulls = {row["name"]: row for row in run(["eval", "sae", str(out), "--nulls"])["nulls"]}
        random, mean = nulls.get("random SAE", {}), nulls.get("mean ablation", {})
        cells = [summary[column] for column in columns] + [
            random.get("fvu"),
            random.get("delta_ce"),
            mean.get("delta_ce"),
        ]
        shown = " | ".join("–" if value is None else f"{value:.4g}" for value in cells)
        print(f"| {name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
