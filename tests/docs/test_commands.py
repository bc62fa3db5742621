"""Every block of the README and of the documentation runs as printed, only smaller; what cannot is named here, with the reason.

A page is one session: its blocks run from top to bottom in one empty directory, Python in one namespace. A shell line is first
read with all the options that it has, so that each must exist, then made small by SMALLER, then run. Fences say what they
hold: ``` alone is shell, ```python is Python, ```text is output; right after a Python block that ran as it is, it must be what
that printed, but for numbers. Commands in running text are read, not run.
"""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

import sae
from probes.comparison import ComparisonConfig
from sae.concepts import concept_scores
from steerkit import storyworld
from steerkit.cli.main import app
from steerkit.models import HookedModel
from steerkit.steering.concept import ConceptConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL_TRAINING = "--tokens 8192 --set training.batch_size=256 --set training.block_tokens=4096 --set training.held_out_tokens=2000"
COMPARISON = {"per_text": 4, "permutations": 4, "n_folds": 2, "score_texts": 4, "context": 64, "Cs": [0.01]}
SMALL_COMPARISON = " ".join(
    f"--set comparison.{name}={str(value).replace(' ', '')}" for name, value in COMPARISON.items()
)
SMALLER = {
    "cache": "--tokens 4096",
    "train sae": SMALL_TRAINING,
    "sweep sae": SMALL_TRAINING,
    "eval sae": "--tokens 2000",
    "dashboard": "--tokens 2000",
    "steer extract": "--n 16",
    "steer apply": "--max-new-tokens 8",
    "steer sweep": "--methods mean_diff,random --sites blocks.1.hook_resid_post --kl-targets 1 --n-prompts 12 --set n_pairs=16 "
    "--set samples=1 --set max_new_tokens=8 --set shuffled=[] --set study=null",
    "adapt train": "--n-train 48 --set n_test=20",
    "adapt bench": "--methods lora,ia3 --seeds 1 --set n_train=32 --set n_test=10 --set bench.grid=1 --set bench.extend=0",
    "compare": f"--texts 16 --labels tense {SMALL_COMPARISON}",
    "concept": "--methods mean_diff,random --at 1 --n-pairs 16 --set kl_targets=[1] --set sites=blocks.1.hook_resid_post "
    "--set n_held_out=8 --set n_prompts=8 --set samples=1 --set max_new_tokens=6 --set few_shot=0 --set shuffled=[]",
    "probe": "--texts 60 --set study.per_text=4 --set study.n_folds=2 --set study.Cs=[0.01]",
}
"""Command: the options that are given to it besides, or instead of what the page says."""

SMALLER_SCRIPTS = {
    "scripts/train_storyworld.py --evaluate": "--stories 20",
    "scripts/train_storyworld.py --samples": "",
}
"""The same for scripts that are run; the others are READ."""

SMALLER_PYTHON = [
    (
        r"tokens=2_000_000",
        "tokens=8_192, batch_size=256, block_tokens=4_096, held_out_tokens=2_000, quiet=True",
    ),
    (r"n_train=300", "n_train=32, n_test=10"),
    (r'"happy", 64\)', '"happy", 4)'),
    (r"texts=300, per_text=8", "texts=40, per_text=4, n_folds=2, Cs=(0.01,)"),
    (r"samples=4", "samples=1"),
    (
        r'"storyworld:mood=happy", method="bipo"',
        'steering.load_pairs("storyworld:mood=happy", n=16), method="bipo"',
    ),
    (r"d_sae=1024", "d_sae=128"),
    (r"run\.dashboard\((tokens=50_000)?\)", "run.dashboard(tokens=2_000, quiet=True)"),
    (r"ConceptConfig\(seeds=3\)", "SMALL_CONCEPT"),
    (r"compare\(base, tuned, .*quick=True\)", "compare(base, tuned, 'storyworld', config=SMALL_COMPARISON)"),
    (
        r"judge\(model, run.sae, site\)",
        "judge(model, run.sae, site, tokens=12_000, max_values=1, min_documents=5)",
    ),
]
"""(pattern, replacement) in Python blocks."""

PLACEHOLDERS = {
    "SRC": "runs/g",
    "RUN": "runs/g",
    "M": "storyworld",
    "D": "storyworld",
    "S": "blocks.2.hook_resid_post",
}
"""What a reader would fill in. DIR is a new directory every time."""

READ = [
    (r"^git clone ", "needs a network"),
    (r"pip install ", "needs a network; `make` does it in CI"),
    (r"^python3 -m venv ", "makes the environment that this runs in"),
    (
        r"^make (demo|test|docs)$",
        "tests/cli and tests/docs run what is in it; `make -n` here says that it is there",
    ),
    (r"\b(hf://|saelens:)", "fetches from a hub"),
    (r"--model (DIR|dir\d+)\b", "a model of the reader's own"),
    (r"--serve\b", "serves until it is stopped"),
    (r"--judge\b", "half a minute each; tests/cli/test_eval_comparison.py runs it"),
    (
        r"^python scripts/(reproduce|study|bench|gpu_check|measure)",
        "takes minutes; tests/scripts run the small ones",
    ),
    (
        r"^(OMP_WAIT_POLICY=PASSIVE )?python scripts/train_storyworld.py$",
        "an hour; tests/storyworld trains a smaller one",
    ),
]
"""(pattern, why such a line is only read: its command and options must exist)."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, first line, and what is in it."""

    language: str
    line: int
    source: str


def blocks(page):
    text = page.read_text()
    found = re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[2], text[: m.start()].count("\n") + 2, m[3]) for m in found]


def commands(source):
    """The lines of a shell block without comments, continued lines joined, `a && b` taken apart."""
    for line in source.replace("\\\n", " ").splitlines():
        bare = re.sub(r"(^|\s)#.*", "", line).strip()
        yield from (part.strip() for part in bare.split("&&") if part.strip())


def of_steerkit(argv):
    """(command, its names, what is left): of ["steer", "apply", "-v", …]."""
    command, names = typer.main.get_command(app), []
    while isinstance(command, click.Group | typer.core.TyperGroup) and argv:
        assert argv[0] in command.commands, f"steerkit has no command {' '.join([*names, argv[0]])}"
        names, command, argv = [*names, argv[0]], command.commands[argv[0]], argv[1:]
    return command, " ".join(names), argv


def read(line):
    """That the command of a line exists and has the options that it is given."""
    words = shlex.split(line)
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "torchrun":
        read(shlex.join(["steerkit", *words[words.index("steerkit.cli.main") + 1 :]]))
    elif words[0] == "steerkit":
        command, names, rest = of_steerkit(words[1:])
        command.make_context(names, list(rest))
    elif words[0] == "python" and words[1].startswith("scripts/"):
        source = (ROOT / words[1]).read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{words[1]} has no option {option}"


def smaller(names, argv, extra):
    """`argv` with the options of `extra`, each instead of its own value if it has one; --set is added."""
    argv, extra = list(argv), shlex.split(extra)
    command = of_steerkit(names.split())[0]
    spellings = {name: set(param.opts) for param in command.params for name in param.opts}
    for option, value in zip(extra[::2], extra[1::2]):
        given = [i for i, word in enumerate(argv) if word in spellings[option]]
        if given and option != "--set":
            argv[given[0] + 1] = value
        else:
            argv += [option, value]
    return argv


def run(line):
    """Run a line of a shell block, made small, in the current directory."""
    words = shlex.split(line)
    if words[0] == "steerkit":
        read(line)
        _, names, rest = of_steerkit(words[1:])
        argv = [*names.split(), *smaller(names, rest, SMALLER.get(names, ""))]
        result = CliRunner().invoke(app, argv)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    elif words[0] == "python" and (extra := _of_script(line)) is not None:
        read(line)
        _run_script(words[1], words[2:] + shlex.split(extra))
    elif words[0] == "cd":
        pass
    else:
        raise AssertionError(f"{line!r} is neither run nor listed in READ.")


def _of_script(line):
    return next(
        (extra for start, extra in SMALLER_SCRIPTS.items() if line.startswith(f"python {start}")), None
    )


def _run_script(script, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def reviews():
    """A table of labelled text."""
    told = [story for mood in ("happy", "sad") for story in storyworld.sample(80, seed=1, mood=mood)]
    rows = [
        (
            " ".join(s.text for s in t.sentences[:4]).replace('"', "'"),
            t.attributes["mood"],
            t.attributes["tense"],
        )
        for t in told
    ]
    return "text,sentiment,topic\n" + "".join(f'"{text}",{mood},{tense}\n' for text, mood, tense in rows)


def filled(line, values):
    """The line with a reader's own words for its placeholders."""
    return re.sub(rf"(?<![\w/-])({'|'.join(values)})(?![\w/.-])", lambda found: values[found[1]], line)


BEFORE = {
    "comparing.md": ["train sae --out runs/sae_base", "train sae --out runs/sae_tuned"],
    "concept.md": ["train sae --out runs/sae"],
    "dashboards.md": [
        "train sae --out runs/topk",
        "train sae --out runs/g",
        "steer extract --method mean_diff --out happy.safetensors",
        "probe --data storyworld:tense --sites blocks.2.hook_resid_post --out runs/p",
        "adapt train --method lora --out runs/lora",
    ],
    "formats.md": ["train sae --out runs/g"],
    "judging.md": ["train sae --out runs/a", "train sae --out runs/b"],
}
"""Page: the commands that its reader has run before. SAEs are tiny."""


def prepare(page, directory):
    """What a reader of `page` has: files, runs, and the names that its Python goes on with."""
    site = "blocks.2.hook_resid_post"
    (directory / "reviews.csv").write_text(reviews())
    (directory / "docs").mkdir()
    for line in BEFORE.get(page.name, []):
        tiny = f" --site {site} --arch topk --k 4 --d-sae 64 --quiet" if line.startswith("train sae") else ""
        run(f"steerkit {line}{tiny}")
    runs = [line.split()[-1] for line in BEFORE.get(page.name, []) if line.startswith("train sae")]
    names = {
        "model": HookedModel.from_pretrained("storyworld"),
        "site": site,
        "SMALL_COMPARISON": ComparisonConfig(texts=16, **{**COMPARISON, "Cs": (0.01,)}),
        "SMALL_CONCEPT": ConceptConfig(
            methods=("mean_diff", "random"), sites=("blocks.1.hook_resid_post",), at=1.0, kl_targets=(1.0,), n_pairs=16,
            n_held_out=8, n_prompts=8, samples=1, max_new_tokens=6, few_shot=0, shuffled=(),
        ),
    }  # fmt: skip
    if runs:
        names["run"] = sae.SAERun.load(runs[-1], names["model"])
    if page.name == "dashboards.md":
        names["vectors"] = torch.randn(2, names["model"].d_model)
        names["documents"] = [story.text for story in storyworld.sample(20, seed=4)]
        names["ask"], names["predict"] = (
            " ".join,
            lambda answer, tokens: [float(token in answer) for token in tokens],
        )
    if page.name == "steering.md":
        torch.save(torch.randn(128), "vec_layer_13.pt")
        layers = {1: torch.randn(128)}
        names["obj"] = types.SimpleNamespace(
            layer_activations=layers, layer_type="decoder_block", directions=layers, model_type="llama"
        )
    return names


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_prints_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "steerkit.cli.dashboard.concept_scores", functools.partial(concept_scores, tokens=30_000)
    )
    names, said, fresh = None, None, 0
    for block in blocks(page):
        assert block.language in ("", "python", "text"), (
            f"{page.name}:{block.line}: what is ```{block.language}?"
        )
        if names is None:
            names = prepare(page, tmp_path)
        if block.language == "text" and said is not None:
            assert without_numbers(block.source) == without_numbers(said), f"{page.name}:{block.line}"
        said = run_python(block, page, names) if block.language == "python" else None
        for line in commands(block.source) if block.language == "" else ():
            fresh += 1
            line = filled(line, {**PLACEHOLDERS, "DIR": f"dir{fresh}"})
            if any(re.search(pattern, line) for pattern, _ in READ):
                read(line)
            else:
                run(line)


def run_python(block, page, names):
    """What a block printed, or None if it was made smaller."""
    source, said = block.source, io.StringIO()
    for pattern, replacement in SMALLER_PYTHON:
        source = re.sub(pattern, replacement, source)
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * (block.line - 1) + source, str(page), "exec"), names)
    return said.getvalue() if source == block.source else None


def without_numbers(text):
    """Sampled figures differ from machine to machine; words do not."""
    return re.sub(r"[-+]?\d[\d.e-]*", "#", text).split()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_in_running_text_exist(page):
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        words = " ".join(span.split()).split(" ")
        options = [word.split("=")[0].strip("[]…,.") for word in words if word.startswith("--")]
        if words[0] == "steerkit":
            command, _, _ = of_steerkit([word for word in words[1:] if re.fullmatch(r"[a-z]+", word)][:2])
            known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
            assert {*options} <= {*known, "--help"}, f"{page.name}: `{span}`"
        scripts = [word for word in words if word.startswith("scripts/") and word.endswith(".py")]
        for script in scripts:
            source = (ROOT / script).read_text()
            for option in options:
                assert f'"{option}"' in source, f"{page.name}: `{span}`"


def test_every_exception_is_used():
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if not block.language
        for line in commands(block.source)
    ]
    for pattern, why in READ:
        assert any(re.search(pattern, line) for line in lines), (
            f"READ has {pattern!r} ({why}), which no page has"
        )
