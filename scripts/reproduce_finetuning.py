"""What papers say about fine-tuning, measured on one encoder: layers, freezing, rollback, stability.

    python scripts/reproduce_finetuning.py --model DIR --data sst2_train.tsv --out runs/finetuning      # an hour on one core
    python scripts/reproduce_finetuning.py --quick --out runs/quick                # StoryWorld's moods, two seeds: minutes

1. Do upper layers change more?                            Merchant et al. 2020, https://arxiv.org/abs/2004.14448
2. How many top blocks reach 90 % of the way from frozen to full?            Lee et al. 2019, https://arxiv.org/abs/1911.03090
3. Does rolling back upper blocks hurt more than lower?    Hao et al. 2019, https://arxiv.org/abs/1908.05620
4. Does the stability recipe cut the spread over seeds?    Mosbach et al. 2021, https://arxiv.org/abs/2006.04884, and Zhang et al.
                                                           2021, https://arxiv.org/abs/2006.05987

Training rows share no sentence with those held out (`--groups phrases`, made for SST-2; a column; or none: each row stands for
itself). Learning rates are chosen on validation, for each number of trained blocks apart, with one seed, on a grid of steps of √10
that is drawn out where the best is at its edge. Questions 1 and 3 are of the same models, all blocks trained. Question 4 is of
few rows, where instability shows, without a validation split, so that no run is stopped at its best. Intervals are over seeds
(Student's t, or the jackknife over runs), the test rows being the same. Writes OUT/index.html, OUT/summary.json and OUT/summary.md;
trainings that are done, in OUT/freezing and OUT/parts, are not repeated by a rerun with the same settings.
"""

from __future__ import annotations

import argparse
import html
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.data import LabelledData, read_rows
from probes.freezing import FreezingSweep, freezing_sweep
from probes.instability import Remedies, representation_instability, seed_runs
from probes.rollback import rollback_sweep
from probes.similarity import drift, similarity
from probes.study import default_sites
from probes.weights import preserved, weights_of
from steerkit.adapters.tasks import PHRASES, split_rows
from steerkit.data import load_documents
from steerkit.finetuning import FinetuneConfig, finetune
from steerkit.models import HookedModel
from steerkit.objectives import Classification
from steerkit.plots import error_bars, page
from steerkit.runs import Run, make_provenance, read_json, write_json
from steerkit.stats import Interval, jackknife

RATES = (1e-4, 1e-4 * math.sqrt(10), 1e-3)
EXTEND = 3
MEASURES = {"CKA": "linear_cka", "Procrustes": "procrustes", "RSA": "rsa"}
SHARE = 0.9
RECIPE = Remedies(warmup=0.1)
"""On top of an optimiser that corrects its biases."""
ARMS = {
    "baseline": (Remedies(bias_correction=False, warmup=0.0), False),
    "bias correction, warm-up": (RECIPE, False),
    "recipe": (RECIPE, True),
    "recipe, top block anew": (replace(RECIPE, reinitialised=1), True),
}
"""The ways to train whose spread is compared, and whether they train long."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured."""

    n_train: int = 4000
    n_test: int = 600
    """Half as many rows are for validation."""
    n_small: int = 500
    """Training rows of question 4."""
    n_texts: int = 200
    """Test texts whose tokens' activations are compared."""
    n_rollback: int = 300
    """Test rows of question 3."""
    seeds: int = 5
    epochs: float = 1.0
    short: float = 3.0
    """Epochs of question 4."""
    long: float = 8.0
    """Epochs of its recipe."""
    batch_size: int = 32

    def quick(self) -> Sizes:
        return replace(self, n_train=400, n_test=200, n_small=200, n_texts=60, seeds=2)


# -- what is studied -------------------------------------------------------------------------------------------------


class Study:
    """One model and one set of labelled texts."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self.sizes, self.out, self.counts = sizes, options.out, options.counts
        self.model = HookedModel.from_pretrained(options.model)
        documents = load_documents(options.data)
        label = documents.column(options.label_column)
        group = documents.column(options.groups) if options.groups not in (None, PHRASES) else str
        n = len(documents) if options.data != "storyworld" else sizes.n_train + 2 * sizes.n_test
        rows = [(documents[i], str(label(i)), str(group(i))) for i in range(n) if documents[i].strip()]
        self.splits = split_rows(rows, sizes.n_train, sizes.n_test, 0, phrases=options.groups == PHRASES)
        train, validation, test = ([(text, name) for text, name, _ in part] for part in self.splits)
        self.objective = Classification(self.model, train, validation, test)
        self.small = Classification(self.model, train[: sizes.n_small], None, test)
        self.few = Classification(self.model, train, None, test[: sizes.n_rollback])
        self.config = FinetuneConfig(
            epochs=sizes.epochs,
            batch_size=sizes.batch_size,
            warmup=0.1,
            dtype=options.dtype,
        )
        self.seeds = tuple(range(sizes.seeds))

    @cached_property
    def lr(self) -> float:
        """The rate that is best on validation when all blocks are trained."""
        found = sweep(self, (), self.seeds[:1]).results[-1].lr
        assert found is not None
        return found

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "objective": self.objective.settings(),
            "sizes": asdict(self.sizes),
            "training": asdict(self.config),
            "rates": RATES,
        }

    @cached_property
    def read_texts(self) -> LabelledData:
        texts = [text for text, _, _ in self.splits[2][: self.sizes.n_texts]]
        return LabelledData(texts, [""] * len(texts), np.arange(len(texts)))

    def activations(self, model: HookedModel) -> dict[str, torch.Tensor]:
        """Embedding and residual stream after each block, at tokens of the test texts, the same ones always."""
        return self.rows(model).acts

    def rows(self, model: HookedModel) -> Any:
        return read_rows(model, self.read_texts, default_sites(model))

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in that part's file, made if it is not there."""
        file = self.out / "parts" / f"{name}.json"
        if not file.exists():
            started = time.perf_counter()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, make())
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return read_json(file)


# -- what is measured ------------------------------------------------------------------------------------------------


def sweep(study: Study, counts: Sequence[int] | None, seeds: Sequence[int]) -> FreezingSweep:
    """Question 2, for these numbers of trained blocks, none and all always among them."""
    return freezing_sweep(
        study.model,
        study.objective,
        study.config,
        counts=counts,
        learning_rates=RATES,
        seeds=seeds,
        extend=EXTEND,
        out=study.out / "freezing",
        resume=True,
        quiet=False,
    )


def taken_apart(study: Study, seed: int) -> dict[str, Any]:
    """Questions 1 and 3, of one tuned model: what changed at each site, and what rollback does."""
    model, objective = study.model, study.objective
    before = study.rows(model)
    weights = {name: weight.clone() for name, weight in weights_of(model).items()}
    with preserved(model, objective):
        finetune(model, objective, replace(study.config, lr=study.lr, seed=seed))
        after = study.activations(model)
        options: dict[str, Any] = {"documents": before.groups, "interval": False, "top_rows": None}
        changed = {
            name: [
                1 - p.value
                for p in similarity(before.acts, after, measure, pairs="matched", **options).pairs.values()
            ]
            for name, measure in MEASURES.items()
        }
        moved = drift(before.acts, after, documents=torch.from_numpy(before.groups), interval=False)
        study.few.head = objective.head
        undone = rollback_sweep(
            model, weights, partial(study.few.evaluate, split="test", dtype=study.config.dtype)
        )
    return {
        "score": undone.tuned.estimate,
        "rolled_back": undone.base.score.estimate,
        "activations": {**changed, "relative change": [d.relative_change.estimate for d in moved.values()]},
        "weights": {str(part): value for part, value in undone.relative_change.items()},
        "rollback": {
            kind: [s.change.difference.estimate for s in undone.of_kind(kind)]
            for kind in ("single", "prefix", "suffix")
        },
    }


def spread(study: Study, arm: Remedies, long: bool) -> dict[str, Any]:
    """Question 4, for one way to train: how far apart runs of several seeds end."""
    epochs = study.sizes.long if long else study.sizes.short
    runs = seed_runs(
        study.model,
        study.small,
        replace(study.config, lr=study.lr),
        study.seeds,
        remedies=replace(arm, epochs=epochs),
        read=study.activations,
    )
    found = runs.instability()
    cka = list(representation_instability(runs.acts, "linear_cka").values())
    return {
        "epochs": epochs,
        "lr": study.lr,
        "scores": list(found.scores),
        "failed": len(found.failed),
        "measures": {
            "SD": found.sd.to_dict(),
            "disagreement": found.disagreement.to_dict(),
            "JSD": found.jsd.to_dict(),
            "1 − CKA, last layer": cka[-1].to_dict(),
        },
        "cka": [value.to_dict() for value in cka],
    }


# -- what it comes to ------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> Interval:
    """Over seeds, with Student's t; NaN ends for one."""
    column = np.array(list(values), dtype=np.float64)
    if len(column) < 2:
        return Interval(float(column[0]), math.nan, math.nan, math.nan)
    return jackknife(np.stack([column, np.ones(len(column))], 1), lambda s: s[..., 0] / s[..., 1])


def upper_less_lower(values: Sequence[float]) -> float:
    """Mean over the upper half of the blocks less the mean over the lower half; the one in the middle is in neither."""
    half = len(values) // 2
    return float(np.mean(values[len(values) - half :]) - np.mean(values[:half]))


def layers(study: Study) -> dict[str, Any]:
    """Questions 1 and 3."""
    runs = [study.once(f"seed{seed}", partial(taken_apart, study, seed)) for seed in study.seeds]
    n = study.model.n_layers
    changes: dict[str, Any] = {
        name: {
            "by_layer": [mean(run["activations"][name][i] for run in runs) for i in range(n + 1)],
            "upper_less_lower": mean(upper_less_lower(run["activations"][name][1:]) for run in runs),
        }
        for name in runs[0]["activations"]
    }
    blocks = [[run["weights"][str(i)] for i in range(n)] for run in runs]
    changes["weights"] = {
        "by_layer": [mean(column) for column in zip(*blocks)],
        "upper_less_lower": mean(map(upper_less_lower, blocks)),
    }
    rollback: dict[str, Any] = {
        kind: [mean(column) for column in zip(*(run["rollback"][kind] for run in runs))]
        for kind in ("single", "prefix", "suffix")
    }
    rollback["upper_less_lower"] = mean(upper_less_lower(run["rollback"]["single"]) for run in runs)
    rollback["suffix_less_prefix"] = [
        mean(run["rollback"]["suffix"][-k] - run["rollback"]["prefix"][k - 1] for run in runs)
        for k in range(1, n)
    ]
    return {
        "lr": study.lr,
        "score": mean(run["score"] for run in runs),
        "rolled_back": mean(run["rolled_back"] for run in runs),
        "changes": changes,
        "rollback": rollback,
    }


def freezing(study: Study) -> dict[str, Any]:
    """Question 2."""
    return {"by_count": frozen(sweep(study, study.counts, study.seeds))}


def stability(study: Study) -> dict[str, Any]:
    """Question 4."""
    arms = {
        name: study.once(f"spread-{number}", partial(spread, study, arm, long))
        for number, (name, (arm, long)) in enumerate(ARMS.items())
    }
    return {name: against(arm, arms["baseline"]) for name, arm in arms.items()}


PARTS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "layers": layers,
    "freezing": freezing,
    "stability": stability,
}


def frozen(found: FreezingSweep) -> list[dict[str, Any]]:
    """Each k's score and how far it comes, with intervals over seeds and, beside them, over test rows."""
    least, most = found.results[0].scores, found.results[-1].scores
    rows = []
    for r in found.results:
        columns = np.stack([r.scores, least, most], axis=1)
        way = Interval(r.normalised.estimate, math.nan, math.nan, math.nan)
        if len(columns) > 1:
            way = jackknife(columns, lambda s: (s[..., 0] - s[..., 1]) / (s[..., 2] - s[..., 1]))
        share = sum(r.scores) / sum(most)
        rows.append(
            {
                "k": r.k,
                "lr": r.lr,
                "at_edge": r.at_edge,
                "score": mean(r.scores),
                "way": way,
                "way_over_rows": r.normalised,
                "share_of_full": share,
            }
        )
    return rows


def against(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's figures, and how they differ from the baseline's.

    SDs by their ratio, whose interval is that of two normal samples (F); the rest by differences, standard errors of both added
    in squares and Student's t on one arm's degrees of freedom, which is wide where seeds have effects of their own.
    """
    from scipy.special import fdtri, stdtrit

    n = len(arm["scores"])
    found: dict[str, Any] = {"score": mean(arm["scores"]), "failed": arm["failed"], "epochs": arm["epochs"]}
    found["measures"] = {name: as_interval(value) for name, value in arm["measures"].items()}
    sd, other = (side["measures"]["SD"]["estimate"] for side in (arm, baseline))
    ratio = sd / other if other else math.nan
    ends = [math.sqrt(fdtri(n - 1, n - 1, p)) for p in (0.025, 0.975)]
    found["sd_ratio"] = Interval(ratio, ratio * ends[0], ratio * ends[1], math.nan)
    t = float(stdtrit(n - 1, 0.975))
    found["less_baseline"] = {}
    for name in arm["measures"]:
        a, b = as_interval(arm["measures"][name]), as_interval(baseline["measures"][name])
        error = math.hypot(a.standard_error, b.standard_error)
        gap = a.estimate - b.estimate
        if name != "SD":
            found["less_baseline"][name] = Interval(gap, gap - t * error, gap + t * error, error)
    return found


def as_interval(value: Mapping[str, Any]) -> Interval:
    """From JSON, where NaN is null."""
    return Interval(**{key: math.nan if v is None else v for key, v in value.items()})


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """What the intervals support, a line each."""
    told = []
    if "layers" in found:
        for name, change in found["layers"]["changes"].items():
            told.append(
                f"{name}, upper half of the blocks less lower half: {sure(change['upper_less_lower'])}"
            )
        rollback = found["layers"]["rollback"]
        told.append(
            f"accuracy with one block rolled back, upper half less lower half: {sure(rollback['upper_less_lower'])}"
        )
        for k, value in enumerate(rollback["suffix_less_prefix"], 1):
            told.append(f"accuracy with the top {k} rolled back less with the bottom {k}: {sure(value)}")
    if "freezing" in found:
        counts = found["freezing"]["by_count"]
        reached = [r["k"] for r in counts if r["way"].estimate >= SHARE]
        surely = [r["k"] for r in counts if r["way"].low >= SHARE or r is counts[-1]]
        share = [r["k"] for r in counts if r["share_of_full"] >= SHARE]
        told.append(
            f"{SHARE:.0%} of the way from head alone to all {counts[-1]['k']} blocks: reached with the top {reached[0]} trained, "
            f"beyond the seeds' doubt with {surely[0]}"
        )
        told.append(
            f"{SHARE:.0%} of the full model's plain accuracy: reached with the top {share[0]} trained"
        )
    for name, arm in found.get("stability", {}).items():
        if name != "baseline":
            gaps = ", ".join(f"{what} {sure(value)}" for what, value in arm["less_baseline"].items())
            told.append(f"{name} against baseline: SD × {shown(arm['sd_ratio'])}; {gaps}")
    return told


def sure(value: Interval) -> str:
    word = "more" if value.low > 0 else "less" if value.high < 0 else "not told apart"
    return f"{shown(value)} ({word})"


def shown(value: Interval, digits: int = 3) -> str:
    told = f"{value.estimate:.{digits}f}"
    return told if math.isnan(value.low) else f"{told} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


# -- what is shown ---------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> str:
    """Markdown, for the docs."""
    lines = []
    if "layers" in found:
        changes, rollback = found["layers"]["changes"], found["layers"]["rollback"]
        lines += ["", *header("layer", *changes)]
        for i in range(len(rollback["single"]) + 1):
            own = {name: change["by_layer"] for name, change in changes.items()}
            own["weights"] = [None, *own["weights"]]
            cells = ["–" if values[i] is None else shown(values[i]) for values in own.values()]
            lines.append(row("embedding" if i == 0 else f"block {i - 1}", *cells))
        kinds = ("single", "prefix", "suffix")
        lines += ["", *header("block rolled back", "alone", "up to it", "from it on")]
        lines += [
            row(i, *map(shown, values)) for i, values in enumerate(zip(*(rollback[kind] for kind in kinds)))
        ]
    if "freezing" in found:
        lines += ["", *header("k", "rate", "accuracy", "way", "way, over test rows", "of full")]
        for r in found["freezing"]["by_count"]:
            rate = "–" if r["lr"] is None else f"{r['lr']:.2g}{' (edge)' if r['at_edge'] else ''}"
            ways = shown(r["way"], 2), shown(r["way_over_rows"], 2)
            lines.append(row(r["k"], rate, shown(r["score"]), *ways, f"{r['share_of_full']:.3f}"))
    if "stability" in found:
        measures = list(found["stability"]["baseline"]["measures"])
        lines += ["", *header("", "epochs", "accuracy", *measures, "SD, × baseline")]
        for name, arm in found["stability"].items():
            cells = [shown(arm["measures"][m]) for m in measures]
            lines.append(
                row(name, f"{arm['epochs']:g}", shown(arm["score"]), *cells, shown(arm["sd_ratio"], 2))
            )
    return "\n".join(lines)


def header(*cells: str) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def figures(found: Mapping[str, Any]) -> list[Any]:
    """The page's parts."""
    parts: list[Any] = []
    if "layers" in found:
        changes, rollback = found["layers"]["changes"], found["layers"]["rollback"]
        blocks = [str(i) for i in range(len(rollback["single"]))]
        sizes = {
            "activations": changes["relative change"]["by_layer"][1:],
            "weights": changes["weights"]["by_layer"],
        }
        kinds = {"one block": "single", "up to the block": "prefix", "from the block on": "suffix"}
        parts += [
            "<h2>Do upper layers change more?</h2>",
            "<p>1 − similarity of the base's and the tuned model's activations: CKA, held-out Procrustes, RSA.</p>",
            lines_of(["embed", *blocks], {name: changes[name]["by_layer"] for name in MEASURES}, "change"),
            "<p>Size of the change as a share of the base: activations after each block, which carry the changes of all below, and "
            "the block's own weights.</p>",
            lines_of(blocks, sizes, "relative change"),
            "<h2>Does rolling back upper blocks hurt more?</h2>",
            lines_of(
                blocks,
                {name: rollback[kind] for name, kind in kinds.items()},
                "accuracy, rolled back − tuned",
                0.0,
            ),
        ]
    if "freezing" in found:
        counts = found["freezing"]["by_count"]
        ways = {
            "over seeds": [r["way"] for r in counts],
            "over test rows": [r["way_over_rows"] for r in counts],
        }
        parts += [
            "<h2>How many top blocks reach 90 % of the way?</h2>",
            lines_of([str(r["k"]) for r in counts], ways, "way from head alone (0) to all (1)", SHARE),
        ]
    if "stability" in found:
        arms = found["stability"]
        parts.append("<h2>Does the recipe cut the spread?</h2>")
        for name in arms["baseline"]["measures"]:
            values = {name: [arm["measures"][name] for arm in arms.values()]}
            parts.append(lines_of(list(arms), values, name, mode="markers"))
    return parts


def lines_of(
    x: list[str],
    series: Mapping[str, Sequence[Interval]],
    title: str,
    level: float | None = None,
    mode: str = "lines+markers",
) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, values in series.items():
        figure.add_scatter(
            x=x, y=[v.estimate for v in values], error_y=error_bars(values), mode=mode, name=name
        )
    if level is not None:
        figure.add_hline(y=level, line={"color": "rgb(128, 128, 128)", "width": 1, "dash": "dot"})
    figure.update_layout(
        xaxis={"type": "category"}, yaxis={"title": {"text": title}}, height=380, showlegend=len(series) > 1
    )
    return figure


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    sizes = Sizes().quick() if options.quick else Sizes()
    given = {f.name: getattr(options, f.name, None) for f in fields(Sizes)}
    study = Study(options, replace(sizes, **{name: n for name, n in given.items() if n is not None}))
    run = Run.open(
        options.out, "reproduce_finetuning", study.settings(), resume=True, provenance=make_provenance()
    )
    found: dict[str, Any] = {}
    for name in options.only or PARTS:
        found[name] = PARTS[name](study)
        text = write(study, found)
    run.finish({"date": date.today().isoformat(), "verdicts": verdicts(found), **plain(found)})
    print(f"{text}\n{options.out / 'index.html'}")


def write(study: Study, found: Mapping[str, Any]) -> str:
    """The page and the tables of what is there; the tables."""
    told = verdicts(found)
    text = "\n".join([*(f"- {line}" for line in told), tables(found)])
    (study.out / "summary.md").write_text(text + "\n")
    introduction = "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in told) + "</ul>"
    page(f"Fine-tuning {study.model.name}", [introduction, *figures(found)], study.out / "index.html")
    return text


def plain(value: Any) -> Any:
    """Intervals as dictionaries."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="storyworld")
    parser.add_argument("--data", default="storyworld", help="table of texts and labels")
    parser.add_argument("--label-column", help="[label; mood of StoryWorld]")
    parser.add_argument("--groups", help="column, or `phrases` [phrases; none of StoryWorld]")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--quick", action="store_true", help="two seeds, 400 rows")
    parser.add_argument("--n-train", type=int)
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--n-small", type=int)
    parser.add_argument("--n-texts", type=int)
    parser.add_argument("--n-rollback", type=int)
    parser.add_argument("--short", type=float, help="epochs of question 4")
    parser.add_argument("--long", type=float, help="epochs of its recipe")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--dtype", help="bf16: of products, which some CPUs and most GPUs do faster")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--counts", type=int, nargs="*", help="numbers of trained blocks [all]")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="layers: questions 1 and 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    story = options.data == "storyworld"
    options.label_column = options.label_column or ("mood" if story else "label")
    options.groups = options.groups or (None if story else PHRASES)
    return options


if __name__ == "__main__":
    main()
