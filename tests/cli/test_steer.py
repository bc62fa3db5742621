"""`steerkit steer …` as its users meet it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_commands import refused, steerkit

from steerkit.steering import SteeringVector

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
    assert sampled[0]["base"] != sampled[0]["steered"]
    alike, _ = steerkit(*arguments, "--temperature", "1", "--seed", "1", "--strength", "0")
    assert alike["steered"] == alike["base"] == sampled[0]["base"]


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


def test_convert_says_what_is_lost_and_comes_back(file, tmp_path):
    strength = ("--strength", "2")
    found, _ = steerkit(
        "steer", "convert", file, "--to", "gguf", "--out", tmp_path / "v.gguf", *strength, "--json"
    )
    assert found["from"] == "steerkit"
    assert ["BOS" in text for text in found["warnings"]] == [True]
    found, _ = steerkit(
        "steer", "convert", tmp_path / "v.gguf", "--to", "pt", "--out", tmp_path / "v.pt", "--json"
    )
    assert found["where"]["bos"] is True
    assert ["bare tensor" in text for text in found["warnings"]] == [True]
    seen, _ = steerkit("steer", "inspect", tmp_path / "v.gguf", "--json")
    assert seen["edits"] == found["edits"]
    back = tmp_path / "back.safetensors"
    steerkit("steer", "convert", tmp_path / "v.pt", "--layer", "2", "--to", "steerkit", "--out", back)
    before, after = SteeringVector.load(file), SteeringVector.load(back)
    assert after.cosine(before) == pytest.approx(1)
    assert after.norm == pytest.approx(2 * before.norm)


def test_merge_writes_a_model_that_needs_no_hooks(file, tmp_path):
    out = tmp_path / "merged"
    merge = ("steer", "merge", "--vector", file, "--strength", "6", "--out", out, "--json")
    assert "--merge-bos" in refused(*merge)
    found, _ = steerkit(*merge, "--merge-bos")
    assert found["path"] == str(out)
    assert found["config"] == {"mlp_bias": True}
    assert found["difference"] < 1e-4
    assert "BOS" in found["notes"][0]
    prompt = ("--prompt", "Anna is", "--max-new-tokens", "20", "--temperature", "0", "--json")
    steered, _ = steerkit("steer", "apply", "--vector", file, "--strength", "6", *prompt)
    plain, _ = steerkit(
        "steer", "apply", "--model", out, "--vector", file, "--strength", "0", "--other-model", *prompt
    )
    assert plain["base"] not in ("", steered["base"])
    assert "not empty" in refused(*merge, "--merge-bos")
    steerkit(*merge, "--merge-bos", "--force")


def test_bad_conversions_and_merges_are_one_clear_line(file, tmp_path):
    convert = ("steer", "convert", file, "--out", tmp_path / "x", "--to")
    assert "Did you mean 'gguf'" in refused(*convert, "ggf")
    assert "weight_delta edits only" in refused(*convert, "lora")
    assert "needs no --site" in refused(*convert, "gguf", "--layer", "2")
    assert not (tmp_path / "x").exists()
    steerkit(*convert[:-1], "--to", "pt")
    (tmp_path / "x").rename(tmp_path / "x.pt")
    assert "--layer" in refused("steer", "merge", "--vector", tmp_path / "x.pt", "--out", tmp_path / "m")
    assert "does not exist" in refused(
        "steer", "convert", tmp_path / "y.gguf", "--to", "pt", "--out", tmp_path / "z"
    )
    steerkit("steer", "convert", file, "--to", "gguf", "--out", tmp_path / "v.gguf")
    assert "give --model" in refused(
        "steer", "merge", "--vector", tmp_path / "v.gguf", "--out", tmp_path / "m"
    )
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "v.gguf").read_bytes()[:300])
    assert "damaged" in refused("steer", "convert", cut, "--to", "pt", "--out", tmp_path / "z")


def test_sweep_writes_a_report_and_resumes(tmp_path):
    command = ["steer", "sweep", "--methods", "mean_diff,random", "--sites", SITE, "--kl-targets", "1"]
    command += ["--n-prompts", "12", "--set", "n_pairs=16", "--set", "samples=1", "--set", "max_new_tokens=8"]
    command += ["--set", "shuffled=[]", "--set", "study=null", "--out", tmp_path / "s", "--json"]
    found, _ = steerkit(*command)
    assert {"mean_diff", "random", "prompting", "few-shot"} == set(found["best"])
    assert {"method", "site", "strength", "effect", "effect_base", "kl", "n"} <= found["results"][0].keys()
    assert (tmp_path / "s" / "report.html").is_file()
    assert steerkit(*command, "--resume")[0]["best"] == found["best"]
    assert "--resume" in refused(*command)
    assert "mean_diff" in refused("steer", "sweep", "--methods", "mean", "--out", tmp_path / "t")
    assert "mood" in refused("steer", "sweep", "--pairs", "storyworld:moud=happy", "--out", tmp_path / "t")
    assert "words:" in refused("steer", "sweep", "--effect", "joy", "--out", tmp_path / "t")


def test_sweep_over_seeds_tells_mean_and_spread(tmp_path):
    command = [
        "steer",
        "sweep",
        "--methods",
        "mean_diff",
        "--sites",
        SITE,
        "--kl-targets",
        "1",
        "--seeds",
        "2",
    ]
    command += ["--n-prompts", "8", "--set", "n_pairs=16", "--set", "samples=1", "--set", "max_new_tokens=8"]
    command += ["--set", "shuffled=[]", "--set", "study=null", "--set", "few_shot=0"]
    found, _ = steerkit(*command, "--out", tmp_path / "s", "--json")
    assert found["seeds"] == [0, 1]
    assert found["best"]["mean_diff"]["seeds"] == 2
    assert {record["seed"] for record in found["results"]} == {0, 1}
    assert all((tmp_path / "s" / name / "report.html").is_file() for name in (".", "seed-0", "seed-1"))
    assert "--seeds is 0" in refused(*command, "--seeds", "0", "--out", tmp_path / "t")
