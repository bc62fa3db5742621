"""What `steerkit doctor` judges: facts of this machine and its Python, gathered in one place.

Whatever may be broken is imported in a process of its own, so that an extension that aborts is a fact like any other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

_IMPORTED = ("numpy", "pyarrow", "pandas", "sklearn", "datasets", "torch", "transformers", "peft")
_BESIDE_TORCH = ("torchvision", "torchaudio")
"""Packages of which each version is built for one version of torch."""
_VARIABLES = ("OMP_NUM_THREADS", "KMP_DUPLICATE_LIB_OK", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that torch can use."""

    name: str
    capability: tuple[int, int]
    """(8, 0) for an A100."""
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Imports:
    """What came of importing the large packages one after the other."""

    errors: Mapping[str, str] = field(default_factory=dict)
    """Module -> what it raised."""
    crashed: str | None = None
    """The module whose import ended the process."""
    stderr: str = ""
    openmp: tuple[str, ...] = ()
    """The OpenMP runtimes that are loaded then: libgomp, libiomp, libomp."""


@dataclass(frozen=True)
class Torch:
    """What torch says of itself."""

    version: str
    cuda: str | None = None
    """The CUDA version that it is built for; None for a CPU build."""
    hip: str | None = None
    built_for: tuple[str, ...] = ()
    """GPU architectures that it has code for: sm_80, compute_90, …"""
    gpus: tuple[Gpu, ...] = ()
    cuda_error: str | None = None
    """Why CUDA can't be started, where it can't."""
    mps: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Space:
    """A place for files, in bytes."""

    path: str
    free: int
    total: int
    writable: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """A model that was asked about."""

    name: str
    place: str | None
    """Its directory: given, or in the cache of the Hub; None where there is none."""
    files: tuple[str, ...] = ()
    pad_token: str | None = None
    eos_token: str | None = None
    tokenizer_error: str | None = None


@dataclass(frozen=True)
class SelfCheck:
    """What the built-in model does here."""

    sites: int = 0
    verified: int = 0
    text: str = ""
    fvu: float = float("nan")
    """Of an SAE after 20 steps, on held-out text."""
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """All of it."""

    python: str
    machine: str
    versions: Mapping[str, str]
    """Installed packages, by their names in lower case."""
    requirements: tuple[str, ...]
    """What steerkit asks for, as in pyproject.toml."""
    cores: int
    """That this process may use."""
    imports: Imports = Imports()
    torch: Torch | None = None
    """None where it can't be imported."""
    torch_wanted: Mapping[str, str] = field(default_factory=dict)
    """torchvision and the like -> the version of torch that each is built for."""
    driver: bool = False
    """Whether an NVIDIA driver is loaded."""
    gpu_nodes: bool = False
    """Whether its devices can be seen from here: a container may be without them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cache: Space | None = None
    cached_models: tuple[str, ...] = ()
    here: Space | None = None
    shared_memory: Space | None = None
    model: ModelFacts | None = None
    self_check: SelfCheck | None = None
    """None where the packages that it needs can't be imported."""

    @property
    def offline(self) -> bool:
        return self.environment.get("HF_HUB_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")


def gather(model: str | None = None) -> Facts:
    """Look around; with `model`, at that model's files and tokenizer too, without the network."""
    versions = {
        name.lower(): dist.version
        for dist in metadata.distributions()
        if (name := dist.metadata["Name"]) is not None
    }
    imports, torch = _import_all([*_IMPORTED, *(name for name in _BESIDE_TORCH if name in versions)])
    cache = _hub_cache()
    loads = torch is not None and not imports.errors and imports.crashed is None
    return Facts(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        versions=versions,
        requirements=_requirements("steerkit"),
        cores=_cores(),
        imports=imports,
        torch=torch,
        torch_wanted=_torch_wanted(),
        driver=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        gpu_nodes=any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        cache=_space(cache),
        cached_models=tuple(
            sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*"))
        ),
        here=_space(Path.cwd()),
        shared_memory=_space(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        model=None if model is None else look_at_model(model, cache),
        self_check=_self_check() if loads else None,
    )


def _requirements(package: str) -> tuple[str, ...]:
    """Those of no extra."""
    try:
        found = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return ()
    return tuple(line.split(";")[0].strip() for line in found if "extra ==" not in line)


def _torch_wanted() -> dict[str, str]:
    from packaging.requirements import Requirement

    wanted = {}
    for package in _BESIDE_TORCH:
        for line in _requirements(package):
            asked = Requirement(line)
            exact = [s.version for s in asked.specifier if s.operator == "=="]
            if asked.name == "torch" and exact:
                wanted[package] = exact[0]
    return wanted


def _cores() -> int:
    """Cores of this process, no more than the time that its control group is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _space(path: Path) -> Space:
    """Of the nearest directory that exists."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(str(path), usage.free, usage.total, os.access(path, os.W_OK))


# -- imports ---------------------------------------------------------------------------------------------------------

_PROBE = """
import importlib, json, sys
sys.path = [path for path in sys.path if path]
errors = {}
for name in sys.argv[1:]:
    print(name, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors[name] = f"{type(error).__name__}: {error}"
found = {"errors": errors, "openmp": [], "torch": None}
try:
    from threadpoolctl import threadpool_info
    found["openmp"] = [p["prefix"] for p in threadpool_info() if p["user_api"] == "openmp"]
except Exception:
    pass
if "torch" not in errors:
    import torch
    about = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
             "built_for": [], "gpus": [], "cuda_error": None,
             "mps": torch.backends.mps.is_available(), "threads": torch.get_num_threads()}
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
            about["built_for"] = torch.cuda.get_arch_list()
            for i in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(i)
                about["gpus"].append([device.name, [device.major, device.minor], device.total_memory])
        except Exception as error:
            about["cuda_error"] = str(error).splitlines()[0]
    found["torch"] = about
print(json.dumps(found))
"""


def _import_all(names: list[str]) -> tuple[Imports, Torch | None]:
    done = subprocess.run([sys.executable, "-c", _PROBE, *names], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        told = done.stderr or f"exit status {done.returncode}"
        return Imports(crashed=lines[-1] if lines else names[0], stderr=told), None
    found = json.loads(lines[-1])
    imports = Imports(found["errors"], None, done.stderr, tuple(sorted(found["openmp"])))
    about = found["torch"]
    if about is None:
        return imports, None
    gpus = tuple(Gpu(name, (major, minor), memory) for name, (major, minor), memory in about["gpus"])
    return imports, Torch(**{**about, "gpus": gpus, "built_for": tuple(about["built_for"])})


# -- models ----------------------------------------------------------------------------------------------------------


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def look_at_model(name: str, cache: Path) -> ModelFacts:
    """The files and the tokenizer of `storyworld`, of a directory, or of what is in the Hub's cache."""
    place = _place(name, cache)
    if place is None:
        return ModelFacts(name, None)
    files = tuple(sorted(path.name for path in place.iterdir()))
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(place))
    except Exception as error:  # transformers raises a dozen kinds here
        return ModelFacts(name, str(place), files, tokenizer_error=_first_line(error))
    return ModelFacts(name, str(place), files, tokenizer.pad_token, tokenizer.eos_token)


def _place(name: str, cache: Path) -> Path | None:
    """The directory of a model's files: its newest snapshot for one of the Hub."""
    if name == "storyworld":
        spec = util.find_spec("steerkit")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "storyworld" / "model"
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    snapshots = (cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json")
    return max((p.parent for p in snapshots), key=lambda p: p.stat().st_mtime, default=None)


def _self_check() -> SelfCheck:
    """Load the built-in model, write a few words, and train an SAE for 20 steps."""
    try:
        import sae
        from steerkit import storyworld
        from steerkit.models import HookedModel

        model = HookedModel.from_pretrained("storyworld", device="cpu")
        text = model.generate("The", max_new_tokens=12, do_sample=False)
        stories = [story.text for story in storyworld.sample(150, seed=0)]
        config = sae.TrainConfig(batch_size=256, block_tokens=2560, held_out_tokens=1000)
        arch = sae.TopK(d_sae=256, k=16)
        with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
            run = sae.train(
                model,
                stories,
                "blocks.1.hook_resid_post",
                arch,
                20 * 256,
                Path(folder) / "run",
                config=config,
                quiet=True,
            )
    except Exception as error:  # whatever is broken, it is what has to be told
        return SelfCheck(error=f"{type(error).__name__}: {_first_line(error)}")
    verified = sum(site.verified for site in model.sites.values())
    return SelfCheck(len(model.sites), verified, f"The {text.strip()}", float(run.summary["fvu"]))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
