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
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae import formats
from sae.architectures import SAE, Config, Sparsity, Terms
from sae.checkpoint import Checkpoints
from sae.dashboard.value import Dashboard
from sae.evaluation import Evaluation, evaluate
from sae.kernels import is_fast
from sae.latents import collect_latents
from sae.schedule import TargetL0, learning_rate_factor
from steerkit.activation_cache import ActivationCache, is_cache
from steerkit.activations import ActivationStream, Statistics, Tokenization
from steerkit.data import Documents, load_documents, split_held_out
from steerkit.errors import InputError, NumericsError, did_you_mean
from steerkit.models import HookedModel
from steerkit.runs import Run, make_provenance, peak_memory_mb, progress

SPARSE_DENSITY = 1 / 32
"""Share of the latents that may be active for products to go over them one by one (measured: `scripts/bench_sae.py`)."""
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
    """What the products are computed in: float32, or bfloat16 with float32 weights and sums."""
    block_tokens: int = 65_536
    """Tokens that are shuffled together."""
    held_out_tokens: int = 200_000
    """Held-out tokens that the final figures are measured on."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_tokens", "held_out_tokens", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {self.dtype!r}; training is done in float32 or bfloat16.")
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
    model: HookedModel,
    data: Any,
    site: str,
    arch: Config,
    tokens: int,
    out: str | Path,
    *,
    config: TrainConfig | None = None,
    tokenization: Tokenization | None = None,
    text_column: str | None = None,
    device: str | torch.device | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> SAERun:
    """Train an SAE on a model's activations at `site`, evaluate it on held-out text, and write all of it to the directory `out`.

    `data` is whatever `load_documents` takes (its last 5 % of documents are held out), or an `ActivationCache` or its directory.
    `settings` are fields of `TrainConfig`, such as `seed=1` or `lr=1e-3`. With `resume` an unfinished run is continued from its
    last checkpoint, and a finished one returned as it is. Raises InputError for bad settings or a directory that holds another run,
    NumericsError on NaN or inf (the last checkpoint is kept), CheckpointError when every checkpoint is damaged. On Ctrl-C a
    checkpoint is saved first.
    """
    started = time.perf_counter()
    config = (config or TrainConfig()).with_(settings).resolve(tokens)
    assert config.batch_size is not None
    width = model.site(site).width
    source = _Source.of(model, data, site, tokenization, text_column)
    made_with = {
        "model": model.name,
        "data": source.name,
        "text_column": text_column,
        "site": site,
        "arch": arch.to_dict(),
        "tokens": tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenization": asdict(source.tokenization),
        "training": asdict(config),
    }
    origin = {
        "seed": config.seed,
        "revision": model.revision,
        "data_sha256": source.documents.fingerprint(),
        "d_in": width,
    }
    run = Run.open(out, "train sae", made_with, resume=resume, provenance=make_provenance(**origin))
    if run.finished:
        return SAERun.load(run.path)
    stream = source.stream(config)
    before_fit = time.perf_counter()
    try:
        sae, seconds = fit(
            stream,
            site,
            arch,
            tokens,
            config=config,
            device=device or model.device,
            run=run,
            checkpoint_seconds=checkpoint_seconds,
            quiet=quiet,
        )
        statistics = stream.statistics(site)
    finally:
        stream.close()
    after_fit = time.perf_counter()
    seen = tokens // config.batch_size * config.batch_size
    sae.metadata = {
        "model": model.name,
        "revision": model.revision,
        "site": site,
        "data": source.name,
        "tokens": seen,
        "tokenization": asdict(source.tokenization),
        "scale": statistics.scale,
        "sink_threshold": statistics.sink_threshold,
        "training": asdict(config),
    }
    sae.save(run.path)
    found = evaluate(
        model,
        sae,
        source.held_out,
        site,
        tokenization=source.tokenization,
        tokens=config.held_out_tokens,
        sink_threshold=statistics.sink_threshold,
    ).to_dict()
    total = seconds["total"] + (time.perf_counter() - started) - (after_fit - before_fit)
    summary = {
        "arch": arch.name,
        "d_in": width,
        "d_sae": arch.d_sae,
        **found,
        "tokens": seen,
        "held_out_tokens": found["tokens"],
        "tokens_per_second": {key: seen / max(s, 1e-9) for key, s in {**seconds, "total": total}.items()},
        "peak_memory_mb": peak_memory_mb(),
        "seconds": total,
    }
    run.finish(summary)
    Checkpoints(run.path / "checkpoint").remove()
    return SAERun(run.path, sae, run.summary, run.config, model)


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
    model: HookedModel | None = field(default=None, repr=False)
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

    def hooked(self) -> HookedModel:
        """The model that the SAE was trained on, loaded if it is not at hand."""
        return self.model or HookedModel.from_pretrained(self.config["model"], dtype=self.config["dtype"])

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

    model: HookedModel
    site: str
    name: str
    documents: Documents
    held_out: Documents
    tokenization: Tokenization
    cache: ActivationCache | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        data: Any,
        site: str,
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
            return cls(model, site, str(data.path), data.train, data.held_out, found, data)
        documents = load_documents(data, text_column=text_column)
        name = str(data) if isinstance(data, (str, Path)) else documents.name
        train_documents, held_out = split_held_out(documents)
        return cls(model, site, name, train_documents, held_out, tokenization or Tokenization())

    def stream(self, config: TrainConfig) -> Stream:
        assert config.batch_size is not None
        if self.cache is not None:
            return self.cache.stream(self.site, config.batch_size, config.seed, device=self.model.device)
        return ActivationStream(
            self.model,
            self.documents,
            self.site,
            tokenization=self.tokenization,
            batch_size=config.batch_size,
            block_tokens=config.block_tokens,
            seed=config.seed,
        )


def _tokenization_of(cache: ActivationCache, model: HookedModel) -> Tokenization:
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
        statistics: Statistics,
        tokens: int,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        config = config.resolve(tokens)
        assert config.batch_size is not None
        assert config.lr is not None
        assert config.dead_after is not None
        self.arch, self.site, self.config, self.device = arch, site, config, device
        self.batch_size, self.lr, self.dead_after = config.batch_size, config.lr, config.dead_after
        self.scale = statistics.scale
        self.mean = statistics.mean.to(device) * self.scale
        self.n_steps = tokens // self.batch_size
        self.sae = arch.build(len(self.mean)).to(device)
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

    def step(self, batch: Float[Tensor, "n d_in"]) -> None:
        """Learn from one batch. Raises NumericsError, before anything has changed, if it makes loss or gradient NaN or infinite."""
        x = batch.to(self.device, torch.float32) * self.scale
        if self.steps == 0:
            generator = torch.Generator().manual_seed(self.config.seed)
            self.sae.initialise(x, self.mean, generator)
        elif self.sae.uses_penalty:
            self._revive(x)
        coefficient = self.coefficient
        terms = Terms(
            coefficient=coefficient,
            dead=self.silent > self.dead_after,
            progress=self.steps / self.n_steps,
            dtype=getattr(torch, self.config.dtype),
            sparse=self.l0 < SPARSE_DENSITY * self.arch.d_sae
            and is_fast(self.device, getattr(torch, self.config.dtype)),
        )
        outcome = self.sae.gradients(x, terms)
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
        self.silent.add_(len(x)).masked_fill_(outcome.counts > 0, 0)
        l0 = float(outcome.l0)
        self.l0 = 0.8 * self.l0 + 0.2 * l0 if self.steps else l0
        if self.controller is not None:
            self.controller.update(l0)
        self.steps += 1
        self._add(
            loss=loss,
            mse=float(outcome.mse),
            variance=float((x - self.mean).square().sum()) / len(x),
            l0=l0,
            batches=1,
        )
        self._add_last(coefficient=coefficient, lr=self.lr * factor)

    def _revive(self, x: Float[Tensor, "n d_in"]) -> None:
        """Give the latents that have been silent for long a new start, now and then in the first part of the run."""
        every = max(1, self.dead_after // self.batch_size)
        if self.steps % every or self.steps > REVIVAL_SHARE * self.n_steps:
            return
        dead = (self.silent > self.dead_after).nonzero().flatten()
        if not len(dead):
            return
        self.sae.revive(x, dead, torch.Generator().manual_seed(self.config.seed + self.steps))
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
        sae = self.arch.build(self.sae.d_in).to(self.device)
        sae.load_state_dict(self.sae.state_dict())
        sae.finish()
        sae.fold_scale(self.scale)
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
            "steps": self.steps,
            "scale": self.scale,
            "gradient_norm": self.gradient_norm,
            "l0": self.l0,
            "sums": self.sums,
            "controller": self.controller.state_dict() if self.controller is not None else None,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
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
        self.steps, self.scale = state["steps"], state["scale"]
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
    config = (config or TrainConfig()).resolve(tokens)
    checkpoints = Checkpoints(run.path / "checkpoint") if run is not None else None
    found = checkpoints.load() if checkpoints is not None else None
    if found is not None:
        stream.load_state_dict(found[1]["stream"])
    trainer = Trainer(arch, site, stream.statistics(site), tokens, config, torch.device(device))
    seconds = {"model": 0.0, "buffer": 0.0, "sae": 0.0, "total": 0.0}
    if found is not None:
        trainer.load(*found)
        seconds = found[1]["seconds"]
    if run is not None:
        run.rewind("step", trainer.steps)
    clock = _Clock(stream, seconds)

    def save() -> None:
        if checkpoints is not None:
            state = {**trainer.state(), "stream": stream.state_dict(), "seconds": clock.seconds()}
            checkpoints.save(trainer.steps, trainer.tensors(), state)

    saved = time.monotonic()
    total = trainer.n_steps * trainer.batch_size
    with (
        _deferred_interrupts() as interrupted,
        progress(total, f"{arch.name} SAE", quiet=quiet, done=trainer.tokens) as bar,
    ):
        while trainer.steps < trainer.n_steps:
            with clock.waiting():
                batch = next(stream)[site]
            with clock.training():
                trainer.step(batch)
            last = trainer.steps == trainer.n_steps
            if run is not None and (last or trainer.steps % config.log_every == 0):
                line = trainer.metrics()
                run.log({**line, "tokens_per_second": clock.rates(trainer.tokens)})
                bar.advance(
                    trainer.tokens - bar.done, **{key: line[key] for key in ("fvu", "l0", "dead_fraction")}
                )
            if interrupted.is_set():
                save()
                raise KeyboardInterrupt
            if last or time.monotonic() - saved >= checkpoint_seconds:
                save()
                saved = time.monotonic()
    return trainer.result(), clock.seconds()


class _Clock:
    """Seconds that go into the model, the buffer and the SAE, across restarts. `total` is the wall's."""

    def __init__(self, stream: Stream, before: Mapping[str, float]) -> None:
        self.stream, self.before = stream, before
        self.started = time.perf_counter()
        self.model_before = stream.seconds_model
        self.waited = self.trained = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.trained += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        model = self.stream.seconds_model - self.model_before
        now = {
            "model": model,
            "buffer": max(0.0, self.waited - model),
            "sae": self.trained,
            "total": time.perf_counter() - self.started,
        }
        return {key: self.before[key] + value for key, value in now.items()}

    def rates(self, tokens: int) -> dict[str, float]:
        """Tokens a second of each part, as if it were alone."""
        return {key: tokens / max(value, 1e-9) for key, value in self.seconds().items()}


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never cut in two; a second Ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
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
