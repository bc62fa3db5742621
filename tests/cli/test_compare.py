"""`steerkit compare` as its users meet it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import SMALL as SMALL_SAE
from test_commands import refused, steerkit

from steerkit import adapters, storyworld
from steerkit.models import HookedModel
from steerkit.steering import SteeringVector

SETTINGS = {"per_text": 4, "permutations": 4, "n_folds": 2, "score_texts": 4, "context": 64, "Cs": "[0.01]"}
SMALL = ["--texts", "16", "--labels", "tense", "--quiet", "--json"]
SMALL += [part for key, value in SETTINGS.items() for part in ("--set", f"comparison.{key}={value}")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A directory of an adapter that changes something."""
    tuned = adapters.get(HookedModel.from_pretrained("storyworld"), "lora", rank=2, layers=[1])
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.fill_(0.05)
    return tuned.save(tmp_path_factory.mktemp("adapters") / "lora")


def test_an_adapter_and_its_base(adapter, tmp_path):
    out = tmp_path / "run"
    found, _ = steerkit("compare", "storyworld", adapter, "--task", "none", *SMALL, "--out", out)
    assert {path.name for path in out.iterdir()} == {
        "plotly.min.js",
        "provenance.json",
        "report.html",
        "run.yaml",
        "summary.json",
    }
    assert found == json.loads((out / "summary.json").read_text())
    assert [row["layer"] for row in found["layers"]] == ["embed", 0, 1, 2, 3]
    assert [row["drift"]["relative_change"]["estimate"] > 0 for row in found["layers"]] == [False] * 2 + [
        True
    ] * 3
    assert {w["layer"] for w in found["weights"] if w["norm"] > 0} == {1}
    assert "finished run" in refused("compare", "storyworld", adapter, *SMALL, "--task", "none", "--out", out)
    again, _ = steerkit("compare", "storyworld", adapter, "--resume", "--out", out, "--json", "--quiet")
    assert again == found


def test_a_freezing_sweep_is_made_on_demand(adapter, tmp_path):
    given = {"n_train": 10, "n_test": 5, "learning_rates": "[1e-4]", "extend": 0}
    small = [part for key, value in given.items() for part in ("--set", f"freezing.{key}={value}")]
    found, _ = steerkit(
        "compare", "storyworld", adapter, "--task", "none", "--freezing", "storyworld:sad", *SMALL, *small,
        "--set", "comparison.rollback=false", "--out", tmp_path / "run",
    )  # fmt: skip
    assert [row["k"] for row in found["freezing"]["results"]] == [0, 1, 2, 3, 4]
    assert len(list((tmp_path / "run" / "freezing" / "trainings").iterdir())) == 4


def test_a_steering_file_acts_on_the_base(tmp_path):
    path = tmp_path / "v.safetensors"
    SteeringVector.add({"blocks.1.hook_resid_post": torch.ones(128)}).save(path)
    found, _ = steerkit(
        "compare", "storyworld", path, "-x", "0.5", "--task", "none", *SMALL, "--out", tmp_path / "r"
    )
    assert [row["drift"]["relative_change"]["estimate"] > 0 for row in found["layers"]] == [False] * 2 + [
        True
    ] * 3
    assert found["tuned"] == "storyworld + 0.5 × v.safetensors"
    assert not found["weights"]


def test_two_sae_runs_are_compared_by_their_latents(tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_text("\n".join(story.text for story in storyworld.sample(60, seed=3)))
    for seed in (0, 1):
        steerkit(
            "train", "sae", *SMALL_SAE, "--data", stories, "--arch", "topk", "--k", "4", "--tokens", "4096", "--seed", seed,
            "--out", tmp_path / f"sae{seed}", "--quiet",
        )  # fmt: skip
    a, b = (tmp_path / f"sae{seed}" for seed in (0, 1))
    found, _ = steerkit("compare", a, a, *SMALL, "--out", tmp_path / "same")
    assert found["counts"]["kept"] == found["living_base"] == found["living_tuned"]
    found, _ = steerkit("compare", a, b, *SMALL, "--out", tmp_path / "seeds")
    assert found["counts"]["kept"] < found["living_base"]
    assert (tmp_path / "seeds" / "report.html").exists()
    assert "another SAE run" in refused("compare", "storyworld", b, *SMALL, "--out", tmp_path / "x")


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path):
    out = ["--out", tmp_path / "r"]
    assert "--out is needed" in refused("compare", "storyworld", "storyworld")
    assert "There is no directory" in refused("compare", "storyworld", "./nowhere", *out)
    assert "is none of storyworld:liars" in refused(
        "compare", "storyworld", "storyworld", "--task", "lies", *out
    )
    assert "texts is 1" in refused("compare", "storyworld", "storyworld", "--texts", "1", *out)
    assert "Did you mean" in refused(
        "compare", "storyworld", "storyworld", "--set", "comparison.text=3", *out
    )
    assert "no attribute" in refused("compare", "storyworld", "storyworld", *SMALL, "--labels", "moood", *out)
