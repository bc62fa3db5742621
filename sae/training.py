"""Training sparse autoencoders on a model's activations.

    run = sae.train(model, data, site="blocks.2.hook_resid_post", arch=sae.Gated(d_sae=1024), tokens=2_000_000, out="runs/g")
    run.sae.encode(acts);  run.summary["fvu"]

`train` makes a run directory; `Trainer` is the loop's content – one SAE, its optimiser, schedules and counts – and takes batches of
activations from anywhere. Training happens in normalised units: activations times `scale`, so that their mean squared norm is d_in;
the scale is folded into the weights that are saved, which act on raw activations.

A run that is killed and resumed ends with the very same weights, bit by bit (on a CPU, with the same number of threads): a
checkpoint holds parameters, moments, controller, counts and the stream's place.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae import formats
from sae.architectures import SAE, Config, Sparsity, Step, Terms
from sae.architectures.crosscoder import Crosscoder
from sae.architectures.guided import GuidedSAE
from sae.checkpoint import Checkpoints
from sae.dashboard.value import Dashboard
from sae.evaluation import Evaluation, evaluate, evaluate_all
from sae.kernels import is_fast
from sae.label_scores import label_scores
from sae.latents import collect_latents
from sae.memory import choose_micro_batch
from sae.reading import Reading, Side
from sae.schedule import TargetL0, learning_rate_factor
from sae.sweep import Job, job_names, summarise, sweep_page
from steerkit import distributed
from steerkit.activation_cache import ActivationCache, is_cache
from steerkit.activations import ActivationStream, Statistics, Tokenization
from steerkit.data import Documents, load_documents, split_held_out
from steerkit.errors import CheckpointError, InputError, NumericsError, did_you_mean
from steerkit.labels import LabelFunction, TokenLabels
from steerkit.models import HookedModel
from steerkit.pair import ModelPair
from steerkit.runs import Run, make_provenance, peak_memory_mb, progress

SPARSE_DENSITY = 1 / 32
"""Share of the latents that may be active for products to go over them one by one (measured: `scripts/bench_sae.py`)."""
_SAME_PRESS = 1.0
"""Seconds within which signals are one request: launchers pass on what the terminal has sent already."""
REVIVAL_SHARE = 0.8
"""The share of a run after which dead latents are no longer made anew: the rest is for learning."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop. The defaults serve runs from a million tokens up."""

    seed: int = 0
    """Sets initial weights and the order of the data."""
    batch_size: int | None = None
    """Tokens a step; by default a thousandth of the run, as a power of two from 512 to 4,096."""
    lr: float | None = None
    """Peak learning rate of Adam; by default 5e-3 · √(1000 / steps), at most 0.01: the longer the run, the smaller the steps."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises."""
    decay: float = 0.5
    """Share of the run, at its end, over which the learning rate falls to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    clip: float = 10.0
    """Greatest norm of the gradient, as a multiple of its running mean."""
    dead_after: int | None = None
    """A latent that has been silent for so many tokens counts as dead; by default a twentieth of the run, at most 10 M."""
    dtype: str = "float32"
    """What the products are computed in: float32, or bfloat16 with float32 weights and sums; tf32 is float32 on CUDA's tensor
    cores; with float64 weights and sums are in it too."""
    micro_batch: int | Literal["auto"] | None = None
    """Tokens that gradients are computed of at once, on each process; they are summed to those of the batch. None: all of them;
    auto: as many as fit into the memory, chosen when the run starts and written to run.yaml."""
    block_tokens: int = 65_536
    """Tokens that are shuffled together."""
    held_out_tokens: int = 200_000
    """Held-out tokens that the final figures are measured on."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "block_tokens", "held_out_tokens", "log_every"):
            value = getattr(self, name)
            if value is not None and value != "auto" and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if self.dtype not in ("float32", "tf32", "bfloat16", "float64"):
            raise InputError(
                f"dtype is {self.dtype!r}; training is done in float32, tf32, bfloat16 or float64."
            )
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr is {self.lr}; it must be positive.")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share of the run, from 0 to 1.")

    def resolve(self, tokens: int) -> TrainConfig:
        """The config of a run of so many tokens, with the defaults that depend on its length. InputError for less than a batch."""
        batch_size = self.batch_size or max(512, min(4096, 2 ** round(math.log2(max(tokens, 1) / 1000))))
        if tokens < batch_size:
            raise InputError(
                f"{tokens} tokens are less than one batch of {batch_size}: give more, or a smaller batch_size."
            )
        lr = self.lr or min(0.01, 5e-3 * (1000 * batch_size / tokens) ** 0.5)
        dead_after = self.dead_after or min(10_000_000, tokens // 20)
        return replace(self, batch_size=batch_size, lr=lr, dead_after=dead_after)

    @property
    def product_dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        """What weights and sums are in."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def with_(self, settings: Mapping[str, Any]) -> TrainConfig:
        """A copy with other values. Raises InputError for a setting that does not exist."""
        names = [field.name for field in fields(self)]
        for name in settings:
            if name not in names:
                raise InputError(
                    f"There is no training setting {name!r}.{did_you_mean(name, names)} There are {', '.join(names)}."
                )
        return replace(self, **settings)


def train(
    model: HookedModel | ModelPair,
    data: Any,
    site: str,
    arch: Config,
    tokens: int,
    out: str | Path,
    *,
    config: TrainConfig | None = None,
    tokenization: Tokenization | None = None,
    text_column: str | None = None,
    labels: LabelFunction | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> SAERun:
    """Train an SAE on a model's activations at `site`, evaluate it on held-out text, and write all of it to the directory `out`.

    `data` is whatever `load_documents` takes (its last 5 % of documents are held out), or an `ActivationCache` or its directory.
    `settings` are fields of `TrainConfig`, such as `seed=1` or `lr=1e-3`. With `resume` an unfinished run is continued from its
    last checkpoint, and a finished one returned as it is. The labels of a guided SAE are StoryWorld's attributes or columns of the
    data, unless `labels` gives them for a text. A crosscoder's `site` is several, with commas between.

    With `force` a run is continued although settings have changed, as far as its checkpoint allows. Processes that `torchrun` or
    `accelerate launch` started train it together: each has its share of every batch, and rank 0 writes.

    Raises InputError for bad settings or a directory that holds another run, NumericsError on NaN or inf (the last checkpoint is
    kept), CheckpointError when every checkpoint is damaged. On Ctrl-C a checkpoint is saved first.
    """
    with distributed.launched():
        task = _Pass.of(
            model,
            data,
            {".": Job(site, arch)},
            tokens,
            out,
            config,
            settings,
            tokenization,
            text_column,
            labels,
        )
        task = task.fitted(torch.device(device or model.device), resume)
        return task.run(device or model.device, checkpoint_seconds, resume, force, quiet)[0]


def train_many(
    model: HookedModel | ModelPair,
    data: Any,
    jobs: Sequence[Job],
    tokens: int,
    out: str | Path,
    *,
    config: TrainConfig | None = None,
    tokenization: Tokenization | None = None,
    text_column: str | None = None,
    labels: LabelFunction | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> list[SAERun]:
    """Train several SAEs in one pass over the activations: the model runs once for all of them.

    `out` is a run directory of its own, with a report of all (`report.html`, and `results` in `summary.json`); each SAE has its run
    directory in it, as `train` makes one. All see the same batches; a token that is a sink at one of the sites is left out at all.
    Otherwise as `train`, and a resumed pass ends with the same weights too.
    """
    named = dict(zip(job_names(jobs), jobs))
    with distributed.launched():
        task = _Pass.of(model, data, named, tokens, out, config, settings, tokenization, text_column, labels)
        task = task.fitted(torch.device(device or model.device), resume)
        distributed.first(lambda: task.open_sweep(resume, force))
        runs = task.run(device or model.device, checkpoint_seconds, resume, force, quiet)
        distributed.first(lambda: task.report(runs))
    return runs


@dataclass(frozen=True)
class _Pass:
    """One pass over activations, and the SAEs that are trained in it."""

    model: HookedModel | ModelPair
    source: _Source
    jobs: Mapping[str, Job]
    """Directory in `out` -> job."""
    tokens: int
    out: Path
    config: TrainConfig
    text_column: str | None
    labels: LabelFunction | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel | ModelPair,
        data: Any,
        jobs: Mapping[str, Job],
        tokens: int,
        out: str | Path,
        config: TrainConfig | None,
        settings: Mapping[str, Any],
        tokenization: Tokenization | None,
        text_column: str | None,
        labels: LabelFunction | None,
    ) -> _Pass:
        config = (config or TrainConfig()).with_(settings).resolve(tokens)
        jobs = {
            name: replace(job, seed=config.seed if job.seed is None else job.seed)
            for name, job in jobs.items()
        }
        model, jobs = _bound(model, jobs)
        source = _Source.of(model, data, tokenization, text_column)
        return cls(model, source, jobs, tokens, Path(out), config, text_column, labels)

    def fitted(self, device: torch.device, resume: bool) -> _Pass:
        """The same with micro-batches that fit, where they are to be chosen: those of before, if it is resumed."""
        if self.config.micro_batch != "auto":
            return self
        assert self.config.batch_size is not None
        present = self.out / "run.yaml"
        if resume and present.exists():
            chosen = Run.load(self.out).config["training"].get("micro_batch")
        else:
            share = distributed.share(self.config.batch_size)
            widths = sum(self.model.site(site).width for site in self._all_sites())
            found = choose_micro_batch(
                [(job.arch, self._d_in(job)) for job in self.jobs.values()],
                share.stop - share.start,
                self.config.product_dtype,
                device,
                reserved=2 * 4 * self.config.block_tokens * widths,
            )
            least = distributed.smallest(torch.tensor(found or self.config.batch_size, device=device))
            chosen = int(least) if int(least) < self.config.batch_size else None
        return replace(self, config=replace(self.config, micro_batch=chosen))

    def _all_sites(self) -> list[str]:
        return list(dict.fromkeys(site for job in self.jobs.values() for site in _sites(job)))

    def open_sweep(self, resume: bool, force: bool) -> None:
        """The run directory of all jobs together."""
        jobs = {
            name: {"site": job.site, "arch": job.arch.to_dict(), "seed": job.seed}
            for name, job in self.jobs.items()
        }
        origin = make_provenance(seed=self.config.seed, revision=self.model.revision)
        made_with = {**self.made_with(), "jobs": jobs}
        Run.open(self.out, "sweep sae", made_with, resume=resume, force=force, provenance=origin)

    def report(self, runs: Sequence[SAERun]) -> None:
        """Finish the directory of all jobs together."""
        run = Run.load(self.out)
        if run.finished:
            return
        summary = summarise({name: (job, made.summary) for (name, job), made in zip(self.jobs.items(), runs)})
        sweep_page(summary, run.path / "report.html")
        run.finish(summary)

    def made_with(self) -> dict[str, Any]:
        """The settings that all jobs share."""
        return {
            "model": self.model.name,
            "data": self.source.name,
            "text_column": self.text_column,
            "tokens": self.tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokenization": asdict(self.source.tokenization),
            "training": asdict(self.config),
        }

    def run(
        self, device: str | torch.device, checkpoint_seconds: float, resume: bool, force: bool, quiet: bool
    ) -> list[SAERun]:
        """Train, evaluate and write all; gives the finished runs in the order of the jobs."""
        started = time.perf_counter()
        distributed.first(lambda: [self._open(name, resume, force) for name in self.jobs])
        runs = {name: self._open(name, resume=True) for name in self.jobs}
        if all(run.finished for run in runs.values()):
            return [SAERun.load(run.path) for run in runs.values()]
        sites = self._all_sites()
        stream = self.source.stream(sites, self.config, self._columns(self.source.documents))
        before = time.perf_counter() - started
        checkpoints = Checkpoints(self.out / "checkpoint")
        try:
            made = fit_all(
                stream,
                self.jobs,
                self.tokens,
                config=self.config,
                device=device,
                runs=runs,
                checkpoints=checkpoints,
                checkpoint_seconds=checkpoint_seconds,
                quiet=quiet,
            )
            statistics = {site: stream.statistics(site) for site in sites}
        finally:
            stream.close()
        for name, (sae, _) in made.items():
            sae.metadata = self._metadata(self.jobs[name], statistics)
        distributed.first(lambda: self._finish(runs, made, statistics, before))
        return [
            SAERun(run.path, made[name][0], run.summary, run.config, self.model) for name, run in runs.items()
        ]

    def _finish(
        self,
        runs: Mapping[str, Run],
        made: Mapping[str, tuple[SAE, dict[str, float]]],
        statistics: Mapping[str, Statistics],
        before: float,
    ) -> None:
        """Save, evaluate and sum up what was trained; `before` is the seconds that went by before the training."""
        started = time.perf_counter()
        for name, (sae, _) in made.items():
            sae.save(runs[name].path)
        found = self._evaluate({name: sae for name, (sae, _) in made.items()}, statistics)
        beside_fit = before + time.perf_counter() - started
        for name, (_, seconds) in made.items():
            seconds = {**seconds, "total": seconds["total"] + beside_fit}
            runs[name].finish(self._summary(self.jobs[name], found[name], seconds))
        Checkpoints(self.out / "checkpoint").remove()

    def _open(self, name: str, resume: bool, force: bool = False) -> Run:
        job = self.jobs[name]
        shared = self.made_with()
        made_with = {
            **{key: shared[key] for key in ("model", "data", "text_column")},
            "site": job.site,
            "arch": job.arch.to_dict(),
            **{key: shared[key] for key in ("tokens", "dtype", "tokenization")},
            "training": asdict(self._config(job)),
        }
        origin: dict[str, Any] = {
            "seed": job.seed,
            "revision": self.model.revision,
            "data_sha256": self.source.documents.fingerprint(),
            "d_in": self._d_in(job),
        }
        if len(self.jobs) > 1:
            origin["pass"] = {"seed": self.config.seed, "jobs": list(self.jobs)}
        provenance = make_provenance(**origin)
        return Run.open(
            self.out / name, "train sae", made_with, resume=resume, force=force, provenance=provenance
        )

    def _config(self, job: Job) -> TrainConfig:
        assert job.seed is not None
        return replace(self.config, seed=job.seed)

    @property
    def _seen(self) -> int:
        """Tokens that are trained on: whole batches."""
        assert self.config.batch_size is not None
        return self.tokens // self.config.batch_size * self.config.batch_size

    def _d_in(self, job: Job) -> int:
        return sum(self.model.site(site).width for site in job.arch.inputs(job.site))

    def _columns(self, documents: Documents) -> TokenLabels | None:
        """The labels that the jobs ask for, of these documents."""
        names = dict.fromkeys(name for job in self.jobs.values() for name in job.arch.labels)
        if not names:
            return None
        if self.source.cache is not None and self.labels is None:
            raise InputError(
                f"{self.source.cache.path} has text and no labels: train a guided SAE from the labelled text itself, "
                "or give its labels as a function of a text."
            )
        return TokenLabels.of(documents, list(names), self.labels)

    def _metadata(self, job: Job, statistics: Mapping[str, Statistics]) -> dict[str, Any]:
        own = {site: statistics[site] for site in _sites(job)}
        first = next(iter(own.values()))
        of_sites = {
            "scales": {site: found.scale for site, found in own.items()},
            "sink_thresholds": {site: found.sink_threshold for site, found in own.items()},
        }
        return {
            "model": self.model.name,
            "revision": self.model.revision,
            "site": job.site,
            "data": self.source.name,
            "tokens": self._seen,
            "tokenization": asdict(self.source.tokenization),
            "scale": first.scale,
            "sink_threshold": first.sink_threshold,
            **(of_sites if len(own) > 1 else {}),
            "training": asdict(self._config(job)),
        }

    def _evaluate(
        self, saes: Mapping[str, SAE], statistics: Mapping[str, Statistics]
    ) -> dict[str, dict[str, Any]]:
        """The figures of each SAE on held-out text; those of a site share a pass."""
        found: dict[str, dict[str, Any]] = {}
        for site in dict.fromkeys(job.site for job in self.jobs.values()):
            here = {name: sae for name, sae in saes.items() if self.jobs[name].site == site}
            evaluations = evaluate_all(
                self.model,
                here,
                self.source.held_out,
                site,
                tokenization=self.source.tokenization,
                tokens=self.config.held_out_tokens,
                sink_threshold=statistics[site].sink_threshold if site in statistics else None,
            )
            found |= {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
        columns = self._columns(self.source.held_out)
        for name, sae in saes.items():
            if columns is not None and isinstance(sae, GuidedSAE):
                found[name]["labels"] = label_scores(
                    self.model,
                    sae,
                    self.source.held_out,
                    self.jobs[name].site,
                    columns,
                    tokenization=self.source.tokenization,
                    tokens=self.config.held_out_tokens,
                )
        return found

    def _summary(self, job: Job, found: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
        return {
            "arch": job.arch.name,
            "d_in": self._d_in(job),
            "d_sae": job.arch.d_sae,
            **found,
            "tokens": self._seen,
            "held_out_tokens": found["tokens"],
            "tokens_per_second": {key: self._seen / max(s, 1e-9) for key, s in seconds.items()},
            "peak_memory_mb": peak_memory_mb(),
            "seconds": seconds["total"],
        }


def _sites(job: Job) -> tuple[str, ...]:
    """The sites that a job reads."""
    return tuple(dict.fromkeys((*job.arch.inputs(job.site), *job.arch.outputs(job.site))))


def _bound(
    model: HookedModel | ModelPair, jobs: Mapping[str, Job]
) -> tuple[HookedModel | ModelPair, dict[str, Job]]:
    """The model or the pair of models that the jobs read, and the jobs with all that follows from its sites."""
    if isinstance(model, ModelPair):
        name = model.tuned.name
        jobs = {
            key: replace(job, arch=replace(job.arch, tuned=name)) if isinstance(job.arch, Crosscoder) else job
            for key, job in jobs.items()
        }
    tuned = {job.arch.tuned for job in jobs.values()}
    if len(tuned) > 1 or (tuned == {None} and isinstance(model, ModelPair)):
        raise InputError(
            "A pair of models is read by crosscoders alone, all of the same pair: train the others apart."
        )
    other = tuned.pop()
    if other is not None and not isinstance(model, ModelPair):
        model = ModelPair.of(model, other)
    bound = {
        key: replace(job, arch=job.arch.bound(job.site, lambda site: model.site(site).width))
        for key, job in jobs.items()
    }
    for job in bound.values():
        for site in _sites(job):
            model.site(site)
    return model, bound


@dataclass(frozen=True, eq=False)
class SAERun:
    """A finished training run."""

    path: Path
    sae: SAE
    """Acts on raw activations."""
    summary: dict[str, Any]
    """Figures on held-out text, speed and memory: summary.json."""
    config: dict[str, Any]
    """The settings: run.yaml."""
    model: HookedModel | ModelPair | None = field(default=None, repr=False)
    """The model that it was trained on, if it is at hand."""

    @classmethod
    def load(cls, path: str | Path, model: HookedModel | None = None) -> SAERun:
        """Read a run directory. Raises InputError when it is none or unfinished, CheckpointError when it is damaged."""
        run = Run.load(path)
        return cls(run.path, formats.load(run.path), run.summary, run.config, model)

    def held_out(self) -> Documents:
        """The text that was kept from training."""
        if is_cache(self.config["data"]):
            return ActivationCache.open(self.config["data"], verify=False).held_out
        return split_held_out(self.documents())[1]

    def documents(self) -> Documents:
        """The text of training; if it was not a cache, the held-out text too."""
        if is_cache(self.config["data"]):
            return ActivationCache.open(self.config["data"], verify=False).train
        return load_documents(self.config["data"], text_column=self.config["text_column"])

    def evaluate(self, documents: Any = None, *, tokens: int = 200_000) -> Evaluation:
        """Measure the SAE on held-out text: the run's own, or `documents`."""
        return evaluate(
            self.hooked(),
            self.sae,
            self.held_out() if documents is None else documents,
            self.config["site"],
            tokenization=Tokenization(**self.config["tokenization"]),
            tokens=tokens,
            sink_threshold=self.sae.metadata["sink_threshold"],
        )

    def dashboard(
        self,
        *,
        latents: str | Sequence[int] = "all",
        tokens: int = 200_000,
        concepts: Mapping[int, tuple[str, float]] | None = None,
        quiet: bool = False,
    ) -> Dashboard:
        """Look at the latents on `tokens` tokens of all the text; `.save(out)` writes the pages. See `sae.dashboard.build`.

        A few per cent of the text, held out, would be too little to see rare latents; the head has the held-out figures.
        """
        model, documents = self.hooked(), self.documents()
        stats = collect_latents(
            model,
            self.sae,
            documents,
            self.config["site"],
            tokenization=Tokenization(**self.config["tokenization"]),
            tokens=tokens,
            sink_threshold=self.sae.metadata["sink_threshold"],
            quiet=quiet,
        )
        origin = {"run": str(self.path), "seed": self.config["training"]["seed"], "data": self.config["data"]}
        return Dashboard(
            model,
            self.sae,
            documents,
            self.config["site"],
            stats,
            latents,
            summary=self.summary,
            concepts=concepts,
            provenance=origin,
        )

    def hooked(self) -> Any:
        """The HookedModel that the SAE was trained on, loaded if it is not at hand; of a crosscoder of two models the ModelPair."""
        if self.model is not None:
            return self.model
        model = HookedModel.from_pretrained(self.config["model"], dtype=self.config["dtype"])
        tuned = self.config["arch"].get("tuned")
        return model if tuned is None else ModelPair.of(model, tuned)

    def train_config(self) -> TrainConfig:
        """The settings of the training loop."""
        settings = self.config["training"]
        return TrainConfig(**{**settings, "betas": tuple(settings["betas"])})

    def __repr__(self) -> str:
        shown = {key: self.summary.get(key) for key in ("l0", "fvu", "delta_ce", "dead_fraction")}
        figures = ", ".join(f"{key} {value:.4g}" for key, value in shown.items() if value is not None)
        return f"SAERun({str(self.path)!r}, {self.sae!r}: {figures})"


@dataclass(frozen=True)
class _Source:
    """Where the activations of a run come from, and the text that is held out of it."""

    model: HookedModel | ModelPair
    name: str
    documents: Documents
    held_out: Documents
    tokenization: Tokenization
    cache: ActivationCache | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel | ModelPair,
        data: Any,
        tokenization: Tokenization | None,
        text_column: str | None,
    ) -> _Source:
        if is_cache(data):
            data = ActivationCache.open(data)
        if isinstance(data, ActivationCache):
            if data.made_with["model"] != model.name:
                raise InputError(
                    f"{data.path} holds activations of {data.made_with['model']}, not of {model.name}."
                )
            found = _tokenization_of(data, model)
            if tokenization not in (None, found):
                raise InputError(f"{data.path} has a tokenization of its own ({found}): give none.")
            return cls(model, str(data.path), data.train, data.held_out, found, data)
        documents = load_documents(data, text_column=text_column)
        name = str(data) if isinstance(data, (str, Path)) else documents.name
        train_documents, held_out = split_held_out(documents)
        return cls(model, name, train_documents, held_out, tokenization or Tokenization())

    def stream(self, sites: Sequence[str], config: TrainConfig, columns: TokenLabels | None = None) -> Stream:
        assert config.batch_size is not None
        if self.cache is not None:
            return self.cache.stream(
                sites, config.batch_size, config.seed, device=self.model.device, columns=columns, shared=True
            )
        return ActivationStream(
            self.model,
            self.documents,
            sites,
            tokenization=self.tokenization,
            batch_size=config.batch_size,
            block_tokens=config.block_tokens,
            seed=config.seed,
            columns=columns,
            shared=True,
        )


def _tokenization_of(cache: ActivationCache, model: HookedModel | ModelPair) -> Tokenization:
    """The tokenization that gives the layout that a cache was made with."""
    layout = cache.tokenization
    shared = {
        key: layout[key] for key in ("context", "packing", "chat_template", "drop_special", "drop_sinks")
    }
    for bos in ("auto", "never", "always"):
        try:
            tokenization = Tokenization(bos=bos, **shared)
            if tokenization.resolve(model).to_dict() == layout:
                return tokenization
        except InputError:
            continue
    raise InputError(f"{cache.path} was made with a tokenization that {model.name} does not have now.")


class Stream(Protocol):
    """Where batches come from: `steerkit.activations.ActivationStream`, a cache's stream, or any object like them."""

    seconds_model: float

    def __next__(self) -> Mapping[str, Tensor]: ...
    def statistics(self, site: str) -> Statistics: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Trainer:
    """One SAE in training, in normalised units. `step` takes raw activations; `result` gives the SAE that acts on them."""

    def __init__(
        self,
        arch: Config,
        site: str,
        statistics: Statistics | Side,
        tokens: int,
        config: TrainConfig,
        device: torch.device,
        target: Side | None = None,
    ) -> None:
        config = config.resolve(tokens)
        assert config.batch_size is not None
        assert config.lr is not None
        assert config.dead_after is not None
        self.arch, self.site, self.config, self.device = arch, site, config, device
        self.batch_size, self.lr, self.dead_after = config.batch_size, config.lr, config.dead_after
        self.scale = statistics.scale
        self.target_scale = self.scale if target is None else target.scale
        aim = statistics if target is None else target
        self.mean = (aim.mean * aim.scale).to(device, config.weight_dtype)
        self.n_steps = tokens // self.batch_size
        self.sae = arch.build(len(statistics.mean)).to(device, config.weight_dtype)
        share = distributed.share(self.batch_size)
        if config.micro_batch == "auto":
            size, dtype = share.stop - share.start, config.product_dtype
            self.config = replace(
                config, micro_batch=choose_micro_batch([(arch, self.sae.d_in)], size, dtype, device)
            )
        elif config.micro_batch is not None and self.sae.needs_whole_batch:
            raise InputError(
                f"{arch.name} chooses its latents over the whole batch, which cannot be cut into micro-batches: "
                "leave out micro_batch, or take a smaller batch_size."
            )
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=self.lr, betas=config.betas, fused=True)
        self.silent = torch.zeros(arch.d_sae, dtype=torch.int64, device=device)
        self.controller: TargetL0 | None = None
        if isinstance(arch, Sparsity) and arch.steers and arch.target_l0 is not None:
            self.controller = TargetL0(
                arch.target_l0, self.n_steps, log_coefficient=math.log(arch.first_coefficient(self.sae.d_in))
            )
        self.steps = 0
        self.gradient_norm = 0.0
        self.l0 = float(arch.d_sae)
        """Running mean of the number of active latents a token."""
        self.sums: dict[str, float] = {}

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.steps * self.batch_size

    @property
    def coefficient(self) -> float:
        """The sparsity penalty's weight at the next step."""
        if self.controller is not None:
            return self.controller.coefficient
        fixed = self.arch.fixed_coefficient if isinstance(self.arch, Sparsity) else 0.0
        return fixed * min(1.0, (self.steps + 1) / max(1.0, self.config.warmup * self.n_steps))

    def step(
        self,
        batch: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"] | None = None,
        labels: Float[Tensor, "n n_labels"] | None = None,
    ) -> None:
        """Learn from one batch: in a distributed run, from all processes' shares of it, alike on every one.

        Raises NumericsError, before anything has changed, if it makes loss or gradient NaN or infinite.
        """
        x = batch.to(self.device, self.config.weight_dtype) * self.scale
        if target is not None:
            target = target.to(x) * self.target_scale
        if self.steps == 0:
            generator = torch.Generator().manual_seed(self.config.seed)
            self.sae.initialise(distributed.gather(x), self.mean, generator)
            distributed.same_as_first(self.sae.state_dict().values())
        elif self.sae.uses_penalty:
            self._revive(x)
        coefficient = self.coefficient
        terms = Terms(
            coefficient=coefficient,
            dead=self.silent > self.dead_after,
            progress=self.steps / self.n_steps,
            dtype=self.config.product_dtype,
            sparse=self.l0 < SPARSE_DENSITY * self.arch.d_sae
            and is_fast(self.device, self.config.product_dtype),
            target=target,
            labels=None if labels is None else labels.to(x),
        )
        with _tensor_cores(self.config.dtype == "tf32"):
            outcome = self._gradients(x, terms)
        aim = x if target is None else target
        variance = distributed.mean((aim - self.mean).square().sum() / len(x))
        self.sae.remove_parallel_gradient()
        loss, norm = float(outcome.loss), self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"NaN or inf in batch {self.steps} at {self.site} ({'loss' if not math.isfinite(loss) else 'gradient'}). "
                "The last checkpoint is intact; check the activations, or lower lr."
            )
        factor = learning_rate_factor(self.steps, self.n_steps, self.config.warmup, self.config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * factor
        self.optimiser.step()
        self.sae.constrain()
        self.silent.add_(self.batch_size).masked_fill_(outcome.counts > 0, 0)
        l0 = float(outcome.l0)
        self.l0 = 0.8 * self.l0 + 0.2 * l0 if self.steps else l0
        if self.controller is not None:
            self.controller.update(l0)
        self.steps += 1
        self._add(
            loss=loss,
            mse=float(outcome.mse),
            variance=float(variance),
            l0=l0,
            batches=1,
        )
        self._add_last(coefficient=coefficient, lr=self.lr * factor)

    def _gradients(self, x: Float[Tensor, "n d_in"], terms: Terms) -> Step:
        """The whole batch's gradients, from micro-batches and all processes, and what the batch gave."""
        assert self.config.micro_batch != "auto"
        size = self.config.micro_batch or len(x)
        parts = [slice(start, start + size) for start in range(0, len(x), size)]
        if len(parts) == 1:
            step = self.sae.gradients(x, terms)
        else:
            step = Step.zero(self.sae)
            sums = {parameter: torch.zeros_like(parameter) for parameter in self.sae.parameters()}
            for part in parts:
                own = self.sae.gradients(x[part], terms.rows(part))
                share = len(x[part]) / len(x)
                for parameter, total in sums.items():
                    if parameter.grad is not None:
                        total.add_(parameter.grad, alpha=share)
                step.counts += own.counts
                for total, value in ((step.loss, own.loss), (step.mse, own.mse), (step.l0, own.l0)):
                    total += share * value
            for parameter, total in sums.items():
                parameter.grad = total
        distributed.average(*(p.grad for p in self.sae.parameters() if p.grad is not None))
        distributed.average(step.loss, step.mse, step.l0)
        distributed.add_up(step.counts)
        return step

    def _revive(self, x: Float[Tensor, "n d_in"]) -> None:
        """Give the latents that have been silent for long a new start, now and then in the first part of the run."""
        every = max(1, self.dead_after // self.batch_size)
        if self.steps % every or self.steps > REVIVAL_SHARE * self.n_steps:
            return
        dead = (self.silent > self.dead_after).nonzero().flatten()
        if not len(dead):
            return
        self.sae.revive(
            distributed.gather(x), dead, torch.Generator().manual_seed(self.config.seed + self.steps)
        )
        distributed.same_as_first(self.sae.state_dict().values())
        self.silent[dead] = 0
        for parameter in self.sae.parameters():
            if parameter is not self.sae.b_dec:
                for moment in ("exp_avg", "exp_avg_sq"):
                    latents = 1 if parameter is self.sae.W_enc else 0
                    self.optimiser.state[parameter][moment].index_fill_(latents, dead, 0.0)

    def _clip(self) -> float:
        """Bound the gradient by a multiple of its running norm; returns the norm that it had."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            return norm
        limit = self.config.clip * self.gradient_norm
        if self.steps and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        share = max(0.01, 1 / (self.steps + 1))
        self.gradient_norm += share * (min(norm, limit) if self.steps else norm) - share * self.gradient_norm
        return norm

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _add_last(self, **values: float) -> None:
        self.sums.update(values)

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, and the present state."""
        sums, self.sums = self.sums, {}
        n = sums["batches"]
        return {
            "step": self.steps,
            "tokens": self.tokens,
            "loss": sums["loss"] / n,
            "fvu": sums["mse"] / sums["variance"],
            "l0": sums["l0"] / n,
            "coefficient": sums["coefficient"],
            "lr": sums["lr"],
            "dead_fraction": float((self.silent > self.dead_after).float().mean()),
        }

    def result(self) -> SAE:
        """The SAE for raw activations, a copy."""
        sae = self.arch.build(self.sae.d_in).to(self.device, self.config.weight_dtype)
        sae.load_state_dict(self.sae.state_dict())
        sae.finish()
        sae.fold_scale(self.scale, self.target_scale)
        return sae.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        found = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            found |= {f"adam.{name}.{key}": value for key, value in self.optimiser.state[parameter].items()}
        return {**found, "silent": self.silent, "mean": self.mean}

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint, plain data."""
        return {
            "arch": {"name": self.arch.name, "d_in": self.sae.d_in, "d_sae": self.sae.d_sae},
            "steps": self.steps,
            "scale": self.scale if isinstance(self.scale, float) else self.scale.tolist(),
            "gradient_norm": self.gradient_norm,
            "l0": self.l0,
            "sums": self.sums,
            "controller": self.controller.state_dict() if self.controller is not None else None,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises CheckpointError when it is of another architecture or width."""
        here, there = self.state()["arch"], state["arch"]
        if here != there:
            raise CheckpointError(
                f"The checkpoint is of {there['name']} with {there['d_sae']} latents of width {there['d_in']}, not of "
                f"{here['name']} with {here['d_sae']} of width {here['d_in']}: resume with the former, or choose another --out."
            )
        self.sae.load_state_dict(
            {k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")}
        )
        for name, parameter in self.sae.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimiser.state[parameter] = {
                key: tensors[f"adam.{name}.{key}"].to(self.device) for key in keys
            }
        self.silent.copy_(tensors["silent"])
        self.mean = tensors["mean"].to(self.device)
        self.steps, scale = state["steps"], state["scale"]
        self.scale = scale if isinstance(scale, float) else torch.tensor(scale).to(self.mean)
        self.gradient_norm, self.l0, self.sums = state["gradient_norm"], state["l0"], dict(state["sums"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def fit(
    stream: Stream,
    site: str,
    arch: Config,
    tokens: int,
    *,
    config: TrainConfig | None = None,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    checkpoint_seconds: float = 60.0,
    quiet: bool = True,
) -> tuple[SAE, dict[str, float]]:
    """Train on a stream's batches; gives the SAE (for raw activations) and the seconds that went into model, buffer and SAE.

    With a `run`, metrics and checkpoints go to its directory, and a checkpoint that is there is continued. After Ctrl-C or SIGTERM
    a checkpoint is written and KeyboardInterrupt raised.
    """
    made = fit_all(
        stream,
        {".": Job(site, arch)},
        tokens,
        config=config,
        device=device,
        runs={} if run is None else {".": run},
        checkpoints=None if run is None else Checkpoints(run.path / "checkpoint"),
        checkpoint_seconds=checkpoint_seconds,
        quiet=quiet,
    )
    return made["."]


def fit_all(
    stream: Stream,
    jobs: Mapping[str, Job],
    tokens: int,
    *,
    config: TrainConfig | None = None,
    device: str | torch.device = "cpu",
    runs: Mapping[str, Run] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    quiet: bool = True,
) -> dict[str, tuple[SAE, dict[str, float]]]:
    """`fit` for several jobs, by their names, on the same batches; metrics go to those `runs` that are given."""
    config = (config or TrainConfig()).resolve(tokens)
    runs = runs or {}
    found = checkpoints.load() if checkpoints is not None else None
    if found is not None:
        stream.load_state_dict(found[1]["stream"])
    clock = _Clock(stream, list(jobs), found[1]["seconds"] if found is not None else None)
    with clock.waiting():
        readings = {name: Reading(job.arch, job.site, stream.statistics) for name, job in jobs.items()}
    trainers = {
        name: Trainer(
            job.arch.bound(job.site, lambda site: len(stream.statistics(site).mean)),
            job.site,
            readings[name].input,
            tokens,
            config if job.seed is None else replace(config, seed=job.seed),
            torch.device(device),
            readings[name].target,
        )
        for name, job in jobs.items()
    }
    if found is not None:
        _load(trainers, *found)
    first = next(iter(trainers.values()))
    _require_same_place(first)
    writes = distributed.is_first()
    for name, run in runs.items():
        if writes:
            run.rewind("step", trainers[name].steps)

    def save() -> None:
        if checkpoints is not None and writes:
            place = {"steps": first.steps, "stream": stream.state_dict(), "seconds": clock.state()}
            checkpoints.save(first.steps, *_checkpoint(trainers, place))

    saved = time.monotonic()
    total = first.n_steps * first.batch_size
    title = f"{first.arch.name} SAE" if len(trainers) == 1 else f"{len(trainers)} SAEs"
    with (
        _deferred_interrupts() as interrupted,
        progress(total, title, quiet=quiet or not writes, done=first.tokens) as bar,
    ):
        while first.steps < first.n_steps:
            with clock.waiting():
                batch = next(stream)
            for name, trainer in trainers.items():
                with clock.training(name):
                    trainer.step(*readings[name](batch))
            last = first.steps == first.n_steps
            if runs and (last or first.steps % config.log_every == 0):
                lines = {name: trainers[name].metrics() for name in runs}
                for name, line in lines.items():
                    if writes:
                        runs[name].log({**line, "tokens_per_second": clock.rates(first.tokens, name)})
                shown = {key: sum(line[key] for line in lines.values()) / len(lines) for key in _SHOWN}
                bar.advance(first.tokens - bar.done, **shown)
            if distributed.any_of(interrupted.is_set(), first.device):
                save()
                raise KeyboardInterrupt
            if last or time.monotonic() - saved >= checkpoint_seconds:
                save()
                saved = time.monotonic()
    return {name: (trainer.result(), clock.seconds(name)) for name, trainer in trainers.items()}


_SHOWN = ("fvu", "l0", "dead_fraction")
"""Figures beside the progress bar: means over the jobs."""


def _require_same_place(trainer: Trainer) -> None:
    """Raise CheckpointError when the processes do not begin at the same step."""
    steps = torch.tensor([trainer.steps], device=trainer.device)
    if len(distributed.gather(steps).unique()) > 1:
        raise CheckpointError(
            "The processes have found different checkpoints: --out must be a directory that all of them see."
        )


def _checkpoint(
    trainers: Mapping[str, Trainer], place: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain data of a checkpoint: `place` is common to all trainers."""
    tensors = {
        f"{name}/{key}": value
        for name, trainer in trainers.items()
        for key, value in trainer.tensors().items()
    }
    return tensors, {**place, "jobs": {name: trainer.state() for name, trainer in trainers.items()}}


def _load(trainers: Mapping[str, Trainer], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Go on from a checkpoint. Raises CheckpointError when it is of other jobs."""
    if trainers.keys() != state["jobs"].keys():
        raise CheckpointError(
            f"The checkpoint is of the SAEs {', '.join(state['jobs'])}, here they are {', '.join(trainers)}: "
            "resume with the same ones."
        )
    for name, trainer in trainers.items():
        own = {
            key.removeprefix(f"{name}/"): value
            for key, value in tensors.items()
            if key.startswith(f"{name}/")
        }
        trainer.load(own, state["jobs"][name])


@contextlib.contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    """Products in TF32 on CUDA, if they are wanted so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Clock:
    """Seconds that go into the model, the buffer and each SAE, across restarts. `total` is the wall's."""

    def __init__(self, stream: Stream, names: Sequence[str], before: Mapping[str, Any] | None) -> None:
        self.stream = stream
        self.before = before or {"model": 0.0, "buffer": 0.0, "sae": dict.fromkeys(names, 0.0), "total": 0.0}
        self.started = time.perf_counter()
        self.model_before = stream.seconds_model
        self.waited = 0.0
        self.trained = dict.fromkeys(names, 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.trained[name] += time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        model = self.stream.seconds_model - self.model_before
        return {
            "model": self.before["model"] + model,
            "buffer": self.before["buffer"] + max(0.0, self.waited - model),
            "sae": {name: self.before["sae"][name] + value for name, value in self.trained.items()},
            "total": self.before["total"] + time.perf_counter() - self.started,
        }

    def seconds(self, name: str) -> dict[str, float]:
        """Those that concern one SAE: what all share, and its own."""
        now = self.state()
        return {**now, "sae": now["sae"][name]}

    def rates(self, tokens: int, name: str) -> dict[str, float]:
        """Tokens a second of each part, as if it were alone."""
        return {key: tokens / max(value, 1e-9) for key, value in self.seconds(name).items()}


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never cut in two; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    when = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        nonlocal when
        if asked.is_set():
            if time.monotonic() - when < _SAME_PRESS:
                return
            raise KeyboardInterrupt
        asked.set()
        when = time.monotonic()
        if distributed.is_first():
            print(
                "Stopping after this step and saving a checkpoint (Ctrl-C again: at once).",
                file=sys.stderr,
                flush=True,
            )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
