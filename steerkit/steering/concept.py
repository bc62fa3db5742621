"""One concept by every means: what detects it and what steers it, on equal data and at equal divergence.

    study = study_concept(model, "storyworld:mood=happy", "runs/happy")
    study.results;  write_report(study, "runs/happy/report.html")

An SAE's latent, the mean difference, a linear probe's direction, trained directions and edits, a LoRA and other changes of weights
learn from the same pairs; an instruction and examples need no training; a random direction and every method fitted on pairs with
shuffled sides are the nulls. All that has a strength is told at the one at which KL(steered ‖ base) is `ConceptConfig.at` on
validation prompts (`steerkit.steering.sweep`), on test prompts.

**Detection** is told on pairs that were held out, as the AUROC of a score of a side's text:

    projection    v·h, h the mean over the side's tokens, summed over the sites            where a vector is added
    latent        the SAE's latent, the mean over the side's tokens
    likelihood    log p(text | changed model) - log p(text | base model), in nats          everything else, at the strength told

It needs nothing above steering, and stands on this floor so that Python has it without the command line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sae as saes
from steerkit.errors import InputError
from steerkit.finetune import Example, log_probs
from steerkit.models import HookedModel
from steerkit.runs import Run, jsonable, make_provenance
from steerkit.stats import auroc_interval, mean_interval
from steerkit.steering.edits import Add, SingularRotate
from steerkit.steering.effects import Effect
from steerkit.steering.fitting import get
from steerkit.steering.methods.fgaa import sae_and_site
from steerkit.steering.methods.learning import encode_pairs, sides_of, steered_log_probs
from steerkit.steering.methods.sae_latent import side_latents
from steerkit.steering.pairs import Pair, Pairs, join, load_pairs
from steerkit.steering.prompting import few_shot
from steerkit.steering.reading import collect_pairs
from steerkit.steering.story import speaks_storyworld
from steerkit.steering.sweep import (
    FEW_SHOT,
    PROMPTING,
    SHUFFLED,
    SweepConfig,
    SweepResult,
    sweep,
    vector_file,
    without_training,
)
from steerkit.steering.tasks import Task, make_task
from steerkit.steering.vector import SteeringVector

LABELS = {
    "sae_latent": ("SAE latent", "SAE"),
    "fgaa": ("SAE latents (FGAA)", "SAE"),
    "mean_diff": ("mean difference (CAA)", "direction"),
    "linear_probe": ("linear probe", "direction"),
    "bipo": ("BiPO", "trained direction"),
    "reft": ("LoReFT", "low-rank edit"),
    "lora": ("LoRA", "weights"),
    "weight_arithmetic": ("weight arithmetic", "weights"),
    "antipasto": ("AntiPaSTO", "weights"),
    PROMPTING: ("instruction", "prompt"),
    FEW_SHOT: ("few-shot", "prompt"),
    "random": ("random direction", "null"),
}
"""Method -> what the page calls it, and its kind."""
NULL = "null"
_BATCH = 32
_OFF = 1.5
"""How many times more or less than asked a divergence on test is before the page warns."""
_FEW = 30
_LEARNED = 2 / 3
"""Share of the pairs to learn from, at most, where there are too few for what is asked."""


@dataclass(frozen=True)
class ConceptConfig:
    """Settings of a study."""

    methods: tuple[str, ...] = (
        "sae_latent",
        "mean_diff",
        "linear_probe",
        "bipo",
        "reft",
        "lora",
        "weight_arithmetic",
        "antipasto",
        "random",
    )
    shuffled: tuple[str, ...] | None = None
    """Methods that are also fitted on pairs with shuffled sides; None: all that learn from the sides."""
    sites: tuple[str, ...] = ()
    """Sites to choose from, those joined by `+` being one; empty: after every second block, and after all of them."""
    at: float = 3.0
    """The divergence that all are told at, nats a sequence."""
    kl_targets: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """The divergences of the curves, `at` among them."""
    n_pairs: int = 256
    """Pairs to learn from, the same for all, at most."""
    n_held_out: int = 128
    """Pairs to detect in, at most."""
    n_prompts: int = 180
    """Prompts: a third to choose by, the rest to report."""
    samples: int = 2
    """Texts a prompt."""
    max_new_tokens: int = 40
    few_shot: int = 4
    """Examples before the prompt, at most."""
    where: str = "everywhere"
    """`everywhere`, `prompt` or `generation`; methods that bring their own keep it."""
    seeds: int = 1
    """Studies with splits, training, prompts and draws of their own, told as mean and spread."""
    seed: int = 0
    sae_tokens: int = 400_000
    """Tokens for the small SAE that is trained where StoryWorld's model is given none."""
    sae_latents: int = 1024
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method -> its settings, where they are not the defaults."""

    def __post_init__(self) -> None:
        for name in ("n_pairs", "n_held_out", "seeds", "sae_tokens", "sae_latents"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is at least 1.")
        if not self.methods:
            raise InputError("methods is empty: name at least one.")
        self.sweep_config(0, self.methods, {})

    def sweep_config(
        self, seed: int, methods: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
    ) -> SweepConfig:
        """The sweep of one seed."""
        return SweepConfig(
            methods=tuple(methods),
            sites=self.sites,
            shuffled=self.shuffled,
            few_shot=self.few_shot,
            study=None,
            kl_targets=self.kl_targets,
            at=self.at,
            where=self.where,
            n_pairs=self.n_pairs,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            settings={**self.settings, **settings},
        )

    @classmethod
    def quick(cls, model: HookedModel) -> dict[str, Any]:
        """The settings of `--quick`: minutes on two cores with the built-in model."""
        posts = [f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)]
        return {
            "shuffled": tuple(
                name for name in cls.methods if name in without_training() and get(name).of_sides
            ),
            "sites": (posts[len(posts) // 2], "+".join(posts))[: len(posts)],
            "kl_targets": (1.0, 3.0),
            "n_pairs": 128,
            "n_held_out": 64,
            "n_prompts": 72,
            "max_new_tokens": 32,
            "sae_tokens": 100_000,
            "sae_latents": 512,
        }


@dataclass(frozen=True)
class ConceptStudy:
    """What was found."""

    results: list[dict[str, Any]]
    """{method, label, kind, auroc, auroc_ci, detected_by, effect, effect_base, effect_ci, side_effect, fluency, kl, params,
    seconds, seeds, …} of every method, the most effective first, nulls and what failed (`reason`) after them. Over several seeds:
    means, with intervals of Student's t and standard deviations (`effect_sd` and so on)."""
    base: dict[str, Any]
    """The unsteered model: effect, effect_ci, fluency."""
    doses: list[dict[str, Any]]
    """{method, target, kl, effect, effect_ci} at every divergence of the curves."""
    samples: list[dict[str, Any]]
    """{method, texts: [[prompt, continuation], …]}, the unsteered model's first; of the first seed."""
    warnings: list[str]
    autoencoder: dict[str, Any] | None
    """Where the SAE is from, its site, and how good it is."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ConceptStudy:
        """What `to_dict` made: the content of summary.json."""
        return cls(**found)

    def __repr__(self) -> str:
        lines = (
            f"{row['label']:<40}"
            + (
                row["reason"]
                if row["effect"] is None
                else f"effect {row['effect']:.3f}  {row['kl']:.2f} nats"
            )
            + ("" if row["auroc"] is None else f"  AUROC {row['auroc']:.3f}")
            for row in self.results
        )
        return "\n".join(lines)


def study_concept(
    model: HookedModel,
    pairs: Any,
    out: str | Path,
    config: ConceptConfig | None = None,
    *,
    effect: str | Effect | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    instruction: str | None = None,
    sae: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> ConceptStudy:
    """Fit, calibrate, detect and steer; writes OUT/summary.json and a sweep for each seed. `concept_report.write_report` draws it.

    `effect`, `prompts`: as `make_task` takes them. `instruction`: plain words that ask for the concept; StoryWorld has its own.
    `sae`: a trained autoencoder's directory; without it the built-in model is given a small one (in OUT/sae), other models none.
    Raises InputError for pairs, a model or an SAE that do not fit, and for less than four pairs with different prompts.
    """
    config = config or ConceptConfig()
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: pass one to from_pretrained(…, tokenizer=…).")
    if not (model.has_lm_head and model.is_causal):
        raise InputError(
            f"{model.name} writes no text: a concept is steered in what a decoder-only model writes."
        )
    loaded = load_pairs(pairs)
    seeds = range(config.seed, config.seed + config.seeds)
    splits = {seed: _split(loaded, config, seed) for seed in seeds}
    tasks = {
        seed: make_task(model, loaded, effect=effect, prompts=prompts, n_prompts=config.n_prompts, seed=seed)
        for seed in seeds
    }
    task = tasks[config.seed]
    if sae is not None:
        sae_and_site(str(sae), model)
    elif config.methods == ("sae_latent",) and not speaks_storyworld(model):
        raise InputError(f"There is no SAE of {model.name} whose latent could be told: give sae=… (--sae).")
    settings = {
        "model": model.name,
        "pairs": loaded.name,
        "pairs_sha256": loaded.fingerprint(),
        "effect": task.effect.name,
        "binary": task.effect.binary,
        "instruction": instruction or task.instruction,
        "sae": sae,
        **asdict(config),
    }
    run = Run.open(out, "concept", settings, resume=resume, provenance=make_provenance(model=model.name))
    if run.finished:
        return ConceptStudy.from_dict(run.summary)
    methods, given, autoencoder, warnings = list(config.methods), {}, None, []
    if "sae_latent" in methods:
        place, autoencoder = _autoencoder(model, sae, run.path / "sae", config, quiet)
        if place is None:
            methods.remove("sae_latent")
            warnings.append("No SAE latent is told: give a trained autoencoder of this model (--sae).")
        else:
            given = {"sae_latent": {"sae": str(place)}}
    parts = []
    for seed, (train, held_out) in splits.items():
        parts.append(
            _part(
                model,
                train,
                held_out,
                tasks[seed],
                run.path / f"seed-{seed}",
                config.sweep_config(seed, methods, given),
                settings["instruction"],
                quiet,
            )
        )
    study = _joined(parts, run.config, autoencoder, warnings)
    run.finish(study.to_dict())
    return ConceptStudy.from_dict(run.summary)


def _split(pairs: Pairs, config: ConceptConfig, seed: int) -> tuple[Pairs, Pairs]:
    """Pairs to learn from and pairs to detect in: no prompt is in both."""
    if len(pairs) < 4:
        raise InputError(
            f"{pairs.name} has {len(pairs)} pairs: at least four are needed, some to learn from and some held out."
        )
    wanted = config.n_pairs + config.n_held_out
    share = config.n_pairs / wanted
    train, held_out = pairs.split(share if len(pairs) >= wanted else min(share, _LEARNED), seed=seed)
    return train[: config.n_pairs], held_out[: config.n_held_out]


def _autoencoder(
    model: HookedModel, given: str | Path | None, place: Path, config: ConceptConfig, quiet: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """(directory of the SAE, what is said of it): the one that is given, or a small one for the built-in model."""
    if given is not None:
        sae, site = sae_and_site(str(given), model)
        return Path(given), {"from": str(given), "site": site, "d_sae": sae.d_sae, "arch": sae.arch}
    if not speaks_storyworld(model):
        return None, None
    site = f"blocks.{model.n_layers // 2}.hook_resid_post"
    trained = saes.train(
        model,
        "storyworld",
        site,
        saes.TopK(d_sae=config.sae_latents, k=16),
        config.sae_tokens,
        place,
        config=saes.TrainConfig(seed=config.seed, held_out_tokens=min(10_000, config.sae_tokens // 4)),
        resume=True,
        quiet=quiet,
    )
    told = {key: trained.summary[key] for key in ("d_sae", "arch", "l0", "fvu", "tokens")}
    return place, {"from": "trained here", "site": site, **told}


# one seed


@dataclass(frozen=True)
class _Part:
    """One seed's sweep, and what was found beside it."""

    sweep: SweepResult
    rows: dict[str, dict[str, Any]]
    """Method -> its figures."""
    n_train: int
    n_held_out: int


def _part(
    model: HookedModel,
    train: Pairs,
    held_out: Pairs,
    task: Task,
    out: Path,
    config: SweepConfig,
    instruction: str | None,
    quiet: bool,
) -> _Part:
    result = sweep(
        model,
        train,
        task.effect,
        task.validation,
        task.test,
        out,
        config,
        prompting=instruction,
        resume=True,
        quiet=quiet,
    )
    run = Run.load(out)
    seconds = {(r["method"], r["site"]): r["seconds"] for r in run.metrics() if r.get("part") == "fit"}
    detector = _Detector(model, held_out, config.settings.get("sae_latent", {}).get("sae"))
    rows = {}
    for name, record in result.best.items():
        row: dict[str, Any] = {"reason": record.get("reason"), "site": record.get("site")}
        if "effect" in record:
            row |= _figures(record)
            if name in (PROMPTING, FEW_SHOT):
                found = (
                    detector.of_prefix(record["prefix"])
                    if name == PROMPTING
                    else detector.of_examples(train, config.few_shot)
                )
                row |= {"params": 0, "seconds": 0.0, "strength": None}
            else:
                vector = SteeringVector.load(out / "vectors" / vector_file(name, record["site"]))
                found = detector.of_vector(vector, record["strength"])
                row |= {"params": n_parameters(vector), "seconds": seconds.get((name, record["site"]))}
            row |= found
        rows[name] = row
    return _Part(result, rows, len(train), len(held_out))


_TAKEN = (
    "strength",
    "effect",
    "effect_base",
    "effect_ci",
    "kl",
    "kl_ci",
    "grammaticality",
    "perplexity_ratio",
)


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a measurement."""
    moved = {
        name: max(0.0, found["tv"] - found["null"])
        for name, found in record["side_effects"].items()
        if None not in (found["tv"], found["null"], *found["tv_ci"])  # too few texts say something of it
    }
    judged = record["grammaticality_base"] is not None
    return {
        **{name: record[name] for name in _TAKEN},
        "fluency": record["grammaticality" if judged else "perplexity_ratio"],
        "side_effect": statistics.fmean(moved.values()) if moved else None,
        "side_effects": moved,
    }


def n_parameters(vector: SteeringVector) -> int:
    """Numbers that were fitted: of AntiPaSTO's edits without the singular vectors and values, which are the model's."""
    return sum(
        tensor.numel()
        for edit in vector.edits
        for name, tensor in edit.tensors().items()
        if not isinstance(edit, SingularRotate) or name in ("P", "dS")
    )


class _Detector:
    """Scores of held-out pairs' sides."""

    def __init__(self, model: HookedModel, pairs: Pairs, sae: Any = None) -> None:
        self.model, self.pairs, self.sae = model, pairs, sae
        self.sides: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_vector(self, vector: SteeringVector, strength: float) -> dict[str, Any]:
        """By what it adds or reads where it does, else by what it makes likelier."""
        if "latent" in vector.provenance and self.sae is not None:
            sae, site = sae_and_site(self.sae, self.model)
            latent = vector.provenance["latent"]
            return self._told(
                "latent", *(side[:, latent] for side in side_latents(self.model, sae, site, self.pairs))
            )
        if all(isinstance(edit, Add) for edit in vector.edits):
            return self._told("projection", *self._projected(vector))
        return self._likelier(
            self.pairs, lambda batch: steered_log_probs(self.model, vector, batch, strength)
        )

    def of_prefix(self, prefix: str) -> dict[str, Any]:
        """By what a text before it makes likelier."""
        after = (Pair(p.positive, p.negative, join(prefix, p.prompt)) for p in self.pairs)
        return self._likelier(Pairs(after, self.pairs.name), lambda batch: log_probs(self.model, batch))

    def of_examples(self, examples: Pairs, k: int) -> dict[str, Any]:
        """By what examples before it make likelier: as many as fit together with the sides, which are longer than prompts."""
        texts = [text for pair in self.pairs for text in pair.texts()]
        try:
            return self.of_prefix(few_shot(self.model, examples, texts, 0, k))
        except InputError as error:
            return _undetected(error)

    def _projected(self, vector: SteeringVector) -> tuple[torch.Tensor, torch.Tensor]:
        directions = vector.directions
        if not set(directions) <= set(self.sides):
            self.sides |= collect_pairs(self.model, self.pairs, list(directions))
        positive, negative = (
            torch.stack([self.sides[site][side].cpu() @ v.cpu() for site, v in directions.items()]).sum(0)
            for side in (0, 1)
        )
        return positive, negative

    def _likelier(self, pairs: Pairs, scored: Callable[[Sequence[Example]], torch.Tensor]) -> dict[str, Any]:
        try:
            gained = self._log_probs(pairs, scored) - self._base
        except InputError as error:
            return _undetected(error)
        return self._told("likelihood", *gained.chunk(2))

    @cached_property
    def _base(self) -> torch.Tensor:
        return self._log_probs(self.pairs, lambda batch: log_probs(self.model, batch))

    def _log_probs(self, pairs: Pairs, scored: Callable[[Sequence[Example]], torch.Tensor]) -> torch.Tensor:
        """Of each side from where it begins to differ from the other on: positive sides, then negative ones."""
        sides = sides_of(encode_pairs(self.model, pairs))
        with torch.no_grad():
            found = [scored(sides[i : i + _BATCH]).double().cpu() for i in range(0, len(sides), _BATCH)]
        return torch.cat(found)

    def _told(self, by: str, positive: torch.Tensor, negative: torch.Tensor) -> dict[str, Any]:
        n = len(positive)
        scores = torch.cat([positive, negative]).double().numpy()
        found = auroc_interval(scores, np.repeat([True, False], n), np.tile(np.arange(n), 2))
        return {"auroc": found.estimate, "auroc_ci": [found.low, found.high], "detected_by": by}


def _undetected(error: InputError) -> dict[str, Any]:
    return {"auroc": None, "auroc_ci": None, "detected_by": None, "undetected": str(error)}


# all seeds together

_TOLD = (
    "auroc",
    "effect",
    "effect_base",
    "kl",
    "side_effect",
    "fluency",
    "grammaticality",
    "perplexity_ratio",
    "seconds",
)
"""Figures that are told over seeds."""
_SHARES = ("auroc", "side_effect", "grammaticality")


def _joined(
    parts: Sequence[_Part],
    config: dict[str, Any],
    autoencoder: dict[str, Any] | None,
    warnings: Sequence[str],
) -> ConceptStudy:
    names = dict.fromkeys(name for part in parts for name in part.rows)
    rows = [_row(name, [part.rows[name] for part in parts if name in part.rows], config) for name in names]
    rows.sort(key=lambda row: (row["effect"] is None, row["kind"] == NULL, -(row["effect"] or 0.0)))
    first, judged = parts[0].sweep, parts[0].sweep.base["grammaticality"] is not None
    bases = [part.sweep.base for part in parts]
    base = {
        "effect": _mean([b["effect"] for b in bases]),
        "effect_ci": _interval([b["effect"] for b in bases], bases[0]["effect_ci"], config["binary"]),
        "fluency": _mean([b["grammaticality"] for b in bases]) if judged else 1.0,
        "fluency_is": "grammatical share of sentences"
        if judged
        else "perplexity, times the unsteered model's",
        "n_prompts": first.base["n_prompts"],
        "n_pairs": parts[0].n_train,
        "n_held_out": parts[0].n_held_out,
    }
    shown = [{"method": "unsteered", "texts": first.base["texts"]}] + [
        {"method": row["method"], "texts": first.best[row["method"]]["texts"]}
        for row in rows
        if "texts" in first.best.get(row["method"], {}) and not row["method"].endswith(SHUFFLED)
    ]
    return ConceptStudy(
        results=rows,
        base=base,
        doses=[dose for name in names for dose in _doses(name, parts, config)],
        samples=shown,
        warnings=[*warnings, *_warnings(rows, base, autoencoder, config)],
        autoencoder=autoencoder,
        config=config,
    )


def label_of(method: str) -> tuple[str, str]:
    """(what the page calls it, its kind)."""
    if method.endswith(SHUFFLED):
        return label_of(method.removesuffix(SHUFFLED))[0] + SHUFFLED, NULL
    return LABELS.get(method, (method, "other"))


def _row(name: str, found: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """One method over the seeds in which it was told."""
    label, kind = label_of(name)
    told = [row for row in found if "effect" in row]
    row: dict[str, Any] = {"method": name, "label": label, "kind": kind, "seeds": len(told)}
    for figure in _TOLD:
        values = [r.get(figure) for r in told]
        row[figure] = _mean(values)
        row[f"{figure}_sd"] = _sd(values)
    for figure in ("auroc", "effect", "kl"):
        share = figure in _SHARES or (figure == "effect" and config["binary"])
        own = told[0].get(f"{figure}_ci") if told else None
        row[f"{figure}_ci"] = _interval([r.get(figure) for r in told], own, share)
    attributes = dict.fromkeys(a for r in told for a in r["side_effects"])
    row["side_effects"] = {a: _mean([r["side_effects"].get(a) for r in told]) for a in attributes}
    for figure in ("detected_by", "undetected", "params"):
        row[figure] = told[0].get(figure) if told else None
    row["sites"] = [r.get("site") for r in told]
    row["strengths"] = [r.get("strength") for r in told]
    row["reason"] = None
    if row["effect"] is None:
        row["reason"] = next((r["reason"] for r in found if r["reason"]), "the effect is known of no text")
    return row


def _doses(name: str, parts: Sequence[_Part], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A method at each divergence of the curves: the strength nearest to it on validation, on test."""
    found: dict[float, list[dict[str, Any]]] = {}
    for part in parts:
        best = part.sweep.best.get(name, {})
        if "effect" not in best:
            continue
        own = [r for r in part.sweep.results if r["method"] == name and r["site"] == best["site"]]
        cost = {
            r["strength"]: r["kl"]
            for r in part.sweep.validation
            if r["method"] == name and r["site"] == best["site"] and r["kl"]
        }
        if name.endswith(SHUFFLED) or name in (PROMPTING, FEW_SHOT):
            found.setdefault(config["at"], []).append(best)
            continue
        for target in config["kl_targets"]:
            known = [r for r in own if r["strength"] in cost and r["effect"] is not None]
            if known:
                near = min(known, key=lambda r: abs(math.log(cost[r["strength"]] / target)))
                found.setdefault(target, []).append(near)
    doses: list[dict[str, Any]] = []
    for target, records in found.items():
        effects = [r["effect"] for r in records]
        ends = _interval(effects, records[0]["effect_ci"], config["binary"])
        dose = {
            "method": name,
            "kl": _mean([r["kl"] for r in records]),
            "effect": _mean(effects),
            "effect_ci": ends,
        }
        if not doses or {**doses[-1], "target": target} != {**dose, "target": target}:
            doses.append({**dose, "target": target})
    return doses


def _warnings(
    rows: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    autoencoder: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> list[str]:
    """What a reader has to know before believing the table."""
    found = []
    if config["seeds"] == 1:
        found.append("One seed: the intervals are over prompts and pairs, not over training.")
    if base["n_prompts"] < _FEW or base["n_held_out"] < _FEW:
        found.append(f"Few texts: {base['n_prompts']} test prompts, {base['n_held_out']} held-out pairs.")
    if autoencoder is not None and autoencoder["from"] == "trained here":
        found.append(
            f"The SAE is a small one that was trained here, on {autoencoder['tokens']:,} tokens without labels "
            f"(FVU {autoencoder['fvu']:.3f}); give a better one with --sae."
        )
    for row in rows:
        if row["effect"] is None:
            found.append(f"{row['label']} is not told: {row['reason']}")
        elif row["undetected"]:
            found.append(f"{row['label']} is not told as a detector: {row['undetected']}")
        if row["effect"] is None or row["kl"] is None or row["kind"] == "prompt":
            continue
        if not 1 / _OFF < row["kl"] / config["at"] < _OFF:
            found.append(
                f"{row['label']} stands at {row['kl']:.2g} nats on test, not at {config['at']:g}: not the others' divergence."
            )
        if row["kind"] == NULL and row["auroc_ci"] and not row["auroc_ci"][0] <= 0.5 <= row["auroc_ci"][1]:
            found.append(
                f"{row['label']} detects with {row['auroc']:.2f}: the sides differ in so much that chance, too, tells them apart."
            )
    return found


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _sd(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.stdev(known) if len(known) > 1 else None


def _interval(values: Sequence[float | None], own: Sequence[float] | None, share: bool) -> list[float] | None:
    """Student's t over seeds; of a single one its own."""
    known = _known(values)
    if len(known) < 2:
        return None if own is None else list(own)
    found = mean_interval(known)
    found = found.clipped(0.0, 1.0) if share else found
    return [found.low, found.high]
