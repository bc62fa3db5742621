"""What each process of a distributed run does in the tests: `torchrun --nproc-per-node 2 ranks.py OUT`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from synthetic import SITE, SparseStream

import sae
from sae.trainer import Trainer
from steerkit import distributed
from steerkit.errors import SteerkitError

STEPS, BATCH = 20, 256
CASES: dict[str, sae.Config] = {
    "l1": sae.L1(64, target_l0=4.0),
    "sqrt_l1": sae.SqrtL1(64, target_l0=4.0),
    "gated": sae.Gated(64, target_l0=4.0),
    "topk": sae.TopK(64, k=4),
    "batch_topk": sae.BatchTopK(64, k=4),
    "jumprelu": sae.JumpReLU(64, target_l0=4.0),
    "jumprelu quadratic": sae.JumpReLU(64, target_l0=4.0, sparsity="quadratic"),
    "matryoshka": sae.Matryoshka(64, k=4),
    "hierarchical_topk": sae.HierarchicalTopK(64, k=4),
    "p_anneal": sae.PAnneal(64, target_l0=4.0),
    "guided": sae.Guided(64, k=4, labels=("a", "b")),
    "transcoder": sae.Transcoder(64, k=4, target_site=SITE),
    "crosscoder": sae.Crosscoder(64, k=4),
}


def trained(arch: sae.Config, **settings: object) -> Trainer:
    """20 steps in float64 on this process's share of each batch, short silences being enough to make latents anew."""
    stream = SparseStream("zipf", batch_size=BATCH)
    config = sae.TrainConfig(batch_size=BATCH, dtype="float64", dead_after=4 * BATCH).with_(settings)
    trainer = Trainer(arch, SITE, stream.statistics(SITE), STEPS * BATCH, config, torch.device("cpu"))
    for _ in range(STEPS):
        trainer.step(next(stream)[SITE][distributed.share(BATCH)])
    return trainer


def refuse_batch() -> None:
    trained(CASES["topk"], batch_size=BATCH + 1)


def fail_on_the_first() -> None:
    def work() -> None:
        raise SteerkitError("no space left")

    distributed.first(work)


def hand_over() -> object:
    return distributed.first(lambda: "what rank 0 found")


def fail_on_the_second() -> None:
    for step in range(10):
        if distributed.rank() == 1 and step == 3:
            raise ValueError("rank 1 gave up")
        distributed.average(torch.ones(1000))


def outcome(work: Callable[[], object]) -> str:
    """What a job ended with on this rank: its error, or what it gave."""
    try:
        with distributed.launched():
            return repr(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # the launcher ends a rank whose neighbour has died, before it has spoken
    out = Path(sys.argv[1])
    with distributed.launched():
        for name, arch in CASES.items():
            trainer = trained(arch)
            found = {key: value.contiguous() for key, value in trainer.tensors().items()}
            found["metrics"] = torch.tensor(list(trainer.metrics().values()), dtype=torch.float64)
            save_file(found, out / f"{name}-{distributed.rank()}.safetensors")
    outcomes = {}
    for work in (refuse_batch, fail_on_the_first, hand_over, fail_on_the_second):
        outcomes[work.__name__] = outcome(work)
    (out / f"outcomes-{distributed.rank()}.json").write_text(json.dumps(outcomes))
    os._exit(distributed.rank())  # gloo waits at the end for what has broken off


if __name__ == "__main__":
    main()
