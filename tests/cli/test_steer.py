"""`steerkit steer …` as its users meet it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import refused, steerkit

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("steer") / "happy.safetensors"
    found, _ = steerkit(
        "steer",
        "extract",
        "--pairs",
        "storyworld:mood=happy",
        "--n",
        "32",
        "--site",
        SITE,
        "--out",
        path,
        "--json",
    )
    assert found["file"] == str(path)
    assert found["provenance"]["n_pairs"] == 32
    assert found["edits"][0]["site"] == SITE
    assert found["edits"][0]["norm"] > 0
    return path


def test_inspect_says_what_is_in_a_file(file):
    found, _ = steerkit("steer", "inspect", file, "--json", "--quiet")
    assert found["provenance"]["method"] == "mean_diff"
    assert found["provenance"]["model"] == "storyworld"
    assert found["where"]["generation"] is True


def test_apply_shows_both_texts(file):
    arguments = [
        "steer",
        "apply",
        "--vector",
        file,
        "--prompt",
        "Anna is",
        "--max-new-tokens",
        "20",
        "--temperature",
        "0",
        "--json",
    ]
    found, _ = steerkit(*arguments, "--strength", "6")
    assert found["base"]
    assert found["steered"] != found["base"]
    none, _ = steerkit(*arguments, "--strength", "0")
    assert none["steered"] == none["base"] == found["base"]
    sampled = [
        steerkit(*arguments, "--temperature", "1", "--seed", seed, "--strength", "6")[0] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_bad_input_is_one_clear_line(file, tmp_path):
    out = tmp_path / "x.safetensors"
    assert "Did you mean 'mean_diff'" in refused("steer", "extract", "--method", "mean_dif", "--out", out)
    assert "Did you mean 'normalize'" in refused("steer", "extract", "--set", "normalise=true", "--out", out)
    assert "has no value 'hungry'" in refused(
        "steer", "extract", "--pairs", "storyworld:mood=hungry", "--out", out
    )
    assert "does not exist" in refused(
        "steer", "extract", "--site", "blocks.9.hook_resid_post", "--n", "4", "--out", out
    )
    assert not out.exists()
    assert "does not exist" in refused("steer", "apply", "--vector", out, "--prompt", "a")
    assert "it is everywhere, prompt, generation" in refused(
        "steer", "apply", "--vector", file, "--prompt", "a", "--where", "here"
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:50])
    assert "damaged" in refused("steer", "inspect", broken)
