"""Where an adapter belongs: the same method in different places.

    result = placement_study(model, task, "lora(rank=4)", BenchConfig(seeds=3), out="runs/placement")

Everything, attention, FFN; q and v against q, k and v; q and v with a higher learning rate for W_v (Yao et al. 2024,
https://arxiv.org/abs/2410.02247, argue that it should be); each layer alone; the bottom and the top quarter. With `equal=True`
every place gets as many parameters as the whole (the size grows); otherwise the size is the same and parameters differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steerkit.adapters.base import METHODS, make
from steerkit.adapters.bench import BenchConfig, BenchResult, Cell, compare, fit_size, parse
from steerkit.adapters.tasks import Task
from steerkit.errors import InputError
from steerkit.models import HookedModel

EVERYWHERE = "everywhere"


def places(model: HookedModel) -> dict[str, dict[str, Any]]:
    """Name -> modules and layers."""
    n = model.n_layers
    quarter = max(1, n // 4)
    found: dict[str, dict[str, Any]] = {
        EVERYWHERE: {"modules": "all"},
        "attention": {"modules": "attention"},
        "FFN": {"modules": "ffn"},
        "q v": {"modules": ("q", "v")},
        "q k v": {"modules": ("q", "k", "v")},
        f"bottom {quarter}": {"modules": "all", "layers": tuple(range(quarter))},
        f"top {quarter}": {"modules": "all", "layers": tuple(range(n - quarter, n))},
    }
    if n > 2 * quarter or quarter > 1:
        found |= {f"layer {i}": {"modules": "all", "layers": (i,)} for i in range(n)}
    return found


def placement_study(
    model: HookedModel,
    task: Task,
    method: str = "lora",
    config: BenchConfig | None = None,
    *,
    equal: bool = False,
    out: str | Path | None = None,
    quiet: bool = True,
) -> BenchResult:
    """Compare the places. See `steerkit.adapters.bench.bench`."""
    return compare(
        model,
        task,
        list(_cells(model, method, equal)),
        config or BenchConfig(),
        baseline=EVERYWHERE,
        out=out,
        quiet=quiet,
    )


def _cells(model: HookedModel, text: str, equal: bool) -> Iterator[Cell]:
    name, settings = parse(text)
    whole = make(name, **settings)
    budget = whole.count(model, whole.targets(model, "all", None))
    size = METHODS[name].size
    if equal and not size:
        raise InputError(f"{name} has no size: places cannot be given equal numbers of parameters.")
    free = {key: value for key, value in settings.items() if key != size}
    for label, where in places(model).items():
        fitted = whole
        if equal and label != EVERYWHERE:
            fitted = fit_size(model, name, free, budget, where)
        yield Cell(label, fitted, budget if equal else None, **where)
        if label == "q v" and name == "lora":
            faster = make("lora_fast_v", **fitted.settings())
            yield Cell("q v, v faster", faster, budget if equal else None, **where)
