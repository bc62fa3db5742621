"""Several processes train what one would: the same weights from the same batches."""

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


def torchrun(*arguments, processes=2, check=True):
    """Run something in several processes, as a user would."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Case -> what each of two processes ended with."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun(Path(__file__).with_name("ranks.py"), out)
    return {name: [load_file(out / f"{name}-{rank}.safetensors") for rank in range(2)] for name in CASES}


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
