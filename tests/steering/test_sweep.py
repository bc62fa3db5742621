"""The sweep: strengths that cost what is asked, choices made on validation only, nulls, resuming, and the page."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from steerkit import HookedModel, steering
from steerkit.errors import InputError
from steerkit.steering import sweep as module
from steerkit.steering.effects import StoryAttribute, Words
from steerkit.steering.sweep import SHUFFLED, SweepConfig, across_seeds, default_sites, sweep
from steerkit.steering.sweep_report import write_report, write_seeds_report
from steerkit.steering.tasks import make_task, telling_words
from steerkit.storyworld import Judge

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def task(model):
    return make_task(model, "storyworld:mood=happy", n_prompts=24)


ALONE = {"shuffled": (), "few_shot": 0, "study": None}

SMALL = SweepConfig(
    methods=("mean_diff", "random"),
    sites=(SITE, "blocks.0.hook_resid_post"),
    kl_targets=(0.5, 3.0),
    n_pairs=48,
    samples=1,
    max_new_tokens=16,
    study=None,
)


@pytest.fixture(scope="module")
def done(model, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "run"
    result = sweep(
        model, task.pairs, task.effect, task.validation, task.test, out, SMALL, prompting=task.instruction
    )
    return out, result


def test_a_task_of_storyworld(task, model):
    assert isinstance(task.effect, StoryAttribute)
    assert task.instruction == "Write a happy story."
    assert not set(task.validation) & set(task.test)
    assert len(task.validation) + len(task.test) == 24


def test_every_method_is_told_on_test_at_about_the_divergences_asked(done):
    _, result = done
    assert set(result.best) == {"mean_diff", "random", "mean_diff" + SHUFFLED, "prompting", "few-shot"}
    chosen_by = {(r["method"], r["site"], r["strength"]) for r in result.validation}
    for record in result.results:
        assert record["n_prompts"] == 16
        if record["method"] not in ("prompting", "few-shot"):
            assert (record["method"], record["site"], record["strength"]) in chosen_by
    reached = [r["kl"] for r in result.validation if r["method"] == "mean_diff"]
    for target in SMALL.kl_targets:
        assert min(abs(math.log(kl / target)) for kl in reached if kl) < 0.7
    assert result.best["prompting"]["effect"] > result.base["effect"] + 0.3


def test_it_is_told_in_a_few_lines(done):
    _, result = done
    first, *lines = repr(result).splitlines()
    assert "unsteered" in first
    assert [line.split()[0] for line in lines] == [name.split()[0] for name in result.best]
    assert f"{result.best['mean_diff']['effect']:.3g} [" in repr(result)
    assert all(len(line) < 200 for line in lines)


def test_the_best_is_the_best_of_validation_within_the_budgets(done):
    _, result = done
    best = result.best["mean_diff"]
    same = [r for r in result.validation if r["method"] == "mean_diff" and r["site"] == best["site"]]
    own = next(r for r in same if r["strength"] == best["strength"])
    assert own["kl"] <= SMALL.kl_budget * 1.3
    assert best["effect_base"] == result.base["effect"]


def test_a_null_is_of_its_method_at_its_site_and_divergence(done):
    _, result = done
    best, null = result.best["mean_diff"], result.best["mean_diff" + SHUFFLED]
    assert null["site"] == best["site"]
    tried = [r for r in result.validation if r["method"] == "mean_diff" + SHUFFLED]
    assert min(abs(math.log(r["kl"] / best["kl"])) for r in tried if r["kl"]) < 0.7
    assert [r["strength"] for r in result.results if r["method"] == null["method"]] == [null["strength"]]


def test_examples_are_positive_sides_without_instructions_that_fit(model, task):
    from steerkit.steering.prompting import few_shot

    prefix = few_shot(model, task.pairs, task.test, 16, 2)
    found = Judge().judge(prefix)
    assert found.grammatical == 1.0
    assert not {s.kind for s in found.sentences} & {"instruction", "persona"}
    assert sum(s.kind == "introduction" for s in found.sentences) in (1, 2)
    assert found.share("mood", "happy") == 1.0
    longest = max(len(model.tokenizer(prefix + prompt)["input_ids"]) for prompt in task.test)
    assert longest + 16 <= model.context
    assert few_shot(
        model, steering.load_pairs([("Anna is happy.", "x"), ("Tom is glad.", "y")]), ["A"], 4, 9
    ) == ("Anna is happy. Tom is glad. ")
    with pytest.raises(InputError, match="No positive side"):
        few_shot(model, task.pairs[:8], task.test, 250)


def test_seeds_are_told_as_mean_and_spread(done, tmp_path):
    _, result = done
    other = replace(result, best={"mean_diff": {**result.best["mean_diff"], "effect": 0.0}})
    found = across_seeds([result, other])
    effect = result.best["mean_diff"]["effect"]
    assert found["mean_diff"]["effect"] == pytest.approx(effect / 2)
    assert found["mean_diff"]["effect_sd"] == pytest.approx(effect / math.sqrt(2))
    assert (found["mean_diff"]["seeds"], found["random"]["seeds"]) == (2, 1)
    assert found["random"]["effect_sd"] is None
    page = write_seeds_report({0: result, 1: other}, tmp_path / "report.html").read_text()
    assert f"{effect / 2:.1%} ± {effect / math.sqrt(2):.1%}" in page


def test_files_resume_and_page(done, model, task, monkeypatch):
    out, result = done
    summary = json.loads((out / "summary.json").read_text())
    assert {"results", "best"} <= summary.keys()
    assert {
        "method",
        "site",
        "strength",
        "effect",
        "effect_base",
        "effect_ci",
        "kl",
        "perplexity_ratio",
        "n",
    } <= summary["results"][0].keys()
    assert len(list((out / "vectors").glob("*.safetensors"))) == 5  # two methods at two sites, one null
    (out / "summary.json").unlink()
    monkeypatch.setattr(module.Bench, "measure", None)  # nothing is measured again
    again = sweep(
        model,
        task.pairs,
        task.effect,
        task.validation,
        task.test,
        out,
        SMALL,
        prompting=task.instruction,
        resume=True,
    )
    assert again.best == result.best
    assert again.results == result.results
    page = write_report(again, out / "report.html").read_text()
    assert "mean_diff" in page
    assert "Write a happy story" not in page or "&lt;" not in page
    with pytest.raises(InputError, match="holds a finished run"):
        sweep(model, task.pairs, task.effect, task.validation, task.test, out, SMALL)


def test_fixed_strengths_and_a_method_that_fails(model, task, tmp_path, monkeypatch):
    config = SweepConfig(
        methods=("mean_diff", "iti"),
        sites=(SITE,),
        **ALONE,
        strengths=(2.0, 8.0),
        n_pairs=16,
        samples=1,
        max_new_tokens=8,
        settings={"iti": {"heads": 1000}},
    )
    result = sweep(model, task.pairs, task.effect, task.validation, task.test, tmp_path / "r", config)
    assert sorted(r["strength"] for r in result.results) == [2.0, 8.0]
    assert "heads is 1000" in result.best["iti"]["reason"]
    write_report(result, tmp_path / "r" / "report.html")


def test_a_vector_that_destroys_the_model_is_reported_as_such(model, task, tmp_path):
    config = SweepConfig(
        methods=("mean_diff",),
        sites=(SITE,),
        **ALONE,
        strengths=(1e30,),
        n_pairs=8,
        samples=1,
        max_new_tokens=8,
    )
    result = sweep(model, task.pairs, task.effect, task.validation, task.test, tmp_path / "r", config)
    assert "budgets" in result.best["mean_diff"]["reason"]
    assert result.validation[0]["destroyed"] or result.validation[0]["kl"] > 10
    write_report(result, tmp_path / "r" / "report.html")


def test_a_base_model_that_finishes_no_sentence_has_no_grammar_to_lose(model, task, tmp_path, monkeypatch):
    real = module.Bench.measure

    def measure(self, *arguments, **options):
        found = real(self, *arguments, **options)
        plain = {**found.to_dict(), "grammaticality": 0.5, "grammaticality_base": None}
        return SimpleNamespace(to_dict=lambda: plain, texts=found.texts)

    monkeypatch.setattr(module.Bench, "measure", measure)
    config = SweepConfig(
        methods=("mean_diff",),
        sites=(SITE,),
        **ALONE,
        strengths=(1.0,),
        n_pairs=8,
        samples=1,
        max_new_tokens=8,
    )
    result = sweep(model, task.pairs, task.effect, task.validation, task.test, tmp_path / "r", config)
    assert result.best["mean_diff"]["strength"] == 1.0


def test_prompts_may_not_be_in_both_parts_and_settings_are_checked(model, task, tmp_path):
    with pytest.raises(InputError, match="separate them"):
        sweep(model, task.pairs, task.effect, task.test, task.test, tmp_path / "r", SMALL)
    for settings, message in (
        ({"kl_targets": (3.0, 1.0)}, "rise"),
        ({"methods": ("mean",)}, "mean_diff"),
        ({"where": "here"}, "where"),
    ):
        with pytest.raises(InputError, match=message):
            SweepConfig(**settings)


def test_strengths_are_sought_in_logarithms():
    known = [{"strength": 1.0, "kl": 0.04}]
    assert module._next_strength(known, 4.0) == pytest.approx(10.0)  # the square of the strength
    known.append({"strength": 10.0, "kl": 40.0})
    assert 1.0 < module._next_strength(known, 4.0) < 10.0
    assert module._next_strength([{"strength": 8.0, "kl": None}], 4.0) == 1.0


def test_tasks_of_other_models(model, tmp_path):
    pairs = [
        {"prompt": f"Once {i}", "positive": "she was happy and glad", "negative": "she was sad and grim"}
        for i in range(12)
    ]
    loaded = steering.load_pairs(pairs)
    assert telling_words(loaded).words == {"happy", "glad"}
    task = make_task(model, loaded, n_prompts=9)
    assert len(task.validation) == 3
    assert isinstance(make_task(model, loaded, effect="words:glad, merry").effect, Words)
    file = tmp_path / "prompts.txt"
    file.write_text("One day\nOne night\nAt noon\n")
    assert set((t := make_task(model, loaded, prompts=file)).validation + t.test) == {
        "One day",
        "One night",
        "At noon",
    }
    with pytest.raises(InputError, match="words:happy"):
        make_task(model, loaded, effect="happiness")
    with pytest.raises(InputError, match="--prompts"):
        make_task(model, [{"positive": "a b", "negative": "a c"}], effect="words:b")
    with pytest.raises(InputError, match="No word tells"):
        telling_words(steering.load_pairs([("red", "blue")]))
    assert default_sites(model)[-1].count("+") == model.n_layers - 1
    assert torch.is_tensor(next(model.model.parameters()))
