"""The demo's page tells each part, and its commands are ones that the command line takes."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from steerkit import storyworld
from steerkit.cli import demo
from steerkit.cli.demo_page import NATS, Size, settled_by_words
from steerkit.cli.main import app

SMALL = Size(
    tokens=20_000,
    held_out_tokens=4_000,
    null_tokens=2_000,
    concept_tokens=25_000,
    dashboard_tokens=4_000,
    prompts=4,
    tries=2,
    n_train=48,
    n_test=8,
    texts=40,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the directory, the result) of `demo --quick` with less than even that."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", SMALL)
        result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(out), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return out, json.loads(result.stdout.splitlines()[-1])


def commands(page):
    return [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]


def test_the_page_tells_each_part(made):
    out, found = made
    page = (out / "index.html").read_text()
    for part in (
        "1. The language",
        "2. A sparse autoencoder",
        "3. A story, steered",
        "4. A liar, and what made it one",
    ):
        assert f"<h2>{part}</h2>" in page
    for name in ("trained", "random SAE", "unsteered", "random direction", *found["steering"]):
        assert name in page
    for finding in found["findings"]:
        assert html.escape(finding) in page
    assert set(found["adapter"]["scores"]) == {"test", "honest cue", "held-out kind"}
    assert [found["steering"][name]["n"] for name in found["steering"]] == [SMALL.prompts] * 3


def test_its_links_lead_to_files(made):
    out, _ = made
    links = re.findall(r"href='([^'#]+)", (out / "index.html").read_text())
    assert {"sae/dashboard/index.html", "compare/report.html"} <= set(links)
    assert all((out / link).is_file() for link in links)


def test_its_commands_can_be_parsed(made):
    out, _ = made
    found = commands((out / "index.html").read_text())
    wanted = (
        "inspect",
        "train sae",
        "eval sae",
        "dashboard",
        "steer extract",
        "steer apply",
        "adapt train",
        "compare",
    )
    assert all(any(text.startswith(f"steerkit {name} ") for text in found) for name in wanted)
    for text in found:
        program, *arguments = shlex.split(text)
        if program == "python":
            compile(arguments[1], text, "exec")
            continue
        assert program == "steerkit"
        command = typer.main.get_command(app)
        while hasattr(command, "resolve_command"):
            name, command, arguments = command.resolve_command(command.context_class(command), arguments)
        command.make_context(name, arguments)  # raises for what the command does not take


def test_a_demo_is_replaced_and_nothing_else_is(made, tmp_path):
    (tmp_path / "mine.txt").write_text("not a demo")
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert (tmp_path / "mine.txt").exists()
    out, _ = made
    demo._claim(out)
    assert [path.name for path in out.iterdir()] == [".steerkit-demo"]


@pytest.mark.parametrize("seed", range(3))
def test_words_settle_what_the_judge_counts(seed):
    for story in storyworld.sample(20, seed=seed):
        found = list(settled_by_words(story.text))
        assert "".join(token for token, _ in found) == f" {story.text}"
        counts = {}
        for _, settled in found:
            for attribute, value in settled.items():
                counts.setdefault(attribute, Counter())[value] += 1
        evidence = storyworld.Judge().judge(story.text).evidence
        assert {a: n for a, n in counts.items() if a != "cue"} == {
            a: n for a, n in evidence.items() if n and a != "cue"
        }


def test_the_next_strength_is_on_the_line():
    target = math.log(NATS)
    square = demo._next_log([(0.0, target - 1.0)])
    assert square == pytest.approx(0.5)
    assert demo._next_log([(0.0, target - 1.0), (2.0, target + 3.0)]) == pytest.approx(0.5)
    assert demo._next_log([(0.0, target - 20.0)]) == pytest.approx(math.log(4))
