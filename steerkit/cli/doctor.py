"""`steerkit doctor`: what this machine has, what is amiss, why that matters, and the command that mends it.

Each check is a function of the facts (`doctor_facts.Facts`) that gives findings. It runs where torch itself is broken,
and no other command starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from steerkit.cli.common import Json, Quiet, command, emit, say
from steerkit.cli.doctor_facts import Facts, Space, gather
from steerkit.errors import SteerkitError

LEAST_SPACE, LITTLE_SPACE = 1e9, 10e9
"""Bytes below which a place for files is a failure, or a note."""
LEAST_SHARED_MEMORY = 1e9
WORST_FVU = 0.9
"""Of the self-check; 0.19 is usual."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Literal["ok", "note", "fail"]
    """A note is worth knowing, or slow; a failure is something that will not work."""
    seen: str
    why: str = ""
    """Why it matters, where it does."""
    mend: str = ""
    """The command that mends it, or what to do."""

    @property
    def ok(self) -> bool:
        return self.level != "fail"


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A Hugging Face id or a directory to look at besides."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Versions, conflicts, devices, caches and space, with the mend of what is amiss, and one self-check."""
    say("Looking around …", quiet=quiet)
    findings = examine(gather(model))
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        level = finding.level.upper() if finding.level == "fail" else finding.level
        say(f"{level:<5}{finding.name:<{width}}{finding.seen}", quiet=quiet)
        for text in (finding.why, finding.mend and f"-> {finding.mend}"):
            if text:
                say(f"{'':<{width + 5}}{text}", quiet=quiet)
    bad = [finding.name for finding in findings if not finding.ok]
    notes = sum(finding.level == "note" for finding in findings)
    if not bad:
        say(f"All {len(findings)} checks passed" + (f", {notes} with a note." if notes else "."), quiet=quiet)
    emit({"ok": not bad, "checks": [{**asdict(f), "ok": f.ok} for f in findings]}, as_json=json)
    if bad:
        raise SteerkitError(f"{len(bad)} of {len(findings)} checks failed: {', '.join(bad)}.")


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order of `CHECKS`."""
    return [finding for check in CHECKS for finding in check(facts)]


# -- packages --------------------------------------------------------------------------------------------------------


def packages(facts: Facts) -> Iterator[Finding]:
    """Each package that steerkit asks for, at a version that it works with."""
    from packaging.requirements import Requirement

    yield Finding("python", "ok", f"{facts.python} on {facts.machine}")
    if not facts.requirements:
        yield Finding(
            "steerkit",
            "note",
            "not installed as a package, so the versions that it needs are not known",
            mend="pip install -e .",
        )
    for line in facts.requirements:
        asked = Requirement(line)
        found = facts.versions.get(asked.name.lower())
        wanted = f"{asked.name}{','.join(sorted(map(str, asked.specifier), reverse=True))}"
        mend = f"pip install '{wanted}'"
        if found is None:
            yield Finding(asked.name, "fail", "not installed", f"steerkit needs {wanted}.", mend)
        elif not asked.specifier.contains(found, prereleases=True):
            yield Finding(
                asked.name, "fail", f"{found}, but {wanted} is needed", _WHY.get(asked.name, ""), mend
            )
        else:
            yield Finding(asked.name, "ok", found)


_WHY = {
    "transformer-lens": "4.x took out HookedTransformer, which sae-lens 6 imports; below 3.0 there is no TransformerBridge.",
    "sae-lens": "Its registry of pretrained SAEs is read under the names that 6.44 gave it.",
    "transformers": "Attention, caches and loading were renamed in 5.x; older ones fail at the first forward or on loading.",
    "peft": "Adapters are written as peft tuners, against names that older versions do not have.",
}

_ABI = (
    ("numpy.dtype size changed", "It was compiled for another version of numpy than the one installed."),
    ("_array_api not found", "It was compiled for numpy 1.x and cannot run with numpy 2.x."),
    ("compiled using numpy 1.x", "It was compiled for numpy 1.x and cannot run with numpy 2.x."),
    ("size changed, may indicate binary", "It was compiled for another version of the package named there."),
    ("torchvision::nms", "It was compiled for another version of torch."),
    ("undefined symbol", "It was compiled against another version of a library than the one that is loaded."),
    ("glibcxx", "The C++ library that is found first is older than the one it was compiled with."),
    ("libcudart", "A CUDA library that it was compiled against is not here."),
)
"""What an error of import says, in lower case, and what it means."""
_PACKAGE_OF = {"sklearn": "scikit-learn"}


def imports(facts: Facts) -> Iterator[Finding]:
    """The large compiled packages are imported one after the other: that is where versions clash."""
    found = facts.imports
    told: set[str] = set()  # what imports a broken package fails alike
    for module, error in found.errors.items():
        if error not in told:
            told.add(error)
            yield _broken(module, error)
    if found.crashed is not None:
        last = found.stderr.strip().splitlines()[-1]
        if "OMP: Error #15" in found.stderr:
            return  # `openmp` tells it
        yield _broken(found.crashed, f"importing it ends Python: {last}")
    elif not found.errors and "compiled using NumPy 1.x" in found.stderr:
        yield Finding(
            "numpy",
            "note",
            "a package was compiled for numpy 1.x",
            _meaning("_ARRAY_API not found"),
            "pip install --upgrade --force-reinstall pyarrow pandas scikit-learn datasets",
        )
    elif not found.errors:
        yield Finding("imports", "ok", "numpy, pyarrow, datasets, torch, transformers and peft load together")


def _broken(module: str, error: str) -> Finding:
    package = _PACKAGE_OF.get(module, module)
    mend = f"pip install --upgrade --force-reinstall {package}"
    if "GLIBCXX" in error:
        mend = "conda install -c conda-forge libstdcxx-ng   (or take the system's libstdc++ first in LD_LIBRARY_PATH)"
    elif module == "datasets" and "pyarrow" in error:
        mend = "pip install --upgrade --force-reinstall pyarrow datasets"
    return Finding(f"import {module}", "fail", " ".join(error.split())[:300], _meaning(error), mend)


def _meaning(error: str) -> str:
    return next((told for sign, told in _ABI if sign in error.lower()), "")


def torch_family(facts: Facts) -> Iterator[Finding]:
    """torchvision and torchaudio are each built for one version of torch."""
    found = facts.versions.get("torch")
    for package, wanted in facts.torch_wanted.items():
        if found is None:
            continue
        have = facts.versions.get(package, "?")
        if found.split("+")[0] == wanted.split("+")[0]:
            yield Finding(package, "ok", f"{have}, built for this torch")
            continue
        yield Finding(
            package,
            "fail",
            f"{have} is built for torch {wanted}, and torch is {found}",
            f"transformers imports {package} where it is installed, and fails with “operator does not exist”.",
            f"pip uninstall -y {package}   (steerkit does not need it), or install the one for torch {found.split('+')[0]}",
        )


def openmp(facts: Facts) -> Iterator[Finding]:
    """Intel's and LLVM's OpenMP in one process abort it, or slow each other down."""
    allowed = facts.environment.get("KMP_DUPLICATE_LIB_OK", "").lower() in ("1", "true", "yes")
    mend = "take numpy and torch from one source: all from pip, or all from conda-forge"
    if "OMP: Error #15" in facts.imports.stderr:
        yield Finding(
            "openmp",
            "fail",
            "two OpenMP runtimes are loaded, and the second ends Python (OMP: Error #15)",
            "KMP_DUPLICATE_LIB_OK=TRUE would silence it; its makers warn of wrong results.",
            mend,
        )
        return
    several = len(set(facts.imports.openmp)) > 1  # copies of GNU's, one in each wheel, do no harm
    if several or allowed:
        runtimes = ", ".join(sorted(set(facts.imports.openmp)))
        seen = f"OpenMP runtimes of several makers: {runtimes}" if several else "one OpenMP runtime"
        yield Finding(
            "openmp",
            "note",
            seen + ("; KMP_DUPLICATE_LIB_OK is set" if allowed else ""),
            "Their threads fight for the same cores; with KMP_DUPLICATE_LIB_OK results can be wrong without a word.",
            mend + ("; then unset KMP_DUPLICATE_LIB_OK" if allowed else ""),
        )


# -- processors ------------------------------------------------------------------------------------------------------


def threads(facts: Facts) -> Iterator[Finding]:
    """No more threads than cores."""
    if facts.torch is None:
        return
    n, cores = facts.torch.threads, facts.cores
    seen = f"{n} thread{'s' * (n != 1)} of torch on {cores} core{'s' * (cores != 1)}"
    if n > cores:
        yield Finding(
            "threads",
            "note",
            seen,
            "Threads beyond the cores wait for each other; small models become several times slower.",
            f"export OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("threads", "ok", seen)


_CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cuNNN"


def gpu(facts: Facts) -> Iterator[Finding]:
    """A GPU that is here is one that torch can use."""
    torch = facts.torch
    if torch is None:
        return
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if torch.gpus:
        for i, device in enumerate(torch.gpus):
            yield Finding(f"cuda:{i}", "ok", f"{device.name}, {device.memory / 2**30:.0f} GiB")
    elif torch.mps:
        yield Finding("gpu", "ok", "mps")
    elif visible is not None and visible.strip() in ("", "-1"):
        yield Finding(
            "gpu",
            "note",
            f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU",
            "All runs on the CPU.",
            "unset CUDA_VISIBLE_DEVICES",
        )
    elif not facts.driver:
        yield Finding("gpu", "ok", "none; the CPU is used")
    elif not facts.gpu_nodes:
        yield Finding(
            "gpu",
            "note",
            "an NVIDIA driver is loaded, but no device can be seen from here",
            "A container sees the GPUs that it is started with; all runs on the CPU.",
            "docker run --gpus all …",
        )
    elif torch.cuda is None:
        yield Finding(
            "gpu",
            "fail",
            f"there is an NVIDIA GPU, and torch {torch.version} is a build for the CPU",
            "--device cuda is refused, and all runs on the CPU, tens of times slower.",
            f"{_CUDA_TORCH}   (cuNNN: of a CUDA version up to the one that nvidia-smi names)",
        )
    else:
        reason = torch.cuda_error or "it finds no device"
        yield Finding(
            "gpu",
            "fail",
            f"there is an NVIDIA GPU, torch {torch.version} is built for CUDA {torch.cuda}, and cannot start it: {reason}",
            "--device cuda is refused, and all runs on the CPU, tens of times slower.",
            f"{_CUDA_TORCH}   (cuNNN: of the CUDA version that nvidia-smi names, or older; or update the driver)",
        )


def gpu_code(facts: Facts) -> Iterator[Finding]:
    """torch has code for each GPU, and the GPU what half precision and the kernels need."""
    torch = facts.torch
    if torch is None or torch.hip is not None:
        return
    for i, device in enumerate(torch.gpus):
        major, minor = device.capability
        if torch.built_for and not any(_runs_on(arch, major, minor) for arch in torch.built_for):
            yield Finding(
                f"cuda:{i} code",
                "fail",
                f"torch has no code for compute capability {major}.{minor}, only {', '.join(torch.built_for)}",
                "The first operation fails: “no kernel image is available for execution on the device”.",
                f"{_CUDA_TORCH}   (cuNNN: an older or a newer CUDA version, whose build has sm_{major}{minor})",
            )
        elif device.capability < (8, 0):
            yield Finding(
                f"cuda:{i} precision",
                "note",
                f"compute capability {major}.{minor}: no bfloat16, no TF32, none of the SAEs' Triton kernels",
                "bfloat16 is emulated and slower than float32; sparse decoding takes the way over torch.",
                "--dtype float16",
            )
        elif "triton" not in facts.versions:
            yield Finding(
                f"cuda:{i} kernels",
                "note",
                "bfloat16 and TF32, but triton is not installed",
                "The SAEs' sparse CUDA kernels are not used: training is slower.",
                "pip install triton   (triton-windows on Windows)",
            )
        else:
            yield Finding(f"cuda:{i} code", "ok", "bfloat16, TF32 and Triton kernels")


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch` runs there: sm_86 on 8.6 and 8.9, compute_80 on all that came later."""
    kind, _, number = arch.partition("_")
    digits = "".join(c for c in number if c.isdigit())
    if not digits:
        return False
    theirs = (int(digits[:-1]), int(digits[-1]))
    if kind == "compute":
        return theirs <= (major, minor)
    return theirs[0] == major and theirs[1] <= minor


# -- files -----------------------------------------------------------------------------------------------------------


def space(facts: Facts) -> Iterator[Finding]:
    """Room for models and runs."""
    if facts.cache is not None:
        yield _room("hub cache", facts.cache, "export HF_HOME=/a/larger/disk", "Models are downloaded there.")
    if facts.here is not None:
        yield _room("disk", facts.here, "free some, or give --out elsewhere", "Runs are written here.")
    shared = facts.shared_memory
    several = facts.torch is not None and len(facts.torch.gpus) > 1
    if shared is not None and shared.total < LEAST_SHARED_MEMORY and several:
        yield Finding(
            "/dev/shm",
            "note",
            f"{shared.total / 1e6:.0f} MB",
            "Processes on several GPUs pass each other their data there: NCCL fails with “unhandled system error”.",
            "docker run --shm-size=8g …",
        )


def _room(name: str, place: Space, mend: str, why: str) -> Finding:
    free = f"{place.free / 1e9:.1f} GB free in {place.path}"
    if not place.writable:
        return Finding(name, "note", f"{place.path} cannot be written to", why, mend)
    if place.free < LITTLE_SPACE:
        return Finding(name, "fail" if place.free < LEAST_SPACE else "note", free, why, mend)
    return Finding(name, "ok", free)


def offline(facts: Facts) -> Iterator[Finding]:
    """Without the network, what is cached is all there is."""
    n = len(facts.cached_models)
    some = f" ({', '.join(facts.cached_models[:3])}{', …' if n > 3 else ''})" if n else ""
    seen = f"{n} models are cached{some}" + ("; HF_HUB_OFFLINE is set" if facts.offline else "")
    if facts.offline and not n and facts.model is None:
        yield Finding(
            "hub",
            "note",
            seen,
            "Only `storyworld` and local directories can be loaded.",
            "unset HF_HUB_OFFLINE",
        )
    else:
        yield Finding("hub", "ok", seen)


def model(facts: Facts) -> Iterator[Finding]:
    """The model that was asked about can be loaded."""
    asked = facts.model
    if asked is None:
        return
    if asked.place is None:
        yield Finding(
            asked.name,
            "fail" if facts.offline else "note",
            "neither a directory nor in the cache" + (", and HF_HUB_OFFLINE is set" if facts.offline else ""),
            "It cannot be loaded." if facts.offline else "It is downloaded at its first use.",
            f"HF_HUB_OFFLINE=0 hf download {asked.name}" if facts.offline else f"hf download {asked.name}",
        )
        return
    if "config.json" not in asked.files and "adapter_config.json" not in asked.files:
        yield Finding(asked.name, "fail", f"{asked.place} has no config.json", "It is no model's directory.")
        return
    if any(f.endswith(".safetensors") for f in asked.files):
        yield Finding(asked.name, "ok", asked.place)
    else:
        pickled = any(f.endswith((".bin", ".pt", ".pth")) for f in asked.files)
        yield Finding(
            asked.name,
            "fail",
            "its weights are pickles" if pickled else f"{asked.place} has no weights",
            "steerkit reads safetensors alone: a pickle runs whatever code is in it." if pickled else "",
            'python -c "import transformers as t; '
            f"t.AutoModelForCausalLM.from_pretrained('{asked.name}').save_pretrained('converted')\""
            if pickled
            else f"hf download {asked.name}",
        )
    yield from _tokenizer(facts)


def _tokenizer(facts: Facts) -> Iterator[Finding]:
    asked = facts.model
    assert asked is not None
    if asked.tokenizer_error is not None:
        yield Finding(
            "tokenizer",
            "fail",
            asked.tokenizer_error,
            "Text cannot be read without one.",
            "put tokenizer.json and tokenizer_config.json beside the weights, or pass tokenizer=… from Python",
        )
    elif asked.pad_token is None:
        taken = f"its EOS, {asked.eos_token!r}," if asked.eos_token is not None else "another token"
        yield Finding(
            "tokenizer",
            "note",
            "no pad token",
            f"steerkit takes {taken} and masks it; other tools refuse to make batches.",
            "tokenizer.pad_token = tokenizer.eos_token",
        )
    else:
        yield Finding("tokenizer", "ok", f"pad token {asked.pad_token!r}")


def self_check(facts: Facts) -> Iterator[Finding]:
    """The built-in model is read, writes, and is learnt from."""
    found = facts.self_check
    if found is None:
        yield Finding("self-check", "note", "not run: what it needs cannot be imported")
        return
    if found.error is not None:
        yield Finding(
            "self-check",
            "fail",
            found.error,
            "The built-in model must run anywhere.",
            "pip install --force-reinstall --no-deps -e .",
        )
        return
    right = found.verified == found.sites > 0 and math.isfinite(found.fvu) and found.fvu < WORST_FVU
    yield Finding(
        "self-check",
        "ok" if right else "fail",
        f"storyworld: {found.verified} of {found.sites} sites verified; writes “{found.text}”; an SAE of 20 steps leaves "
        f"{found.fvu:.2f} unexplained",
        ""
        if right
        else f"All sites are verified and less than {WORST_FVU:g} is left where arithmetic is right.",
        "" if right else "pip install --force-reinstall torch numpy",
    )


CHECKS: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    packages,
    imports,
    torch_family,
    openmp,
    threads,
    gpu,
    gpu_code,
    space,
    offline,
    model,
    self_check,
)


def alone() -> None:
    """The command by itself, for when the others cannot be imported."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command(doctor))
    app()
