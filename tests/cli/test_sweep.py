"""`steerkit sweep sae` as its users meet it."""

import json
import os
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from steerkit import storyworld
from steerkit.cli.main import app

SITE = "blocks.0.hook_resid_pre"
SMALL = [
    "--set",
    "training.batch_size=256",
    "--set",
    "training.block_tokens=4096",
    "--set",
    "training.held_out_tokens=500",
]
GRID = ["--sites", SITE, "--d-saes", "64", "--archs", "topk,gated", "--ks", "4", "--seeds", "2"]
NAMES = [f"{arch}-seed{seed}" for arch in ("topk", "gated") for seed in (0, 1)]


def steerkit(*arguments, status=0):
    """(last line of stdout as JSON if there is any, stdout, stderr) of a command run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    lines = result.stdout.splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return found, result.stdout, result.stderr


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n".join(story.text for story in storyworld.sample(80, seed=3)))
    return path


@pytest.fixture(scope="module")
def swept(stories, tmp_path_factory):
    """A finished sweep: its directory, summary, what it printed, and its command."""
    out = tmp_path_factory.mktemp("runs") / "s"
    command = ["sweep", "sae", "--data", stories, *GRID, *SMALL, "--tokens", "4096", "--out", out]
    summary, said, _ = steerkit(*command, "--json")
    return out, summary, said, command


def test_every_combination_is_trained_and_reported(swept):
    out, summary, said, _ = swept
    assert summary == json.loads((out / "summary.json").read_text())
    assert [line["run"] for line in summary["results"]] == NAMES
    groups = [(group["arch"], group["sparsity"], group["seeds"]) for group in summary["groups"]]
    assert groups == [("topk", "k 4", [0, 1]), ("gated", "L0 4", [0, 1])]
    assert {path.name for path in out.iterdir()} == {
        *NAMES, "run.yaml", "provenance.json", "summary.json", "report.html", "plotly.min.js",
    }  # fmt: skip
    for name in NAMES:
        assert (out / name / "sae_weights.safetensors").exists()
    assert "4 SAEs: topk-seed0" in said
    assert f"{SITE}  topk, 64 latents, k 4: l0 4" in said


def test_resuming_a_finished_sweep_says_so_and_changes_nothing(swept):
    out, summary, _, command = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    found, said, _ = steerkit(*command, "--resume", "--json")
    assert found == summary
    assert "nothing to resume" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sites", ""], "--sites is needed"),
        (["--archs", ""], "--archs is needed"),
        (["--archs", "topk,gatd"], "Did you mean 'gated'"),
        (["--archs", "topk,topk"], "Two jobs are the same"),
        (["--sites", f"{SITE},blocks.9.hook_resid_post"], "blocks.9.hook_resid_post"),
        (["--d-saes", "64,sixty"], "sixty"),
        (["--ks", "4,65"], "k is 65"),
        (["--expansions", "2"], "Give --d-saes or --expansions"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--tokens", "100"], "less than one batch"),
        (["--set", "training.lrr=1"], "Did you mean 'lr'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(change, message, stories, tmp_path):
    command = ["sweep", "sae", "--data", stories, *GRID, *SMALL, "--tokens", "4096", "--quiet"]
    _, _, error = steerkit(*command, "--out", tmp_path / "s", *change, status=2)
    (line,) = (line for line in error.splitlines() if line)
    assert line.startswith("Error: ")
    assert message in line
    assert not (tmp_path / "s").exists()


def test_another_sweep_in_the_directory_is_refused(swept):
    out, _, _, command = swept
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "holds a finished run" in steerkit(*command, "--quiet", status=2)[2]
    assert "--out is needed" in steerkit(*command[:-2], "--quiet", status=2)[2]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_quick_is_at_most_so_many_tokens(stories, tmp_path, monkeypatch):
    monkeypatch.setattr("steerkit.cli.sweep.QUICK_TOKENS", 2048)
    command = [
        "sweep",
        "sae",
        "--data",
        stories,
        *SMALL,
        "--sites",
        SITE,
        "--archs",
        "topk",
        "--expansions",
        "0.5",
    ]
    found, _, _ = steerkit(*command, "--ks", "4", "--quick", "--out", tmp_path / "s", "--quiet", "--json")
    assert [(line["tokens"], line["d_sae"]) for line in found["results"]] == [(2048, 64)]


def test_a_number_of_latents_serves_every_architecture(stories, tmp_path):
    command = [
        "sweep",
        "sae",
        "--data",
        stories,
        *SMALL,
        "--sites",
        SITE,
        "--archs",
        "topk,l1",
        "--d-saes",
        "64",
    ]
    command += ["--tokens", "1024", "--quiet", "--json"]
    found, _, _ = steerkit(*command, "--target-l0s", "8", "--out", tmp_path / "a")
    assert [group["sparsity"] for group in found["groups"]] == ["k 8", "L0 8"]
    found, _, _ = steerkit(*command, "--ks", "4", "--l1s", "0.5,2", "--out", tmp_path / "b")
    assert [group["sparsity"] for group in found["groups"]] == ["k 4", "l1 0.5", "l1 2"]


def test_a_killed_sweep_goes_on_and_ends_bit_identical(swept, stories, tmp_path):
    whole, _, _, command = swept
    command = [*command[:-1], tmp_path / "cut", "--checkpoint-seconds", "0", "--resume", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "steerkit.cli.main", *map(str, command)]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "cut" / "checkpoint").glob("step-*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cut" / "summary.json").exists(), "the sweep was over before it could be killed"
    steerkit(*command)
    for name in NAMES:
        ours, theirs = (
            load_file(out / name / "sae_weights.safetensors") for out in (whole, tmp_path / "cut")
        )
        assert all((ours[key] == theirs[key]).all() for key in ours), name
    first, second = (json.loads((out / "summary.json").read_text()) for out in (whole, tmp_path / "cut"))
    assert first == second
