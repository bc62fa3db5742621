"""`train sae` with architectures that read more than one site, or labels."""

import json
import sys
from pathlib import Path

import pytest

import sae

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import refused, steerkit

HERE = "blocks.1.hook_resid_post"
OTHERS = {
    "guided": ["--site", HERE, "--k", "4", "--labels", "mood=happy, weather=rainy"],
    "transcoder": ["--site", "blocks.1.hook_resid_mid", "--k", "4", "--target-site", "blocks.1.hook_mlp_out"],
    "crosscoder": ["--site", f"{HERE},blocks.2.hook_resid_post", "--k", "4"],
    "crosscoder of two models": ["--site", HERE, "--k", "4", "--tuned", "storyworld"],
}


def command(name):
    small = ["--set", "training.batch_size=256", "--set", "training.block_tokens=2048"]
    small += ["--set", "training.held_out_tokens=2000", "--tokens", "1024"]
    return ["train", "sae", "--arch", name.split()[0], "--expansion", "0.5", *OTHERS[name], *small]


@pytest.mark.parametrize("name", OTHERS)
def test_a_dry_run_and_a_run_agree_on_the_shapes(name, tmp_path):
    planned, _ = steerkit(*command(name), "--dry-run", "--json", "--quiet")
    summary, _ = steerkit(*command(name), "--out", tmp_path / "r", "--json", "--quiet")
    widths = {"crosscoder": 256, "crosscoder of two models": 256}
    for found in (planned, summary):
        assert found["d_in"] == widths.get(name, 128)
        assert found["d_sae"] == widths.get(name, 128) // 2
    loaded = sae.load(tmp_path / "r")
    assert loaded.config.name == name.split()[0]
    if name == "guided":
        assert loaded.config.labels == ("mood=happy", "weather=rainy")
        assert {score["label"] for score in summary["labels"]} == {"mood=happy", "weather=rainy"}
    if name == "transcoder":
        assert (
            json.loads((tmp_path / "r/cfg.json").read_text())["metadata"]["hook_name_out"]
            == "blocks.1.hook_mlp_out"
        )


def test_what_an_architecture_lacks_is_told_with_the_flag(tmp_path):
    plain = ["--d-sae", "64", "--tokens", "1024", "--out", tmp_path / "r"]
    assert "--target-site" in refused("train", "sae", "--arch", "transcoder", "--site", HERE, *plain)
    assert "--labels" in refused("train", "sae", "--arch", "guided", "--site", HERE, *plain)
    assert "joins two sites or more" in refused(
        "train", "sae", "--arch", "crosscoder", "--site", HERE, *plain
    )
    assert "target_site" in refused(
        "train", "sae", "--arch", "topk", "--site", HERE, "--target-site", HERE, *plain
    )
    assert not (tmp_path / "r").exists()
