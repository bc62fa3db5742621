"""`steerkit probe` as its users meet it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import refused, steerkit

SMALL = ["--set", "study.per_text=4", "--set", "study.n_folds=3", "--set", "study.Cs=[0.01]", "--texts", "60"]
SITES = "hook_embed,blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "p"
    found, _ = steerkit(
        "probe", "--data", "storyworld:tense", "--sites", SITES, *SMALL, "--out", out, "--json", "--quiet"
    )
    return out, found


def test_a_run_has_its_files_and_its_summary(run):
    out, found = run
    assert {path.name for path in out.iterdir()} == {
        "plotly.min.js",
        "probes.safetensors",
        "provenance.json",
        "report.html",
        "run.yaml",
        "summary.json",
    }
    assert found["classes"] == ["past", "present"]
    assert [r["site"] for r in found["results"] if r["method"] == "logistic"] == SITES.split(",")
    assert found["rows"] == 240
    assert found["ceiling"]["accuracy"]["estimate"] > 0.9


def test_a_finished_run_is_left_alone_and_another_refused(run):
    out, found = run
    again, _ = steerkit("probe", "--resume", "--out", out, "--json")
    assert again == found
    assert "finished run" in refused("probe", "--texts", "60", "--out", out)


def test_any_table_with_labels_can_be_probed(tmp_path):
    table = tmp_path / "t.csv"
    lines = [
        f"The {'happy' if i % 2 else 'sad'} fox number {i} sleeps.,{'up' if i % 2 else 'down'}"
        for i in range(40)
    ]
    table.write_text("text,mood\n" + "\n".join(lines) + "\n")
    found, _ = steerkit(
        "probe", "--data", table, "--label-column", "mood", "--sites", SITES, "--probes", "lda", *SMALL,
        "--set", "study.erase=false", "--set", "study.random_model=false", "--reading", "mean",
        "--out", tmp_path / "r", "--json",
    )  # fmt: skip
    assert found["classes"] == ["down", "up"]
    assert found["best"]["scores"]["accuracy"]["estimate"] == 1.0
    assert found["causal"] is None
    assert any("rows to train on" in note for note in found["notes"])


def test_what_cannot_be_probed_is_said_in_one_line(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "\n".join(f"A fox {i}.,a" for i in range(30)) + "\n")
    out = ["--out", tmp_path / "r"]
    assert "at least two classes" in refused("probe", "--data", table, *out)
    assert "no column 'mood'" in refused("probe", "--data", table, "--label-column", "mood", *out)
    assert "Did you mean 'lda'" in refused("probe", "--probes", "ldaa", *out)
    assert "Did you mean 'mood'" in refused("probe", "--data", "storyworld:moo", *out)
    assert "does not exist" in refused("probe", "--sites", "blocks.9.hook_resid_post", "--texts", "30", *out)
    assert "--out is needed" in refused("probe")
