"""How long probes of all layers take, beside the forward passes that give the activations.

    python scripts/bench_probes.py                                  # StoryWorld's model, 20,000 tokens
    python scripts/bench_probes.py --model DIR_OR_ID --data FILE    # labels are random where the table has none
    python scripts/bench_probes.py --sklearn                        # scikit-learn, layer by layer, too

Every probe is fitted to all tokens at once, at the embedding and after every block: one fit of a site each, with
one penalty. The time of the forward is that of reading the activations at all those sites, tokenisation
included. Best of three, in seconds; `ratio` is to the forward. `--folds` times a cross-validation, too: five
folds, the penalty chosen of five in each, shuffled labels beside, so that some 160 fits a site.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from probes.crossval import cross_validate
from probes.data import LabelledData, load_labelled
from probes.linear import stacks
from probes.methods import Lda, LeastSquares, Logistic, MassMean, Method, Mlp, Problems
from probes.splits import encode_labels
from probes.study import default_sites
from steerkit.activations import collect
from steerkit.data import load_documents
from steerkit.models import HookedModel

METHODS: dict[str, Method] = {
    "mass_mean": MassMean(),
    "lda": Lda(),
    "least_squares": LeastSquares(),
    "logistic, float32": Logistic(C=0.01, exact=False),
    "logistic, float64": Logistic(C=0.01),
    "mlp": Mlp(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="storyworld")
    parser.add_argument("--data", default="storyworld:mood")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--device", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folds", action="store_true", help="time the cross-validation too")
    parser.add_argument("--sklearn", action="store_true")
    arguments = parser.parse_args()
    model = HookedModel.from_pretrained(arguments.model, device=arguments.device)
    data = labelled(arguments.data)
    sites = default_sites(model)

    def forward() -> Any:
        return collect(model, data.texts, sites, max_tokens=arguments.tokens, drop_sinks=False)

    acts, seconds = timed(forward, arguments.repeats)
    codes, classes = encode_labels(np.array([data.labels[t] for t in acts.document.tolist()]))
    groups = acts.document.numpy()
    print(
        f"{len(codes):,} tokens, {len(sites)} sites, {len(classes)} classes; {torch.get_num_threads()} threads, {model.device}"
    )
    print(f"{'forward':<28}{seconds:>9.3f}")
    result: dict[str, Any] = {"forward": seconds, "tokens": len(codes), "sites": len(sites)}
    problems = Problems.single(torch.from_numpy(codes), len(classes))
    for name, method in METHODS.items():

        def fit(method: Method = method) -> None:
            for _, x in stacks(dict(acts)):
                method.fit(x, problems.to(x.device))
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        result[name] = report(name, fit, seconds, arguments.repeats)
    if arguments.folds:
        result["folds"] = report(
            "folds",
            lambda: cross_validate(dict(acts), codes, groups, method=Logistic(exact=False)),
            seconds,
            1,
        )
    if arguments.sklearn:
        result["scikit-learn"] = report(
            "scikit-learn, a layer a time", lambda: sklearn(acts, codes), seconds, 1
        )
    print(json.dumps(result))


def labelled(spec: str) -> LabelledData:
    """Labelled texts, or texts with random labels."""
    if spec.startswith("storyworld"):
        return load_labelled(spec, n_texts=2000)
    texts = list(load_documents(spec))
    return LabelledData.of(texts, np.random.default_rng(0).integers(0, 2, len(texts)).tolist())


def sklearn(acts: Any, codes: np.ndarray) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for x in acts.values():
        make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(x.cpu().numpy(), codes)


def report(name: str, work: Callable[[], Any], forward: float, repeats: int) -> float:
    _, seconds = timed(work, repeats)
    print(f"{name:<28}{seconds:>9.3f}   ratio {seconds / forward:.2f}")
    return seconds


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """(what it returned last, the least seconds)."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - started)
    return found, best


if __name__ == "__main__":
    main()
