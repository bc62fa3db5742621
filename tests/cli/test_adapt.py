"""`steerkit adapt …` as its users meet it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import refused, steerkit

from steerkit.models import HookedModel

FEW = ("--set", "n_train=48", "--set", "n_test=20")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapt") / "run"
    found, _ = steerkit("adapt", "train", "--method", "lora", "--rank", "2", *FEW, "--out", out, "--json")
    assert found["settings"]["rank"] == 2
    assert set(found["scores"]) == {"test", "honest cue", "held-out kind"}
    assert found["scores_base"]["test"] < 0.05
    assert found == {**json.loads((out / "summary.json").read_text()), **found}
    return out


def logits(model):
    return model.logits(torch.arange(5, 25)[None])


def test_a_run_is_a_model(run):
    tuned, base = HookedModel.from_pretrained(run), HookedModel.from_pretrained("storyworld")
    assert tuned.model.peft_config["default"].r == 2
    assert not torch.allclose(logits(tuned), logits(base))


def test_a_finished_run_is_not_repeated(run):
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    again, _ = steerkit(
        "adapt", "train", "--method", "lora", "--rank", "2", *FEW, "--out", run, "--resume", "--json"
    )
    assert again == json.loads((run / "summary.json").read_text())
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_it_merges_into_an_ordinary_checkpoint(run, tmp_path):
    steerkit("adapt", "merge", run, "--out", tmp_path / "merged", "--json")
    merged = HookedModel.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.model, "peft_config")
    torch.testing.assert_close(logits(merged), logits(HookedModel.from_pretrained(run)), rtol=0, atol=1e-4)


def test_inspect_looks_inside(run, tmp_path):
    found, _ = steerkit("adapt", "inspect", run, "--out", tmp_path / "page", "--json")
    assert len(found["modules"]) == 28
    assert all(0 < row["relative_norm"] < 1 for row in found["modules"])
    assert "plotly.min.js" in (tmp_path / "page" / "report.html").read_text()


def test_methods_are_told(run):
    found, _ = steerkit("adapt", "methods", "--json")
    names = {row["name"] for row in found["methods"]}
    assert {"lora", "svft", "full", "houlsby", "antipasto"} <= names


def test_bench_compares_and_keeps_what_is_done(tmp_path):
    out = tmp_path / "bench"
    arguments = ("adapt", "bench", "--methods", "lora,svft(pattern=plain)", "--seeds", "2", *FEW)
    options = ("--set", "bench.grid=1", "--set", "bench.extend=0", "--out", out, "--json")
    found, _ = steerkit(*arguments, *options)
    assert [row["method"] for row in found["results"]] == ["lora", "svft(pattern=plain)"]
    for row in found["results"]:
        assert row["seeds"] == 2
        assert row["merge_error"] < 1e-4
        assert row["forgetting"] is not None
    assert found["results"][0]["difference"] is None
    assert found["results"][1]["difference"]["ci"] is not None
    page = (out / "report.html").read_text()
    assert "svft(pattern=plain)" in page
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    again, _ = steerkit(*arguments, *options, "--resume")
    assert again["results"] == found["results"]
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--method", "lorra"), "did you mean"),
        (("train", "--modules", "q_prj"), "q_proj"),
        (("train", "--set", "settings.rnk=3"), "rank"),
        (("train", "--method", "full", "--rank", "3"), "no size"),
        (("train", "--layers", "9"), "no layer 9"),
        (("train", "--data", "absent.csv"), "absent.csv"),
        (("train", "--data", "storyworld:happier"), "no variant"),
        (("bench", "--methods", "svft(pattern)"), "key=value"),
        (("bench", "--budgets", "many"), "whole numbers"),
        (("merge", "absent"), "absent"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    assert message in refused("adapt", *arguments, "--out", tmp_path / "out")


def test_a_file_of_one_class_is_refused(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\n" + "".join(f"The hat is red {i}.,1\n" for i in range(40)))
    told = refused(
        "adapt", "train", "--data", tmp_path / "one.csv", "--set", "n_test=5", "--out", tmp_path / "out"
    )
    assert "no classes" in told
