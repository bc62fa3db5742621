"""`steerkit doctor`: what this machine has, what conflicts, and how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from steerkit.cli.common import Json, Quiet, emit, say
from steerkit.errors import SteerkitError


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, what was seen, and the mend where something is wrong."""

    name: str
    ok: bool
    seen: str
    mend: str = ""


# Package, import name, lowest version that works, first version that does not.
_REQUIRED = (
    ("torch", "torch", "2.6", None),
    ("transformers", "transformers", "5.9", "6"),
    ("transformer-lens", None, "3.0", "4"),
    ("sae-lens", None, "6.44", "7"),
    ("peft", None, "0.17", None),
    ("datasets", None, "3.0", None),
    ("numpy", "numpy", "1.26", None),
    ("pyarrow", "pyarrow", "15", None),
    ("safetensors", "safetensors", "0.5", None),
    ("plotly", None, "6.0", None),
    ("scikit-learn", None, "1.4", None),
)


def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Versions, conflicts, devices, offline caches, and one self-check of the built-in model."""
    checks = [*_packages(), *_devices(), *_caches(), _self_check()]
    for check in checks:
        say(f"{'ok  ' if check.ok else 'BAD '} {check.name:<18} {check.seen}", quiet=quiet)
        if check.mend:
            say(f"{'':23} -> {check.mend}", quiet=quiet)
    bad = [check.name for check in checks if not check.ok]
    if not bad:
        say(f"All {len(checks)} checks passed.", quiet=quiet)
    emit({"ok": not bad, "checks": [vars(check) for check in checks]}, as_json=json)
    if bad:
        raise SteerkitError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}.")


def _packages() -> list[Check]:
    from packaging.version import Version

    checks = [
        Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    ]
    for package, module, lowest, beyond in _REQUIRED:
        wanted = f"{package}>={lowest}" + (f",<{beyond}" if beyond else "")
        mend = f"pip install '{wanted}'"
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            checks.append(Check(package, False, "not installed", mend))
            continue
        version = Version(found)
        if version < Version(lowest) or (beyond and version >= Version(beyond)):
            if package == "transformer-lens" and version >= Version("4"):
                mend += "   (4.x removed HookedTransformer, which sae-lens 6 imports)"
            checks.append(Check(package, False, f"{found}, but {wanted} is needed", mend))
            continue
        try:
            if module:
                importlib.import_module(module)
            checks.append(Check(package, True, found))
        except Exception as error:  # a broken binary can raise anything on import
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            checks.append(
                Check(
                    package,
                    False,
                    f"{found}, but importing it fails: {reason}",
                    f"pip install --force-reinstall '{wanted}'",
                )
            )
    return checks


def _devices() -> list[Check]:
    import torch

    checks = [Check("cpu", True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            checks.append(Check(f"cuda:{i}", True, f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    elif shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        checks.append(
            Check(
                "cuda",
                False,
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it",
                "install a CUDA build of torch into this environment (see the README, 'On a CUDA machine')",
            )
        )
    else:
        checks.append(
            Check("gpu", True, "mps" if torch.backends.mps.is_available() else "none; the CPU is used")
        )
    return checks


def _caches() -> list[Check]:
    hub = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    ).expanduser()
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in hub.glob("models--*"))
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0", "false", "False")
    seen = f"{len(models)} models in {hub}" + (
        f" ({', '.join(models[:3])}{', …' if len(models) > 3 else ''})" if models else ""
    )
    mend = ""
    if offline and not models:
        mend = "HF_HUB_OFFLINE is set and nothing is cached: only `storyworld` and local directories can be loaded"
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return [
        Check("hub cache", True, seen + ("; offline" if offline else ""), mend),
        Check(
            "disk",
            free > 2,
            f"{free:.0f} GB free here",
            "" if free > 2 else "caches and runs need space: free some",
        ),
    ]


def _self_check() -> Check:
    from steerkit.models import HookedModel

    try:
        model = HookedModel.from_pretrained("storyworld", device="cpu")
        story = model.generate("The", max_new_tokens=12, do_sample=False)
    except Exception as error:
        return Check("self-check", False, f"{type(error).__name__}: {error}", "reinstall steerkit")
    verified = sum(site.verified for site in model.sites.values())
    return Check(
        "self-check",
        verified > 0,
        f"storyworld: {verified} of {len(model.sites)} sites verified; writes “The{story}”",
    )
