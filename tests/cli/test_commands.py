"""The command line as its users meet it: the files, the last line of JSON, exit statuses, and one clear line for bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from steerkit import storyworld
from steerkit.cli.main import app

SITE = "blocks.1.hook_resid_post"
SMALL = [
    "--site",
    SITE,
    "--d-sae",
    "64",
    "--set",
    "training.batch_size=256",
    "--set",
    "training.block_tokens=4096",
]
SUMMARY = {
    "arch", "d_in", "d_sae", "tokens", "l0", "fvu", "ce_clean", "ce_sae", "ce_zero", "ce_recovered", "delta_ce", "kl",
    "dead_fraction", "tokens_per_second", "peak_memory_mb", "seconds",
}  # fmt: skip


def steerkit(*arguments, status=0):
    """(last line of stdout as JSON if there is any, stderr) of a command run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    lines = result.stdout.splitlines()
    return (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None), result.stderr


def refused(*arguments, status=2):
    """The one line that a command prints when it refuses its input."""
    _, error = steerkit(*arguments, status=status)
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n".join(story.text for story in storyworld.sample(120, seed=3)))
    return path


@pytest.fixture(scope="module")
def run(stories, tmp_path_factory):
    """A finished run of the smallest kind, and its summary."""
    out = tmp_path_factory.mktemp("runs") / "topk"
    command = [
        "train",
        "sae",
        "--data",
        stories,
        *SMALL,
        "--arch",
        "topk",
        "--k",
        "4",
        "--tokens",
        "8192",
        "--out",
        out,
    ]
    summary, _ = steerkit(*command, "--json", "--quiet")
    return out, summary, command


def test_a_run_directory_has_everything(run):
    out, summary, _ = run
    assert {path.name for path in out.iterdir()} == {
        "run.yaml", "provenance.json", "metrics.jsonl", "summary.json", "cfg.json", "sae_weights.safetensors",
    }  # fmt: skip
    assert set(summary) >= SUMMARY
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == 8192
    assert summary["l0"] == pytest.approx(4, abs=0.1)
    assert set(summary["tokens_per_second"]) >= {"total", "model", "sae"}
    assert json.loads((out / "provenance.json").read_text())["data_sha256"]


def test_resuming_a_finished_run_says_so_and_changes_nothing(run):
    out, summary, command = run
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert steerkit(*command, "--resume", "--json")[0] == summary
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "finished run" in refused(*command)


def test_a_runs_settings_file_makes_the_same_run(run, tmp_path):
    out, _, _ = run
    steerkit("train", "sae", "--config", out / "run.yaml", "--out", tmp_path / "again", "--quiet")
    ours, theirs = (load_file(path / "sae_weights.safetensors") for path in (out, tmp_path / "again"))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_evaluation_conversion_and_dashboard_of_a_run(run, tmp_path):
    out, summary, _ = run
    found, _ = steerkit("eval", "sae", out, "--nulls", "--json", "--quiet")
    (out / "evaluation.json").unlink()
    assert found["fvu"] == pytest.approx(summary["fvu"], rel=1e-5)
    rows = {row["name"]: row for row in found["nulls"]}
    assert rows["random SAE"]["fvu"] > rows["trained"]["fvu"]
    for to in ("sparsify", "dictionary_learning", "saelens"):
        made, _ = steerkit("convert", "sae", out, "--to", to, "--out", tmp_path / to, "--json")
        assert made["arch"] == "topk"
    page, _ = steerkit(
        "dashboard", out, "--out", tmp_path / "dash", "--tokens", "3000", "--latents", "top:8", "--json"
    )
    assert Path(page["page"]).is_file()


def test_a_dry_run_writes_nothing(stories, tmp_path):
    command = [
        "train",
        "sae",
        "--data",
        stories,
        *SMALL,
        "--arch",
        "gated",
        "--tokens",
        "8192",
        "--dry-run",
        "--json",
    ]
    plan, _ = steerkit(*command, "--out", tmp_path / "run")
    assert plan["d_sae"] == 64
    assert plan["parameters"] == 2 * 64 * 128 + 128 + 3 * 64
    assert plan["seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_training_from_a_cache(stories, tmp_path):
    made, _ = steerkit(
        "cache",
        "--data",
        stories,
        "--site",
        SITE,
        "--tokens",
        "6000",
        "--out",
        tmp_path / "acts",
        "--quiet",
        "--json",
    )
    assert made["tokens"] == 6000
    summary, _ = steerkit(
        "train", "sae", "--data", tmp_path / "acts", *SMALL, "--arch", "topk", "--k", "4", "--tokens", "4096",
        "--out", tmp_path / "run", "--quiet", "--json",
    )  # fmt: skip
    assert summary["fvu"] < 1


def test_inspect_lists_verified_sites():
    found, _ = steerkit("inspect", "storyworld", "--json")
    sites = {site["name"]: site for site in found["sites"]}
    assert sites[SITE]["verified"]
    assert sites[SITE]["width"] == found["d_model"] == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "no/such-model"], "no/such-model"),
        (["--site", "blocks.9.hook_resid_post"], "does not exist"),
        (["--site", "blocks.1.hook_resid_pots"], "Did you mean"),
        (["--arch", "gatd"], "Did you mean 'gated'"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--text-column", "title"], "title"),
        (["--context", "100000"], "longer than"),
        (["--tokens", "10"], "less than one batch"),
        (["--k", "65"], "k is 65"),
        (["--expansion", "2"], "not both"),
        (["--set", "training.lrr=1"], "Did you mean 'lr'"),
        (["--set", "training.lr=-1"], "lr is -1"),
        (["--set", "arch.target_l0=3"], "target_l0"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--dtype", "float7"], "float7"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(change, message, stories, tmp_path):
    command = ["train", "sae", "--data", stories, *SMALL, "--arch", "topk", "--k", "4", "--tokens", "4096"]
    if change[0] == "--text-column":
        table = tmp_path / "table.csv"
        table.write_text("text,label\n" + "a story,1\n" * 50)
        command += ["--data", table]
    assert message in refused(*command, "--out", tmp_path / "run", "--quiet", *change)
    assert not (tmp_path / "run" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize("text", ["", "\n\n", "one\n"], ids=["empty", "blank", "one document"])
def test_too_little_text_is_refused(text, tmp_path):
    (tmp_path / "t.txt").write_text(text)
    command = [
        "train",
        "sae",
        *SMALL,
        "--arch",
        "topk",
        "--tokens",
        "4096",
        "--out",
        tmp_path / "run",
        "--quiet",
    ]
    assert "t.txt" in refused(*command, "--data", tmp_path / "t.txt")


def test_one_token_documents_train(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(["Tom", "Anna", "fox"] * 200))
    command = [
        "train",
        "sae",
        *SMALL,
        "--arch",
        "topk",
        "--k",
        "2",
        "--tokens",
        "2048",
        "--out",
        tmp_path / "run",
    ]
    summary, _ = steerkit(*command, "--data", tmp_path / "t.txt", "--quiet", "--json")
    assert summary["fvu"] < 1


def test_a_directory_with_another_run_is_refused(run, stories):
    out, _, command = run
    other = [("5" if a == "4" else a) for a in command]
    assert "finished run" in refused(*other)
    assert "not a run directory" in refused("eval", "sae", out.parent)
    assert "does not exist" in refused("dashboard", out / "none")


def start(command, out):
    arguments = [
        str(a) for a in (*command, "--out", out, "--checkpoint-seconds", "0.1", "--resume", "--quiet")
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "steerkit.cli.main", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_checkpoint(process, out, before=frozenset()):
    """Until there is a checkpoint that was not there before, or the process has ended."""
    while process.poll() is None and checkpoints(out) <= before:
        time.sleep(0.02)


def checkpoints(out):
    return {path.name for path in (out / "checkpoint").glob("step-*.safetensors")}


def test_killed_and_interrupted_runs_end_bit_identical(stories, tmp_path):
    command = [
        "train",
        "sae",
        "--data",
        stories,
        *SMALL,
        "--arch",
        "gated",
        "--target-l0",
        "4",
        "--tokens",
        "65536",
    ]
    assert start(command, tmp_path / "whole").wait() == 0
    chance = random.Random(time.time_ns())
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        before = checkpoints(tmp_path / "cut")
        process = start(command, tmp_path / "cut")
        wait_for_checkpoint(process, tmp_path / "cut", before)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(number)
        _, error = process.communicate()
        if number == signal.SIGINT and process.returncode != 0:  # it may have been done already
            assert process.returncode == 130, error
    assert start(command, tmp_path / "cut").wait() == 0
    whole, cut = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all((whole[name] == cut[name]).all() for name in whole)
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("whole", "cut")
    ]
    assert steps[0] == steps[1]


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(stories, tmp_path):
    command = ["train", "sae", "--data", stories, *SMALL, "--arch", "topk", "--k", "4", "--tokens", "131072"]
    process = start(command, tmp_path / "run")
    wait_for_checkpoint(process, tmp_path / "run")
    process.kill()
    process.wait()
    for path in (tmp_path / "run" / "checkpoint").glob("step-*"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    _, error = steerkit(*command, "--out", tmp_path / "run", "--resume", "--quiet", status=2)
    assert re.search(r"Error: .*checkpoint.* is damaged", error)
    assert (tmp_path / "run" / "run.yaml").exists()


def test_nan_weights_are_named_with_their_site(stories, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(storyworld.model_path(), broken)
    weights = load_file(broken / "model.safetensors")
    vocabulary = json.loads((broken / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][vocabulary[" red"]] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    command = [
        "train",
        "sae",
        "--model",
        broken,
        "--data",
        stories,
        *SMALL,
        "--arch",
        "topk",
        "--tokens",
        "4096",
    ]
    _, error = steerkit(*command, "--out", tmp_path / "run", "--quiet", status=1)
    assert "NaN" in error
    assert SITE in error
