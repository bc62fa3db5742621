"""Commands in several processes, as `torchrun` starts them: what one process would have made, and no process left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from steerkit import storyworld
from steerkit.checkpoints import Checkpoints
from steerkit.cli.main import app

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")

SITE = "blocks.0.hook_resid_post"
STEPS, BATCH = 40, 256
LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHED += ["-m", "steerkit.cli.main"]
PATIENCE = 120
"""Seconds after which a process that should have ended is taken to hang."""


def alone(*arguments):
    """The JSON that a command ends with, in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


def start(*arguments):
    """The same command in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*LAUNCHED, *map(str, arguments), "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def together(*arguments):
    """(the only line that it says, as JSON; stderr) of a command in two processes."""
    process = start(*arguments, "--quiet")
    said, error = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, error
    (line,) = said.splitlines()
    return json.loads(line), error


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def ranked(process, rank):
    """The process id of a rank."""
    wanted = f"RANK={rank}".encode()
    (found,) = (
        pid for pid in children(process) if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return found


def files(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n".join(story.text for story in storyworld.sample(100, seed=3)))
    return path


@pytest.fixture(scope="module")
def command(stories):
    settings = {"batch_size": BATCH, "block_tokens": 4096, "held_out_tokens": 300, "dtype": "float64"}
    return [
        "train", "sae", "--data", stories, "--site", SITE, "--arch", "batch_topk", "--d-sae", 64, "--k", 4,
        "--tokens", STEPS * BATCH, "--checkpoint-seconds", 0,
        *(part for name, value in settings.items() for part in ("--set", f"training.{name}={value}")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def of_one(command, tmp_path_factory):
    """The run of one process, and its summary."""
    out = tmp_path_factory.mktemp("one") / "run"
    return out, alone(*command, "--out", out, "--quiet")


def assert_same_weights(out, other):
    ours, theirs = (load_file(path / "sae_weights.safetensors") for path in (out, other))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=0, atol=1e-8)


def test_two_processes_make_the_run_of_one(command, of_one, tmp_path):
    one, summary = of_one
    found, error = together(*command, "--out", tmp_path / "run")
    assert_same_weights(tmp_path / "run", one)
    assert files(tmp_path / "run") == files(one)
    assert found == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["fvu"] == pytest.approx(summary["fvu"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [20, 40]
    assert "Error" not in error


def test_a_rank_that_is_killed_stops_the_others_and_an_interrupt_saves(command, of_one, tmp_path):
    out = tmp_path / "run"
    kept = Checkpoints(out / "checkpoint")

    def cut(send):
        """Start or go on, and `send` a signal after a new checkpoint. What was said, and the step that it came to."""
        before = {path.name for path in kept.files()}
        process = start(*command, "--out", out, "--resume")
        while process.poll() is None and {path.name for path in kept.files()} <= before:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        workers = children(process)
        send(process)
        said, error = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0, "the run was over before the signal came"
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert not said
        found = kept.load()
        assert found is not None
        return error, found[1]["steps"]

    error, steps = cut(lambda process: os.kill(ranked(process, 1), signal.SIGKILL))
    assert "another process of this run has ended" in error or "Interrupted" in error
    assert 0 < steps < STEPS
    error, later = cut(lambda process: process.send_signal(signal.SIGINT))
    assert error.count("Stopping after this step") == 1
    assert steps < later < STEPS
    alone(*command, "--out", out, "--resume", "--quiet")
    assert_same_weights(out, of_one[0])


def test_a_cache_of_two_processes_is_that_of_one(stories, tmp_path):
    command = ["cache", "--data", stories, "--site", SITE, "--site", "blocks.1.hook_mlp_out"]
    command += ["--tokens", "5000", "--set", "shard_tokens=2048"]
    one = alone(*command, "--out", tmp_path / "one", "--quiet")
    two, _ = together(*command, "--out", tmp_path / "two")
    assert {**one, "out": ""} == {**two, "out": ""}
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
