"""End-to-end training of an SAE, ours and sae-lens's own runner, in tokens per second and in what comes out of it.

    python scripts/bench_train.py                                          # the built-in model
    python scripts/bench_train.py --llama DIR --stories FILE.txt           # a small TinyStories Llama
    python scripts/bench_train.py --parts live --archs topk --rounds 7

Three parts:

    live      gated and TopK on a model that runs along: same weights, text, site, width, tokens, batches, sparsity
    cached    the same from activations on disk, each written by its own tool, of a wider model with random weights
    many      four SAEs in one pass of ours beside one, at the last layer, and the bare forward

We and sae-lens take turns, the order changing every round; figures are medians with quartiles over rounds, ratios are taken
within a round. Timed is training: from the first token that is read to the last step, with our statistics of the activations,
with shuffling and both sides' bookkeeping. Not timed: loading the model, making the runner, caching, saving, evaluating.
sae-lens gets its text tokenised (its fast path), a forward that stops at the site (its `HookedProxyLM`), no logging and no
evaluation; otherwise its defaults.

Every SAE is evaluated by our evaluator on the same held-out text. sae-lens has no target L0, so that of its gated SAE is searched
for beforehand, and its learning rate is the best of `--peer-lrs`; both can be given instead (`--peer-l1`, one of `--peer-lrs`).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import logging
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_activations import truncated
from torch import nn

import sae
from sae.evaluation import evaluate_all
from sae.training import fit_all
from steerkit.activation_cache import ActivationCache, cache
from steerkit.activations import ActivationStream, Tokenization
from steerkit.data import Documents, load_documents, split_held_out
from steerkit.models import HookedModel
from steerkit.tokens import token_batches

PARTS = ("live", "cached", "many")
ARCHITECTURES = ("gated", "topk")
GOALS = {"live gated": 2.0, "live topk": 1.5, "cached gated": 3.0, "cached topk": 3.0, "many": 2.0}
L0_TOLERANCE = 0.05
QUALITY = ("l0", "fvu", "ce_recovered", "delta_ce", "dead_fraction")


@dataclass(frozen=True)
class Job:
    """One SAE that both sides train."""

    model: HookedModel
    site: str
    train: Documents
    held_out: Documents
    context: int
    d_sae: int
    k: int
    tokens: int
    batch: int
    cached_ours: Path | None = None
    cached_theirs: Path | None = None

    @property
    def tokenization(self) -> Tokenization:
        return Tokenization(context=self.context, packing=True)

    @property
    def layer(self) -> int:
        layer = self.model.site(self.site).layer
        assert layer is not None
        return layer


@dataclass(frozen=True)
class PeerSettings:
    """What sae-lens is told that we are not."""

    lr: float
    l1: float | None = None


def ours(job: Job, arch: str, seed: int) -> tuple[sae.SAE, float]:
    """(the SAE, seconds of training)."""
    config = sae.TrainConfig(batch_size=job.batch, seed=seed)
    if job.cached_ours is None:
        stream: Any = ActivationStream(
            job.model, job.train, job.site, tokenization=job.tokenization, batch_size=job.batch, seed=seed
        )
    else:
        stream = ActivationCache.open(job.cached_ours, verify=False).stream(job.site, job.batch, seed)
    started = time.perf_counter()
    made, _ = sae.fit(stream, job.site, architecture(arch, job.d_sae, job.k), job.tokens, config=config)
    seconds = time.perf_counter() - started
    stream.close()
    return made, seconds


def architecture(name: str, d_sae: int, k: int) -> sae.Config:
    return sae.TopK(d_sae, k=k) if name == "topk" else sae.Gated(d_sae, target_l0=float(k))


def peer(job: Job, arch: str, seed: int, settings: PeerSettings) -> tuple[sae.SAE, float]:
    """The same by sae-lens's `LanguageModelSAETrainingRunner`."""
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.saes import GatedTrainingSAEConfig, TopKTrainingSAEConfig

    width = job.model.site(job.site).width
    steps = job.tokens // job.batch
    own: Any
    if arch == "topk":
        own = TopKTrainingSAEConfig(d_in=width, d_sae=job.d_sae, k=job.k)
    else:
        assert settings.l1 is not None
        own = GatedTrainingSAEConfig(
            d_in=width, d_sae=job.d_sae, l1_coefficient=settings.l1, l1_warm_up_steps=steps // 20
        )
    from_disk = job.cached_theirs is not None
    config = LanguageModelSAERunnerConfig(
        sae=own,
        model_name=job.model.name,
        model_class_name="AutoModelForCausalLM",
        hook_name=module_name(job.model, job.layer),
        dataset_path="given",
        context_size=job.context,
        use_cached_activations=from_disk,
        cached_activations_path=str(job.cached_theirs) if from_disk else None,
        training_tokens=steps * job.batch,
        train_batch_size_tokens=job.batch,
        lr=settings.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=min(1000, max(1, steps // 20)),
        exclude_special_tokens=sorted(job.model.special_ids),
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    torch.manual_seed(seed)
    runner = LanguageModelSAETrainingRunner(
        config, override_dataset=pretokenised(job), override_model=proxy(job.model, job.layer)
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        started = time.perf_counter()
        trained = runner.run()
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        return sae.load(folder), seconds


def module_name(model: HookedModel, layer: int) -> str:
    """The Hugging Face name of the block whose output the site is."""
    for name, module in model.model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.n_layers:
            return f"{name}.{layer}"
    raise SystemExit(f"{model.name} has no list of {model.n_layers} blocks.")


def proxy(model: HookedModel, layer: int) -> Any:
    """sae-lens's wrapper of a Hugging Face model, whose forward stops at the block; a copy, as it leaves hooks behind."""
    from sae_lens.load_model import HookedProxyLM

    wrapped = HookedProxyLM(
        copy.deepcopy(model.model), model.tokenizer, hook_names=[module_name(model, layer)]
    )
    wrapped.requires_grad_(False)
    return wrapped


def pretokenised(job: Job) -> Any:
    """The full rows of the training text, as sae-lens reads them fastest."""
    import datasets

    rows: list[list[int]] = []
    for batch in token_batches(job.model, job.train, job.tokenization, max_tokens=job.tokens):
        rows += batch.input_ids[batch.attention_mask.bool().all(1)].tolist()
    return datasets.Dataset.from_dict({"tokens": [row for row in rows if len(row) == job.context]})


def evaluated(job: Job, made: Mapping[str, sae.SAE], tokens: int) -> dict[str, dict[str, float | None]]:
    found = evaluate_all(
        job.model, made, job.held_out, job.site, tokenization=job.tokenization, tokens=tokens
    )
    return {name: {key: getattr(one, key) for key in QUALITY} for name, one in found.items()}


# the peer's settings


def search(job: Job, arch: str, arguments: argparse.Namespace) -> PeerSettings:
    """The learning rate that leaves the lowest FVU, with the L0 that is asked for."""
    tried = []
    for lr in arguments.peer_lrs:
        settings = PeerSettings(lr, None if arch == "topk" else arguments.peer_l1 or 1.0)
        if arch != "topk" and arguments.peer_l1 is None:
            settings, row = with_l0(job, arch, settings, arguments)
        elif len(arguments.peer_lrs) == 1:
            return settings
        else:
            row = outcome(job, arch, settings, arguments.quality_tokens)
        shown = f"lr {lr:g}" + (f", l1 {settings.l1:.4g}" if settings.l1 is not None else "")
        print(f"  sae-lens {arch}, {shown}: L0 {row['l0']:.2f}, FVU {row['fvu']:.4f}", flush=True)
        tried.append((abs(math.log(row["l0"] / job.k)) > 2 * L0_TOLERANCE, row["fvu"], settings))
    return min(tried, key=lambda item: item[:2])[2]


def with_l0(
    job: Job, arch: str, settings: PeerSettings, arguments: argparse.Namespace
) -> tuple[PeerSettings, dict[str, Any]]:
    """The penalty whose L0 is k, within 5 %: by secants between logarithms."""
    known: list[tuple[float, float, PeerSettings, dict[str, Any]]] = []
    assert settings.l1 is not None
    guess = math.log(settings.l1)
    for _ in range(arguments.search_tries):
        settings = replace(settings, l1=math.exp(guess))
        row = outcome(job, arch, settings, arguments.quality_tokens)
        off = math.log(max(row["l0"], 0.01) / job.k)
        known.append((guess, off, settings, row))
        if abs(off) < L0_TOLERANCE:
            break
        slope = -0.7
        if len(known) > 1:
            (a, off_a, *_), (b, off_b, *_) = sorted(known, key=lambda item: abs(item[1]))[:2]
            slope = min(-0.2, (off_b - off_a) / (b - a)) if abs(b - a) > 1e-6 else slope
        best = min(known, key=lambda item: abs(item[1]))
        guess = best[0] - max(-2.0, min(2.0, best[1] / slope))
    best = min(known, key=lambda item: abs(item[1]))
    return best[2], best[3]


def outcome(job: Job, arch: str, settings: PeerSettings, tokens: int) -> dict[str, Any]:
    return evaluated(job, {"sae-lens": peer(job, arch, 0, settings)[0]}, tokens)["sae-lens"]


# the parts


def beside(name: str, job: Job, arch: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours and theirs in turns."""
    settings = search(job, arch, arguments)
    contestants: dict[str, Callable[[int], tuple[sae.SAE, float]]] = {
        "steerkit": lambda seed: ours(job, arch, seed),
        "sae-lens": lambda seed: peer(job, arch, seed, settings),
    }
    rates: dict[str, list[float]] = {who: [] for who in contestants}
    quality: dict[str, list[dict[str, Any]]] = {who: [] for who in contestants}
    seen = job.tokens // job.batch * job.batch
    for round_ in range(arguments.rounds):
        made = {}
        for who in list(contestants) if round_ % 2 == 0 else list(contestants)[::-1]:
            gc.collect()
            made[who], seconds = contestants[who](round_)
            rates[who].append(seen / seconds)
        for who, row in evaluated(job, made, arguments.quality_tokens).items():
            quality[who].append(row)
    ratio = spread([a / b for a, b in zip(rates["steerkit"], rates["sae-lens"])])
    found = {
        "site": job.site,
        "d_in": job.model.site(job.site).width,
        "d_sae": job.d_sae,
        "k": job.k,
        "tokens": seen,
        "batch": job.batch,
        "peer_settings": {"lr": settings.lr, "l1": settings.l1},
        "tokens_per_second": {who: spread(values) for who, values in rates.items()},
        "ratio": ratio,
        "goal": GOALS[f"{name} {arch}"],
        "quality": {who: means(rows) for who, rows in quality.items()},
    }
    print(f"{name}, {arch}: {job.d_sae:,} latents, {seen:,} tokens in batches of {job.batch:,}")
    for who, row in found["quality"].items():
        figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None)
        print(f"  {who:10} {shown(found['tokens_per_second'][who], ',.0f')} tokens/s   {figures}")
    print(f"  ratio {shown(ratio, '.2f')}, goal {found['goal']}\n", flush=True)
    return found


def live(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "bare_tokens_per_second": bare(job, arguments.rounds),
        **{arch: beside("live", job, arch, arguments) for arch in arguments.archs},
    }


def cached(job: Job, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """From disk: a block of width --cached-d with random weights, so that the width is free."""
    model = wide(job.model, arguments.cached_d, folder / "model")
    job = replace(
        job,
        model=model,
        site="blocks.0.hook_resid_post",
        d_sae=arguments.cached_d_sae,
        k=arguments.cached_k,
        tokens=arguments.cached_tokens,
        batch=arguments.cached_batch,
        context=min(job.context, 128),  # sae-lens reads whole rows
    )
    both = Documents(_Joined(job.train, job.held_out), job.train.name, job.train.fingerprint)
    cache(
        model,
        both,
        job.site,
        folder / "ours",
        tokens=job.tokens,
        tokenization=job.tokenization,
    )
    job = replace(
        job, cached_ours=folder / "ours", cached_theirs=peer_cache(job, folder / "model", folder / "theirs")
    )
    return {arch: beside("cached", job, arch, arguments) for arch in arguments.archs}


class _Joined(Sequence[str]):
    """Training text, and after it what is held out, as a corpus has them."""

    def __init__(self, *parts: Documents) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def wide(like: HookedModel, width: int, folder: Path) -> HookedModel:
    """One Llama block of this width with random weights and the tokenizer of `like`, saved as a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=like.d_vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=like.context,
        bos_token_id=like.bos_id,
        pad_token_id=like.pad_id,
    )
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        LlamaForCausalLM(config).save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    return HookedModel.from_pretrained(str(folder))


def peer_cache(job: Job, model: Path, out: Path) -> Path:
    """The activations of the same text by sae-lens's `CacheActivationsRunner`."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    rows = pretokenised(job)
    prompts = min(32, len(rows))
    with contextlib.redirect_stderr(io.StringIO()):
        CacheActivationsRunner(
            CacheActivationsRunnerConfig(
                dataset_path="given",
                model_name=str(model),
                model_class_name="AutoModelForCausalLM",
                model_batch_size=prompts,
                hook_name=module_name(job.model, job.layer),
                d_in=job.model.site(job.site).width,
                training_tokens=len(rows) // prompts * prompts * job.context,
                context_size=job.context,
                new_cached_activations_path=str(out),
                device="cpu",
                buffer_size_gb=0.25,
            ),
            override_dataset=rows,
        ).run()
    return out


def many(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Four SAEs in one pass, beside one: ours, at the last layer, where the forward is dearest."""
    job = replace(job, site=f"blocks.{job.model.n_layers - 1}.hook_resid_post", d_sae=arguments.many_d_sae)
    config = sae.TrainConfig(batch_size=job.batch)
    names = [f"k{k}" for k in (job.k // 2, job.k, 2 * job.k, 4 * job.k)]
    jobs = {name: sae.Job(job.site, sae.TopK(job.d_sae, k=int(name[1:]))) for name in names}
    seconds: dict[str, list[float]] = {"one": [], "four": []}
    shares = []
    for round_ in range(arguments.rounds):
        for who in ("one", "four") if round_ % 2 == 0 else ("four", "one"):
            chosen = jobs if who == "four" else {names[1]: jobs[names[1]]}
            stream = ActivationStream(
                job.model, job.train, job.site, tokenization=job.tokenization, batch_size=job.batch
            )
            started = time.perf_counter()
            made = fit_all(stream, chosen, job.tokens, config=config)
            seconds[who].append(time.perf_counter() - started)
            stream.close()
            if who == "one":
                parts = next(iter(made.values()))[1]
                shares.append(parts["model"] / parts["total"])
    ratio = spread([four / one for one, four in zip(seconds["one"], seconds["four"])])
    found = {
        "site": job.site,
        "d_sae": job.d_sae,
        "ks": [int(name[1:]) for name in names],
        "tokens": job.tokens // job.batch * job.batch,
        "bare_tokens_per_second": bare(job, arguments.rounds),
        "seconds": {who: spread(values) for who, values in seconds.items()},
        "share_of_the_forward_in_one": spread(shares),
        "ratio": ratio,
        "goal": GOALS["many"],
    }
    print(
        f"many: four SAEs of {job.d_sae:,} latents cost {shown(ratio, '.2f')} times one (goal: at most {GOALS['many']}); "
        f"the forward is {shown(found['share_of_the_forward_in_one'], '.0%')} of one\n",
        flush=True,
    )
    return found


@torch.no_grad()
def bare(job: Job, rounds: int) -> dict[str, float]:
    """Tokens a second of the Hugging Face forward cut off at the layer, on the batches that streams use."""
    model = truncated(job.model, job.layer)
    batches = list(token_batches(job.model, job.train, job.tokenization, max_tokens=min(job.tokens, 65_536)))
    rates = []
    for round_ in range(rounds + 1):
        started = time.perf_counter()
        for batch in batches:
            model(input_ids=batch.input_ids)
        if round_:  # the first is a warm-up
            rates.append(sum(batch.n_kept for batch in batches) / (time.perf_counter() - started))
    found = spread(rates)
    print(f"the bare forward to {job.site}: {shown(found, ',.0f')} tokens/s\n", flush=True)
    return found


# figures


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "low": low, "high": high}


def shown(found: Mapping[str, float], form: str) -> str:
    return f"{found['median']:{form}} ({found['low']:{form}}–{found['high']:{form}})"


def means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over the rounds, each of which trained with a seed of its own."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else statistics.mean(value for value in values if value is not None)

    return {key: mean(key) for key in QUALITY}


@contextlib.contextmanager
def scratch(place: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-train-") as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", help="directory of a causal model instead of the built-in one")
    parser.add_argument("--stories", help="its text, one document a line")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--site", default="blocks.2.hook_resid_post")
    parser.add_argument("--context", type=int, default=256, help="tokens a row")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument(
        "--k", type=int, default=16, help="active latents: k, and the target of the gated SAE"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--cached-d", type=int, default=512)
    parser.add_argument("--cached-d-sae", type=int, default=4096)
    parser.add_argument("--cached-k", type=int, default=32)
    parser.add_argument("--cached-tokens", type=int, default=200_000)
    parser.add_argument("--cached-batch", type=int, default=2048)
    parser.add_argument("--many-d-sae", type=int, default=512)
    parser.add_argument("--quality-tokens", type=int, default=50_000, help="held-out tokens")
    parser.add_argument(
        "--peer-lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="sae-lens's, to choose from"
    )
    parser.add_argument("--peer-l1", type=float, help="sae-lens's penalty; searched for without it")
    parser.add_argument("--search-tries", type=int, default=5, help="runs of that search, for each lr")
    parser.add_argument("--scratch", type=Path, help="where the caches lie while it runs (0.8 GB by default)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)

    model = HookedModel.from_pretrained(arguments.llama or "storyworld")
    train, held_out = split_held_out(load_documents(arguments.stories or "storyworld"))
    job = Job(
        model, arguments.site, train, held_out, arguments.context, arguments.d_sae, arguments.k,
        arguments.tokens, arguments.batch,
    )  # fmt: skip
    print(
        f"{date.today()}, {platform.machine()}, {arguments.threads} threads, torch {torch.__version__}; "
        f"{Path(model.name).name}, {model.n_layers} layers, d_model {model.d_model}; "
        f"{arguments.rounds} rounds, alternating: median (quartiles)\n"
    )
    results: dict[str, Any] = {}
    if "live" in arguments.parts:
        results["live"] = live(job, arguments)
    if "cached" in arguments.parts:
        with scratch(arguments.scratch) as folder:
            results["cached"] = cached(job, arguments, folder)
    if "many" in arguments.parts:
        results["many"] = many(job, arguments)
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
    }
    print(json.dumps({"date": str(date.today()), "torch": torch.__version__, **settings, "results": results}))


if __name__ == "__main__":
    main()
