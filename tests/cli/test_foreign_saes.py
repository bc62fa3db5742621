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
