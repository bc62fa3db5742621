"""Training sparse autoencoders on a model's activations.

    run = sae.train(model, data, site="blocks.2.hook_resid_post", arch=sae.Gated(d_sae=1024), tokens=2_000_000, out="runs/g")
    run.sae.encode(acts);  run.summary["fvu"]

`train` makes a run directory: text and model or a cache in, trained weights, figures on held-out text and metrics out; `train_many`
makes several in one pass. The loop is in `sae.trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sae import formats
from sae.architectures import SAE, Config
from sae.architectures.crosscoder import Crosscoder
from sae.architectures.guided import GuidedSAE
from sae.dashboard.value import Dashboard
from sae.evaluation import Evaluation, evaluate, evaluate_all
from sae.label_scores import label_scores
from sae.latents import collect_latents
from sae.memory import choose_micro_batch
from sae.sweep import Job, job_names, summarise, sweep_page
from sae.trainer import Stream, TrainConfig, fit_all
from steerkit import distributed
from steerkit.activation_cache import ActivationCache, is_cache
from steerkit.activations import ActivationStream, Statistics, Tokenization
from steerkit.checkpoints import Checkpoints
from steerkit.data import Documents, load_documents, split_held_out
from steerkit.errors import InputError
from steerkit.labels import LabelFunction, TokenLabels
from steerkit.models import HookedModel
from steerkit.pair import ModelPair
from steerkit.runs import Run, make_provenance, peak_memory_mb


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
            chosen = Run.load(self.out).config.get("training", {}).get("micro_batch")
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
        runs = {name: Run.load(self.out / name) for name in self.jobs}
        checkpoints = Checkpoints(self.out / "checkpoint")
        if all(run.finished for run in runs.values()):
            distributed.first(checkpoints.remove)
            return [SAERun.load(run.path) for run in runs.values()]
        sites = self._all_sites()
        stream = self.source.stream(sites, self.config, self._columns(self.source.documents))
        before = time.perf_counter() - started
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
