"""Adapters compared on equal terms: one model, one task, one budget of parameters, a learning rate chosen for each, several seeds.

    result = bench(model, task, BenchConfig(methods=("lora", "svft", "full"), seeds=3), out="runs/adapters")
    result.rows                                     # one a method and budget, with means, spread and intervals
    write_report(result, "runs/adapters/report.html")

Budgets are numbers of trained parameters: each method's own size (rank, blocks, frequencies …) is set so that it comes nearest. The
learning rate is the one of a grid with the least validation loss – for one seed that is not reported –, the grid being drawn out
while the best lies on its edge. What is reported is of test examples. Runs that are there already (one file each in OUT/parts)
are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerkit.adapters.adapted import Adapted, get
from steerkit.adapters.base import METHODS, AdapterMethod, make
from steerkit.adapters.tasks import Task
from steerkit.adapters.training import train
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig
from steerkit.models import HookedModel
from steerkit.runs import progress, read_json, write_json
from steerkit.stats import mean_interval

BASELINE = "lora"
"""What the others are compared with."""
_GRID_STEP = math.sqrt(10)


@dataclass(frozen=True)
class BenchConfig:
    """What is run."""

    methods: tuple[str, ...] = ("lora", "dora", "pissa", "svft", "ia3", "full")
    """Names, each perhaps with settings: `svft(pattern=plain)`."""
    budgets: tuple[int, ...] = ()
    """Trained parameters; by default as many as LoRA of rank 8 has."""
    seeds: int = 3
    """Runs that are reported; the one that chooses the learning rate is not among them."""
    seed: int = 0
    """The search's; those reported follow it."""
    epochs: float = 1.0
    batch_size: int = 16
    grid: int = 3
    """Learning rates that are tried at first, √10 apart, around the method's own."""
    extend: int = 2
    """How often the grid is drawn out at most."""
    modules: str | tuple[str, ...] | None = None
    """Where adapters go; by default where each method belongs."""
    layers: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.grid < 1 or self.extend < 0:
            raise InputError("seeds and grid are at least 1, extend at least 0.")
        for name in self.methods:
            parse(name)


@dataclass(frozen=True)
class BenchResult:
    """What came out."""

    config: dict[str, Any]
    base: dict[str, Any]
    """Of the model as it is: `scores` by set, `unrelated` loss."""
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    """Methods that cannot be put into the model, each with the reason."""
    runs: list[dict[str, Any]]
    """Every run, those of the search too."""

    def __repr__(self) -> str:
        task, before = self.config["task"], self.base["scores"]["test"]
        lines = [f"{task['metric']} on {task['name']} of {self.config['model']}: {before:.4g} as it is"]
        for row in self.rows:
            ends = "" if row["metric_ci"] is None else " [{:.4g}, {:.4g}]".format(*row["metric_ci"])
            lines.append(
                f"  {row['method']:<24}{row['trainable_params']:>10,}  {row['metric_mean']:.4g}{ends}"
            )
        return "\n".join(
            [*lines, *(f"  left out: {left['method']}, {left['reason']}" for left in self.skipped)]
        )


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """('svft', {'pattern': 'plain'}) from `svft(pattern=plain)`. Raises InputError for what does not exist."""
    import yaml

    name, _, rest = text.partition("(")
    settings = {}
    for part in filter(None, rest.removesuffix(")").split(";")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{text}: settings are written name(key=value;key=value).")
        settings[key.strip()] = yaml.safe_load(value)
    make(name.strip(), **settings)
    return name.strip(), settings


@dataclass(frozen=True)
class Cell:
    """One thing that is compared with the others."""

    label: str
    method: AdapterMethod
    budget: int | None = None
    modules: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    @property
    def where(self) -> dict[str, Any]:
        return {"modules": self.modules, "layers": self.layers}


def bench(
    model: HookedModel, task: Task, config: BenchConfig, *, out: str | Path | None = None, quiet: bool = True
) -> BenchResult:
    """Compare methods. The model is left as it was; a method that cannot be put into it is left out, with the reason."""
    budgets = config.budgets or (_lora_parameters(model, config),)
    cells, skipped = _cells(model, config, budgets)
    return compare(model, task, cells, config, baseline=BASELINE, skipped=skipped, out=out, quiet=quiet)


def compare(
    model: HookedModel,
    task: Task,
    cells: Sequence[Cell],
    config: BenchConfig,
    *,
    baseline: str,
    skipped: Sequence[dict[str, str]] = (),
    out: str | Path | None = None,
    quiet: bool = True,
) -> BenchResult:
    """Run the cells; `baseline` is the label of those that the others are compared with. See `bench`.

    Raises InputError when there are none.
    """
    if not cells:
        raise InputError("No method is left: " + " ".join(entry["reason"] for entry in skipped))
    bencher = _Bencher(model, task, config, Path(out) if out is not None else None)
    with progress(len(cells) * (config.grid + config.seeds), "adapters", "runs", quiet=quiet) as bar:
        rows = [bencher.row(cell, bar) for cell in cells]
    for row in rows:
        row["difference"] = _difference(row, _reference(row, [r for r in rows if r["method"] == baseline]))
    budgets = sorted({cell.budget for cell in cells if cell.budget is not None})
    described = {
        **asdict(config),
        "budgets": budgets,
        "model": model.name,
        "task": task.settings(),
        "baseline": baseline,
    }
    result = BenchResult(described, bencher.base, rows, list(skipped), bencher.runs)
    if out is not None:
        write_json(Path(out) / "results.json", asdict(result))
    return result


def _lora_parameters(model: HookedModel, config: BenchConfig) -> int:
    lora = make(BASELINE, rank=8)
    return lora.count(model, lora.targets(model, config.modules, config.layers))


def _cells(
    model: HookedModel, config: BenchConfig, budgets: Sequence[int]
) -> tuple[list[Cell], list[dict[str, str]]]:
    """A method at each budget, one without a size once; and those that do not fit the model."""
    found: list[Cell] = []
    skipped: list[dict[str, str]] = []
    for text in config.methods:
        try:
            found += _cells_of(model, text, config, budgets)
        except InputError as error:
            skipped.append({"method": text, "reason": str(error)})
    return found, skipped


def _cells_of(model: HookedModel, text: str, config: BenchConfig, budgets: Sequence[int]) -> list[Cell]:
    where: dict[str, Any] = {"modules": config.modules, "layers": config.layers}
    name, settings = parse(text)
    sized = bool(METHODS[name].size) and METHODS[name].size not in settings
    found: list[Cell] = []
    for budget in budgets if sized else (None,):
        method = make(name, **settings) if budget is None else fit_size(model, name, settings, budget, where)
        if all(cell.method != method for cell in found):
            get(model, method, **where).remove()
            found.append(Cell(text, method, budget, **where))
    return found


def _reference(row: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The baseline of the nearest size."""
    size = math.log(max(1, row["trainable_params"]))
    return min(baselines, key=lambda r: abs(math.log(max(1, r["trainable_params"])) - size), default=None)


def fit_size(
    model: HookedModel, name: str, settings: Mapping[str, Any], budget: int, where: Mapping[str, Any]
) -> AdapterMethod:
    """The method with its size such that it trains as nearly `budget` parameters as it can; as it is where it has no size, or where
    the settings fix it."""
    kind = METHODS[name]
    plain = make(name, **settings)
    if not kind.size or kind.size in settings:
        return plain
    found: list[tuple[float, int, AdapterMethod]] = []
    for value in _sizes():
        try:
            method = make(name, **{**settings, kind.size: value})
            count = method.count(model, method.targets(model, where.get("modules"), where.get("layers")))
        except InputError:
            continue
        found.append((abs(math.log(max(count, 1) / budget)), value, method))
        if count > 4 * budget:
            break
    for _, _, method in sorted(found, key=lambda entry: entry[:2]):
        try:
            get(model, method, **where).remove()
        except InputError:
            continue
        return method
    return plain


def _sizes() -> Iterator[int]:
    yield from range(1, 65)
    value = 64
    while value < 100_000:
        value = math.ceil(value * 1.1)
        yield value


class _Bencher:
    def __init__(self, model: HookedModel, task: Task, config: BenchConfig, out: Path | None) -> None:
        self.model, self.task, self.config, self.out = model, task, config, out
        self.runs: list[dict[str, Any]] = []
        self.base = self._part({"base": model.fingerprint}, lambda: task.scores(model))

    def row(self, cell: Cell, bar: Any) -> dict[str, Any]:
        """What came out of one cell."""
        lr, tried = self._search(cell, bar)
        found = []
        for seed in range(self.config.seed + 1, self.config.seed + self.config.seeds + 1):
            found.append(self._run(cell, lr, seed, final=True))
            bar.advance(1)
        scores = {name: [run["scores"][name] for run in found] for name in found[0]["scores"]}
        test = scores["test"]
        forgetting = [run["forgetting"] for run in found if run["forgetting"] is not None]
        return {
            "method": cell.label,
            "name": cell.method.name,
            "settings": cell.method.settings(),
            "family": cell.method.family,
            "budget": cell.budget,
            **cell.where,
            "trainable_params": found[0]["trainable_params"],
            "lr": lr,
            "tried": tried,
            "metric": self.task.metric,
            "metric_mean": _mean(test),
            "metric_sd": _sd(test),
            "metric_ci": _ends(test),
            "by_seed": test,
            "ood": {name: {"mean": _mean(v), "sd": _sd(v)} for name, v in scores.items() if name != "test"},
            "forgetting": _mean(forgetting) if forgetting else None,
            "forgetting_sd": _sd(forgetting) if forgetting else None,
            "seconds": _mean([run["seconds"] for run in found]),
            "step_seconds": _median([run["step_seconds"] for run in found]),
            "peak_memory_mb": max(run["peak_memory_mb"] or 0.0 for run in found) or None,
            "size_mb": found[0]["size_mb"],
            "merge_error": found[0]["merge_error"],
            "seeds": self.config.seeds,
            "diverged": [run["seed"] for run in found if run["failed"]],
        }

    def _search(self, cell: Cell, bar: Any) -> tuple[float, list[list[float]]]:
        """(the best learning rate, [rate, validation loss] of all that were tried)."""
        losses: dict[int, float] = {}

        def rates(exponent: int) -> float:
            return cell.method.lr * _GRID_STEP**exponent

        def try_at(exponent: int) -> None:
            run = self._run(cell, rates(exponent), self.config.seed, final=False)
            losses[exponent] = math.inf if run["validation"] is None else run["validation"]
            bar.advance(1)

        first = -((self.config.grid - 1) // 2)
        for exponent in range(first, first + self.config.grid):
            try_at(exponent)
        for _ in range(self.config.extend):
            best = min(losses, key=losses.__getitem__)
            edge = {min(losses): best - 1, max(losses): best + 1}.get(best)
            if edge is None or len(losses) == 1:
                break
            bar.total += 1
            try_at(edge)
        best = min(losses, key=losses.__getitem__)
        return rates(best), [[rates(exponent), losses[exponent]] for exponent in sorted(losses)]

    def _run(self, cell: Cell, lr: float, seed: int, *, final: bool) -> dict[str, Any]:
        key = {
            "method": cell.method.name, "settings": cell.method.settings(), "lr": lr, "seed": seed, "final": final, **cell.where,
            "epochs": self.config.epochs, "batch_size": self.config.batch_size, "dtype": self.config.dtype,
        }  # fmt: skip
        found = self._part(key, lambda: self._trained(cell, lr, seed, final))
        run = {"method": cell.label, "lr": lr, "seed": seed, "final": final, **found}
        self.runs.append(run)
        return run

    def _part(self, key: Mapping[str, Any], make_it: Any) -> dict[str, Any]:
        """What `make_it` gives, from OUT/parts if it is there."""
        if self.out is None:
            return make_it()
        key = {**key, "task": self.task.settings(), "model": self.model.fingerprint}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
        path = self.out / "parts" / f"{digest}.json"
        if path.is_file():
            return read_json(path)["found"]
        found = make_it()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "found": found})
        return found

    def _trained(self, cell: Cell, lr: float, seed: int, final: bool) -> dict[str, Any]:
        config = FinetuneConfig(
            lr=lr,
            epochs=self.config.epochs,
            batch_size=self.config.batch_size,
            seed=seed,
            dtype=self.config.dtype,
        )
        tuned = get(self.model, cell.method, seed=seed, **cell.where)
        try:
            started = time.perf_counter()
            failed, outcome = "", None
            try:
                outcome = train(tuned, self.task.objective, config)
            except NumericsError as error:
                failed = str(error)
            found: dict[str, Any] = {
                "failed": failed,
                "validation": None if outcome is None or outcome.best is None else outcome.best[1]["loss"],
                "trainable_params": tuned.n_trainable,
                "seconds": time.perf_counter() - started,
                "step_seconds": None if outcome is None else outcome.step_seconds,
                "peak_memory_mb": None if outcome is None else outcome.peak_memory_mb,
            }
            if final:
                found |= self._judged(tuned)
            return found
        finally:
            tuned.remove()

    def _judged(self, tuned: Adapted) -> dict[str, Any]:
        found = self.task.scores(tuned)
        before = self.base["unrelated"]
        found["forgetting"] = None if before is None else found["unrelated"] - before
        found["merge_error"] = merge_error(tuned, self.task)
        with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
            saved = tuned.save(Path(folder) / "adapter")
            found["size_mb"] = sum(f.stat().st_size for f in saved.rglob("*.safetensors")) / 1e6
        return found


@torch.no_grad()
def merge_error(tuned: Adapted, task: Task) -> float | None:
    """Greatest difference of the final states on a few examples once the adapter is merged, as a share of their greatest; None
    where it cannot be."""
    from steerkit.finetune import padded

    if tuned.method.merge != "exact":
        return None
    ids, mask = padded(tuned, task.objective.examples("validation")[:4])
    before = tuned.final(ids, mask).float()
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        merged = HookedModel.from_pretrained(tuned.merge(Path(folder) / "merged"), device=tuned.device)
    after = merged.final(ids, mask).float()
    return float((after - before)[mask.bool()].abs().max() / before[mask.bool()].abs().max())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _ends(values: Sequence[float]) -> list[float] | None:
    """Of the mean over seeds; None for one seed."""
    if len(values) < 2:
        return None
    found = mean_interval(values)
    return [found.low, found.high]


def _difference(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Row less reference, seed by seed."""
    if reference is None or reference is row:
        return None
    found = [one - other for one, other in zip(row["by_seed"], reference["by_seed"], strict=True)]
    return {"mean": _mean(found), "ci": _ends(found)}
