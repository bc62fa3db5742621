"""One training step of an SAE, ours and the peers', as a share of the dense floor.

    python scripts/bench_sae.py                                  # d 512, 4,096 latents, batches of 4,096, all that is installed
    python scripts/bench_sae.py --archs gated --rounds 20 --threads 2
    python scripts/bench_sae.py --alone --dense --archs l1 gated jumprelu       # ours only, as before latents have become few
    python scripts/bench_sae.py --device cuda --dtype bfloat16 --d-in 2048 --d-sae 32768 --archs topk batch_topk gated l1 jumprelu

The floor is what a dense step cannot go below: five products of the step's shape (encode, decode, and the gradients of latents,
decoder and encoder), measured in the same process and in the dtype that steps compute products in (bfloat16: weights stay in
float32; the peers run under torch's autocast). In each round the floor, we and every peer take a step on the same batch, one
after another, so that whatever else the machine does weighs on all alike; a share is floor / step within a round. A step is
everything: forward, backward, clipping, optimiser, normalisation, schedules, counts of dead latents.

Peers: sae-lens (its SAETrainer), dictionary-learning (its trainers' `update`), eai-sparsify (TopK; the step of its trainer with
torch's Adam). Those that are not installed are skipped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import Tensor

import sae
from sae.trainer import Trainer
from steerkit.activations import Statistics

Step = Callable[[Tensor], Any]
ARCHITECTURES = ["gated", "l1", "sqrt_l1", "topk", "batch_topk", "jumprelu"]
TOTAL_STEPS = 10_000
"""Length of the run that the timed steps belong to."""


def activations(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Tokens of 1,000 sparse features, of unit mean square."""
    features = torch.nn.functional.normalize(torch.randn(1000, d, generator=generator), dim=1)
    latents = torch.rand(n, 1000, generator=generator)
    x = (latents * (latents > 0.98)) @ features + 0.02 * torch.randn(n, d, generator=generator)
    return x * (d * n / x.square().sum()).sqrt()


def floor(x: Tensor, d_sae: int, dtype: torch.dtype) -> Step:
    n, d = x.shape
    shapes = [(n, d), (n, d), (n, d_sae), (d, d_sae), (d_sae, d)]
    x, error, latents, W_enc, W_dec = (torch.randn(shape, device=x.device, dtype=dtype) for shape in shapes)

    def step(batch: Tensor) -> None:
        torch.mm(x, W_enc)
        torch.mm(latents, W_dec)
        torch.mm(error, W_dec.T)
        torch.mm(latents.T, error)
        torch.mm(x.T, latents)

    return step


def ours(arch: str, x: Tensor, d_sae: int, k: int, dtype: torch.dtype) -> Step:
    n, d = x.shape
    sparsity = {"k": k} if arch.endswith("topk") else {"target_l0": float(k)}
    config = sae.TrainConfig(batch_size=n, dtype=str(dtype).removeprefix("torch."))
    statistics_ = Statistics(x.mean(0), 1.0, None, n)
    trainer = Trainer(
        sae.get(arch)(d_sae, **sparsity), "bench", statistics_, TOTAL_STEPS * n, config, x.device
    )
    return trainer.step


def sae_lens(arch: str, x: Tensor, d_sae: int, k: int, dtype: torch.dtype) -> Step | None:
    import sae_lens.saes as saes
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n, d = x.shape
    names = {
        "l1": "Standard",
        "gated": "Gated",
        "topk": "TopK",
        "batch_topk": "BatchTopK",
        "jumprelu": "JumpReLU",
    }
    if arch not in names:
        return None
    name = f"{names[arch]}TrainingSAE"
    settings = {"k": k} if arch.endswith("topk") else {}
    config_ = getattr(saes, f"{name}Config")(d_in=d, d_sae=d_sae, device=str(x.device), **settings)
    coder = getattr(saes, name)(config_)
    config = SAETrainerConfig(
        total_training_samples=TOTAL_STEPS * n,
        train_batch_size_samples=n,
        lr_end=3e-5,
        device=str(x.device),
        autocast=dtype == torch.bfloat16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, coder, data_provider=iter(()))
    return lambda batch: trainer._train_step(trainer.sae, batch)


def dictionary_learning(arch: str, x: Tensor, d_sae: int, k: int, dtype: torch.dtype) -> Step | None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    options: dict[str, Any] = {
        "steps": TOTAL_STEPS,
        "activation_dim": x.shape[1],
        "dict_size": d_sae,
        "layer": 0,
    }
    options |= {"lm_name": "bench", "device": str(x.device)}
    trainers = {"l1": StandardTrainer, "gated": GatedSAETrainer, "topk": TopKTrainer}
    trainers |= {"batch_topk": BatchTopKTrainer, "jumprelu": JumpReluTrainer}
    if arch not in trainers:
        return None
    trainer = trainers[arch](**options, **({"k": k} if arch.endswith("topk") else {}))
    count = iter(range(1, TOTAL_STEPS))  # their step 0 only sets the bias

    def step(batch: Tensor) -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            trainer.update(next(count), batch)

    return step


def sparsify(arch: str, x: Tensor, d_sae: int, k: int, dtype: torch.dtype) -> Step | None:
    if arch != "topk":
        return None
    if x.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton's presence for a GPU's
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k), device=x.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-3)
    silent = torch.zeros(d_sae, dtype=torch.long, device=x.device)

    def step(batch: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = coder(batch, dead_mask=silent > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        silent.add_(len(batch))
        silent[out.latent_indices.flatten()] = 0
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step


PEERS = {
    "sae-lens": ("sae_lens", sae_lens),
    "dictionary-learning": ("dictionary_learning", dictionary_learning),
}
PEERS["eai-sparsify"] = ("sparsify", sparsify)


def measure(arch: str, arguments: argparse.Namespace, peers: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and shares of the floor, for us and every peer."""
    generator = torch.Generator().manual_seed(0)
    x = activations(arguments.batch, arguments.d_in, generator).to(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    steps: dict[str, Step] = {"floor": floor(x, arguments.d_sae, dtype)}
    for name, make in {"steerkit": ours, **peers}.items():
        step = make(arch, x, arguments.d_sae, arguments.k, dtype)
        if step is not None:
            steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.warmup + arguments.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= arguments.warmup:
                seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, taken in seconds.items():
        shares = [f / s for f, s in zip(seconds["floor"], taken)]
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else (shares[0],) * 3
        found[name] = {"seconds": statistics.median(taken), "share": middle, "quartiles": [low, high]}
    return found


def installed_peers() -> tuple[dict[str, Any], list[str]]:
    """(those that are installed, names of the others)."""
    peers = {name: make for name, (module, make) in PEERS.items() if importlib.util.find_spec(module)}
    return peers, [name for name in PEERS if name not in peers]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["gated", "l1", "topk"], choices=ARCHITECTURES)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32, help="active latents: k, and the target of the others")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--dense", action="store_true", help="all of our products densely")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)

    peers, skipped = ({}, []) if arguments.alone else installed_peers()
    if arguments.dense:
        sae.trainer.SPARSE_DENSITY = 0.0
    for name in skipped:
        print(f"{name} is not installed and is skipped (pip install {name}).")
    shape = f"d {arguments.d_in}, {arguments.d_sae:,} latents, batch {arguments.batch:,}, k {arguments.k}"
    print(
        f"{date.today()}, {platform.machine()}, {arguments.device}, {arguments.dtype}, {arguments.threads} threads, "
        f"torch {torch.__version__}; {shape}"
    )
    print(f"{arguments.rounds} rounds, alternating; share of the dense floor: median (quartiles)\n")
    results = {}
    for arch in arguments.archs:
        results[arch] = measure(arch, arguments, peers)
        for name, row in results[arch].items():
            low, high = row["quartiles"]
            print(
                f"{arch:10} {name:20} {row['seconds']:8.4f} s   {row['share']:.2f} ({low:.2f}–{high:.2f})",
                flush=True,
            )
        print()
    settings = {key: value for key, value in vars(arguments).items() if key != "archs"}
    print(json.dumps({**settings, "skipped": skipped, "results": results}))


if __name__ == "__main__":
    main()
