"""Fine-tuning: the one loop that trains a model's own parameters, whichever of them take gradients.

    objective = LanguageModelling(model, train, validation, test)              # steerkit.objectives; shared by all seeds
    with trainable(model, layers(2, 3)):                                       # or an adapter, which sets the flags itself
        outcome = finetune(model, objective, FinetuneConfig(lr=1e-4, epochs=2, seed=0), out="runs/top")
    objective.evaluate(model, "test").interval()

Trained are the parameters of `model.model` that require gradients, and the objective's head. Afterwards the model has the weights
that were best on validation, if there is any; flags, training mode and gradient checkpointing are as they were. With `out`, a run
that was killed and is resumed ends with the same weights, bit by bit (on a CPU, with the same number of threads): the order of the
examples comes from the seed, the random numbers of a step (dropout) from seed, step and process, and the rest is in a checkpoint.
Under `torchrun` or `accelerate launch` each process has its share of every batch, and rank 0 writes.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit import distributed
from steerkit.checkpoints import Checkpoints, deferred_interrupts, read_tensors, write_tensors
from steerkit.errors import CheckpointError, InputError, NumericsError, did_you_mean
from steerkit.finetune import DRRho, OptimiseConfig, batch_order
from steerkit.loading import parse_dtype
from steerkit.models import HookedModel
from steerkit.objectives import Objective, autocast
from steerkit.optimisers import optimiser_class
from steerkit.runs import Run, make_provenance, peak_memory_mb, progress, reset_peak_memory

WEIGHTS = "weights.safetensors"
"""File of a finished run: what was trained, and the curve of losses."""

Groups = Callable[[HookedModel], list[dict[str, Any]]]
"""Parameter groups for torch's optimisers: `params`, with `lr` (its peak) and other settings where they differ."""
AfterBackward = Callable[[HookedModel, int], Any]
AfterStep = Callable[[HookedModel, int, int], Any]


@dataclass(frozen=True)
class FinetuneConfig(OptimiseConfig):
    """Settings of a run. `batch_size` is that of all processes together."""

    head_lr: float | None = None
    """Peak learning rate of the objective's head; `lr` if None."""
    optimiser: str = "AdamW"
    """A class of `torch.optim` (fused, if it can be) or `steerkit.optimisers`."""
    accumulation: int = 1
    """Parts that gradients of each process's share of a batch are computed in, one after another, and added up."""
    gradient_checkpointing: bool = False
    """Activations inside the blocks are computed again rather than kept: less memory, more time."""
    dtype: str | None = None
    """bf16: products are computed in it (autocast), the weights staying as they are. None: as the weights are."""
    eval_every: int | None = None
    """Steps between evaluations on the validation split; once an epoch, if None. After the last step there is always one."""
    patience: int | None = None
    """Stop after so many evaluations in a row that were not the best. None: never."""
    tau: float | None = None
    """Weigh examples by their excess loss over a `reference` with this temperature (`steerkit.finetune.DRRho`). None: all alike."""
    gamma: float = 0.9
    """γ of `DRRho`."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_lr", "accumulation", "eval_every", "patience", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be positive.")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be at least 0.")
        if parse_dtype(self.dtype) not in (None, torch.bfloat16):
            raise InputError(f"dtype is {self.dtype!r}; it is bf16, or None for that of the weights.")
        if self.tau is not None:
            DRRho(self.tau, self.gamma)
        optimiser_class(self.optimiser)


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    losses: list[float]
    """Mean loss of each step's batch, as it was trained on, without the regulariser."""
    validation: list[tuple[int, dict[str, float]]]
    """(steps done, figures on the validation split)."""
    best: tuple[int, dict[str, float]] | None
    """The entry of `validation` whose weights the model has; None without a validation split: it has the last ones."""
    steps: int
    """Steps done; less than planned if it was stopped early."""
    n_trained: int
    """Trained parameters, the head's among them."""
    seconds: float
    """Wall time, evaluations included, over all parts of a run that was resumed."""
    step_seconds: float
    """Median time of a step."""
    peak_memory_mb: float
    """Peak memory since the run began (or was last resumed): of the GPU's allocator, else of the whole process."""

    def __repr__(self) -> str:
        figures = {"loss": self.losses[-1]} if self.best is None else self.best[1]
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        at = "" if self.best is None else f" on validation at step {self.best[0]}"
        return f"Outcome({self.steps} steps, {self.seconds:.1f} s; {shown}{at})"

    def summary(self) -> dict[str, Any]:
        """All but the curve of losses."""
        return {name: value for name, value in asdict(self).items() if name != "losses"}


def finetune(
    model: HookedModel,
    objective: Objective[Any],
    config: FinetuneConfig = FinetuneConfig(),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    settings: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    reference: Float[np.ndarray, " n_train"] | None = None,
    regulariser: Callable[[HookedModel], Tensor] | None = None,
    after_backward: AfterBackward | None = None,
    after_step: AfterStep | None = None,
    checkpoint_seconds: float = 60.0,
) -> Outcome:
    """Train what takes gradients in `model.model`, and the objective's head (made anew from the seed), in place.

    `groups` gives the model's parameters in groups of their own, each trained one in one of them; by default all have `lr`, and
    `weight_decay` where they have two dimensions or more (biases and norms have one). `reference` is the losses of the training
    examples under a reference model, `objective.evaluate(other, "train")["loss"]`, which `tau` asks for. `regulariser(model)` is
    added to the loss, once a step. `after_backward(model, step)` comes when a step's gradients, of all processes, are there and
    not yet clipped, `after_step(model, step, n_steps)` when the weights have moved and gradients are still there; steps count
    from 0.

    With `out`, settings, metrics, checkpoints and the trained weights go to that run directory; `resume` continues it, or gives
    back what it came to. `settings` are a caller's own for its run.yaml, instead of those of this function. After Ctrl-C or
    SIGTERM a checkpoint is written and KeyboardInterrupt raised. State that the functions given here keep outside of parameters
    is not in a checkpoint.

    Raises InputError when nothing takes gradients, for float16 weights, groups that leave parameters out, `tau` without a
    `reference`, or a directory that holds another run; NumericsError when loss or gradient is NaN or infinite: the model then has
    the weights that were best on validation, or those it began with.
    """
    with ExitStack() as stack:
        stack.enter_context(distributed.launched())
        objective.reset(model, config.seed)
        training = _Training(model, objective, config, groups, reference)
        training.regulariser, training.after_backward, training.after_step = (
            regulariser,
            after_backward,
            after_step,
        )
        run, checkpoints = None, None
        if out is not None:
            own = {"model": model.name, "objective": objective.settings(), "training": asdict(config)}
            run = _open(Path(out), own, settings, resume, config.seed, model.revision)
            if (Path(out) / "summary.json").exists():
                return load_run(model, objective, out)
            checkpoints = Checkpoints(Path(out) / "checkpoint")
        devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(training.open())
        outcome = training.run(run, checkpoints, checkpoint_seconds, quiet)
        if out is not None:
            distributed.first(lambda: training.finish(Path(out), outcome))
        return outcome


def load_run(model: HookedModel, objective: Objective[Any], out: str | Path) -> Outcome:
    """Put what a finished run has trained into the model and the objective's head; what it came to.

    Raises InputError for an unfinished run, CheckpointError when the weights are damaged or of another model or objective.
    """
    summary = Run.load(out).summary
    tensors, _ = read_tensors(Path(out) / WEIGHTS)
    losses = tensors.pop("losses").tolist()
    objective.reset(model, 0)
    _copy_into(_all_parameters(model, objective), tensors, f"The run {out}")
    validation = [(step, metrics) for step, metrics in summary["validation"]]
    best = None if summary["best"] is None else (summary["best"][0], summary["best"][1])
    return Outcome(
        **{**{k: summary[k] for k in _FIGURES}, "losses": losses, "validation": validation, "best": best}
    )


_FIGURES = ("steps", "n_trained", "seconds", "step_seconds", "peak_memory_mb")


def _open(
    path: Path,
    own: dict[str, Any],
    settings: Mapping[str, Any] | None,
    resume: bool,
    seed: int,
    revision: str | None,
) -> Run | None:
    """The run directory, on rank 0."""
    origin = make_provenance(seed=seed, revision=revision)
    if settings is not None:
        origin["sources"] = own
    shown = own if settings is None else settings
    return distributed.first(lambda: Run.open(path, "finetune", shown, resume=resume, provenance=origin))


def _all_parameters(model: HookedModel, objective: Objective[Any]) -> dict[str, nn.Parameter]:
    found = {f"model.{name}": parameter for name, parameter in model.model.named_parameters()}
    if objective.head is not None:
        found |= {f"head.{name}": parameter for name, parameter in objective.head.named_parameters()}
    return found


@torch.no_grad()
def _copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: str) -> None:
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckpointError(
                f"{source} has trained {name} of shape {tuple(value.shape)}, which is not here: "
                "give the same model, adapter and objective."
            )
    for name, value in tensors.items():
        parameters[name].copy_(value)


# -- which parameters ------------------------------------------------------------------------------------------------

Select = Callable[[HookedModel], Iterable[str]]
"""Model -> names of the parameters of `model.model` that are to be trained."""


@contextmanager
def trainable(model: HookedModel, select: Select) -> Iterator[None]:
    """Inside, the parameters that `select` names take gradients and no other does; afterwards all is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.model.parameters()]
    chosen = set(select(model))
    unknown = sorted(chosen.difference(everything(model)))
    if unknown:
        raise InputError(
            f"{model.name} has no parameter {unknown[0]!r}.{did_you_mean(unknown[0], everything(model))}"
        )
    try:
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def everything(model: HookedModel) -> list[str]:
    """All parameters."""
    return [name for name, _ in model.model.named_parameters()]


def layers(*indices: int) -> Select:
    """All parameters of these blocks, negative indices counting from the last: no embeddings, no head, no final norm."""

    def select(model: HookedModel) -> list[str]:
        for index in indices:
            if not -model.n_layers <= index < model.n_layers:
                raise InputError(
                    f"Layer {index} does not exist: {model.name} has layers 0–{model.n_layers - 1}."
                )
        wanted = {index % model.n_layers for index in indices}
        blocks = {_block_of(site.path, site.layer) for site in model.sites.values() if site.layer in wanted}
        inside = tuple(f"{block}." for block in blocks if block)
        return [name for name in everything(model) if name.startswith(inside)]

    return select


def matching(pattern: str) -> Select:
    """Parameters in whose names a regular expression is found."""

    def select(model: HookedModel) -> list[str]:
        found = [name for name in everything(model) if re.search(pattern, name)]
        if not found:
            near = did_you_mean(pattern, {part for name in everything(model) for part in name.split(".")})
            raise InputError(f"No parameter of {model.name} matches {pattern!r}.{near}")
        return found

    return select


def _block_of(path: str, layer: int | None) -> str:
    """`model.layers.3` of `model.layers.3.mlp.down_proj`; nothing of a site that is read outside of its block."""
    parts = path.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1]) if str(layer) in parts else ""


# -- the loop --------------------------------------------------------------------------------------------------------


class _Training:
    """A run under way: parameters, optimiser, counts, and the best weights so far."""

    regulariser: Callable[[HookedModel], Tensor] | None = None
    after_backward: AfterBackward | None = None
    after_step: AfterStep | None = None

    def __init__(
        self,
        model: HookedModel,
        objective: Objective[Any],
        config: FinetuneConfig,
        groups: Groups | None,
        reference: Float[np.ndarray, " n_train"] | None,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.examples = objective.examples("train")
        self.parameters = {
            name: p for name, p in _all_parameters(model, objective).items() if p.requires_grad
        }
        self._check(reference)
        self.optimiser = self._optimiser(groups)
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.reference = None if reference is None else torch.tensor(reference, dtype=torch.float64)
        self.weighing = None if config.tau is None else DRRho(config.tau, config.gamma)
        self.n_steps = config.steps(len(self.examples))
        self.eval_every = config.eval_every or math.ceil(len(self.examples) / config.batch_size)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.validation: list[tuple[int, dict[str, float]]] = []
        self.best: tuple[int, dict[str, float]] | None = None
        self.seconds_before, self.started = 0.0, time.perf_counter()
        distributed.same_as_first(p.data for p in self.parameters.values())
        self.kept = self._copies()

    def _check(self, reference: Float[np.ndarray, " n_train"] | None) -> None:
        if not self.parameters:
            raise InputError(
                f"Nothing of {self.model.name} takes gradients: put an adapter on it, or choose with `trainable`."
            )
        half = next((name for name, p in self.parameters.items() if p.dtype == torch.float16), None)
        if half is not None:
            raise InputError(
                f"{half} is in float16, too coarse to be trained: load the model in float32 or bfloat16."
            )
        if self.config.tau is not None and reference is None:
            raise InputError(
                "tau asks for the training examples' losses under a reference model: reference=…."
            )
        if reference is not None and len(reference) != len(self.examples):
            raise InputError(f"reference has {len(reference)} losses for {len(self.examples)} examples.")

    def _optimiser(self, groups: Groups | None) -> torch.optim.Optimizer:
        config = self.config
        own = {name: p for name, p in self.parameters.items() if name.startswith("model.")}
        heads = [p for name, p in self.parameters.items() if name.startswith("head.")]
        if groups is None:
            made: list[dict[str, Any]] = [
                {"params": [p for p in own.values() if p.dim() >= 2]},
                {"params": [p for p in own.values() if p.dim() < 2], "weight_decay": 0.0},
            ]
        else:
            made = [dict(group) for group in groups(self.model)]
            for group in made:
                group["params"] = list(group["params"])
            _check_groups(made, own)
        made += [
            {"params": [p for p in heads if p.dim() >= 2], "lr": config.head_lr or config.lr},
            {
                "params": [p for p in heads if p.dim() < 2],
                "lr": config.head_lr or config.lr,
                "weight_decay": 0.0,
            },
        ]
        kind = optimiser_class(config.optimiser)
        options: dict[str, Any] = {
            "lr": config.lr,
            "betas": config.betas,
            "weight_decay": config.weight_decay,
            "fused": True,  # one pass over the weights, which tells where many of them meet small batches
        }
        taken = inspect.signature(kind).parameters
        return kind(
            [group for group in made if group["params"]],
            **{name: value for name, value in options.items() if name in taken},
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Model and head in training mode; afterwards they are as they were, and no gradient is left."""
        modules = [self.model.model, *([self.objective.head] if self.objective.head is not None else [])]
        flags = [(module, module.training) for root in modules for module in root.modules()]
        try:
            for root in modules:
                root.train()
            with _gradient_checkpointing(self.model, self.config.gradient_checkpointing), torch.enable_grad():
                yield
        finally:
            for module, flag in flags:
                module.training = flag
            for parameter in self.parameters.values():
                parameter.grad = None

    def run(
        self, run: Run | None, checkpoints: Checkpoints | None, checkpoint_seconds: float, quiet: bool
    ) -> Outcome:
        """Train to the end, or to where validation has not become better for long."""
        reset_peak_memory()
        self._resume(checkpoints)
        self._require_same_place()
        if run is not None:
            run.rewind("step", self.steps)
        batches = batch_order(list(map(len, self.examples)), self.config.batch_size, self.config.seed)
        batches = itertools.islice(batches, self.steps, None)
        saved = time.monotonic()
        speaks = distributed.is_first() and not quiet
        with (
            nullcontext() if checkpoints is None else deferred_interrupts() as interrupted,
            progress(self.n_steps, "fine-tuning", "steps", quiet=not speaks, done=self.steps) as bar,
        ):
            while self.steps < self.n_steps and not self.exhausted:
                line = self.step(next(batches))
                self._evaluate(run)
                if run is not None and (
                    self.steps % self.config.log_every == 0 or self.steps == self.n_steps
                ):
                    run.log(line)
                bar.advance(1, loss=line["loss"])
                stop = interrupted is not None and distributed.any_of(interrupted.is_set(), self.model.device)
                if stop or time.monotonic() - saved >= checkpoint_seconds:
                    self._save(checkpoints)
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        if self.best is not None:
            _copy_into(self.parameters, self.kept, "This run")
        return self.outcome()

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def exhausted(self) -> bool:
        """Whether validation has not become better for long."""
        since = sum(step > self.best[0] for step, _ in self.validation) if self.best is not None else 0
        return self.config.patience is not None and since >= self.config.patience

    def step(self, batch: list[int]) -> dict[str, float]:
        """Learn from one batch; its figures. NumericsError, with the best weights put back, where they are not finite."""
        started = time.perf_counter()
        config, step = self.config, self.steps
        _seed(config.seed, step, distributed.rank())
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._gradients(batch)
        penalty = self._penalise()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        for gradient in gradients:
            distributed.add_up(gradient)
        if self.after_backward is not None:
            with torch.no_grad():
                self.after_backward(self.model, step)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.clip))
        if not (math.isfinite(loss) and math.isfinite(penalty) and math.isfinite(norm)):
            self._give_up(loss + penalty, norm)
        factor = config.factor(step, self.n_steps)
        for group, peak in zip(self.optimiser.param_groups, self.peaks):
            group["lr"] = peak * factor
        self.optimiser.step()
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.model, step, self.n_steps)
        self.losses.append(loss)
        self.step_seconds.append(time.perf_counter() - started)
        found = {"step": self.steps, "loss": loss, "lr": config.lr * factor, "gradient_norm": norm}
        return found if self.regulariser is None else {**found, "penalty": penalty}

    def _gradients(self, batch: list[int]) -> float:
        """The gradients of this process's share of a batch, as parts of the whole's; the whole's loss.

        The loss is Σ a_i w_i l_i / Σ a_i. a_i is what an example counts for, 1 or its tokens, and w_i is 1, or DRRho's weight. Its
        normaliser is known only when all parts have been seen: until then weights are relative to what was known before.
        """
        own = batch[distributed.rank() :: distributed.world_size()]
        counts = {i: self.objective.weight(self.examples[i]) for i in batch}
        total = sum(counts.values())
        if not own:  # a last batch of fewer examples than processes: gradients of 0
            own, counts = batch[:1], {batch[0]: 0.0}
        size = math.ceil(len(own) / self.config.accumulation)
        sums = torch.zeros(2, dtype=torch.float64)
        shift = None if self.weighing is None else self.weighing.log_normaliser
        for first in range(0, len(own), size):
            part = own[first : first + size]
            with autocast(self.model, self.config.dtype):
                losses = self.objective.outcomes(self.model, [self.examples[i] for i in part])["loss"]
            share = torch.tensor([counts[i] / total for i in part], dtype=torch.float64).to(losses)
            if self.weighing is not None:
                assert self.reference is not None
                excess = self.weighing.excess(losses, self.reference[part])
                if shift is None:
                    shift = float(distributed.gather(excess.max()[None]).max())
                share = share * (excess - shift).exp()
            loss = (share * losses).sum()
            loss.backward()
            sums += torch.stack([loss.detach(), share.sum()]).double().cpu()
        distributed.add_up(sums)
        if self.weighing is None or shift is None:
            return float(sums[0])
        if not sums.isfinite().all():
            return math.nan
        factor = math.exp(shift - self.weighing.move(shift + math.log(float(sums[1]))))
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return factor * float(sums[0])

    def _penalise(self) -> float:
        """Add the regulariser's gradient, of which each process gives its part; its value."""
        if self.regulariser is None:
            return 0.0
        with autocast(self.model, self.config.dtype):
            value = self.regulariser(self.model) / distributed.world_size()
        value.backward()
        return float(distributed.add_up(value.detach().clone()))

    def _give_up(self, loss: float, norm: float) -> None:
        _copy_into(self.parameters, self.kept, "This run")
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
        whose = (
            "those it began with" if self.best is None else f"the best on validation, of step {self.best[0]}"
        )
        raise NumericsError(
            f"The {what} at step {self.steps}: lower lr ({self.config.lr}), or look at the data. "
            f"The weights of {self.model.name} are now {whose}."
        )

    def _evaluate(self, run: Run | None) -> None:
        """Figures on validation, where it is time; the best weights are kept."""
        due = self.steps % self.eval_every == 0 or self.steps == self.n_steps
        if not due or not self.objective.has("validation"):
            return
        found = self.objective.evaluate(self.model, "validation", self.config.dtype).metrics()
        self.validation.append((self.steps, found))
        if run is not None:
            run.log({"step": self.steps, "validation": found})
        if not math.isfinite(found["loss"]):
            self._give_up(found["loss"], 0.0)
        if self.best is None or self._rank(found) > self._rank(self.best[1]):
            self.best, self.kept = (self.steps, found), self._copies()

    def _rank(self, metrics: dict[str, float]) -> tuple[float, float]:
        """What is better compares greater: the score, then the loss; NaN is worst."""
        sign = 1 if self.objective.higher_is_better else -1
        values = (sign * metrics[self.objective.score_name], -metrics["loss"])
        return tuple(-math.inf if math.isnan(value) else value for value in values)  # type: ignore[return-value]

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    # what is kept on disk

    def _save(self, checkpoints: Checkpoints | None) -> None:
        if checkpoints is None or not distributed.is_first():
            return
        moments: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for index, state in self.optimiser.state_dict()["state"].items():
            for key, value in state.items():
                kept: dict[str, Any] = moments if isinstance(value, Tensor) else plain
                kept[f"optimiser.{index}.{key}"] = value
        tensors = {
            **{f"now.{name}": p for name, p in self.parameters.items()},
            **{f"kept.{name}": value for name, value in self.kept.items()},
            **moments,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
        }
        state = {
            "validation": self.validation,
            "best": self.best,
            "seconds": self.seconds,
            "optimiser": plain,
            "log_normaliser": None if self.weighing is None else self.weighing.log_normaliser,
        }
        checkpoints.save(self.steps, tensors, state)

    def _resume(self, checkpoints: Checkpoints | None) -> None:
        found = None if checkpoints is None else checkpoints.load()
        if found is None:
            return
        tensors, state = found

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        if part("now.").keys() != self.parameters.keys():
            raise CheckpointError(
                "The checkpoint is of other parameters than those that take gradients here: resume with the same."
            )
        _copy_into(self.parameters, part("now."), "The checkpoint")
        self.kept = part("kept.")
        moments: dict[int, dict[str, Any]] = {}
        for name, value in {**part("optimiser."), **state["optimiser"]}.items():
            index, key = name.removeprefix("optimiser.").split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.losses = tensors["losses"].tolist()
        self.step_seconds = tensors["step_seconds"].tolist()
        self.validation = [(step, metrics) for step, metrics in state["validation"]]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.seconds_before = state["seconds"]
        if self.weighing is not None:
            self.weighing.log_normaliser = state["log_normaliser"]

    def _require_same_place(self) -> None:
        """Raise CheckpointError when the processes do not begin at the same step."""
        steps = torch.tensor([self.steps], device=self.model.device)
        if len(distributed.gather(steps).unique()) > 1:
            raise CheckpointError(
                "The processes have found different checkpoints: out must be a directory that all of them see."
            )

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def outcome(self) -> Outcome:
        return Outcome(
            losses=self.losses,
            validation=self.validation,
            best=self.best,
            steps=self.steps,
            n_trained=sum(p.numel() for p in self.parameters.values()),
            seconds=self.seconds,
            step_seconds=statistics.median(self.step_seconds),
            peak_memory_mb=peak_memory_mb(),
        )

    def finish(self, out: Path, outcome: Outcome) -> None:
        """Write the trained weights and the summary; the checkpoints are needed no more."""
        losses = torch.tensor(outcome.losses, dtype=torch.float64)
        write_tensors(out / WEIGHTS, {**self._copies(), "losses": losses}, {})
        objective = {"objective": self.objective.name, "score": self.objective.score_name}
        Run.load(out).finish({**objective, **outcome.summary()})
        Checkpoints(out / "checkpoint").remove()


def _check_groups(groups: list[dict[str, Any]], trained: Mapping[str, nn.Parameter]) -> None:
    """Raise InputError unless each trained parameter is in one group."""
    given = [id(p) for group in groups for p in group["params"]]
    for name, parameter in trained.items():
        times = given.count(id(parameter))
        if times != 1:
            raise InputError(
                f"{name.removeprefix('model.')} takes gradients and is in {times} groups of parameters: each must be in one."
            )
    if len(given) > len(trained):
        raise InputError("A group holds a parameter that takes no gradients: leave it out.")


def _seed(*parts: int) -> None:
    """torch's generators, as these numbers say."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))


@contextmanager
def _gradient_checkpointing(model: HookedModel, wanted: bool) -> Iterator[None]:
    inner: Any = model.model
    if not wanted or getattr(inner, "is_gradient_checkpointing", False):
        yield
        return
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise InputError(f"{type(inner).__name__} has no gradient checkpointing: leave it out.")
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        inner.gradient_checkpointing_disable()
