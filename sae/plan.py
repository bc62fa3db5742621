"""What a training run will need, before it starts: shapes, parameters, memory, time. `steerkit train sae --dry-run` prints it."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae.architectures import Config
from sae.reading import Reading
from sae.trainer import TrainConfig, Trainer
from steerkit.activations import Statistics
from steerkit.data import Documents
from steerkit.models import HookedModel
from steerkit.pair import ModelPair
from steerkit.runs import peak_memory_mb
from steerkit.tokens import Tokenization, token_batches

_PROBE_BATCHES = 3


@dataclass(frozen=True)
class Plan:
    """An estimate. Seconds are extrapolated from a few forwards and steps that were timed here."""

    arch: str
    d_in: int
    d_sae: int
    parameters: int
    tokens: int
    steps: int
    batch_size: int
    documents: int
    memory_mb: dict[str, float]
    """`now` is what this process has used with the model loaded; the rest comes on top."""
    tokens_per_second: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {mb:,.0f}" for name, mb in self.memory_mb.items())
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in self.tokens_per_second.items())
        return (
            f"SAE         {self.arch}: {self.d_in} -> {self.d_sae:,} latents, {self.parameters:,} parameters\n"
            f"data        {self.documents:,} documents\n"
            f"tokens      {self.tokens:,} in {self.steps:,} steps of {self.batch_size:,}\n"
            f"memory, MB  {memory}; in all {sum(self.memory_mb.values()):,.0f}\n"
            f"tokens/s    {rates}\n"
            f"time        about {self.seconds:,.0f} s"
        )


def plan(
    model: HookedModel,
    documents: Documents,
    *,
    site: str,
    arch: Config,
    tokens: int,
    tokenization: Tokenization | None = None,
    config: TrainConfig | None = None,
) -> Plan:
    """Time a few forwards and steps, and reckon the rest. Writes nothing, changes nothing."""
    config = (config or TrainConfig()).resolve(tokens)
    assert config.batch_size is not None
    tuned = getattr(arch, "tuned", None)
    read: HookedModel | ModelPair = model if tuned is None else ModelPair.of(model, tuned)
    arch = arch.bound(site, lambda name: read.site(name).width)
    sites = list(dict.fromkeys((*arch.inputs(site), *arch.outputs(site))))
    statistics = {name: Statistics(torch.zeros(read.site(name).width), 1.0, None, 0) for name in sites}
    reading = Reading(arch, site, lambda name: statistics[name])
    batches = list(itertools.islice(token_batches(model, documents[:512], tokenization), _PROBE_BATCHES))
    seconds_model, n_model = 0.0, 0
    with torch.no_grad():
        for i, batch in enumerate([batches[0], *batches]):
            started = time.perf_counter()
            acts = read.run(batch.input_ids, batch.attention_mask, sites=sites)
            _synchronise(next(iter(acts.values())).device)
            if i:  # the first is a warm-up
                seconds_model += time.perf_counter() - started
                n_model += batch.n_kept
    trainer = Trainer(arch, site, reading.input, tokens, config, model.device, reading.target)
    n, width = config.batch_size, len(reading.input.mean)
    made = {name: torch.randn(n, len(known.mean), device=model.device) for name, known in statistics.items()}
    made |= {label: torch.rand(n, device=model.device).round() for label in arch.labels}
    trainer.step(*reading(made))
    started = time.perf_counter()
    for _ in range(_PROBE_BATCHES):
        trainer.step(*reading(made))
    _synchronise(model.device)
    rates = {
        "model": n_model / seconds_model,
        "sae": _PROBE_BATCHES * config.batch_size / (time.perf_counter() - started),
    }
    rates["total"] = 1 / sum(1 / rate for rate in rates.values())
    parameters = sum(p.numel() for p in trainer.sae.parameters())
    mb = 4 / 1e6
    return Plan(
        arch=arch.name,
        d_in=width,
        d_sae=arch.d_sae,
        parameters=parameters,
        tokens=trainer.n_steps * config.batch_size,
        steps=trainer.n_steps,
        batch_size=config.batch_size,
        documents=len(documents),
        memory_mb={
            "now": peak_memory_mb(),
            "weights, gradients, moments": 4 * parameters * mb,
            "latents of a batch": 4 * config.batch_size * arch.d_sae * mb,
            "buffer": 2 * config.block_tokens * sum(len(known.mean) for known in statistics.values()) * mb,
        },
        tokens_per_second=rates,
        seconds=trainer.n_steps * config.batch_size / rates["total"],
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
