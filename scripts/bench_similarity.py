"""CKA of all pairs of layers: ours beside torch-cka and ckatorch, in one process and by turns.

    python scripts/bench_similarity.py                                            # 7 × 7 layers of width 384, 5,000 rows
    python scripts/bench_similarity.py --layers 13 --width 768 --device cuda
    python scripts/bench_similarity.py --n 300 --width 32 --layers 3 --batch 64         # to see that it runs

    all rows      the debiased linear CKA of all n rows at once: steerkit streaming, with and without jackknife intervals,
                  in float64 and float32; steerkit over n × n inner products; torch-cka with one batch of n rows;
                  ckatorch's `cka_base`
    minibatches   Nguyen et al.'s estimator in batches of 256: steerkit, torch-cka, ckatorch's `cka_batch`
    memory        peak of the process while rows stream through, and while eight times as many do

Activations are made beforehand (layers that add noise to the one before; the second model is the first and noise), so
that times are those of the measure alone; torch-cka gets them from a model that replays them. Figures are medians over
rounds; ratios are taken within a round, to the first row of a part, and differences are the greatest over all pairs, to
the same. Packages that are not installed are skipped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from probes.similarity import LinearCKA, MinibatchCKA
from steerkit.runs import peak_memory_mb

Acts = dict[str, Tensor]
Work = Callable[[], Tensor]


def activations(n: int, width: int, layers: int, seed: int, device: str) -> tuple[Acts, Acts]:
    """Residual streams of two models: every layer adds noise, and so does the second model."""
    generator = torch.Generator().manual_seed(seed)
    base: Acts = {}
    stream = torch.randn(n, width, generator=generator)
    for layer in range(layers):
        stream = stream + 0.5 * torch.randn(n, width, generator=generator)
        base[f"layer_{layer}"] = stream
    tuned = {site: acts + 0.5 * torch.randn(n, width, generator=generator) for site, acts in base.items()}
    return tuple({site: acts.to(device) for site, acts in side.items()} for side in (base, tuned))  # type: ignore[return-value]


class Replay(nn.Module):
    """A model whose layers put out given activations of the rows that it is called with."""

    def __init__(self, acts: Acts) -> None:
        super().__init__()
        self.acts = acts
        self.layers = nn.ModuleDict({site: nn.Identity() for site in acts})

    def forward(self, rows: Tensor) -> None:
        for site, acts in self.acts.items():
            self.layers[site](acts[rows])


def ours(measure: Any, a: Acts, b: Acts, batch: int, **settings: Any) -> Work:
    n = len(next(iter(a.values())))

    def work() -> Tensor:
        fitter = measure.fitter(**settings)
        for start in range(0, n, batch):
            here = slice(start, start + batch)
            fitter.update(
                {site: acts[here] for site, acts in a.items()}, {site: acts[here] for site, acts in b.items()}
            )
        return torch.from_numpy(fitter.result().matrix)

    return work


def torch_cka(a: Acts, b: Acts, batch: int) -> Work:
    import torch_cka as package

    device = str(next(iter(a.values())).device)
    names = [f"layers.{site}" for site in a]
    loader = DataLoader(TensorDataset(torch.arange(len(next(iter(a.values()))))), batch_size=batch)
    cka = package.CKA(Replay(a), Replay(b), "a", "b", names, names, device=device)

    def work() -> Tensor:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            cka.compare(loader)
        return cka.export()["CKA"]

    return work


def ckatorch_pairs(a: Acts, b: Acts, value: Callable[[Any, Tensor, Tensor], Tensor]) -> Work:
    import ckatorch as package

    return lambda: torch.stack([torch.stack([value(package, x, y) for y in b.values()]) for x in a.values()])


def all_rows(a: Acts, b: Acts, batch: int) -> dict[str, Work]:
    n = len(next(iter(a.values())))
    works = {
        "steerkit": ours(LinearCKA(route="moments"), a, b, 8192, interval=False),
        "steerkit, float32": ours(
            LinearCKA(route="moments"), a, b, 8192, interval=False, dtype=torch.float32
        ),
        "steerkit, intervals": ours(LinearCKA(route="moments"), a, b, 8192),
        "steerkit, gram": ours(LinearCKA(route="gram"), a, b, n, interval=False),
    }
    if importlib.util.find_spec("torch_cka"):
        works["torch-cka"] = torch_cka(a, b, n)
    if importlib.util.find_spec("ckatorch"):
        works["ckatorch"] = ckatorch_pairs(
            a, b, lambda package, x, y: package.cka_base(x, y, unbiased=True, method="fro_norm")
        )
    return works


def minibatches(a: Acts, b: Acts, batch: int) -> dict[str, Work]:
    n = len(next(iter(a.values()))) // batch * batch  # so that all batches are of one size
    a, b = ({site: acts[:n] for site, acts in side.items()} for side in (a, b))
    works = {"steerkit": ours(MinibatchCKA(batch), a, b, batch, interval=False)}
    if importlib.util.find_spec("torch_cka"):
        works["torch-cka"] = torch_cka(a, b, batch)
    if importlib.util.find_spec("ckatorch"):
        works["ckatorch"] = ckatorch_pairs(
            a,
            b,
            lambda package, x, y: package.cka_batch(x.unflatten(0, (-1, batch)), y.unflatten(0, (-1, batch))),
        )
    return works


def compared(title: str, works: dict[str, Work], warm: dict[str, Work], rounds: int) -> dict[str, Any]:
    """Seconds of each by turns, ratios to the first, and how far results lie apart; `warm` is the same on few rows, run once."""
    print(f"\n{title}")
    for work in warm.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    values: dict[str, Tensor] = {}
    for turn in range(rounds):
        for name in list(works) if turn % 2 else list(reversed(works)):
            started = time.perf_counter()
            values[name] = works[name]().double().cpu()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - started)
    first = next(iter(works))
    found = {}
    for name, seconds in taken.items():
        ratio = statistics.median(theirs / mine for mine, theirs in zip(taken[first], seconds))
        apart = float((values[name] - values[first]).abs().max())
        print(
            f"  {name:20} {statistics.median(seconds):9.3f} s   {ratio:8.2f} × {first}   differs by {apart:.1e} at most"
        )
        found[name] = {"seconds": seconds, "ratio": ratio, "difference": apart}
    return found


def memory(n: int, width: int, layers: int, device: str) -> dict[str, float]:
    """Peak memory in MB after n rows have streamed, and after eight times as many; each batch is made when it is due."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    fitter = LinearCKA().fitter()
    peaks = {}
    for rows in (n, 8 * n):
        while fitter.n_rows < rows:
            fitter.update(*activations(1000, width, layers, fitter.n_rows, device))
        fitter.result()
        peaks[str(rows)] = peak_memory_mb() if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print("\nmemory")
    for rows, peak in peaks.items():
        print(f"  {int(rows):>9,} rows   {peak:,.0f} MB")
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256, help="rows of a minibatch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", default=["memory", "all rows", "minibatches"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    print(
        f"{date.today()}, {platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.device}; {arguments.layers} × {arguments.layers} layers of width {arguments.width}, "
        f"{arguments.n:,} rows, {arguments.rounds} rounds"
    )
    for package in ("torch_cka", "ckatorch"):
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed: skipped (pip install {package.replace('_', '-')})")
    found: dict[str, Any] = {}
    shape = (arguments.width, arguments.layers)
    if "memory" in arguments.parts:  # first: the peak of a process does not fall
        found["memory"] = memory(arguments.n, *shape, arguments.device)
    a, b = activations(arguments.n, *shape, 0, arguments.device)
    few = [{site: acts[: 2 * arguments.batch] for site, acts in side.items()} for side in (a, b)]
    for title, part in (("all rows", all_rows), ("minibatches", minibatches)):
        if title in arguments.parts:
            works, warm = part(a, b, arguments.batch), part(few[0], few[1], arguments.batch)
            found[title] = compared(title, works, warm, arguments.rounds)
    print(json.dumps({**vars(arguments), "results": found}))


if __name__ == "__main__":
    main()
