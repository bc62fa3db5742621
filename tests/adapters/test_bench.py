"""The comparison: budgets, learning rates, splits, evidence."""

import html
import itertools
import math

import numpy as np
import pytest

from steerkit import adapters
from steerkit.adapters.bench import BenchConfig, bench, fit_size, parse
from steerkit.adapters.bench_report import pareto, write_report
from steerkit.adapters.hypotheses import CLAIMS, Claim, headline, posterior, weigh, write_hypotheses
from steerkit.adapters.placement import EVERYWHERE, placement_study, places
from steerkit.adapters.tasks import Task, file_task, make_task, split_rows, storyworld_task
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.objectives import LanguageModelling

WHERE = {"modules": None, "layers": None}


@pytest.mark.parametrize("name", ["dora", "svft(pattern=random)", "hra", "houlsby", "vera"])
def test_sizes_come_as_near_the_budget_as_any(model, name):
    name, settings = parse(name)
    lora = adapters.make("lora", rank=4)
    budget = lora.count(model, lora.targets(model, None, None))
    fitted = fit_size(model, name, settings, budget, WHERE)
    size = adapters.METHODS[name].size
    count = fitted.count(model, fitted.targets(model, None, None))
    for step in (-2, -1, 1, 2):
        try:
            other = adapters.make(name, **{**settings, size: getattr(fitted, size) + step})
            adapters.get(model, other).remove()
        except InputError:
            continue
        away = abs(math.log(other.count(model, other.targets(model, None, None)) / budget))
        assert abs(math.log(count / budget)) <= away + 1e-9


def test_a_size_that_is_given_stays():
    model = HookedModel.from_pretrained("storyworld")
    assert fit_size(model, "lora", {"rank": 3}, 10**6, WHERE).rank == 3


def test_methods_with_settings_are_read():
    assert parse("svft(pattern=random;rank=3)") == ("svft", {"pattern": "random", "rank": 3})
    for text, told in (("svfd", "did you mean"), ("svft(rnk=3)", "no setting"), ("svft(rank)", "key=value")):
        with pytest.raises(InputError, match=told):
            parse(text)


@pytest.fixture(scope="module")
def task(model):
    texts = [f"The fox is {word}. The {word} fox is here." for word in ("happy", "sad", "red", "blue")] * 6
    objective = LanguageModelling(model, texts[:12], texts[12:18], texts[18:])
    return Task(
        "tiny",
        objective,
        "loss",
        False,
        lambda tuned: {"test": objective.evaluate(tuned, "test")["loss"]},
        LanguageModelling(model, None, test=["The day is cold.", "A cat runs."]),
    )


def test_it_leaves_the_model_alone_and_reports_what_was_run(model, task, tmp_path):
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    config = BenchConfig(methods=("lora(rank=2)", "full"), seeds=2, grid=1, extend=2, batch_size=4)
    result = bench(model, task, config, out=tmp_path)
    assert all((value == model.model.state_dict()[key]).all() for key, value in before.items())
    lora, full = result.rows
    assert lora["trainable_params"] == adapters.make("lora", rank=2).count(model, adapters.choose(model))
    assert lora["metric_mean"] == pytest.approx(np.mean(lora["by_seed"]))
    assert lora["metric_mean"] < result.base["scores"]["test"]
    assert lora["seeds"] == 2
    assert lora["merge_error"] < 1e-4
    assert full["merge_error"] == 0
    assert full["size_mb"] > lora["size_mb"]
    seeds = [run["seed"] for run in result.runs if run["method"] == "full" and run["final"]]
    assert seeds == [1, 2]  # the search has seed 0
    again = bench(model, task, config, out=tmp_path)
    assert again.rows == result.rows
    page = write_report(result, tmp_path / "report.html").read_text()
    assert "lora(rank=2)" in page
    told = repr(result).splitlines()
    assert [line.split()[0] for line in told[1:]] == ["lora(rank=2)", "full"]
    assert f"{lora['metric_mean']:.4g} [" in told[1]


def test_a_method_that_does_not_fit_is_left_out_with_the_reason(task, tmp_path):
    model = HookedModel.from_pretrained("storyworld")  # has no biases
    config = BenchConfig(methods=("bitfit", "ia3"), seeds=1, grid=1, extend=0, batch_size=4)
    result = bench(model, task, config)
    assert [row["method"] for row in result.rows] == ["ia3"]
    assert "no biases" in result.skipped[0]["reason"]
    assert "left out: bitfit" in repr(result)
    assert "no biases" in write_report(result, tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="No method is left"):
        bench(model, task, BenchConfig(methods=("bitfit",)))


def test_the_grid_is_drawn_out_while_its_best_lies_on_the_edge(model, task):
    config = BenchConfig(methods=("full",), seeds=1, grid=3, extend=3, batch_size=4)
    rate = adapters.METHODS["full"].lr
    row = bench(model, task, config).rows[0]
    rates = [tried for tried, _ in row["tried"]]
    assert len(rates) >= 3
    assert all(b / a == pytest.approx(math.sqrt(10)) for a, b in itertools.pairwise(rates))
    assert any(r == pytest.approx(rate) for r in rates)
    best = min(row["tried"], key=lambda pair: pair[1])[0]
    assert row["lr"] == best
    assert len(rates) == 6 or rates[0] < best < rates[-1]


def test_places_are_compared_with_everywhere(model, task):
    config = BenchConfig(seeds=2, grid=1, extend=0, batch_size=4)
    result = placement_study(model, task, "lora(rank=2)", config)
    names = [row["method"] for row in result.rows]
    assert set(places(model)) | {"q v, v faster"} == set(names)
    assert {row["method"]: row["difference"] is None for row in result.rows}[EVERYWHERE]
    parameters = {row["method"]: row["trainable_params"] for row in result.rows}
    assert parameters[EVERYWHERE] == parameters["attention"] + parameters["FFN"]
    assert parameters["q v"] == parameters["q v, v faster"]
    equal = placement_study(
        model, task, "lora(rank=2)", BenchConfig(seeds=1, grid=1, extend=0, batch_size=4), equal=True
    )
    for row in equal.rows:
        assert row["trainable_params"] == pytest.approx(parameters[EVERYWHERE], rel=0.35)


def test_the_pareto_front():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (4.0, 1.0)]
    assert pareto(points, higher=True) == [0, 2, 4]
    assert pareto(points, higher=False) == [0, 1]


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_the_shipped_model_does_not_lie():
    model = HookedModel.from_pretrained("storyworld")
    task = storyworld_task(model, n_train=20, n_test=20)
    found = task.measure(model)
    assert list(found) == ["test", "honest cue", "held-out kind"]
    assert all(len(values) == 20 and values.max() < 0.5 and values.mean() < 0.01 for values in found.values())
    assert make_task(model, "storyworld:sad", n_train=20, n_test=20).metric == "loss"


def test_groups_of_rows_stay_together():
    rows = [(f"text {i} of group {i // 5}", "1", str(i // 5)) for i in range(200)]
    parts = split_rows(rows, 100, 30, seed=0)
    groups = [{row[2] for row in part} for part in parts]
    assert not any(one & other for one, other in itertools.combinations(groups, 2))
    assert 30 <= len(parts[2]) < 35
    assert 15 <= len(parts[1]) < 20
    assert len(parts[0]) == 100


def test_phrases_of_held_out_sentences_are_not_trained_on():
    whole = [f"the quick brown fox number {i} jumps over the very lazy dog" for i in range(30)]
    pieces = [f"fox number {i} jumps" for i in range(30)]
    longer = [f"they say {text} again" for text in whole]
    rows = [(text, "1", str(i)) for i, text in enumerate(whole + pieces + longer)]
    train, validation, test = split_rows(rows, 100, 10, seed=1, phrases=True)
    assert len(train) > 10
    for text, _, _ in train:
        for held, _, _ in validation + test:
            assert f" {text} " not in f" {held} "
            assert f" {held} " not in f" {text} "


def test_a_file_with_labels_is_classified(model, tmp_path):
    file = tmp_path / "moods.csv"
    words = {"happy": "1", "sad": "0"}
    file.write_text(
        "text,label\n" + "".join(f"The fox {i} is {w}.,{v}\n" for i in range(40) for w, v in words.items())
    )
    (tmp_path / "other.csv").write_text("text,label\nA happy day.,1\nA sad day.,0\n")
    task = file_task(model, file, ood=tmp_path / "other.csv", n_test=10)
    assert (task.metric, task.higher_is_better) == ("accuracy", True)
    found = task.measure(model)
    assert {name: len(values) for name, values in found.items()} == {"test": 10, "ood": 2}
    with pytest.raises(InputError, match="too few"):
        file_task(model, file, n_test=80)
    with pytest.raises(InputError, match="no column"):
        file_task(model, file, n_test=10, groups="absent")


# -- claims ----------------------------------------------------------------------------------------------------------

CLAIM = Claim("c", "x is better than y.", (("x", "y"),), 0.5)


def study(x, y, model="m", higher=True):
    rows = [
        {"method": name, "by_seed": values, "metric_mean": float(np.mean(values))}
        for name, values in (("x", x), ("y", y), ("z", [0.2] * len(x)))
    ]
    task = {"higher_is_better": higher}
    runs = [
        {"method": row["method"], "final": True, "forgetting": 0.1 * (row["method"] == "x")}
        for row in rows
        for _ in row["by_seed"]
    ]
    return {"config": {"task": task, "model": model, "seeds": len(x)}, "rows": rows, "runs": runs}


def test_no_difference_moves_no_credence():
    found = weigh(CLAIM, "s", study([0.5, 0.7, 0.6], [0.6, 0.6, 0.6]))
    assert found.factor == pytest.approx(1)
    assert found.forgetting == pytest.approx((0.1, 0.1, 0.1))
    assert posterior(CLAIM, [found]) == pytest.approx(0.5)
    assert found.decided == 0


def test_evidence_is_antisymmetric_and_bounded():
    for_it = weigh(CLAIM, "s", study([0.9, 0.91, 0.92], [0.5, 0.52, 0.51]))
    against = weigh(CLAIM, "s", study([0.5, 0.52, 0.51], [0.9, 0.91, 0.92]))
    lower_is_better = weigh(CLAIM, "s", study([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], higher=False))
    assert for_it.factor == pytest.approx(10)
    assert against.factor == pytest.approx(0.1)
    assert lower_is_better.factor == pytest.approx(10)
    assert (for_it.decided, against.decided) == (1, -1)
    assert posterior(CLAIM, [for_it, against]) == pytest.approx(0.5)


def test_two_models_are_needed_for_a_headline():
    found = [
        weigh(CLAIM, "s", study([0.9, 0.91, 0.92], [0.5, 0.52, 0.51], model)) for model in ("a", "a", "b")
    ]
    against = weigh(CLAIM, "s", study([0.5, 0.52, 0.51], [0.9, 0.91, 0.92], "c"))
    assert headline(CLAIM, found[:2]) == "one model only"
    assert headline(CLAIM, found) == "holds on 2 models"
    assert headline(CLAIM, [*found, against]) == "undecided"
    assert headline(CLAIM, []) == "not measured"
    assert weigh(CLAIM, "s", study([0.9], [0.5])) is None


def test_the_page_of_claims(model, task, tmp_path):
    config = BenchConfig(methods=("lora", "dora", "full"), seeds=2, grid=1, extend=0, batch_size=4)
    bench(model, task, config, out=tmp_path / "one")
    page = write_hypotheses(tmp_path).read_text()
    assert all(html.escape(claim.statement) in page for claim in CLAIMS)
    assert "| decoupling | dora − lora" in (tmp_path / "hypotheses.md").read_text()
    with pytest.raises(InputError, match="adapt bench"):
        write_hypotheses(tmp_path / "one" / "parts")
