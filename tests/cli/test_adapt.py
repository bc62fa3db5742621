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
        (("train", "--modules", ""), "modules is empty"),
        (("train", "--rank", "999"), "at most 128"),
        (("train", "--method", "tied_lora", "--rank", "999"), "at most 128"),
        (("train", "--method", "qa_lora", "--rank", "999"), "at most 128"),
        (("train", "--method", "hra", "--rank", "3"), "even number"),
        (("train", "--method", "svft", "--set", "settings.rank=many"), "a whole number"),
        (("train", "--method", "parallel", "--modules", "q"), "no down projection"),
        (("train", "--method", "clover", "--modules", "down"), "goes to o, k, up and gate"),
        (("train", "--method", "clover", "--set", "settings.width=9999"), "128 inputs"),
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


def test_a_column_of_labels_that_is_absent_is_no_other_task(tmp_path):
    (tmp_path / "two.csv").write_text("text,label\n" + "".join(f"Hat {i}.,{i % 2}\n" for i in range(40)))
    told = refused(
        "adapt", "train", "--data", tmp_path / "two.csv", "--label-column", "lable", "--out", tmp_path / "out"
    )
    assert "no column 'lable'" in told


def test_text_and_labels_are_in_the_columns_that_are_named(tmp_path):
    rows = "".join(f"{i % 2},{i},The hat is {'red' if i % 2 else 'blue'} {i}.\n" for i in range(60))
    (tmp_path / "three.csv").write_text("mark,text,claim\n" + rows)
    out = tmp_path / "out"
    columns = ("--text-column", "claim", "--label-column", "mark")
    few = ("--set", "n_train=16", "--set", "n_test=10")
    found, _ = steerkit(
        "adapt", "train", "--data", tmp_path / "three.csv", *columns, *few, "--out", out, "--json"
    )
    assert found["metric"] == "accuracy"
    again, _ = steerkit("adapt", "train", "--config", out / "run.yaml", "--out", tmp_path / "again", "--json")
    assert again["scores"] == found["scores"]
    (tmp_path / "three.csv").write_text("mark,text,claim\n" + rows.replace("hat", "cap"))
    (out / "summary.json").unlink()
    told = refused("adapt", "train", "--config", out / "run.yaml", "--out", out, "--resume")
    assert "objective.fingerprint is" in told
    told = refused(
        "adapt", "train", "--data", tmp_path / "three.csv", "--text-column", "claims", "--out", tmp_path / "x"
    )
    assert "claims" in told


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    """Also where it shows only after the last step."""
    arguments = ("adapt", "train", "--lr", "1e30", "--set", "n_test=10", "--quiet")
    for n_train, step in (("48", 1), ("16", 1)):
        told = refused(*arguments, "--set", f"n_train={n_train}", "--out", tmp_path / n_train, status=1)
        assert f"The loss is nan at step {step}: lower lr" in told
        assert not (tmp_path / n_train / "adapter").exists()


def test_what_cannot_be_merged_is_refused(run, tmp_path):
    houlsby = tmp_path / "houlsby"
    steerkit("adapt", "train", "--method", "houlsby", "--rank", "2", *FEW, "--out", houlsby, "--quiet")
    for command in ("merge", "inspect"):
        assert "no change of weights" in refused("adapt", command, houlsby, "--out", tmp_path / "out")
    other = HookedModel.from_pretrained("storyworld")
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    told = refused("adapt", "merge", run, "--model", tmp_path / "other", "--out", tmp_path / "out")
    assert "is another model" in told
    (houlsby / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    assert "can't be read" in refused("adapt", "merge", houlsby, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
