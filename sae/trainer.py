"""The training loop: SAEs that learn side by side from batches of activations, wherever those come from.

    sae, seconds = fit(stream, site, Gated(1024), 2_000_000, run=run)

`Trainer` is the loop's content – one SAE, its optimiser, schedules and counts. Training happens in normalised units:
activations times `scale`, so that their mean squared norm is d_in; the scale is folded into the weights that are given out, which
act on raw activations.

A run that is killed and resumed ends with the very same weights, bit by bit (on a CPU, with the same number of threads): a
checkpoint holds parameters, moments, controller, counts and the stream's place.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import SAE, Config, Sparsity, Step, Terms
from sae.architectures.base import squared
from sae.kernels import is_fast
from sae.memory import choose_micro_batch
from sae.reading import Reading, Side
from sae.schedule import learning_rate_factor
from sae.sweep import Job
from steerkit import distributed
from steerkit.activations import Statistics
from steerkit.checkpoints import Checkpoints, deferred_interrupts
from steerkit.errors import CheckpointError, InputError, NumericsError, did_you_mean
from steerkit.runs import Run, progress

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
    """Peak learning rate of Adam; by default 5 / √(d_in · d_sae), at most 0.02, times √(1000 / steps) for longer runs than 1,000
    steps: the wider the SAE and the longer the run, the smaller the steps (docs/saes.md)."""
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
        """The config of a run of so many tokens, with the defaults that depend on its length; `lr` depends on the SAE, too.
        InputError for less than a batch."""
        batch_size = self.batch_size or max(512, min(4096, 2 ** round(math.log2(max(tokens, 1) / 1000))))
        if tokens < batch_size:
            raise InputError(
                f"{tokens} tokens are less than one batch of {batch_size}: give more, or a smaller batch_size."
            )
        dead_after = self.dead_after or min(10_000_000, tokens // 20)
        return replace(self, batch_size=batch_size, dead_after=dead_after)

    def peak_lr(self, d_in: int, d_sae: int, n_steps: int) -> float:
        """`lr`, or its default."""
        return self.lr or min(0.02, 5 / math.sqrt(d_in * d_sae)) * min(1.0, math.sqrt(1000 / n_steps))

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
        assert config.dead_after is not None
        self.arch, self.site, self.config, self.device = arch, site, config, device
        self.batch_size, self.dead_after = config.batch_size, config.dead_after
        self.scale = statistics.scale
        self.target_scale = self.scale if target is None else target.scale
        aim = statistics if target is None else target
        self.mean = (aim.mean * aim.scale).to(device, config.weight_dtype)
        self.n_steps = tokens // self.batch_size
        self.sae = arch.build(len(statistics.mean)).to(device, config.weight_dtype)
        self.lr = config.peak_lr(self.sae.d_in, arch.d_sae, self.n_steps)
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
        self.controller = arch.controller(self.sae.d_in, self.n_steps) if isinstance(arch, Sparsity) else None
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
        fixed = self.arch.fixed_coefficient(self.sae.d_in) if isinstance(self.arch, Sparsity) else 0.0
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
        variance = distributed.mean(squared(aim.sub_(self.mean)) / len(x))
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
            self.controller.update(l0, float(outcome.mse))
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
        deferred_interrupts() as interrupted,
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
