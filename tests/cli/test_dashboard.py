"""`steerkit dashboard` with what costs more than looking at the latents."""

import json

import pytest
import torch
from typer.testing import CliRunner

import sae
from steerkit import storyworld
from steerkit.cli.main import app
from steerkit.models import HookedModel

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two SAEs of StoryWorld's width, the second the first in another order, and a text."""
    path = tmp_path_factory.mktemp("saes")
    stories = [story.text for story in storyworld.sample(40, seed=3)]
    (path / "stories.txt").write_text("\n".join(stories))
    acts = HookedModel.from_pretrained("storyworld").activations(stories[:8], [SITE])[SITE]
    first = sae.TopK(48, k=6).build(128)
    first.initialise(acts, acts.mean(0), torch.Generator().manual_seed(0))
    second = sae.TopK(48, k=6).build(128)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.W_dec.copy_(first.W_dec.flip(0))
    for name, made in (("a", first), ("b", second)):
        made.metadata = {"model": "storyworld", "site": SITE, "data": str(path / "stories.txt")}
        made.save(path / name)
    return path


def steerkit(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    if status:
        assert len(result.stderr.splitlines()) == 1
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_all_panels_of_a_pretrained_sae_in_one_command(saved):
    options = ("--tokens", "1500", "--latents", "top:6", "--json", "--quiet")
    more = (
        "--ablate",
        "--steer",
        "--prompt",
        "Once",
        "--compare",
        saved / "b",
        "--export",
        "csv,json,neuronpedia",
    )
    found = steerkit("dashboard", saved / "a", *options, *more)
    folder = saved / "a" / "dashboard"
    assert found["page"] == str(folder / "index.html")
    shard = (folder / "data" / "latents-0.js").read_text()
    for key in ("about", "misses", "co", "ablation", "steer", "logit_hist"):
        assert f'"{key}":' in shard
    assert '"prompt":"Once"' in shard
    latents = json.loads((folder / "export" / "latents.json").read_text())
    assert len(latents) == 6
    page = (folder / "index.html").read_text()
    assert str([[47 - latent["id"], 1.0] for latent in latents]).replace(" ", "") in page


def test_what_cannot_be_is_refused_before_the_work(saved):
    assert "no export 'pdf'" in steerkit("dashboard", saved / "a", "--export", "pdf", status=2)
    assert "(--compare) does not exist" in steerkit(
        "dashboard", saved / "a", "--compare", saved / "none", status=2
    )
