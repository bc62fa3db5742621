"""What a training step of each adapter costs, beside peft's LoRA on the same modules of the same model.

    python scripts/bench_adapters.py                                  # every method; minutes
    python scripts/bench_adapters.py --methods svft,antipasto,oft --rounds 10 --threads 2

A step is forward, backward and fused AdamW, which the trainer takes, on one batch, with the method's regulariser. In each round
LoRA and the method take turns in one process; the ratio is the median over rounds. With one thread on a CPU seconds are the
process's own, so that other work on the machine hardly counts. Peak memory is that of the process above what it has with the bare
model (on CUDA: the allocator's). Methods have about as many parameters as LoRA of rank 8 where they have a size that is not given.
Ours (not peft's) have the goal of 1.5 times LoRA's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from typing import Any

import torch

from steerkit import adapters
from steerkit.adapters.base import EditMethod
from steerkit.adapters.bench import fit_size, parse
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.runs import peak_memory_mb, reset_peak_memory

GOAL = 1.5
SKIPPED = {"adapter_fusion": "needs trained adapters", "qlora": "needs a quantised base"}


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    model = build(options)
    ids = torch.randint(
        5, model.d_vocab, (options.batch, options.length), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(model.device)
    lora = adapters.make("lora", rank=8)
    budget = lora.count(model, lora.targets(model, None, None))
    print(
        f"{date.today()}, {options.threads} threads, torch {torch.__version__}, {model.device}; d_model {options.width}, "
        f"{options.layers} "
        f"layers, batch {options.batch} × {options.length}; LoRA of rank 8 on all linear maps: {budget:,} parameters"
    )
    print(
        f"{'method':<20}{'parameters':>12}{'ms a step':>12}{'/ LoRA':>9}{'MB':>8}   medians of {options.rounds} rounds (quartiles)"
    )
    rows = []
    for text in options.methods.split(",") if options.methods else sorted(adapters.METHODS):
        name, settings = parse(text)
        if name in SKIPPED:
            print(f"{text:<20}{SKIPPED[name]}")
            continue
        try:
            method = fit_size(model, name, settings, budget, {"modules": None, "layers": None})
            rows.append(beside(model, text, method, lora, ids, options.rounds))
        except InputError as error:
            print(f"{text:<20}{error}")
            continue
        row = rows[-1]
        low, high = row["quartiles"]
        over = "  over the goal" if row["ours"] and row["ratio"] > GOAL else ""
        print(
            f"{text:<20}{row['parameters']:>12,}{1e3 * row['seconds']:>12.1f}{row['ratio']:>9.2f}{row['memory_mb']:>8.0f}   "
            f"({low:.2f}–{high:.2f}){over}",
            flush=True,
        )
    print(json.dumps({"date": str(date.today()), **vars(options), "budget": budget, "rows": rows}))


def beside(
    model: HookedModel, text: str, method: Any, lora: Any, ids: torch.Tensor, rounds: int
) -> dict[str, Any]:
    ratios, seconds, memory = [], [], 0.0
    for turn in range(rounds + 1):
        theirs, _, _ = steps(model, lora, ids)
        own, peak, parameters = steps(model, method, ids)
        if turn:  # the first warms up
            ratios.append(own / theirs)
            seconds.append(own)
            memory = max(memory, peak)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "method": text,
        "ours": isinstance(method, EditMethod),
        "parameters": parameters,
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "memory_mb": memory,
    }


def steps(model: HookedModel, method: Any, ids: torch.Tensor, n: int = 3) -> tuple[float, float, int]:
    """(median seconds of a step, MB above the bare model, trained parameters)."""
    reset_peak_memory()
    before = peak_memory_mb()
    clock = time.perf_counter if ids.is_cuda or torch.get_num_threads() > 1 else time.process_time
    tuned = adapters.get(model, method)
    try:
        optimiser = torch.optim.AdamW(tuned.trainable().values(), lr=1e-4, fused=True)
        taken = []
        for _ in range(n):
            started = clock()
            logits = tuned.logits(ids, torch.ones_like(ids))[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            extra = tuned.method.regulariser(tuned.model)
            (loss if extra is None else loss + extra).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if ids.is_cuda:
                torch.cuda.synchronize()
            taken.append(clock() - started)
        return statistics.median(taken), peak_memory_mb() - before, tuned.n_trainable
    finally:
        tuned.remove()


def build(options: argparse.Namespace) -> HookedModel:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 128,
        max_position_embeddings=1024,
    )
    return HookedModel.from_pretrained(LlamaForCausalLM(config).to(options.device).eval())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", help="with commas; all by default")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
