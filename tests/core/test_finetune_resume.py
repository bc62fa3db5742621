"""Runs of fine-tuning that are cut in two, or done by two, end as one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from finetune_cases import CASES, RESUMED, VARIANTS, decoder, exactly, modelling, resumable, weights

from steerkit.checkpoints import Checkpoints
from steerkit.errors import CheckpointError, InputError
from steerkit.finetuning import finetune, layers, load_run, trainable
from steerkit.runs import Run

SCRIPT = Path(__file__).with_name("finetune_cases.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_bit_identical(case, tmp_path):
    whole, outcome = resumable(case, tmp_path / "whole")
    number = signal.SIGINT if case == "classification" else signal.SIGTERM
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        resumable(case, tmp_path / "cut", at=6, number=number)
    assert signal.getsignal(number) == before
    Run.load(tmp_path / "cut").log({"step": 9, "loss": -1.0})  # of steps that no checkpoint has
    found, resumed = resumable(case, tmp_path / "cut", resume=True)
    assert same(found, whole)
    assert resumed.losses == outcome.losses
    assert resumed.validation == outcome.validation
    assert resumed.best == outcome.best
    assert Run.load(tmp_path / "cut").metrics() == Run.load(tmp_path / "whole").metrics()
    assert not (tmp_path / "cut/checkpoint").exists()


def test_a_run_without_a_directory_is_the_same(tmp_path):
    assert same(resumable("classification", None)[0], resumable("classification", tmp_path / "r")[0])


def test_a_killed_run_ends_bit_identical(tmp_path):
    whole, _ = resumable("preference", None)
    child = os.fork()
    if not child:
        try:
            resumable("preference", tmp_path / "r", at=6, number=signal.SIGKILL, checkpoint_seconds=0.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(Checkpoints(tmp_path / "r/checkpoint").files()) == 2
    assert same(resumable("preference", tmp_path / "r", resume=True)[0], whole)


def test_a_finished_run_is_read_back(tmp_path):
    whole, outcome = resumable("classification", tmp_path / "r")
    again, found = resumable("classification", tmp_path / "r", at=0, number=signal.SIGKILL, resume=True)
    assert same(again, whole)
    assert found == outcome
    summary = Run.load(tmp_path / "r").summary
    assert summary["best"] == list(outcome.best)
    assert summary["score"] == "accuracy"
    with pytest.raises(InputError, match="finished run"):
        resumable("classification", tmp_path / "r")


def test_weights_of_another_model_are_refused(tmp_path):
    resumable("classification", tmp_path / "r")
    model = decoder()
    before = weights(model, modelling(model))
    with pytest.raises(CheckpointError, match=r"has trained head\.bias .* is not here"):
        load_run(model, modelling(model), tmp_path / "r")
    assert same(weights(model, modelling(model)), before)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    model = decoder()
    objective = modelling(model)
    config = replace(RESUMED, tau=None)

    def stop(model, step, n_steps):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        finetune(model, objective, config, out=tmp_path, checkpoint_seconds=0.0, after_step=stop)
    assert finetune(model, objective, config, out=None).steps  # nothing was saved before the first step

    def stop_later(model, step, n_steps):
        if step:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        finetune(
            model, objective, config, out=tmp_path, resume=True, checkpoint_seconds=0.0, after_step=stop_later
        )
    with trainable(model, layers(0)), pytest.raises(CheckpointError, match="other parameters"):
        finetune(model, objective, config, out=tmp_path, resume=True)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two processes end with."""
    path = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, SCRIPT, path], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_weights_of_one(case, variant, of_two):
    one, outcome = exactly(case, **VARIANTS[variant])
    one["losses"] = torch.tensor(outcome.losses, dtype=torch.float64)
    first, second = (load_file(of_two / f"{case} {variant} {rank}.safetensors") for rank in range(2))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
