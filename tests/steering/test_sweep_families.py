"""The sweep runs from a directory of another family, whose words are not StoryWorld's: every method, and the page."""

import math
import sys
from pathlib import Path

import pytest

from steerkit import HookedModel
from steerkit.steering import METHODS
from steerkit.steering.pairs import Pair, Pairs
from steerkit.steering.sweep import FEW_SHOT, SHUFFLED, SweepConfig, sweep
from steerkit.steering.sweep_report import write_report
from steerkit.steering.tasks import make_task

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

GOOD, BAD = ("glad", "jolly", "merry"), ("grim", "bleak", "upset")
NOUNS = ("fox", "hen", "cow", "owl", "ant", "bee", "pig", "rat", "cat")
TINY = {"epochs": 1, "batch_size": 8}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "is", "and", *GOOD, *BAD, *NOUNS]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(97 - len(words)))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
def test_every_method_runs_on_a_random_model_of_a_directory(family, tmp_path):
    build(family).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    model = HookedModel.from_pretrained(str(tmp_path / "model"))
    pairs = Pairs(
        (
            Pair(f"is {good} and {good}", f"is {bad} and {bad}", f"the {n}")
            for n in NOUNS
            for good, bad in zip(GOOD, BAD)
        ),
        "moods",
    )
    task = make_task(model, pairs, n_prompts=6)
    config = SweepConfig(
        sites=("blocks.1.hook_resid_post",),
        shuffled=("mean_diff",),
        kl_targets=(0.5,),
        kl_budget=100.0,
        samples=1,
        max_new_tokens=6,
        settings=dict.fromkeys(("bipo", "reft", "reft_r1", "lora", "weight_arithmetic", "antipasto"), TINY)
        | {"iti": {"heads": 2}},
    )
    result = sweep(model, task.pairs, task.effect, task.validation, task.test, tmp_path / "run", config)
    whole = {name for name, kind in METHODS.items() if not kind.needs}
    assert set(result.best) == {*whole, "mean_diff" + SHUFFLED, FEW_SHOT}
    failed = {name: record["reason"] for name, record in result.best.items() if "reason" in record}
    assert set(failed) <= {"reft_r1"}  # of a random model, its direction may never be active
    assert all(math.isfinite(record["kl"]) and record["n"] == 4 for record in result.results)
    assert len(result.study) == 2 * 7
    assert {record["site"].count("+") for record in result.study} == {0, model.n_layers - 1}
    assert {(r["positions"], r["schedule"].split()[0]) for r in result.study} == {
        ("prompt", "constant"),
        *((p, s) for p in ("generation", "both") for s in ("constant", "halving", "until")),
    }
    near = sorted(abs(math.log(r["kl"] / 0.5)) for r in result.study)
    assert near[len(near) // 2] < 0.7
    assert not any(":" in record["method"] for record in (*result.results, *result.validation))
    page = write_report(result, tmp_path / "report.html").read_text()
    assert "More sites" in page
    assert all(name in page for name in result.best if SHUFFLED not in name)
