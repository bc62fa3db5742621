"""Steering methods compared at equal divergence: fitted on pairs, chosen on some prompts, told on others.

    result = sweep(model, pairs, effect, validation, test, out="runs/happy")
    result.best["mean_diff"], result.results;   write_report(result, "runs/happy/report.html")

For every method the strengths are sought at which KL(steered ‖ base), in nats a sequence, is what `SweepConfig.kl_targets` asks: at
the site that does best at the middle of them, all on the validation prompts. There, too, the best strength within the KL budget
and the loss of grammar that is allowed is chosen. All figures that are reported are of the test prompts.

Beside the methods stand their nulls – a random direction, and each method fitted on pairs with their sides shuffled, at the same
site and divergence – and prompting, by an instruction and by examples. A study tells what more sites, other positions and
schedules buy at equal divergence. `across_seeds` puts several sweeps together.
Every measurement is a line of metrics.jsonl; a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from steerkit.errors import CheckpointError, InputError, SteerkitError
from steerkit.models import HookedModel
from steerkit.runs import Run, jsonable, make_provenance, progress
from steerkit.steering.effects import Effect
from steerkit.steering.evaluation import Bench, Measurement
from steerkit.steering.fitting import get
from steerkit.steering.methods import METHODS, Method
from steerkit.steering.methods.learning import Trained
from steerkit.steering.pairs import Pairs
from steerkit.steering.prompting import few_shot
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Constant, Decay, Schedule, Where, Window

SHUFFLED = ", sides shuffled"
PROMPTING = "prompting"
FEW_SHOT = "few-shot"
OWN = "its own"
"""The site of methods that choose where they act."""
SAMPLES_SHOWN = 4
_TRIES = 8
"""Measurements that a strength is sought with, at most."""
_CLOSE = 0.25
"""How far the logarithm of a divergence may be from that of its target."""
_STRONGEST = 1e4


@dataclass(frozen=True)
class SweepConfig:
    """Settings of a sweep."""

    methods: tuple[str, ...] = ()
    """Names of methods; empty: all that fit the model."""
    sites: tuple[str, ...] = ()
    """Sites, each tried by itself; several joined by `+` are one. Empty: after every second block, and after all of them."""
    shuffled: tuple[str, ...] | None = None
    """Methods of the sweep that are also fitted on pairs with shuffled sides; None: all that learn from the sides."""
    few_shot: int = 4
    """Positive sides put before the prompt, as a baseline, at most: as many as fit; 0: none."""
    study: str | None = "mean_diff"
    """The method, if it is in the sweep, with which sites, positions and schedules are compared; None: none."""
    kl_targets: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Divergences at which methods are compared, nats a sequence; rising."""
    strengths: tuple[float, ...] = ()
    """Fixed strengths instead, the same for all methods."""
    at: float | None = None
    """One of the targets, at which every method is told whatever it brings there, and its null: their `best` is the strength whose
    divergence on validation is nearest to it. None: the most effective strength within the budgets."""
    kl_budget: float = 10.0
    """What the best strength may cost."""
    grammar_budget: float = 0.1
    """Share of grammatical sentences that the best strength may lose, where a judge reads them."""
    where: str = "everywhere"
    """`everywhere`, `prompt` or `generation`; methods that bring their own keep it."""
    n_pairs: int = 256
    """Pairs to fit on, at most."""
    samples: int = 2
    """Texts a prompt."""
    max_new_tokens: int = 40
    seed: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method -> its settings, where they are not the defaults."""

    @property
    def target(self) -> float:
        """The divergence that sites are compared at."""
        return middle(self.kl_targets) if self.at is None else self.at

    def __post_init__(self) -> None:
        targets = list(self.kl_targets)
        if not targets or targets[0] <= 0 or targets != sorted(set(targets)):
            raise InputError(f"kl_targets is {self.kl_targets}; they are positive and rise.")
        if self.at is not None and (self.at not in targets or self.strengths):
            raise InputError(f"at is {self.at:g}; it is one of kl_targets ({targets}), without strengths.")
        if self.where not in WHERES:
            raise InputError(f"where is {self.where!r}; it is one of {', '.join(WHERES)}.")
        for name in (*self.methods, *(self.shuffled or ()), *self.settings):
            get(name)
        if self.study is not None:
            get(self.study)
        if self.few_shot < 0:
            raise InputError(f"few_shot is {self.few_shot}; it is a number of examples.")


WHERES = {
    "everywhere": Where(),
    "prompt": Where.prompt_only(),
    "generation": Where.generation_only(),
}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found."""

    results: list[dict[str, Any]]
    """On test: {method, site, strength, effect, effect_base, effect_ci, kl, …} (`Measurement.to_dict`)."""
    best: dict[str, dict[str, Any]]
    """Method -> the entry whose strength was chosen on validation within the budgets; with `reason` where none is within them."""
    validation: list[dict[str, Any]]
    """The measurements that were chosen by: all sites and strengths that were tried."""
    base: dict[str, Any]
    """The unsteered model on test."""
    study: list[dict[str, Any]]
    """On test, at about the middle target: one method's {site, positions, schedule, …}."""
    config: dict[str, Any]

    def __repr__(self) -> str:
        lines = [f"Steering, unsteered {_figure(self.base['effect'])}; the best of each method, on test:"]
        for name, record in self.best.items():
            told = record.get("reason") or record.get("destroyed") or "no effect is known"
            if record.get("effect") is not None:
                ends = ", ".join(map(_figure, record["effect_ci"]))
                told = f"{_figure(record['effect'])} [{ends}] at {_figure(record['kl'])} nats"
            lines.append(f"  {name:<24}{told}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sweep(
    model: HookedModel,
    pairs: Pairs,
    effect: Effect,
    validation: Sequence[str],
    test: Sequence[str],
    out: str | Path,
    config: SweepConfig | None = None,
    *,
    prompting: str | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> SweepResult:
    """Fit, calibrate, choose and test; writes OUT/summary.json, metrics.jsonl and vectors/*.safetensors. `write_report` draws it.

    `validation` and `test` are prompts, none in both. `prompting` is an instruction whose effect is shown beside the methods'. A
    method that fails is reported with its error, and the rest goes on. Raises InputError when there is nothing to do.
    """
    config = config or SweepConfig()
    if set(validation) & set(test):
        raise InputError("A prompt is among those to choose by and among those to report: separate them.")
    pairs = pairs[: config.n_pairs]
    settings = {
        "model": model.name,
        "pairs": pairs.name,
        "pairs_sha256": pairs.fingerprint(),
        "effect": effect.name,
        "binary": effect.binary,
        "prompting": prompting,
        "n_validation": len(validation),
        "n_test": len(test),
        **asdict(config),
    }
    run = Run.open(out, "steer sweep", settings, resume=resume, provenance=make_provenance(model=model.name))
    work = _Sweep(model, pairs, effect, validation, test, config, run)
    methods = config.methods or _fitting(model, config)
    with progress(len(methods) + bool(prompting), "sweep", "methods", quiet=quiet) as bar:
        for name in methods:
            work.run_method(name, pairs)
            work.run_null(name, pairs)
            bar.advance(1, method=name)
        if prompting:
            work.run_prompting(PROMPTING, prompting)
            bar.advance(1, method=PROMPTING)
    work.run_few_shot(pairs)
    if config.study is not None and config.study in methods:
        work.run_study(config.study, pairs)
    result = work.result()
    run.finish(result.to_dict())
    return result


def _fitting(model: HookedModel, config: SweepConfig) -> list[str]:
    """Methods that fit the model, and have the settings that they need."""
    return [
        name
        for name, kind in METHODS.items()
        if (model.has_lm_head or not kind.needs_lm_head)
        and set(kind.needs) <= set(config.settings.get(name, {}))
    ]


def without_training() -> tuple[str, ...]:
    """Names of the methods that train nothing: their nulls are cheap."""
    return tuple(name for name, kind in METHODS.items() if not issubclass(kind, Trained))


def default_sites(model: HookedModel) -> tuple[str, ...]:
    """After every second block, and after all blocks together."""
    sites = [f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)]
    return (*sites[(model.n_layers - 1) % 2 :: 2], "+".join(sites)) if len(sites) > 1 else tuple(sites)


class _Sweep:
    """One sweep at work. What has been measured is kept by its key, and in metrics.jsonl."""

    def __init__(
        self,
        model: HookedModel,
        pairs: Pairs,
        effect: Effect,
        validation: Sequence[str],
        test: Sequence[str],
        config: SweepConfig,
        run: Run,
    ) -> None:
        self.model, self.config, self.run = model, config, run
        self.benches = {
            name: Bench(
                model,
                prompts,
                effect,
                max_new_tokens=config.max_new_tokens,
                samples=config.samples,
                seed=config.seed + number,
            )
            for number, (name, prompts) in enumerate((("validation", validation), ("test", test)))
        }
        self.records: dict[tuple[Any, ...], dict[str, Any]] = {}
        for record in run.metrics():
            self.records[_key(record)] = record
        self.used: dict[tuple[Any, ...], dict[str, Any]] = {}
        """What has been asked for so far: a sweep that goes on takes the same way again."""
        self.best: dict[str, dict[str, Any]] = {}
        self.study: dict[str, dict[str, Any]] = {}

    # one method

    def run_method(self, name: str, pairs: Pairs) -> None:
        """Everything of one method; its error, if it fails, is what is reported of it."""
        kind = get(name)
        sites = self.config.sites or default_sites(self.model)
        try:
            candidates = {
                site: self._vector(name, kind, pairs, site) for site in (sites if kind.of_sites else (OWN,))
            }
        except SteerkitError as error:
            self.best[name] = {"method": name, "reason": str(error)}
            return
        tried = {site: self._tried(name, site, vector) for site, vector in candidates.items()}
        site = max(tried, key=lambda site: max(_merit(record) for record in tried[site]))
        vector = candidates[site]
        if self.config.strengths:
            found = tried[site]
        else:
            found = [self._calibrated(name, site, vector, target) for target in self.config.kl_targets]
        if self.config.at is None:
            allowed = [record for record in found if self._within(record)]
        else:
            nearest = min(found, key=lambda record: _distance(record, self.config.target))
            allowed = [nearest] if nearest["destroyed"] is None else []
        for record in found:
            self._measured("test", name, site, vector, record["strength"])
        if not allowed:
            self.best[name] = {"method": name, "site": site, "reason": "no strength stays within the budgets"}
            return
        strength = max(allowed, key=_merit)["strength"]
        self.best[name] = self._measured("test", name, site, vector, strength)

    def run_null(self, name: str, pairs: Pairs) -> None:
        """The method fitted on pairs with shuffled sides: at its site, and the divergence of its best strength."""
        chosen, wanted, kind = self.best[name], self.config.shuffled, get(name)
        if "site" not in chosen or not kind.of_sides or (wanted is not None and name not in wanted):
            return
        null, site = name + SHUFFLED, chosen["site"]
        try:
            vector = self._vector(null, kind, pairs.shuffled_sides(self.config.seed), site)
        except SteerkitError as error:
            self.best[null] = {"method": null, "site": site, "reason": str(error)}
            return
        target = self.config.at or chosen.get("kl") or self.config.target
        strength = self._calibrated(null, site, vector, target)["strength"]
        self.best[null] = self._measured("test", null, site, vector, strength)

    def run_prompting(self, name: str, prefix: str) -> None:
        """A text before the prompt, which has no strength."""
        key = ("test", name, "", 1.0)
        if key not in self.records:
            found = self.benches["test"].measure_prompted(prefix)
            self._keep(key, found, prefix=prefix)
        self.best[name] = self.records[key]

    def run_few_shot(self, pairs: Pairs) -> None:
        """Examples before the prompt."""
        if not self.config.few_shot:
            return
        prompts, tokens = self.benches["test"].prompts, self.config.max_new_tokens
        try:
            self.run_prompting(FEW_SHOT, few_shot(self.model, pairs, prompts, tokens, self.config.few_shot))
        except InputError as error:
            self.best[FEW_SHOT] = {"method": FEW_SHOT, "reason": str(error)}

    def run_study(self, method: str, pairs: Pairs) -> None:
        """What sites, positions and schedules make of one method, each at the middle target."""
        posts = [f"blocks.{i}.hook_resid_post" for i in range(self.model.n_layers)]
        kind = get(method)
        for site in dict.fromkeys((posts[(len(posts) - 1) // 2], "+".join(posts))):
            try:
                vector = self._vector(method, kind, pairs, site)
            except SteerkitError:
                return  # said where the method itself is told
            for positions, schedule, where in _ways(self.config.max_new_tokens):
                name = f"{method}: {positions}, {schedule}"
                placed = replace(vector, where=where)
                strength = self._calibrated(name, site, placed, self.config.target)["strength"]
                found = self._measured("test", name, site, placed, strength)
                told = {"method": method, "positions": positions, "schedule": schedule}
                self.study[f"{name} at {site}"] = {**found, **told}

    def _vector(self, name: str, kind: type[Method], pairs: Pairs, site: str) -> SteeringVector:
        """The fitted vector, from its file if it was fitted before, with the sweep's `where` unless it has its own."""
        vector = self._fitted(name, kind, pairs, site)
        own = vector.where != Where()
        return vector if own else replace(vector, where=WHERES[self.config.where])

    def _fitted(self, name: str, kind: type[Method], pairs: Pairs, site: str) -> SteeringVector:
        path = self.run.path / "vectors" / vector_file(name, site)
        if path.exists():
            try:
                return SteeringVector.load(path)
            except (CheckpointError, InputError):
                path.unlink()
        started = time.monotonic()
        seeded = {"seed": self.config.seed} if "seed" in {f.name for f in fields(kind)} else {}
        method = kind(**{**seeded, **self.config.settings.get(kind.name, {})})
        vector = method.fit(self.model, pairs, [] if site == OWN else site.split("+"))
        self.run.log({"part": "fit", "method": name, "site": site, "seconds": time.monotonic() - started})
        vector.save(path)
        return vector

    def _tried(self, name: str, site: str, vector: SteeringVector) -> list[dict[str, Any]]:
        """What a site is chosen by: validation at the middle target, or at all strengths that are given."""
        if self.config.strengths:
            return [self._measured("validation", name, site, vector, s) for s in self.config.strengths]
        return [self._calibrated(name, site, vector, self.config.target)]

    def _calibrated(self, name: str, site: str, vector: SteeringVector, target: float) -> dict[str, Any]:
        """The validation measurement whose divergence is nearest to the target.

        Strengths are sought between those that are known: KL grows about like a power of the strength.
        """
        known = [
            record
            for record in self.used.values()
            if record["part"] == "validation" and record["method"] == name and record["site"] == site
        ]
        if not known:
            known.append(self._measured("validation", name, site, vector, 1.0))
        for _ in range(_TRIES):
            if min(_distance(record, target) for record in known) < _CLOSE:
                break
            strength = _next_strength(known, target)
            if strength is None or not 1 / _STRONGEST < strength < _STRONGEST:
                break
            known.append(self._measured("validation", name, site, vector, strength))
        return min(known, key=lambda record: _distance(record, target))

    def _measured(
        self, part: str, name: str, site: str, vector: SteeringVector, strength: float
    ) -> dict[str, Any]:
        key = (part, name, site, strength)
        if key not in self.records:
            self._keep(key, self.benches[part].measure(vector, strength))
        self.used[key] = self.records[key]
        return self.records[key]

    def _keep(self, key: tuple[Any, ...], found: Measurement, **more: Any) -> None:
        part, method, site, strength = key
        record = {
            "part": part,
            "method": method,
            "site": site,
            "strength": strength,
            **found.to_dict(),
            **more,
            "texts": self._shown(found),
        }
        self.run.log(record)
        self.records[key] = jsonable(record)

    def _shown(self, found: Measurement) -> list[list[str]]:
        """A text each of the first prompts."""
        each = self.config.samples
        return [list(pair) for pair in found.texts[: SAMPLES_SHOWN * each : each]]

    def _within(self, record: Mapping[str, Any]) -> bool:
        """Whether a measurement stays within the budgets."""
        lost = 0.0
        if record["grammaticality"] is not None and record["grammaticality_base"] is not None:
            lost = record["grammaticality_base"] - record["grammaticality"]
        kl = record["kl"]
        return (
            record["destroyed"] is None
            and kl is not None
            and kl <= self.config.kl_budget * math.exp(_CLOSE)
            and lost <= self.config.grammar_budget
        )

    def result(self) -> SweepResult:
        base = self.benches["test"].base
        parts: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
        for record in self.records.values():
            if record.get("part") in parts and record["method"] in self.best:
                parts[record["part"]].append(_without_part(record))
        best = {name: _without_part(record) for name, record in self.best.items()}
        study = [_without_part(record) for record in self.study.values()]
        shown = {**base.to_dict(), "texts": self._shown(base)}
        return SweepResult(parts["test"], best, parts["validation"], shown, study, self.run.config)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _without_part(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "part"}


def _ways(max_new_tokens: int) -> Iterator[tuple[str, str, Where]]:
    """(positions, schedule, both) of the study; schedules are of generated tokens."""
    yield "prompt", "constant", Where.prompt_only()
    quarter, half = max(1, max_new_tokens // 4), max(1, max_new_tokens // 2)
    schedules: dict[str, Schedule] = {
        "constant": Constant(),
        f"halving every {quarter} tokens": Decay(quarter),
        f"until token {half}": Window(0, half + 1),
    }
    for positions, where in (("generation", Where.generation_only()), ("both", Where())):
        for name, schedule in schedules.items():
            yield positions, name, replace(where, schedule=schedule)


SPREAD = ("effect", "effect_base", "change", "kl", "cost", "grammaticality", "perplexity_ratio")
"""Figures that are told over seeds."""


def across_seeds(results: Sequence[SweepResult]) -> dict[str, dict[str, Any]]:
    """Method -> {figure: mean, figure_sd: its standard deviation (n - 1)} of the best entries, and how many seeds have one."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for result in results for name in result.best):
        best = [result.best[name] for result in results if "effect" in result.best.get(name, {})]
        told: dict[str, Any] = {"method": name, "seeds": len(best)}
        for figure in SPREAD:
            values = [record[figure] for record in best if record[figure] is not None]
            told[figure] = statistics.fmean(values) if values else None
            told[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        found[name] = told
    return found


def middle(targets: Sequence[float]) -> float:
    """The target that sites are compared at."""
    return targets[len(targets) // 2]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("part", "method", "site", "strength"))


def _merit(record: Mapping[str, Any]) -> float:
    """What strengths and sites are chosen by: the effect; nothing where it is unknown or the model is broken."""
    return -1.0 if record["destroyed"] is not None or record["effect"] is None else record["effect"]


def _distance(record: Mapping[str, Any], target: float) -> float:
    """How far the divergence is from the target, in logarithms."""
    kl = record["kl"]
    return abs(math.log(max(kl, 1e-9) / target)) if kl is not None else math.inf


def _next_strength(known: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """By the two measurements around the target, or the nearest two beyond which it lies; in logarithms. None: there is no more."""
    points = sorted((record["strength"], record["kl"]) for record in known if record["kl"])
    if not points:
        weakest = min(record["strength"] for record in known)
        return weakest / 8
    below = [p for p in points if p[1] <= target]
    above = [p for p in points if p[1] > target]
    if below and above:
        (s0, k0), (s1, k1) = below[-1], above[0]
        if s1 <= s0:  # not monotonous
            return None
        share = math.log(target / k0) / math.log(k1 / k0)
        return math.exp(math.log(s0) + min(0.9, max(0.1, share)) * math.log(s1 / s0))
    strength, kl = points[-1] if below else points[0]
    slope = 2.0
    if len(points) > 1:
        (s0, k0), (s1, k1) = points[-2:] if below else points[:2]
        if s1 > s0 and k1 > k0:
            slope = min(3.0, max(0.5, math.log(k1 / k0) / math.log(s1 / s0)))
    factor = (target / kl) ** (1 / slope)
    return strength * min(16.0, max(1 / 16, factor))


def vector_file(method: str, site: str) -> str:
    """The name of a vector's file in the run's `vectors`."""
    return f"{_slug(method)}-{_slug(site)}.safetensors"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name)
