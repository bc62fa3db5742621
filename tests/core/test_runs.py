"""Run directories: files appear whole or not at all, and a directory never mixes two runs."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from steerkit import runs
from steerkit.errors import CheckpointError, InputError, SteerkitError, did_you_mean
from steerkit.runs import Run, atomic_path, atomic_write, jsonable, progress, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "weights"
    atomic_write(target, "old")

    def write_half():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights"]


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "report"
    for content in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert os.listdir(target) == ["second"]
    assert os.listdir(tmp_path) == ["report"]


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "summary.json"
    write_json(target, {"l0": 16})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(SteerkitError, match=r"disk is full.*summary\.json"):
        write_json(target, {"l0": 17})
    assert read_json(target) == {"l0": 16}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_killed_while_writing_leaves_only_whole_files(tmp_path):
    program = (
        "import sys; from steerkit.runs import atomic_write\n"
        "for i in range(10**6): atomic_write(sys.argv[1], f'{i} ' * 20000 + 'end'); print(i, flush=True)"
    )
    target = tmp_path / "data"
    process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = target.read_text()
    assert text.endswith("end")
    assert len(set(text.split())) == 2


def test_json_has_no_nan_and_takes_arrays():
    value = {"a": np.float32(1.5), "b": float("nan"), "c": (np.arange(2), float("inf")), 3: None, "d": True}
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == {
        "a": 1.5, "b": None, "c": [[0, 1], None], "3": None, "d": True,
    }  # fmt: skip


def test_a_run_directory_holds_one_run(tmp_path):
    out = tmp_path / "run"
    run = Run.open(out, "train sae", {"arch": "gated", "tokens": 10})
    assert {"run.yaml", "provenance.json"} <= set(os.listdir(out))
    with pytest.raises(InputError, match=r"unfinished run.*--resume"):
        Run.open(out, "train sae", {"arch": "gated", "tokens": 10})
    with pytest.raises(InputError, match="another run: arch is 'gated' there and 'topk' here"):
        Run.open(out, "train sae", {"arch": "topk", "tokens": 10}, resume=True)
    with pytest.raises(InputError, match="unfinished"):
        _ = run.summary
    run.finish({"l0": 16.0})
    again = Run.open(out, "train sae", {"arch": "gated", "tokens": 10}, resume=True)
    assert again.finished
    assert again.summary == {"l0": 16.0}
    assert Run.load(out).config == {"arch": "gated", "tokens": 10}


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(InputError, match="not empty"):
        Run.open(tmp_path, "train sae", {})
    with pytest.raises(InputError, match="is a file"):
        Run.open(tmp_path / "thesis.tex", "train sae", {})
    with pytest.raises(InputError, match="not a run directory"):
        Run.load(tmp_path)


def test_a_damaged_settings_file_is_named(tmp_path):
    Run.open(tmp_path / "run", "train sae", {})
    (tmp_path / "run" / "run.yaml").write_text("a: [1,\nb")
    with pytest.raises(CheckpointError, match=r"run\.yaml is damaged"):
        Run.load(tmp_path / "run")


def test_rewinding_drops_later_lines_and_a_half_written_one(tmp_path):
    run = Run.open(tmp_path / "run", "train sae", {})
    for tokens in (10, 20, 30):
        run.log({"tokens": tokens, "loss": 1 / tokens})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"tokens": 40, "lo')
    run.rewind("tokens", 20)
    run.log({"tokens": 30})
    assert [record["tokens"] for record in run.metrics()] == [10, 20, 30]


def test_plain_progress_shows_rate_eta_and_fields(capsys, monkeypatch):
    with progress(100, "training") as bar:
        monkeypatch.setattr(bar, "seconds", 0)
        bar.advance(25, loss=0.5)
    line = capsys.readouterr().err
    assert line.startswith("training: 25 %  25/100 tokens")
    assert "left" in line
    assert "loss 0.5" in line


def test_quiet_progress_is_silent(capsys):
    with progress(10, "training", quiet=True) as bar:
        bar.advance(10)
    assert capsys.readouterr() == ("", "")


def test_suggestions_are_near_or_absent():
    assert did_you_mean("gatd", ["gated", "topk"]) == " Did you mean 'gated'?"
    assert did_you_mean("zzz", ["gated", "topk"]) == ""
