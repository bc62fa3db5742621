"""Several processes train what one would: the same weights from the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae

sys.path.insert(0, str(Path(__file__).parent))
from ranks import CASES, trained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What two processes left behind; the last thing that they did was to fail."""
    path = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(Path(__file__).with_name("ranks.py")), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 1, done.stderr
    assert (path / "outcomes-0.json").exists(), done.stderr
    return path


@pytest.fixture(scope="module")
def of_two(out):
    """Case -> what each of two processes ended with."""
    return {name: [load_file(out / f"{name}-{rank}.safetensors") for rank in range(2)] for name in CASES}


@pytest.fixture(scope="module")
def outcomes(out):
    """What each of two processes met."""
    return [json.loads((out / f"outcomes-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_of_one(name, of_two):
    one = trained(CASES[name])
    first, second = of_two[name]
    for key, value in one.tensors().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(
            first[key], value, rtol=0, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )
    metrics = torch.tensor(list(one.metrics().values()), dtype=torch.float64)
    torch.testing.assert_close(first["metrics"], metrics, rtol=1e-8, atol=1e-8)


def test_every_architecture_is_among_the_cases():
    assert {arch.name for arch in CASES.values()} == set(sae.REGISTRY)


def test_a_batch_that_does_not_divide_is_refused_by_all(outcomes):
    for found in outcomes:
        assert found["refuse_batch"].startswith("InputError: ")
        assert "A batch of 257 does not divide among 2 processes" in found["refuse_batch"]


def test_what_the_first_cannot_do_stops_the_second(outcomes):
    first, second = (found["fail_on_the_first"] for found in outcomes)
    assert first == "SteerkitError: no space left"
    assert second == "SteerkitError: Rank 0 stopped: no space left"


def test_a_job_that_failed_leaves_the_next_one_alone(outcomes):
    assert [found["hand_over"] for found in outcomes] == ["'what rank 0 found'", "None"]


def test_the_error_of_a_rank_that_dies_is_every_ranks(outcomes):
    first, second = (found["fail_on_the_second"] for found in outcomes)
    assert second == "ValueError: rank 1 gave up"
    assert first == "SteerkitError: Rank 1 stopped: rank 1 gave up"
