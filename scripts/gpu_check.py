"""All that only a GPU can show, in one run: are the kernels right, how fast is a step, does a whole training run go through.

    python scripts/gpu_check.py                      # some ten minutes; needs CUDA, and says so and exits with 2 without
    python scripts/gpu_check.py --rehearse           # the same code at toy sizes on the CPU: its figures mean nothing

1. Products with latents and the choice of the k largest, ours and torch's, at d 2,048, 32,768 latents, batch 4,096, some latents
   far more frequent than others: greatest error, relative to the greatest value of the product in float64, and milliseconds – in
   float32 (TF32 off), with TF32 on (torch's dense products may use it, ours never do) and in bfloat16. Then the gradients of the
   architectures, sparse against autograd of the dense objective, in float32.
2. One training step of five architectures as a share of the dense floor, beside the peers that are installed: `bench_sae.py` on the
   GPU, in bfloat16 and float32, at d 2,048 and 32,768 latents and at the CPU benchmark's shape.
3. The main job: an SAE of the built-in model, from text to figures on held-out text, in bfloat16 and float32.

The last line is one JSON object. Exits with 1 if a kernel or gradient is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import bench_sae
import torch
from torch import Tensor

import sae
from sae import kernels
from sae.architectures import Terms
from sae.kernels import Pattern
from steerkit.models import HookedModel

SETTINGS = {
    "float32": (torch.float32, False, 1e-5),
    "float32, TF32 on": (torch.float32, True, 1e-5),
    "bfloat16": (torch.bfloat16, False, 1e-2),
}
"""dtype, whether torch's float32 products may use TF32, and the greatest relative error that is allowed to ours."""
GRADIENT_ERROR = 1e-5
"""Greatest error of a gradient, relative to the dense one, both as norms."""


def check_products(
    device: torch.device, d: int, d_sae: int, n: int, ks: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Errors and milliseconds of every product, for us and for torch's dense one."""
    rows = []
    for k in ks:
        for setting, (dtype, tf32, allowed) in SETTINGS.items():
            generator = torch.Generator(device).manual_seed(0)
            latents = torch.randn(n, d_sae, generator=generator, device=device)
            latents += torch.randn(d_sae, generator=generator, device=device)
            columns = latents.topk(k, dim=1).indices.sort(dim=1).values.flatten()
            where = (torch.arange(n, device=device).repeat_interleave(k), columns, (n, d_sae))
            shapes = [(n * k,), (d_sae, d), (n, d)]
            values, W_dec, errors = (
                torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes
            )
            pattern, dense = kernels.make_pattern(*where, dtype), Pattern(*where)

            def products(p: Pattern, v: Tensor, W: Tensor, e: Tensor) -> dict[str, Callable[[], Tensor]]:
                return {
                    "times": lambda: p.times(v, W),
                    "sample": lambda: p.sample(e, W),
                    "transposed_times": lambda: p.transposed_times(v, e),
                    "column_sums": lambda: p.column_sums(v),
                }

            exact = products(dense, values.double(), W_dec.double(), errors.double())
            ours, torchs = (products(p, values, W_dec, errors) for p in (pattern, dense))
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for name in exact:
                expected = exact[name]()
                row = {"product": name, "k": k, "setting": setting}
                for who, product in (("ours", ours[name]), ("torch", torchs[name])):
                    error = (product().double() - expected).abs().max() / expected.abs().max()
                    row |= {f"{who}_error": float(error), f"{who}_ms": milliseconds(product, device, rounds)}
                row["ok"] = row["ours_error"] <= allowed
                rows.append(row)
            torch.backends.cuda.matmul.allow_tf32 = False
            rows += [check_top_k(latents.to(dtype), k, setting, rounds)] * (not tf32)
    return rows


def check_top_k(x: Tensor, k: int, setting: str, rounds: int) -> dict[str, Any]:
    """Likewise, of the k largest in each row; the error is the greatest difference between values, which must be none."""
    found, _ = kernels.top_k(x, k)
    expected, _ = x.topk(k)
    error = float((found.sort(descending=True).values - expected).abs().max())
    taken = {
        "ours_ms": milliseconds(lambda: kernels.top_k(x, k)[0], x.device, rounds),
        "torch_ms": milliseconds(lambda: x.topk(k, sorted=False)[0], x.device, rounds),
    }
    row = {"product": "top_k", "k": k, "setting": setting, "ours_error": error, "torch_error": 0.0}
    return {**row, **taken, "ok": error == 0.0}


def check_gradients(device: torch.device, d: int, d_sae: int, n: int) -> list[dict[str, Any]]:
    """The norm of each gradient's error relative to its own, the greatest of an architecture's parameters."""
    rows = []
    for arch in ("l1", "sqrt_l1", "p_anneal", "gated", "jumprelu", "topk", "batch_topk", "hierarchical_topk"):
        generator = torch.Generator().manual_seed(0)
        x = bench_sae.activations(n, d, generator)
        model = sae.get(arch)(d_sae, **sparsity(arch, 16)).build(d)
        model.initialise(x, x.mean(0), generator)
        model, x = model.to(device), x.to(device)
        dead = torch.arange(d_sae, device=device) < d_sae // 8
        terms = Terms(0.3, dead, progress=0.5, sparse=True)
        model.loss(x, terms).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = None
        model.gradients(x, terms)
        error = max(
            float((parameter.grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
            for name, parameter in model.named_parameters()
            if expected[name] is not None
        )
        rows.append({"arch": arch, "error": error, "ok": error <= GRADIENT_ERROR})
    return rows


def benchmark(device: torch.device, shapes: list[tuple[int, int, int]], rounds: int) -> list[dict[str, Any]]:
    """Seconds and shares of the floor of one step, for us and every peer, at every (d, d_sae, batch)."""
    peers, skipped = bench_sae.installed_peers()
    for name in skipped:
        print(f"{name} is not installed and is skipped (pip install {name}).")
    rows = []
    for d, d_sae, n in shapes:
        for dtype in ("bfloat16", "float32"):
            for arch in ("topk", "batch_topk", "gated", "l1", "jumprelu"):
                row: dict[str, Any] = {"arch": arch, "d": d, "d_sae": d_sae, "batch": n, "dtype": dtype}
                arguments = argparse.Namespace(d_in=d, d_sae=d_sae, batch=n, k=min(32, d_sae // 8))
                arguments.device, arguments.dtype = str(device), dtype
                arguments.rounds, arguments.warmup = rounds, max(2, rounds // 4)
                row["results"] = {}
                # Each peer is measured alone beside the floor and us: one that fails or fills the memory takes no other along.
                for name in ["steerkit", *peers]:
                    others = {name: peers[name]} if name in peers else {}
                    try:
                        found = bench_sae.measure(arch, arguments, others)
                    except Exception as error:
                        found = {name: {"failed": f"{type(error).__name__}: {error}"[:200]}}
                    row["results"] = found | row["results"]
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                rows.append(row)
                print(step_line(row), flush=True)
    return rows


def main_job(device: torch.device, tokens: int, dtype: str) -> dict[str, Any]:
    """Train and evaluate an SAE of the built-in model; the figures of its summary."""
    model = HookedModel.from_pretrained("storyworld", device=device)
    arch = sae.Gated(1024) if dtype == "float32" else sae.TopK(1024, k=16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = sae.train(
            model,
            "storyworld",
            "blocks.2.hook_resid_post",
            arch,
            tokens,
            Path(folder) / "run",
            dtype=dtype,
            held_out_tokens=min(tokens, 100_000),
            quiet=True,
        )
    keys = ("arch", "l0", "fvu", "delta_ce", "dead_fraction", "tokens", "tokens_per_second", "peak_memory_mb")
    found = {key: run.summary[key] for key in keys}
    return {**found, "dtype": dtype, "seconds": time.perf_counter() - started}


def sparsity(arch: str, k: int) -> dict[str, Any]:
    return {"k": k} if arch.endswith("topk") else {"target_l0": float(k)}


def milliseconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median over `rounds`, after three to warm up."""
    taken = []
    for round_ in range(3 + rounds):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        taken += [1000 * (time.perf_counter() - started)] * (round_ >= 3)
    return statistics.median(taken)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_line(row: dict[str, Any]) -> str:
    return (
        f"{row['product']:18} k {row['k']:4} {row['setting']:17}"
        f" {row['ours_error']:8.1e} {row['ours_ms']:9.3f} ms   torch {row['torch_error']:8.1e} {row['torch_ms']:9.3f} ms"
        f"   {'ok' if row['ok'] else 'WRONG'}"
    )


def step_line(row: dict[str, Any]) -> str:
    shares = "   ".join(
        f"{name} {found['share']:.2f} ({1000 * found['seconds']:.2f} ms)"
        if "share" in found
        else f"{name} {found['failed']}"
        for name, found in row["results"].items()
    )
    return f"{row['arch']:10} d {row['d']:,}, {row['d_sae']:,} latents, batch {row['batch']:,}, {row['dtype']:8}  {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=300_000, help="of the main job")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", message="Triton does not run")
    rehearse = arguments.rehearse
    if not rehearse and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch sees none here.", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cpu" if rehearse else "cuda")
    name = "CPU, a rehearsal" if rehearse else torch.cuda.get_device_name()
    triton = kernels.is_fast(device, torch.bfloat16)
    result: dict[str, Any] = {"date": str(date.today()), "device": name, "torch": torch.__version__}
    result |= {"cuda": torch.version.cuda, "triton_runs": triton}
    print(
        f"{result['date']}, {name}, torch {torch.__version__}, Triton {'runs' if triton else 'does not run'}\n"
    )

    wide = (32, 256, 64) if rehearse else (2048, 32_768, 4096)
    rounds = 2 if rehearse else arguments.rounds
    print("1. Products: greatest error and median time, ours and torch's dense one")
    result["products"] = check_products(device, *wide, [4] if rehearse else [32, 128, 512], rounds)
    print("\n".join(map(product_line, result["products"])))
    print(
        "\n   Gradients, sparse against autograd of the dense objective, float32: error relative to the norm"
    )
    result["gradients"] = check_gradients(device, *((32, 256, 64) if rehearse else (256, 2048, 512)))
    for row in result["gradients"]:
        print(f"{row['arch']:18} {row['error']:8.1e}   {'ok' if row['ok'] else 'WRONG'}")

    print("\n2. A training step as a share of the floor of five matrix products in the same dtype")
    result["steps"] = benchmark(device, [wide] if rehearse else [wide, (512, 4096, 4096)], rounds)

    print("\n3. The main job: storyworld, blocks.2.hook_resid_post")
    result["main_job"] = []
    for dtype in ("float32", "bfloat16"):
        row = main_job(device, 4096 if rehearse else arguments.tokens, dtype)
        result["main_job"].append(row)
        rates = ", ".join(f"{key} {value:,.0f}" for key, value in row["tokens_per_second"].items())
        print(
            f"{row['arch']} {dtype}: L0 {row['l0']:.2f}, FVU {row['fvu']:.4f}, ΔCE {row['delta_ce']:.4f}, "
            f"dead {row['dead_fraction']:.1%}; {row['seconds']:.1f} s; tokens/s: {rates}",
            flush=True,
        )

    result["ok"] = all(row["ok"] for row in result["products"] + result["gradients"])
    print()
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
