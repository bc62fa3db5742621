"""What the papers promise of SAEs, measured: Pareto fronts of all architectures, ours beside sae-lens's, controls, and a verdict.

    python scripts/reproduce_sae.py --quick --out runs/reproduce           # StoryWorld, minutes on 2 cores
    python scripts/reproduce_sae.py --out runs/reproduce \\
        --llama DIR --stories FILE.txt --bert DIR --wikitext FILE.txt      # hours: three models, more of everything

For each model and seed one pass of `sae.train_many` trains every architecture at every sparsity; sae-lens's own trainer gets the
same activations in the same batches and order. A seed sets initial weights and the order of the data. Beside them stand PCA with as
many components as there are active latents, a random SAE, an SAE of the same model with random weights, and mean ablation. All are
evaluated by `sae.evaluation` on the same held-out text.

sae-lens is given what it lacks: of its learning rates the one that does best, and coefficients of its penalties that land at our
L0s, both found by a run of their own (`pilot`) of the first seed.

Two architectures are compared by what one needs as a share of what the other needs: active latents at equal error, or error at
equal L0, each as a geometric mean over what both curves cover, interpolated between logarithms. Intervals are Student's t over
seeds, 95 %. Writes OUT/index.html and OUT/results.json. Finished parts, one file each in OUT/parts, are not repeated by a rerun
with the same settings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sae
from sae.evaluation import evaluate_all
from sae.judging import Examples, monosemanticity
from sae.judging.dictionaries import of_sae
from sae.judging.judgement import CHOSEN_ON, JUDGE_SEED
from steerkit import storyworld
from steerkit.activations import ActivationStream, Tokenization, collect
from steerkit.data import load_documents, split_held_out
from steerkit.models import HookedModel
from steerkit.plots import page
from steerkit.runs import jsonable, make_provenance, progress, read_json, write_json
from steerkit.stats import jackknife

PENALTIES = ("l1", "sqrt_l1", "p_anneal", "gated", "jumprelu")
CHOSEN = ("topk", "batch_topk", "matryoshka", "hierarchical_topk")
ARCHITECTURES = (*PENALTIES, *CHOSEN)
PEERS = {
    "l1": "Standard",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
}
"""Architecture -> what sae-lens calls it."""
PRUNED = ("l1", "sqrt_l1", "gated")
STEERED = ("l1", "sqrt_l1", "gated", "jumprelu")
"""Those whose target L0 is checked."""
GUIDED = ("mood=happy", "mood=sad", "tense=past", "weather=rainy", "place=forest", "politeness=rude")
FIGURES = ("l0", "fvu", "delta_ce", "ce_recovered", "final_cosine", "dead_fraction")
TARGET, TOLERANCE = 16.0, 0.05
LEAST = {"fvu": 1e-4, "delta_ce": 1e-4, "final_distance": 1e-5}
"""What an error counts for at least: below it lies noise, and logarithms need something positive."""
LABELS = {
    "fvu": "FVU",
    "delta_ce": "ΔCE, nats a token",
    "final_distance": "1 − cosine of the final states",
}
SHORT = {"fvu": "FVU", "delta_ce": "ΔCE", "final_distance": "1 − final cosine"}


@dataclass(frozen=True)
class Case:
    """A model, its text, and how much is trained on it."""

    name: str
    model: str
    data: str
    site: str
    d_sae: int
    tokens: int
    l0s: tuple[int, ...]
    wide_l0s: tuple[int, ...]
    """More for L1 and sqrt-L1, which are looked at from afar: half the L0 of the largest is to be reached."""
    held_out: int
    """Held-out tokens."""
    architectures: tuple[str, ...] = ARCHITECTURES
    peers: tuple[str, ...] = tuple(PEERS)
    peer_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tokenization: Tokenization = field(default_factory=Tokenization)
    labels: tuple[str, ...] = ()
    judge_tokens: int = 100_000

    @property
    def middle(self) -> int:
        """The L0 that settings are chosen at."""
        return 16 if 16 in self.l0s else self.l0s[len(self.l0s) // 2]

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def l0s_of(self, arch: str) -> tuple[int, ...]:
        return (*self.l0s, *self.wide_l0s) if arch in ("l1", "sqrt_l1") else self.l0s

    def configs(self) -> dict[str, sae.Config]:
        """Name -> architecture, of all that are trained for one seed."""
        found: dict[str, sae.Config] = {}
        for arch in self.architectures:
            for l0 in self.l0s_of(arch):
                given = {"target_l0": float(l0)} if arch in PENALTIES else {"k": l0}
                found[f"{arch}-{l0}"] = sae.get(arch)(self.d_sae, **given)
        if self.labels:
            found[f"guided-{self.middle}"] = sae.Guided(self.d_sae, k=self.middle, labels=self.labels)
        return found


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What is asked for."""
    quick = arguments.quick
    found = [
        Case(
            "storyworld",
            "storyworld",
            "storyworld",
            "blocks.2.hook_resid_post",
            d_sae=512 if quick else 1024,
            tokens=200_000 if quick else 1_000_000,
            l0s=(8, 16, 32),
            wide_l0s=(64,),
            held_out=10_000 if quick else 100_000,
            architectures=("l1", "sqrt_l1", "gated", "jumprelu", "topk", "batch_topk")
            if quick
            else ARCHITECTURES,
            peers=("l1", "gated", "topk") if quick else tuple(PEERS),
            peer_lrs=(3e-3, 1e-2) if quick else (1e-3, 3e-3, 1e-2),
            labels=GUIDED,
            judge_tokens=60_000 if quick else 200_000,
        )
    ]
    if arguments.llama:
        llama = replace(
            found[0],
            name="llama",
            model=arguments.llama,
            data=arguments.stories,
            d_sae=1024,
            tokens=200_000 if quick else 1_000_000,
            labels=(),
        )
        found.append(llama)
    if arguments.bert:
        bert = replace(
            found[0],
            name="bert",
            model=arguments.bert,
            data=arguments.wikitext,
            site="blocks.3.hook_resid_post",
            d_sae=1536,
            tokens=200_000 if quick else 500_000,
            l0s=(16, 32, 64),
            wide_l0s=(128,),
            held_out=10_000,  # WikiText-2's 5 % are no more
            tokenization=Tokenization(context=128, packing=True),
            labels=(),
        )
        found.append(bert)
    if arguments.tokens:
        found = [replace(case, tokens=arguments.tokens) for case in found]
    return [case for case in found if not arguments.only or case.name in arguments.only]


@dataclass(eq=False)
class Bench:
    """A case at work: the model, the text, and what has been measured."""

    case: Case
    model: HookedModel
    out: Path

    def __post_init__(self) -> None:
        self.documents = load_documents(self.case.data)
        self.train, self.held_out = split_held_out(self.documents)

    def stream(self, seed: int, model: HookedModel | None = None) -> ActivationStream:
        """The very batches that `train_many` takes for this seed."""
        batch = sae.TrainConfig().resolve(self.case.tokens).batch_size
        assert batch is not None
        return ActivationStream(
            model or self.model,
            self.train,
            self.case.site,
            tokenization=self.case.tokenization,
            batch_size=batch,
            seed=seed,
        )

    def evaluate(
        self, saes: Mapping[str, sae.SAE], sink_threshold: float | None
    ) -> dict[str, dict[str, Any]]:
        found = evaluate_all(
            self.model,
            saes,
            self.held_out,
            self.case.site,
            tokenization=self.case.tokenization,
            tokens=self.case.held_out,
            sink_threshold=sink_threshold,
        )
        return {name: one.to_dict() for name, one in found.items()}

    def runs(self, what: str, seed: int) -> Path:
        """Where the runs of one pass go: other settings, another directory."""
        mark = hashlib.sha256(json.dumps(jsonable(self.case.settings()), sort_keys=True).encode()).hexdigest()
        return self.out / "runs" / f"{self.case.name}-{what}-{seed}-{mark[:8]}"


def row(side: str, arch: str, target: float | None, seed: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    found = {"side": side, "arch": arch, "target": target, "seed": seed}
    found |= {key: figures.get(key) for key in FIGURES}
    cosine = found["final_cosine"]
    found["final_distance"] = None if cosine is None else 1 - cosine
    return found


# the parts of a case


def train_ours(bench: Bench, seed: int) -> dict[str, Any]:
    """Every architecture at every sparsity, in one pass."""
    case = bench.case
    jobs = [sae.Job(case.site, config, seed, name) for name, config in case.configs().items()]
    runs = sae.train_many(
        bench.model,
        case.data,
        jobs,
        case.tokens,
        bench.runs("ours", seed),
        tokenization=case.tokenization,
        resume=True,
        seed=seed,
        held_out_tokens=case.held_out,
    )
    rows = []
    for run in runs:
        arch, _, target = run.path.name.rpartition("-")
        rows.append(row("steerkit", arch, float(target), seed, run.summary))
    clean, mean = runs[0].summary["ce_clean"], runs[0].summary["ce_mean"]
    cosine = runs[0].summary["final_cosine_mean"]
    ablation = {
        "l0": 0.0,
        "fvu": 1.0,
        "delta_ce": None if clean is None else mean - clean,
        "final_cosine": cosine,
    }
    return {"rows": [*rows, row("control", "mean ablation", None, seed, ablation)]}


def trained(bench: Bench, seed: int, name: str) -> sae.SAE:
    return sae.load(bench.runs("ours", seed) / name)


def controls(bench: Bench, seed: int) -> dict[str, Any]:
    """PCA, random SAEs, and SAEs of the random model: in the model, and where they come from."""
    case = bench.case
    threshold = trained(bench, seed, f"topk-{case.middle}").metadata["sink_threshold"]
    acts = collect(
        bench.model, bench.train, case.site, tokenization=case.tokenization, max_tokens=20_000
    )[case.site].float()  # fmt: skip
    saes: dict[tuple[str, int], sae.SAE] = {}
    for n in (*case.l0s, *case.wide_l0s):
        if n < acts.shape[1]:
            saes["PCA", n] = pca(acts, n)
    for k in case.l0s:
        saes["random SAE", k] = sae.random_sae(trained(bench, seed, f"topk-{k}"), acts[:8192], seed=seed)
    jobs = [sae.Job(case.site, sae.TopK(case.d_sae, k=k), seed, f"topk-{k}") for k in case.l0s]
    of_random_model = sae.train_many(
        bench.model.randomized(seed),
        case.data,
        jobs,
        case.tokens,
        bench.runs("random-model", seed),
        tokenization=case.tokenization,
        resume=True,
        seed=seed,
        held_out_tokens=case.held_out,
    )
    for k, run in zip(case.l0s, of_random_model):
        saes["SAE of the random model", k] = run.sae
    found = bench.evaluate({f"{name}-{k}": one for (name, k), one in saes.items()}, threshold)
    rows = [row("control", name, k, seed, found[f"{name}-{k}"]) for name, k in saes]
    rows += [
        row("control", "the same, on the random model", k, seed, run.summary)
        for k, run in zip(case.l0s, of_random_model)
    ]
    return {"rows": rows}


@torch.no_grad()
def pca(acts: Tensor, n: int) -> sae.SAE:
    """The projection onto n principal components as an SAE with exactly n active latents: one for each sign of each."""
    mean = acts.mean(0)
    components = torch.linalg.svd(acts - mean, full_matrices=False).Vh[:n]
    found = sae.L1(2 * n, target_l0=None, l1=0.0).build(acts.shape[1])
    found.W_dec.copy_(torch.cat([components, -components]))
    found.W_enc.copy_(found.W_dec.T)
    found.b_dec.copy_(mean)
    return found.eval().requires_grad_(False)


def prune(bench: Bench, seed: int) -> dict[str, Any]:
    """What becomes of SAEs whose latents lose their lowest activations."""
    case, curves = bench.case, {}
    for arch in PRUNED:
        if arch in case.architectures:
            one = trained(bench, seed, f"{arch}-{case.l0s[-1]}")
            curve = sae.prune_curve(
                bench.model,
                one,
                bench.held_out,
                case.site,
                quantiles=(0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
                tokens=case.held_out,
                calibration_tokens=max(case.held_out // 2, 8192),
                tokenization=case.tokenization,
                sink_threshold=one.metadata["sink_threshold"],
            )
            curves[arch] = [
                {**point, **row("pruned", arch, float(case.l0s[-1]), seed, point)}
                for point in curve.to_dict()
            ]
    return {"curves": curves}


def judged(bench: Bench, seed: int) -> dict[str, Any]:
    """FMS of the guided SAE and of others on the concepts that it was guided to; on stories that nothing else uses."""
    from scipy.sparse import csr_array

    case = bench.case
    stories, n = [], 0
    for story in storyworld.stream(JUDGE_SEED):
        if n >= case.judge_tokens:
            break
        stories.append(story)
        n += len(story.tokens)
    values = {
        label: [
            "yes" if story.attributes[label.split("=")[0]] == label.split("=")[1] else "no"
            for story in stories
        ]
        for label in case.labels
    }
    found = collect(bench.model, [story.text for story in stories], case.site, tokenization=case.tokenization)
    acts, document = found[case.site].float(), found.document.numpy()
    counts = np.bincount(document, minlength=len(stories))
    weights = (1 / np.maximum(counts, 1))[document].astype(np.float32)
    pool = csr_array((weights, (document, np.arange(len(document)))), shape=(len(stories), len(document)))
    index = np.arange(len(stories))
    examples = Examples.of(values, index, index < CHOSEN_ON * len(stories))
    plain = trained(bench, seed, f"topk-{case.middle}")
    saes = {
        "guided": trained(bench, seed, f"guided-{case.middle}"),
        "topk": plain,
        "random SAE": sae.random_sae(plain, acts[:8192], seed=seed),
    }
    scores = {}
    for name, one in saes.items():
        measured = monosemanticity(of_sae(name, one, acts, pool)[0], examples)
        concepts = {c.concept.split("=no")[0].split("=yes")[0]: c.score for c in measured.concepts}
        scores[name] = {
            "fms": {str(p): interval.estimate for p, interval in measured.score.items()},
            "accs_0": measured.accs_0.estimate,
            "concepts": {
                concept: {str(p): value for p, value in s.items()} for concept, s in concepts.items()
            },
        }
    return {"scores": scores, "examples": examples.describe()}


# sae-lens's own training


class PeerTraining:
    """sae-lens's SAETrainer, given our batches in units of unit mean square (its `expected_average_only_in`). The schedule is that
    of its tutorial: warm-ups of a twentieth, a decay over the last fifth."""

    def __init__(
        self, arch: str, d_in: int, d_sae: int, l0: int, coefficient: float | None, lr: float, steps: int,
        batch: int, seed: int,
    ) -> None:  # fmt: skip
        import sae_lens.saes as saes
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.arch, self.l0 = arch, l0
        self.steers = coefficient is None and arch in PENALTIES
        """Whether the coefficient is being searched for."""
        self.log_coefficient = math.log(coefficient or 0.1)
        self.recent: list[tuple[float, float, float]] = []
        """Of the last steps: share of the variance left over, L0, logarithm of the coefficient."""
        settings: dict[str, Any] = {"k": l0}
        if arch in PENALTIES:
            name = "l0" if arch == "jumprelu" else "l1"
            settings = {f"{name}_coefficient": coefficient or 0.1}
            settings[f"{name}_warm_up_steps"] = 0 if self.steers else steps // 20
        made_of = getattr(saes, f"{PEERS[arch]}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, **settings)
        torch.manual_seed(seed)
        coder = getattr(saes, f"{PEERS[arch]}TrainingSAE")(made_of)
        config = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            dead_feature_window=min(1000, max(1, steps // 20)),
        )
        self.trainer: Any = SAETrainer(config, coder, data_provider=iter(()))
        self.kept = max(1, steps // 10)
        self.gain = min(0.1, 20 / steps)
        self.before = 0.0

    def step(self, batch: Tensor) -> None:
        """Learn from a batch in training units."""
        out = self.trainer.step(batch)
        self.trainer.n_training_steps += 1
        acts = out.feature_acts.detach()
        acts = acts.to_dense() if acts.is_sparse else acts
        l0 = float((acts > 0).sum()) / len(batch)
        left = float((out.sae_out.detach() - batch).square().sum() / (batch - batch.mean(0)).square().sum())
        self.recent = [*self.recent[-self.kept + 1 :], (left, l0, self.log_coefficient)]
        if self.steers:
            off = math.log(max(l0, 0.05 * self.l0) / self.l0)
            self.log_coefficient += self.gain * max(-1.0, min(1.0, off)) + 0.2 * (off - self.before)
            self.before = off
            for scheduler in self.trainer.coefficient_schedulers.values():
                scheduler.final_value = scheduler.current_value = math.exp(self.log_coefficient)

    @property
    def outcome(self) -> dict[str, float]:
        """Means over the last tenth."""
        left, l0, log_coefficient = np.mean(self.recent, axis=0).tolist()
        return {"fvu": left, "l0": l0, "coefficient": math.exp(log_coefficient)}

    def result(self, scale: float) -> sae.SAE:
        """What it saves for inference, read by us."""
        self.trainer.sae.fold_activation_norm_scaling_factor(scale)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.sae.save_inference_model(folder)
            return sae.load(folder)


def feed(bench: Bench, seed: int, peers: Sequence[PeerTraining], title: str) -> Any:
    """Train them all on one pass; gives the statistics of the activations."""
    stream = bench.stream(seed)
    statistics = stream.statistics(bench.case.site)
    steps = bench.case.tokens // stream.batch_size
    with progress(steps * stream.batch_size, title) as bar:
        for _ in range(steps):
            batch = next(stream)[bench.case.site].float() * statistics.scale
            for peer in peers:
                peer.step(batch)
            bar.advance(stream.batch_size)
    stream.close()
    return statistics


def peer(bench: Bench, arch: str, l0: int, coefficient: float | None, lr: float, seed: int) -> PeerTraining:
    case = bench.case
    batch = sae.TrainConfig().resolve(case.tokens).batch_size
    assert batch is not None
    d_in = bench.model.site(case.site).width
    return PeerTraining(arch, d_in, case.d_sae, l0, coefficient, lr, case.tokens // batch, batch, seed)


def pilot(bench: Bench, seed: int) -> dict[str, Any]:
    """sae-lens's learning rates, at one L0, and then its coefficients, at the others."""
    case = bench.case
    tried = {
        (arch, lr): peer(bench, arch, case.middle, None, lr, seed)
        for arch in case.peers
        for lr in case.peer_lrs
    }
    feed(bench, seed, list(tried.values()), "sae-lens, learning rates")

    def badness(arch: str, lr: float) -> tuple[bool, float]:
        """A run whose L0 went astray cannot be compared; among the others the error decides."""
        outcome = tried[arch, lr].outcome
        return abs(math.log(max(outcome["l0"], 0.01) / case.middle)) > 0.15, outcome["fvu"]

    best = {arch: min(case.peer_lrs, key=lambda lr: badness(arch, lr)) for arch in case.peers}
    # A coefficient that is found while it moves is not the one that lands there when it is fixed: fixed ones, and between them.
    found = {arch: tried[arch, best[arch]].outcome["coefficient"] for arch in case.peers if arch in PENALTIES}
    fixed = {
        (arch, factor): peer(bench, arch, case.middle, factor * coefficient, best[arch], seed)
        for arch, coefficient in found.items()
        for factor in (1.0, 2.0, 4.0, 8.0, 16.0)
    }
    if fixed:
        feed(bench, seed, list(fixed.values()), "sae-lens, coefficients")
    coefficients = {}
    for arch in found:
        points = sorted(
            (math.log(max(one.outcome["l0"], 0.1)), math.log(one.outcome["coefficient"]))
            for (name, _), one in fixed.items()
            if name == arch
        )
        for l0 in case.l0s_of(arch):
            logarithm = np.interp(math.log(l0), *zip(*points))
            coefficients[f"{arch}-{l0}"] = math.exp(logarithm)
    return {
        "lr": best,
        "coefficients": coefficients,
        "tried": {f"{arch}, lr {lr:g}": one.outcome for (arch, lr), one in tried.items()},
    }


def train_peers(bench: Bench, seed: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    case = bench.case
    peers = {
        (arch, l0): peer(
            bench, arch, l0, chosen["coefficients"].get(f"{arch}-{l0}"), chosen["lr"][arch], seed
        )
        for arch in case.peers
        for l0 in case.l0s_of(arch)
    }
    statistics = feed(bench, seed, list(peers.values()), "sae-lens")
    saes = {f"{arch}-{l0}": one.result(statistics.scale) for (arch, l0), one in peers.items()}
    found = bench.evaluate(saes, statistics.sink_threshold)
    return {"rows": [row("sae-lens", arch, l0, seed, found[f"{arch}-{l0}"]) for arch, l0 in peers]}


# the whole


class Plan:
    """The parts that are left, and how long they may take: by their weights, from those that are done."""

    def __init__(self, out: Path, total: float) -> None:
        self.out, self.total = out, total
        self.done = self.skipped = 0.0
        self.started = time.monotonic()
        self.seconds = {"wall": 0.0, "processor": 0.0}
        """What all parts took, those too that were there already."""

    def part(
        self,
        name: str,
        settings: Mapping[str, Any],
        weight: float,
        work: Callable[..., dict[str, Any]],
        *given: Any,
    ) -> dict[str, Any]:
        """The result of `work(*given)`: read, if it was made with the same settings, else worked out and written."""
        path = self.out / "parts" / f"{name}.json"
        settings = json.loads(json.dumps(jsonable(settings)))
        known = read_json(path) if path.exists() else {}
        if known.get("settings") == settings:
            self.skipped += weight
            self._count(known["seconds"])
            print(f"{name}: there already", flush=True)
            return known["result"]
        print(f"{name} …", flush=True)
        started, processor = time.monotonic(), time.process_time()
        result = json.loads(json.dumps(jsonable(work(*given))))
        seconds = {"wall": time.monotonic() - started, "processor": time.process_time() - processor}
        write_json(path, {"settings": settings, "seconds": seconds, "result": result})
        self._count(seconds)
        self.done += weight
        left = self.total - self.done - self.skipped
        eta = (time.monotonic() - self.started) / self.done * left
        print(
            f"{name}: {seconds['wall']:.0f} s; {self.share:.0%} of all, about {eta / 60:.0f} min to go",
            flush=True,
        )
        return result

    def _count(self, seconds: Mapping[str, float]) -> None:
        for clock, value in seconds.items():
            self.seconds[clock] += value

    @property
    def share(self) -> float:
        return (self.done + self.skipped) / self.total


def weights(case: Case) -> dict[str, float]:
    """What the parts of a seed cost, in our SAEs' training."""
    n_peers = sum(len(case.l0s_of(arch)) for arch in case.peers)
    found = {
        "ours": len(case.configs()) + 3.0,
        "controls": 2.0 * len(case.l0s) + 3,
        "prune": 4.0,
        "peers": 2.0 * n_peers + 3,
    }
    return found | ({"judged": 3.0} if case.labels else {})


def pilot_weight(case: Case) -> float:
    return 2.0 * (len(case.peers) * len(case.peer_lrs) + 3 * len(case.l0s))


def measure(case: Case, seeds: Sequence[int], plan: Plan) -> dict[str, Any]:
    """Everything of one case."""
    bench = Bench(case, HookedModel.from_pretrained(case.model), plan.out)
    cost = weights(case)

    def part(what: str, work: Callable[..., dict[str, Any]], seed: int, *given: Any) -> dict[str, Any]:
        settings = {**case.settings(), "seed": seed, "given": given}
        weight = cost.get(what, pilot_weight(case))
        return plan.part(f"{case.name}-{what}-{seed}", settings, weight, work, bench, seed, *given)

    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    judgements: list[dict[str, Any]] = []
    chosen = part("pilot", pilot, seeds[0])
    for seed in seeds:
        rows += part("ours", train_ours, seed)["rows"]
        rows += part("controls", controls, seed)["rows"]
        curves.append(part("prune", prune, seed)["curves"])
        if case.labels:
            judgements.append(part("judged", judged, seed))
        rows += part("peers", train_peers, seed, chosen)["rows"]
    return {
        "case": case.settings(),
        "measures": ("fvu", "delta_ce" if rows[0]["delta_ce"] is not None else "final_distance"),
        "rows": rows,
        "pruned": curves,
        "fms": [found["scores"] for found in judgements],
        "judged_on": judgements[0]["examples"] if judgements else "",
        "peer": chosen,
    }


# what it says


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; `ratio` ones are geometric."""

    mean: float
    low: float
    high: float
    n: int
    note: str = ""

    @classmethod
    def of(cls, values: Sequence[float], *, ratio: bool = False, note: str = "") -> Estimate:
        used = [math.log(v) for v in values] if ratio else list(values)
        back: Callable[[float], float] = math.exp if ratio else float
        if len(used) < 2:
            return cls(back(used[0]), math.nan, math.nan, 1, note)
        found = jackknife(np.array([[v, 1.0] for v in used]), lambda s: s[..., 0] / s[..., 1])
        return cls(back(found.estimate), back(found.low), back(found.high), len(used), note)

    def show(self, form: str = ".3g") -> str:
        return f"{self.mean:{form}}" + (
            "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        )


@dataclass(frozen=True)
class Check:
    """One line of evidence: a figure, what was expected of it, and whether it holds."""

    case: str
    what: str
    estimate: Estimate
    expected: str
    verdict: str
    """confirmed, refuted, undecided."""
    form: str = ".2f"


@dataclass(frozen=True)
class Finding:
    """An expectation and all its checks."""

    expectation: str
    checks: tuple[Check, ...]
    words: str
    """More, in words."""

    @property
    def verdict(self) -> str:
        verdicts = {check.verdict for check in self.checks}
        if not verdicts:
            return "not measured"
        return verdicts.pop() if len(verdicts) == 1 else "mixed"

    def sentence(self) -> str:
        parts = [
            f"{check.verdict} on {check.case} ({check.what}: {check.estimate.show(check.form)}{check.estimate.note}, "
            f"expected {check.expected})"
            for check in self.checks
        ]
        return "; ".join(parts)


def at_most(estimate: Estimate, limit: float) -> str:
    """Whether the whole interval is below a limit, or above it."""
    if math.isnan(estimate.low):
        return "undecided"
    return "confirmed" if estimate.high <= limit else "refuted" if estimate.low > limit else "undecided"


def at_least(estimate: Estimate, limit: float) -> str:
    if math.isnan(estimate.low):
        return "undecided"
    return "confirmed" if estimate.low >= limit else "refuted" if estimate.high < limit else "undecided"


Curve = list[tuple[float, float]]
"""(L0, the lowest error that so many active latents or fewer leave), L0 rising."""


def curve(points: Iterable[tuple[float, float | None]], measure: str) -> Curve:
    found: Curve = []
    for l0, error in sorted((l0, error) for l0, error in points if error is not None):
        error = max(error, LEAST[measure])
        found.append((l0, min(error, found[-1][1]) if found else error))
    return found


def l0_ratio(a: Curve, b: Curve) -> tuple[float, bool]:
    """(active latents that `a` needs as a share of those of `b` at equal error, whether that is only a bound).

    Where the curves have no error in common, as the worse one never gets so far, the ratio of the nearest ends bounds it.
    """
    low = max(a[-1][1], b[-1][1])
    high = min(a[0][1], b[0][1])
    if low >= high:
        better, worse = (a, b) if a[0][1] <= b[-1][1] else (b, a)
        bound = better[0][0] / worse[-1][0]
        return (bound if better is a else 1 / bound), True
    grid = np.linspace(math.log(low), math.log(high), 25)
    return _ratio(*(_inverted(one, grid) for one in (a, b))), False


def error_ratio(a: Curve, b: Curve) -> float:
    """Error of `a` as a share of that of `b` at equal L0; NaN where they have none in common."""
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    if low > high:
        return math.nan
    grid = np.linspace(math.log(low), math.log(high), 25)
    logs = [np.log(np.array(one)) for one in (a, b)]
    return _ratio(*(np.interp(grid, one[:, 0], one[:, 1]) for one in logs))


def _inverted(one: Curve, grid: np.ndarray) -> np.ndarray:
    """Logarithms of the L0 at which a curve comes to these logarithms of the error."""
    falling = [point for i, point in enumerate(one) if i == 0 or point[1] < one[i - 1][1]]
    logs = np.log(np.array(falling))[::-1]
    return np.interp(grid, logs[:, 1], logs[:, 0])


def _ratio(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.exp((a - b).mean()))


class Data:
    """The rows of a case, by side, architecture and seed."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found, self.rows = found, found["rows"]
        self.name, self.measures = found["case"]["name"], found["measures"]
        self.seeds = sorted({r["seed"] for r in self.rows})

    def of(self, side: str, arch: str, seed: int | None = None) -> list[dict[str, Any]]:
        return [r for r in self.rows if (r["side"], r["arch"]) == (side, arch) and seed in (None, r["seed"])]

    def architectures(self, side: str) -> list[str]:
        return [arch for arch in (*ARCHITECTURES, "guided") if self.of(side, arch)]

    def curve(self, side: str, arch: str, seed: int, measure: str) -> Curve:
        return curve([(r["l0"], r[measure]) for r in self.of(side, arch, seed)], measure)

    def group(self, side: str, arch: str, target: float | None, key: str) -> Estimate | None:
        values = [r[key] for r in self.of(side, arch) if r["target"] == target]
        return None if not values or None in values else Estimate.of(values)

    def l0_ratio(self, a: str, b: str, measure: str) -> Estimate:
        found = [
            l0_ratio(self.curve("steerkit", a, s, measure), self.curve("steerkit", b, s, measure))
            for s in self.seeds
        ]
        note = ""
        if any(bound for _, bound in found):
            note = " (the curves have no error in common: a bound)"
        return Estimate.of([value for value, _ in found], ratio=True, note=note)

    def error_ratio(self, a: tuple[str, str], b: tuple[str, str], measure: str) -> Estimate:
        found = [error_ratio(self.curve(*a, s, measure), self.curve(*b, s, measure)) for s in self.seeds]
        found = [ratio for ratio in found if not math.isnan(ratio)]
        if not found:
            return Estimate(math.nan, math.nan, math.nan, 0, " (the curves have no L0 in common)")
        return Estimate.of(found, ratio=True)


def findings(results: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What each expectation came to."""
    data = [Data(found) for found in results]
    return [
        Finding(
            "Gated needs half the L0 of L1 for the same fidelity",
            tuple(
                Check(d.name, f"L0 of gated / L0 of L1 at equal {SHORT[m]}", r := d.l0_ratio("gated", "l1", m), "≤ 0.5",
                      at_most(r, 0.5))
                for d in data for m in d.measures
            ),
            "Rajamanoharan et al. 2024.",
        ),
        Finding(
            "sqrt-L1 needs a lower L0 than L1 for the same loss",
            tuple(
                Check(d.name, f"L0 of sqrt-L1 / L0 of L1 at equal {SHORT[m]}", r := d.l0_ratio("sqrt_l1", "l1", m),
                      "< 1", at_most(r, 1.0))
                for d in data for m in d.measures
            ),
            "Riggs & Brinkmann 2024.",
        ),
        Finding(
            "Removing the lowest activations lowers L0 at little cost",
            tuple(check for d in data for check in _pruning_checks(d)),
            "Little cost: less than is saved. That is, more than 10 % of the active latents go before the error has risen by 10 %.",
        ),
        Finding(
            "TopK, BatchTopK and JumpReLU are at or above gated",
            tuple(
                Check(d.name, f"{SHORT[m]} of {arch} / that of gated at equal L0",
                      r := d.error_ratio(("steerkit", arch), ("steerkit", "gated"), m), "≤ 1", at_most(r, 1.0))
                for d in data for arch in ("topk", "batch_topk", "jumprelu") for m in d.measures
            ),
            "At equal L0, interpolated.",
        ),
        Finding(
            "A guided SAE raises FMS on its concepts",
            tuple(check for d in data for check in _guided_checks(d)),
            "FMS@p as in sae.judging.monosemanticity, on stories that nothing was trained on; the difference from an unguided "
            "TopK of the same k and seed.",
        ),
        Finding(
            "--target-l0 16 lands within 5 %",
            tuple(
                Check(d.name, f"held-out L0 of {arch}, off by", _off_target(d, arch), "within ± 5 % for every seed",
                      "confirmed" if max(abs(v) for v in _off_by(d, arch)) <= TOLERANCE else "refuted", "+.1%")
                for d in data for arch in STEERED if _off_by(d, arch)
            ),
            "Each seed counts by itself.",
        ),
        Finding(
            "Ours is no worse than sae-lens's own training",
            tuple(
                Check(d.name, f"{SHORT[m]} of our {arch} / that of sae-lens's at equal L0",
                      r := d.error_ratio(("steerkit", arch), ("sae-lens", arch), m), "≤ 1", at_most(r, 1.0))
                for d in data for arch in d.architectures("sae-lens") for m in d.measures
            ),
            "The same activations in the same order and number; sae-lens has the learning rate and coefficients that suit it.",
        ),
    ]  # fmt: skip


def _off_by(d: Data, arch: str) -> list[float]:
    return [r["l0"] / TARGET - 1 for r in d.of("steerkit", arch) if r["target"] == TARGET]


def _off_target(d: Data, arch: str) -> Estimate:
    return Estimate.of(_off_by(d, arch))


def _pruning_checks(d: Data) -> Iterator[Check]:
    for arch in d.found["pruned"][0]:
        for measure in d.measures:
            saved = [_saved(curves[arch], measure) for curves in d.found["pruned"]]
            estimate = Estimate.of(saved)
            yield Check(
                d.name,
                f"share of {arch}'s active latents that go for 10 % more {SHORT[measure]}",
                estimate,
                "> 10 %",
                at_least(estimate, 0.1),
                ".0%",
            )


def _saved(points: Sequence[Mapping[str, Any]], measure: str, rise: float = 0.1) -> float:
    """The share of L0 that is gone when the error has risen by `rise`."""
    ordered = sorted(points, key=lambda point: -point["l0"])
    whole = ordered[0]
    limit = (1 + rise) * max(whole[measure], LEAST[measure])
    before = whole
    for point in ordered[1:]:
        if point[measure] > limit:
            part = (limit - before[measure]) / (point[measure] - before[measure])
            l0 = before["l0"] + max(0.0, min(1.0, part)) * (point["l0"] - before["l0"])
            return 1 - l0 / whole["l0"]
        before = point
    return 1 - before["l0"] / whole["l0"]


def _guided_checks(d: Data) -> Iterator[Check]:
    scores = d.found["fms"]
    for p in scores[0]["guided"]["fms"] if scores else ():
        gains = [s["guided"]["fms"][p] - s["topk"]["fms"][p] for s in scores]
        estimate = Estimate.of(gains)
        yield Check(
            d.name, f"FMS@{p} of guided less that of topk", estimate, "> 0", at_least(estimate, 0.0), "+.3f"
        )


# the page

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_GREY = "rgb(128, 128, 128)"
_TICKS = [digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5)]
_TWO = ("#2b8ccc", "#d8702a")
"""Blue and orange that can be read on light and on dark."""
_MARKS = {"confirmed": "✓", "refuted": "✗", "undecided": "?", "mixed": "±", "not measured": "–"}
_CONTROLS = {"PCA": "square-open", "random SAE": "x", "SAE of the random model": "diamond-open"}
_CSS = """<style>
.wide { overflow-x: auto; } .wide table { min-width: 100%; } td small { color: var(--quiet); white-space: nowrap; }
.wide td:first-child, .wide td:nth-child(2) { white-space: nowrap; }
.verdict { white-space: nowrap; font-weight: 600; } h3 { font-size: 14px; font-weight: 600; margin: 20px 0 4px; }
.quiet { color: var(--quiet); } details { margin: 4px 0 12px; } summary { cursor: pointer; }
</style>"""


def report(results: Sequence[Mapping[str, Any]], found: Sequence[Finding], out: Path, quick: bool) -> Path:
    """index.html."""
    parts: list[Any] = [_CSS, _head(results, quick), _verdicts(found)]
    for one in results:
        data = Data(one)
        parts.append(f"<h2>{html.escape(data.name)}</h2>{_about(data)}")
        for measure in data.measures:
            parts += [f"<h3>{LABELS[measure]} against L0</h3>", _fronts(data, measure)]
        parts += [
            "<h3>Ours beside sae-lens's own training</h3><p>Equal tokens, the very same batches; solid and filled: ours.</p>",
            _beside_peer(data, "fvu"),
        ]
        parts += [
            "<h3>Lowest activations removed</h3><p>Filled: SAEs as they were trained, at several sparsities. Open, dashed: the one "
            "of the highest L0 with 10 to 70 % of each latent's lowest activations removed.</p>",
            _pruning(data, data.measures[1]),
        ]
        if one["fms"]:
            parts += [
                "<h3>Monosemanticity on the guided concepts</h3><p>FMS@1 by concept, means over seeds with 95 % intervals; 0.25 is "
                f"what candidates have that know nothing. {html.escape(one['judged_on'])}.</p>",
                _fms(data),
            ]
        parts += [f"<h3>All figures of {html.escape(data.name)}</h3>", _table(data)]
    return page("Sparse autoencoders: what the papers promise", parts, out / "index.html")


def _head(results: Sequence[Mapping[str, Any]], quick: bool) -> str:
    first = results[0]
    seeds = len({r["seed"] for r in first["rows"]})
    return (
        f"<p>{date.today()}; {seeds} seed{'s' * (seeds != 1)}{', the quick setting' * quick}. Points are means over seeds, with "
        "95 % intervals (Student's t over seeds); figures are of held-out text. “At equal error” and “at equal L0” are geometric "
        "means of ratios over what both curves cover, interpolated between logarithms. A verdict needs the whole interval on one "
        "side: <b>undecided</b> means that it is not.</p>"
    )


def _verdicts(found: Sequence[Finding]) -> str:
    rows = []
    for finding in found:
        evidence = "".join(
            f"<tr><td>{html.escape(check.case)}</td><td>{html.escape(check.what)}{html.escape(check.estimate.note)}</td>"
            f'<td class="number">{check.estimate.show(check.form)}</td><td>{html.escape(check.expected)}</td>'
            f'<td class="verdict">{_MARKS[check.verdict]} {check.verdict}</td></tr>'
            for check in finding.checks
        )
        counts = [
            f"{sum(c.verdict == v for c in finding.checks)} {v}"
            for v in ("confirmed", "refuted", "undecided")
        ]
        counts = [part for part in counts if not part.startswith("0 ")]
        rows.append(
            f'<h3>{_MARKS[finding.verdict]} {html.escape(finding.expectation)}: <span class="verdict">{finding.verdict}</span></h3>'
            f'<p>{html.escape(finding.words)} <span class="quiet">{", ".join(counts)}.</span></p>'
            f'<div class="wide"><table><tr><th>model</th><th>figure</th><th class="number">mean [95 %]</th><th>expected</th>'
            f"<th>verdict</th></tr>{evidence}</table></div>"
        )
    return "<h2>Expectations</h2>" + "".join(rows)


def _about(data: Data) -> str:
    case = data.found["case"]
    lrs = ", ".join(f"{arch} {lr:g}" for arch, lr in data.found["peer"]["lr"].items())
    name = "" if case["model"] == data.name else f"{html.escape(Path(case['model']).name)}, "
    return (
        f"<p>{name}<code>{html.escape(case['site'])}</code>, {case['d_sae']:,} latents, {case['tokens']:,} tokens an SAE, "
        f"{case['held_out']:,} held-out tokens at most. sae-lens's learning rates: {lrs}, chosen from "
        f"{', '.join(f'{lr:g}' for lr in case['peer_lrs'])}.</p>"
    )


def _points(data: Data, side: str, arch: str, measure: str) -> list[tuple[Estimate, Estimate, str]]:
    found = []
    for target in sorted({r["target"] for r in data.of(side, arch)}):
        l0, error = (data.group(side, arch, target, key) for key in ("l0", measure))
        if l0 is not None and error is not None:
            found.append((l0, error, f"{arch}, {side}, aimed at {target:g}"))
    return sorted(found, key=lambda point: point[0].mean)


def _trace(points: Sequence[tuple[Estimate, Estimate, str]], name: str, **more: Any) -> Any:
    from plotly import graph_objects as go

    def bars(which: int) -> dict[str, Any]:
        values = [point[which] for point in points]
        return {
            "type": "data",
            "symmetric": False,
            "array": [0 if math.isnan(v.high) else v.high - v.mean for v in values],
            # on a logarithmic axis a bar must not reach zero
            "arrayminus": [0 if math.isnan(v.low) else v.mean - max(v.low, v.mean / 20) for v in values],
            "thickness": 1,
            "width": 2,
        }

    return go.Scatter(
        x=[l0.mean for l0, _, _ in points],
        y=[max(error.mean, 1e-5) for _, error, _ in points],
        error_x=bars(0),
        error_y=bars(1),
        text=[html.escape(text) for _, _, text in points],
        name=name,
        hovertemplate="%{text}<br>L0 %{x:.3g}<br>%{y:.4g}<extra></extra>",
        **{"mode": "lines+markers", **more},
    )


def _panels(titles: Sequence[str], label: str, height: int = 400) -> Any:
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=len(titles), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03
    )
    figure.update_annotations(font={"size": 12})
    figure.update_xaxes(
        type="log",
        title_text="L0",
        tickvals=[4, 8, 16, 32, 64, 128],
        ticktext=["4", "8", "16", "32", "64", "128"],
    )
    figure.update_yaxes(type="log", tickvals=_TICKS, ticktext=[f"{tick:g}" for tick in _TICKS])
    figure.update_yaxes(title_text=label, col=1)
    figure.update_layout(
        height=height, showlegend=True, margin={"t": 32, "l": 64, "r": 8, "b": 40},
        legend={"orientation": "h", "y": -0.18, "yanchor": "top"},
    )  # fmt: skip
    return figure


def _fronts(data: Data, measure: str) -> Any:
    figure = _panels(("with a penalty", "with a number of latents"), LABELS[measure], 460)
    number = 0
    for column, family in enumerate((PENALTIES, CHOSEN), 1):
        for arch in (a for a in family if data.of("steerkit", a)):
            look = {
                "marker": {"size": 8, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
                "line": {"width": 1.5, "dash": _DASHES[number % len(_DASHES)]},
            }
            figure.add_trace(
                _trace(_points(data, "steerkit", arch, measure), arch, **look), row=1, col=column
            )
            number += 1
    ablated = data.group("control", "mean ablation", None, measure)
    l0s = [r["l0"] for r in data.rows if r["side"] == "steerkit"]
    for column in (1, 2):
        for name, symbol in _CONTROLS.items():
            points = _points(data, "control", name, measure)
            look = {
                "marker": {"size": 7, "symbol": symbol, "color": _GREY},
                "line": {"width": 1, "dash": "dot", "color": _GREY},
            }
            if points:
                trace = _trace(points, name, legendgroup=name, showlegend=column == 1, **look)
                figure.add_trace(trace, row=1, col=column)
        if ablated is not None:
            ends = [(Estimate(l0, l0, l0, 0), ablated, "mean ablation") for l0 in (min(l0s), max(l0s))]
            trace = _trace(
                ends, "mean ablation", mode="lines", legendgroup="mean", showlegend=column == 1,
                line={"width": 1.5, "dash": "dash", "color": _GREY},
            )  # fmt: skip
            figure.add_trace(trace, row=1, col=column)
    return figure


def _beside_peer(data: Data, measure: str) -> Any:
    archs = data.architectures("sae-lens")
    figure = _panels(archs, LABELS[measure], 340)
    for column, arch in enumerate(archs, 1):
        for i, side in enumerate(("steerkit", "sae-lens")):
            figure.add_trace(_of_two(i, _points(data, side, arch, measure), side, column), row=1, col=column)
    return figure


def _pruning(data: Data, measure: str) -> Any:
    archs = list(data.found["pruned"][0])
    figure = _panels(archs, LABELS[measure], 340)
    for column, arch in enumerate(archs, 1):
        cut = []
        for same in zip(*(curves[arch] for curves in data.found["pruned"])):
            l0, error = (Estimate.of([point[key] for point in same]) for key in ("l0", measure))
            share = same[0]["value"]
            cut.append((l0, error, "as trained" if share is None else f"{share:.0%} of activations removed"))
        whole = _points(data, "steerkit", arch, measure)
        figure.add_trace(_of_two(0, whole, "as trained", column), row=1, col=column)
        figure.add_trace(_of_two(1, cut, "lowest activations removed", column), row=1, col=column)
    return figure


def _of_two(which: int, points: Sequence[tuple[Estimate, Estimate, str]], name: str, column: int) -> Any:
    """A curve of the first kind or of the second, alike in all panels."""
    return _trace(
        points,
        name,
        legendgroup=name,
        showlegend=column == 1,
        marker={"size": 8, "symbol": ("circle", "square-open")[which], "color": _TWO[which]},
        line={"width": 1.5, "dash": ("solid", "dash")[which], "color": _TWO[which]},
    )


def _fms(data: Data) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    scores = data.found["fms"]
    for i, name in enumerate(scores[0]):
        concepts = list(scores[0][name]["concepts"])
        found = [Estimate.of([s[name]["concepts"][c]["1"] for s in scores]) for c in concepts]
        marker: dict[str, Any] = {"size": 10, "symbol": _SYMBOLS[i]}
        if name == "random SAE":
            marker |= {"color": _GREY, "symbol": "x"}
        figure.add_scatter(
            x=concepts,
            y=[one.mean for one in found],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [0 if math.isnan(one.high) else one.high - one.mean for one in found],
                "arrayminus": [0 if math.isnan(one.low) else one.mean - one.low for one in found],
                "thickness": 1,
                "width": 3,
            },
            mode="markers",
            marker=marker,
            name=name,
            offsetgroup=str(i),
        )
    figure.update_layout(
        scattermode="group",
        scattergap=0.5,
        showlegend=True,
        height=340,
        yaxis={"title": {"text": "FMS@1"}, "range": [0, 1]},
    )
    return figure


def _table(data: Data) -> str:
    keys = [("l0", "L0"), ("fvu", "FVU"), ("delta_ce", "ΔCE"), ("ce_recovered", "CE recovered"), ("final_cosine", "final cosine"),
            ("dead_fraction", "dead")]  # fmt: skip
    keys = [(key, label) for key, label in keys if any(r[key] is not None for r in data.rows)]
    rows = []
    sides = list(dict.fromkeys((r["side"], r["arch"], r["target"]) for r in data.rows))
    for side, arch, target in sorted(sides, key=lambda s: ("steerkit", "sae-lens", "control").index(s[0])):
        cells = []
        for key, _ in keys:
            one = data.group(side, arch, target, key)
            if one is None:
                cells.append('<td class="number">–</td>')
                continue
            ends = "" if math.isnan(one.low) else f"<br><small>{one.low:.3g} – {one.high:.3g}</small>"
            cells.append(f'<td class="number">{one.mean:.3g}{ends}</td>')
        aim = "" if target is None else f"{target:g}"
        rows.append(
            f'<tr><td>{side}</td><td>{html.escape(arch)}</td><td class="number">{aim}</td>{"".join(cells)}</tr>'
        )
    head = "".join(f'<th class="number">{label}</th>' for _, label in keys)
    return (
        '<div class="wide"><table><tr><th></th><th></th><th class="number">aimed at</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens, latents and architectures: minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce-sae"))
    parser.add_argument("--llama", help="directory of a small causal model")
    parser.add_argument("--stories", help="its text, one document a line")
    parser.add_argument("--bert", help="directory of an encoder")
    parser.add_argument("--wikitext", help="its text, one paragraph a line")
    parser.add_argument("--only", nargs="*", help="of storyworld, llama, bert")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="tokens an SAE, instead of those of the setting")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    for model, text in (("llama", "stories"), ("bert", "wikitext")):
        if (getattr(arguments, model) is None) != (getattr(arguments, text) is None):
            parser.error(f"--{model} and --{text} go together")
    warnings.filterwarnings("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen, seeds = cases(arguments), range(arguments.seeds)
    if not chosen or not seeds:
        parser.error("there is nothing to measure")
    total = sum(pilot_weight(case) + len(seeds) * sum(weights(case).values()) for case in chosen)
    plan = Plan(arguments.out, total)
    with contextlib.suppress(KeyboardInterrupt):
        results = [measure(case, seeds, plan) for case in chosen]
        found = findings(results)
        write_json(
            arguments.out / "results.json",
            {
                "provenance": make_provenance(seeds=list(seeds), quick=arguments.quick),
                "seconds": plan.seconds,
                "findings": [{**asdict(one), "verdict": one.verdict} for one in found],
                "cases": results,
            },
        )
        shown = report(results, found, arguments.out, arguments.quick)
        for one in found:
            print(f"\n{one.expectation}: {one.verdict}.\n  " + one.sentence().replace("; ", "\n  "))
        wall, processor = plan.seconds.values()
        print(f"\n{shown}: {wall:.0f} s, {processor:.0f} s of processor time")
        return
    raise SystemExit(130)


if __name__ == "__main__":
    main()
