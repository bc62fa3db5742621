"""SAEs of other toolkits on the command line."""

import json

import pytest
import torch
from typer.testing import CliRunner

import sae
from steerkit import storyworld
from steerkit.cli.main import app

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An SAE of StoryWorld's width in dictionary_learning's layout, which knows neither model nor site."""
    path = tmp_path_factory.mktemp("foreign")
    made = sae.Gated(64, target_l0=8.0).build(128)
    generator = torch.Generator().manual_seed(0)
    made.initialise(torch.randn(512, 128, generator=generator), torch.zeros(128), generator)
    made.save(path / "own")
    sae.convert(path / "own", "dictionary_learning", path / "ae")
    return path / "ae"


def steerkit(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    if status:
        assert len(result.stderr.splitlines()) == 1
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_foreign_sae_is_drawn(foreign, tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story.text for story in storyworld.sample(60, seed=3)))
    options = ("--data", text, "--site", SITE, "--latents", "top:4", "--tokens", "1000", "--json", "--quiet")
    found = steerkit("dashboard", foreign, "--model", "storyworld", *options)
    assert (foreign / "dashboard" / "index.html").exists()
    assert found["page"].endswith("dashboard/index.html")
    assert "model" in steerkit("dashboard", foreign, *options, status=2)
    assert "is of width 128" in steerkit(
        "dashboard", foreign, "--model", "storyworld", *options, "--site", "blocks.1.mlp.hook_post", status=2
    )


def test_a_dashboard_of_what_is_no_directory_needs_a_place(tmp_path):
    assert "give --out" in steerkit("dashboard", "hf://me/saes/gated", status=2)


def test_conversions_say_what_they_read_and_refuse_what_they_cannot_keep(foreign, tmp_path):
    found = steerkit(
        "convert", "sae", foreign, "--to", "jumprelu", "--out", tmp_path / "j", "--json", "--quiet"
    )
    assert (found["from"], found["to"], found["arch"]) == ("dictionary_learning", "jumprelu", "gated")
    x = torch.randn(64, 128)
    torch.testing.assert_close(sae.load(tmp_path / "j")(x), sae.load(foreign)(x), rtol=1e-5, atol=1e-5)
    assert "TopK SAEs only" in steerkit(
        "convert", "sae", foreign, "--to", "sparsify", "--out", tmp_path / "s", status=2
    )
    assert not (tmp_path / "s").exists()


# evaluation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n".join(story.text for story in storyworld.sample(120, seed=3)))
    return path


@pytest.fixture(scope="module")
def run(text):
    """A finished run of ours."""
    out = text.parent / "run"
    settings = (
        "--set",
        "training.batch_size=256",
        "--set",
        "training.block_tokens=4096",
        "--json",
        "--quiet",
    )
    options = ("--site", SITE, "--arch", "gated", "--d-sae", "64", "--tokens", "4096", "--out", out)
    steerkit("train", "sae", "--data", text, *options, *settings)
    return out


@pytest.mark.parametrize("to", ["dictionary_learning", "jumprelu"])
def test_a_foreign_copy_is_measured_as_the_run_is(to, run, text, tmp_path):
    steerkit("convert", "sae", run, "--to", to, "--out", tmp_path / "copy", "--json", "--quiet")
    options = ("--data", text, "-n", 1500, "--json", "--quiet")
    own = steerkit("eval", "sae", run, *options)
    named = ("--model", "storyworld", "--site", SITE)
    copy = steerkit("eval", "sae", tmp_path / "copy", *named, *options)
    assert own.keys() == copy.keys()
    # The norm from which tokens are sinks is measured anew, on other tokens; here no token is one.
    for key in own.keys() - {"run", "arch", "sink_threshold", "intervals"}:
        assert copy[key] == (pytest.approx(own[key], rel=1e-4) if isinstance(own[key], float) else own[key])
    for name, interval in own["intervals"].items():
        assert copy["intervals"][name] == pytest.approx(interval, rel=1e-3, abs=1e-6)


def test_a_run_and_a_foreign_sae_are_compared_and_nothing_is_written_into_the_foreign_directory(
    run, foreign, text, tmp_path
):
    before = sorted(foreign.rglob("*"))
    options = (
        "--model",
        "storyworld",
        "--site",
        SITE,
        "--data",
        text,
        "-n",
        1000,
        "--prune-curve",
        "--nulls",
    )
    found = steerkit("eval", "sae", run, foreign, *options, "--out", tmp_path / "page", "--json", "--quiet")
    assert sorted(foreign.rglob("*")) == before
    assert json.loads((run / "evaluation.json").read_text()) == found["runs"][0]
    assert json.loads((tmp_path / "page" / "comparison.json").read_text())["runs"] == found["runs"]
    page = (tmp_path / "page" / "comparison.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in ("run", "ae"))
    assert found["runs"][1]["model"] == "storyworld"
    for result in found["runs"]:
        first, *others = result["prune_curve"]
        assert first["kind"] == "original"
        densities = [point["l0"] for point in (first, *others)]
        assert densities == sorted(densities, reverse=True)


def test_what_a_foreign_sae_does_not_say_must_be_given(run, foreign, text, tmp_path):
    assert "which model it is for: give it (--model" in steerkit("eval", "sae", foreign, status=2)
    given = ("--model", "storyworld", "--site", SITE)
    assert "which data it is for: give it (--data" in steerkit("eval", "sae", foreign, *given, status=2)
    given = (*given, "--data", text)
    assert "does not say how it was trained" in steerkit(
        "eval", "sae", foreign, *given, "--random-model", status=2
    )
    assert "give --out" in steerkit("eval", "sae", run, "hf://me/saes/gated", *given, status=2)
    wrong = ("--model", "storyworld", "--data", text, "--site", "blocks.1.mlp.hook_post")
    assert "is of width 128" in steerkit("eval", "sae", foreign, *wrong, status=2)
    assert "holds no SAE" in steerkit("eval", "sae", tmp_path, *given, status=2)


def test_a_caution_is_said(foreign, text, tmp_path):
    settings = {"fold_ln": True}
    cautious = tmp_path / "cautious"
    steerkit("convert", "sae", foreign, "--to", "saelens", "--out", cautious, "--json", "--quiet")
    config = json.loads((cautious / "cfg.json").read_text())
    config["metadata"].pop("steerkit")
    config["metadata"]["model_from_pretrained_kwargs"] = settings
    (cautious / "cfg.json").write_text(json.dumps(config))
    given = ("--model", "storyworld", "--site", SITE, "--data", text, "-n", "500")
    result = CliRunner().invoke(app, [str(a) for a in ("eval", "sae", cautious, *given)])
    assert result.exit_code == 0
    assert "activations may differ" in result.stdout
    assert (
        "activations may differ" in steerkit("eval", "sae", cautious, *given, "--json", "--quiet")["caution"]
    )
