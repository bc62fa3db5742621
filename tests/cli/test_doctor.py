"""Each check of `steerkit doctor` on the facts of a machine that has the trouble; and one look around this one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from steerkit import storyworld
from steerkit.cli.doctor import CHECKS, examine
from steerkit.cli.doctor_facts import Facts, Gpu, Imports, ModelFacts, SelfCheck, Space, Torch, look_at_model
from steerkit.cli.main import app

ROOM = Space("/home/me", free=int(50e9), total=int(100e9))
CPU = Torch("2.13.0+cpu", threads=4)
CUDA = Torch(
    "2.13.0",
    cuda="13.0",
    built_for=("sm_75", "sm_80", "sm_90", "compute_90"),
    gpus=(Gpu("A100", (8, 0), 80 * 2**30),),
    threads=4,
)
HEALTHY = Facts(
    python="3.11.7",
    machine="Linux x86_64",
    versions={"torch": "2.13.0", "numpy": "2.4.6", "transformer-lens": "3.9.0", "sae-lens": "6.54.12", "triton": "3.7.1"},
    requirements=("torch>=2.6", "numpy>=1.26", "transformer-lens<4,>=3.0", "sae-lens<7,>=6.44"),
    cores=4,
    imports=Imports(openmp=("libgomp", "libgomp")),
    torch=CPU,
    environment={},
    cache=ROOM,
    here=ROOM,
    shared_memory=Space("/dev/shm", int(8e9), int(8e9)),
    self_check=SelfCheck(sites=30, verified=30, text="The fox", fvu=0.2),
)  # fmt: skip
MODEL = ModelFacts("me/model", "/cache/me", ("config.json", "model.safetensors"), "<pad>", "</s>")


def having(**changes):
    return replace(HEALTHY, **changes)


def installed(**versions):
    return having(versions={**HEALTHY.versions, **{k.replace("_", "-"): v for k, v in versions.items()}})


def importing(**errors):
    return having(imports=Imports(errors=errors))


def asked(**changes):
    return having(model=replace(MODEL, **changes))


def lacking(package):
    return having(versions={k: v for k, v in HEALTHY.versions.items() if k != package})


@pytest.mark.parametrize(
    "facts",
    [
        HEALTHY,
        having(torch=CUDA, driver=True, gpu_nodes=True),
        having(torch=replace(CPU, mps=True)),
        having(torch_wanted={"torchvision": "2.13.0"}, versions={**HEALTHY.versions, "torchvision": "0.28.0"}),
        having(cached_models=("me/model",), environment={"HF_HUB_OFFLINE": "1"}),
        having(model=MODEL),
        having(cores=8),
    ],
    ids=["cpu", "cuda", "mps", "torchvision", "offline", "model", "more cores than threads"],
)  # fmt: skip
def test_nothing_is_found_where_all_is_well(facts):
    assert {finding.level for finding in examine(facts)} == {"ok"}


TROUBLES = {
    "a package is missing": (lacking("sae-lens"), "sae-lens", "not installed", "pip install 'sae-lens"),
    "sae-lens is too old": (installed(sae_lens="6.10.0"), "sae-lens", "6.10.0, but", "pip install 'sae-lens"),
    "transformer-lens 4": (installed(transformer_lens="4.3.0"), "transformer-lens", "4.3.0, but", "<4'"),
    "numpy's ABI": (
        importing(datasets="ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96"),
        "import datasets", "numpy.dtype size changed", "--force-reinstall datasets",
    ),
    "pyarrow's ABI": (
        importing(datasets="ValueError: pyarrow.lib.IpcReadOptions size changed, may indicate binary incompatibility"),
        "import datasets", "IpcReadOptions", "pyarrow datasets",
    ),
    "an old libstdc++": (
        importing(pandas="ImportError: libstdc++.so.6: version `GLIBCXX_3.4.29' not found"),
        "import pandas", "GLIBCXX", "libstdcxx-ng",
    ),
    "an extension that aborts": (
        having(imports=Imports(crashed="pyarrow", stderr="…\nIllegal instruction"), torch=None),
        "import pyarrow", "Illegal instruction", "pyarrow",
    ),
    "two OpenMP runtimes": (
        having(imports=Imports(crashed="torch", stderr="OMP: Error #15: Initializing libiomp5.so, but found …"), torch=None),
        "openmp", "Error #15", "one source",
    ),
    "torchvision of another torch": (
        having(torch_wanted={"torchvision": "2.12.0"}, versions={**HEALTHY.versions, "torchvision": "0.27.0"}),
        "torchvision", "built for torch 2.12.0", "pip uninstall -y torchvision",
    ),
    "a CPU build beside a GPU": (having(driver=True, gpu_nodes=True), "gpu", "build for the CPU", "--index-url"),
    "a driver that is too old": (
        having(driver=True, gpu_nodes=True, torch=replace(CUDA, gpus=(), cuda_error="driver on your system is too old")),
        "gpu", "too old", "update the driver",
    ),
    "a GPU without code": (
        having(torch=replace(CUDA, gpus=(Gpu("GTX 1080", (6, 1), 2**33),))), "cuda:0 code", "6.1", "sm_61",
    ),
    "no room": (having(cache=replace(ROOM, free=int(5e8))), "hub cache", "0.5 GB free", "HF_HOME"),
    "a model that is not cached": (
        having(model=ModelFacts("me/model", None), environment={"HF_HUB_OFFLINE": "1"}),
        "me/model", "HF_HUB_OFFLINE is set", "hf download me/model",
    ),
    "pickled weights": (asked(files=("config.json", "pytorch_model.bin")), "me/model", "pickles", "save_pretrained"),
    "no tokenizer": (asked(tokenizer_error="Can't load tokenizer"), "tokenizer", "Can't load", "tokenizer.json"),
    "no model": (asked(files=("notes.txt",)), "me/model", "no config.json", ""),
    "sites that cannot be verified": (having(self_check=SelfCheck(30, 28, "The", 0.2)), "self-check", "28 of 30", "torch"),
    "arithmetic that is wrong": (having(self_check=SelfCheck(30, 30, "The", float("nan"))), "self-check", "nan", "torch"),
    "an error in the self-check": (having(self_check=SelfCheck(error="OSError: x")), "self-check", "OSError", "pip"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "name", "seen", "mend"), TROUBLES.values(), ids=TROUBLES)
def test_what_will_fail_is_named_with_its_mend(facts, name, seen, mend):
    (finding,) = [finding for finding in examine(facts) if finding.level == "fail"]
    assert finding.name == name
    assert seen in finding.seen
    assert mend in finding.mend


NOTES = {
    "threads": (having(cores=2), "threads", "OMP_NUM_THREADS=2"),
    "several makers' OpenMP": (having(imports=Imports(openmp=("libgomp", "libiomp"))), "openmp", "one source"),
    "KMP_DUPLICATE_LIB_OK": (having(environment={"KMP_DUPLICATE_LIB_OK": "TRUE"}), "openmp", "unset KMP_DUPLICATE_LIB_OK"),
    "a container without the GPU": (having(driver=True), "gpu", "--gpus all"),
    "a hidden GPU": (
        having(driver=True, gpu_nodes=True, environment={"CUDA_VISIBLE_DEVICES": ""}), "gpu", "unset CUDA_VISIBLE_DEVICES",
    ),
    "no bfloat16": (having(torch=replace(CUDA, gpus=(Gpu("T4", (7, 5), 2**34),))), "cuda:0 precision", "float16"),
    "no triton": (replace(lacking("triton"), torch=CUDA), "cuda:0 kernels", "pip install triton"),
    "little room": (having(here=replace(ROOM, free=int(3e9))), "disk", "--out"),
    "a cache that is read only": (having(cache=replace(ROOM, writable=False)), "hub cache", "HF_HOME"),
    "little shared memory": (
        having(torch=replace(CUDA, gpus=CUDA.gpus * 2), shared_memory=Space("/dev/shm", 2**26, 2**26)),
        "/dev/shm", "--shm-size",
    ),
    "nothing cached": (having(environment={"HF_HUB_OFFLINE": "1"}), "hub", "unset HF_HUB_OFFLINE"),
    "to be downloaded": (having(model=ModelFacts("me/model", None)), "me/model", "hf download"),
    "no pad token": (asked(pad_token=None), "tokenizer", "pad_token"),
    "no self-check": (having(self_check=None), "self-check", ""),
    "numpy 1 modules": (
        having(imports=Imports(stderr="A module that was compiled using NumPy 1.x cannot be run in NumPy 2.4.6")),
        "numpy", "pyarrow",
    ),
    "no metadata": (having(requirements=()), "steerkit", "pip install -e ."),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "name", "mend"), NOTES.values(), ids=NOTES)
def test_what_is_slow_or_worth_knowing_is_a_note(facts, name, mend):
    (finding,) = [finding for finding in examine(facts) if finding.level != "ok"]
    assert (finding.name, finding.level) == (name, "note")
    assert mend in finding.mend


def test_an_error_that_others_inherit_is_told_once():
    facts = importing(
        numpy="ImportError: a", torch="OSError: libcudart.so.12", peft="OSError: libcudart.so.12"
    )
    names = [finding.name for finding in examine(facts) if finding.level == "fail"]
    assert names == ["import numpy", "import torch"]


def test_every_check_has_found_something():
    """Every check speaks on some machine of this file, so that none is forgotten in CHECKS."""
    told = {
        check.__name__
        for facts, *_ in [*TROUBLES.values(), *NOTES.values()]
        for check in CHECKS
        if any(finding.level != "ok" for finding in check(facts))
    }
    assert told == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("name", ["torchvision of another torch", "pickled weights"])
def test_mends_are_commands_of_a_shell(name):
    facts = TROUBLES[name][0]
    for finding in examine(facts):
        shlex.split(finding.mend)


def test_a_model_is_found_in_the_cache_by_its_name(tmp_path):
    snapshot = tmp_path / "models--me--fox" / "snapshots" / "abc"
    shutil.copytree(storyworld.model_path(), snapshot)
    found = look_at_model("me/fox", tmp_path)
    assert found.place == str(snapshot)
    assert replace(found, name="", place="") == replace(
        look_at_model("storyworld", tmp_path), name="", place=""
    )
    assert found.pad_token is not None
    for path in snapshot.glob("tokenizer*"):
        path.unlink()
    assert look_at_model("me/fox", tmp_path).tokenizer_error
    assert look_at_model("me/bear", tmp_path).place is None


def test_here_it_finds_nothing_but_a_model_that_is_not_there():
    result = CliRunner().invoke(app, ["doctor", "no/such-model", "--json"], env={"HF_HUB_OFFLINE": "1"})
    found = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 1
    assert "no/such-model" in result.stderr
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "torch", "imports", "threads", "hub", "self-check"} <= set(checks)
    assert [name for name, check in checks.items() if not check["ok"]] == ["no/such-model"]
    assert not found["ok"]


def test_doctor_runs_where_torch_is_broken_and_the_others_name_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")

    def steerkit(*arguments):
        program = "import sys; from steerkit.cli import start; sys.argv[0] = 'steerkit'; start()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    other = steerkit("probe", "--help")
    assert other.returncode == 1
    assert other.stderr.splitlines() == [
        "Error: steerkit cannot start (OSError: libcudart.so.13: cannot open shared object file): "
        "`steerkit doctor` says what is amiss."
    ]
    found = steerkit("doctor")
    assert found.returncode == 1
    assert "libcudart.so.13" in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
