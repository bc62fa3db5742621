"""`steerkit concept` as its users meet it: the page, the table behind it, and going on."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sae
from steerkit.cli.main import app
from steerkit.steering.sweep import FEW_SHOT, PROMPTING, SHUFFLED

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import build

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260k"
SITE = "blocks.1.hook_resid_post"
METHODS = ["sae_latent", "mean_diff", "reft", "random"]
SMALL = [
    f"sites={SITE}", "kl_targets=[0.5, 2]", "n_held_out=24", "n_prompts=24", "samples=1", "max_new_tokens=10",
    "few_shot=1", "shuffled=[mean_diff]", "sae_tokens=4096", "sae_latents=64", "settings.reft.epochs=1",
]  # fmt: skip
ARGUMENTS = ["--methods", ",".join(METHODS), "--at", "2", "--n-pairs", "32"]
ARGUMENTS += [part for setting in SMALL for part in ("--set", setting)]
KEYS = {
    "method", "kind", "auroc", "auroc_ci", "effect", "effect_base", "effect_ci", "side_effect", "fluency", "kl", "params",
    "seconds", "seeds",
}  # fmt: skip


def steerkit(*arguments, status=0):
    """(last line of stdout as JSON if there is any, stdout, stderr) of a command run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    lines = result.stdout.splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return found, result.stdout, result.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study: its directory, summary, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "happy"
    found, said, _ = steerkit("concept", *ARGUMENTS, "--out", out, "--json")
    return out, found, said


def test_every_method_and_null_is_in_the_table_in_order(done):
    out, found, said = done
    assert found == json.loads((out / "summary.json").read_text())
    rows = found["results"]
    assert {row["method"] for row in rows} == {*METHODS, "mean_diff" + SHUFFLED, PROMPTING, FEW_SHOT}
    assert all(row.keys() >= KEYS and row["seeds"] == 1 and row["reason"] is None for row in rows)
    nulls = [row["kind"] == "null" for row in rows]
    assert nulls == sorted(nulls), "nulls come last"
    effects = [row["effect"] for row, null in zip(rows, nulls) if not null]
    assert effects == sorted(effects, reverse=True)
    by = {row["method"]: row["detected_by"] for row in rows}
    assert by["sae_latent"], by["mean_diff"] == ("latent", "projection")
    assert by["reft"] == by[PROMPTING] == by[FEW_SHOT] == "likelihood"
    for row in rows:
        assert row["effect_ci"][0] <= row["effect"] <= row["effect_ci"][1]
        assert row["auroc_ci"][0] <= row["auroc"] <= row["auroc_ci"][1]
        assert 0 <= row["fluency"] <= 1
        assert all(0 <= moved <= 1 for moved in row["side_effects"].values())
        assert (row["params"] == 0) == (row["kind"] == "prompt")
    assert next(row for row in rows if row["method"] == "mean_diff")["params"] == 128
    assert found["autoencoder"]["from"] == "trained here"
    assert any("small one that was trained here" in text for text in found["warnings"])
    assert "other models go without" in said


def test_what_has_a_strength_is_compared_at_one_divergence(done):
    out, found, _ = done
    swept = json.loads((out / "seed-0" / "summary.json").read_text())
    for row in found["results"]:
        if row["kind"] == "prompt":
            continue
        (own,) = (
            r
            for r in swept["validation"]
            if (r["method"], r["site"], r["strength"])
            == (row["method"], row["sites"][0], row["strengths"][0])
        )
        assert abs(math.log(own["kl"] / 2.0)) < 0.5
        far = not 1 / 1.5 < row["kl"] / 2.0 < 1.5
        assert far == any(text.startswith(f"{row['label']} stands at") for text in found["warnings"])
    doses = {(dose["method"], dose["target"]) for dose in found["doses"]}
    assert {("mean_diff", 0.5), ("mean_diff", 2.0), ("mean_diff" + SHUFFLED, 2.0), (PROMPTING, 2.0)} <= doses


def test_what_knows_the_concept_beats_the_nulls(done):
    rows = {row["method"]: row for row in done[1]["results"]}
    base = done[1]["base"]["effect"]
    assert rows[PROMPTING]["effect"] > base + 0.3
    for name, least in (("mean_diff", 0.7), ("sae_latent", 0.55), (PROMPTING, 0.9)):
        assert rows[name]["auroc"] > least
    for name in ("random", "mean_diff" + SHUFFLED):
        assert abs(rows[name]["effect"] - base) < 0.25
        assert abs(rows[name]["auroc"] - 0.5) < abs(rows["mean_diff"]["auroc"] - 0.5)


def test_the_page_has_it_all(done):
    out, found, _ = done
    page = (out / "report.html").read_text()
    assert (out / "plotly.min.js").exists()
    assert "http://" not in page
    assert page.count("<tr") >= len(found["results"])
    for row in found["results"]:
        assert f'data-value="{row["label"]}"' in page
    assert page.count('class="figure"') == 2
    assert page.count("data-sort=") == 10
    assert {path.name for path in out.iterdir()} == {
        "run.yaml", "provenance.json", "summary.json", "report.html", "plotly.min.js", "sae", "seed-0",
    }  # fmt: skip


def without_seconds(found):
    """A summary without what a clock says."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found["results"]]
    return {**found, "results": rows}


def test_a_study_that_was_stopped_goes_on_to_the_same(done, tmp_path):
    out, found, _ = done
    place = tmp_path / "happy"
    shutil.copytree(out, place)
    again, said, _ = steerkit("concept", *ARGUMENTS, "--out", place, "--resume", "--json")
    assert again == found
    assert "nothing to resume" in said

    for path in ("summary.json", "report.html", "seed-0/summary.json"):
        (place / path).unlink()
    lines = (place / "seed-0" / "metrics.jsonl").read_text().splitlines()
    kept = 3 * len(lines) // 4
    (place / "seed-0" / "metrics.jsonl").write_text("\n".join(lines[:kept]) + "\n" + lines[kept][:20])
    next((place / "seed-0" / "vectors").glob("reft-*")).unlink()
    # the SAE's directory is in the settings of the seed's sweep: the run goes on where it was
    shutil.rmtree(out)
    shutil.move(place, out)
    again, _, _ = steerkit("concept", *ARGUMENTS, "--out", out, "--resume", "--json")
    assert without_seconds(again) == without_seconds(found)
    assert (out / "report.html").exists()


def write_pairs(path, columns=("prompt", "positive", "negative"), n=12):
    names = ("Tom", "Lily", "Ben", "Sue", "Max", "Amy")
    rows = [
        (f"One day, {names[i % 6]} {verb}", f"and was {good}.", f"and was {bad}.")
        for i in range(n)
        for verb in ("went out", "came home")
        for good, bad in [("happy and glad", "sad and upset")]
    ]
    lines = [
        json.dumps({c: v for c, v in zip(("prompt", "positive", "negative"), row) if c in columns})
        for row in rows
    ]
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return path


def test_a_real_model_with_pairs_of_a_file_and_two_seeds(tmp_path):
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/models/stories260k")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    found, _, _ = steerkit(
        "concept", "--model", STORIES, "--pairs", pairs, "--out", tmp_path / "r", "--methods", "sae_latent,mean_diff,random",
        "--seeds", "2", "--at", "1", "--set", "kl_targets=[1]", "--set", f"sites={SITE}", "--set", "n_held_out=8", "--set",
        "shuffled=[]", "--set", "samples=1", "--set", "max_new_tokens=6", "--prompting", "A happy story.", "--json", "--quiet",
    )  # fmt: skip
    rows = {row["method"]: row for row in found["results"]}
    assert set(rows) == {"mean_diff", "random", PROMPTING, FEW_SHOT}
    assert any("No SAE latent is told" in text for text in found["warnings"])
    assert found["config"]["effect"].startswith("words: ")
    assert rows["mean_diff"]["seeds"] == 2
    assert rows["mean_diff"]["auroc"] > 0.9
    assert rows["mean_diff"]["kl_sd"] is not None
    assert rows["mean_diff"]["fluency"] == pytest.approx(rows["mean_diff"]["perplexity_ratio"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pairs", "one-side.jsonl"], "has no pairs"),
        (["--pairs", "blank.jsonl"], "positive side of pair 1"),
        (["--pairs", "few.jsonl"], "at least four"),
        (["--pairs", "storyworld:mod"], "Did you mean 'mood'"),
        (["--sae", "narrow"], "width 64"),
        (["--model", "mute"], "no tokenizer"),
        (["--at", "5"], "one of kl_targets"),
        (["--methods", "mean_dif"], "mean_diff"),
        (["--seeds", "0"], "seeds is 0"),
        (["--set", "n_heldout=3"], "n_held_out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "one-side.jsonl", ("prompt", "positive"))
    write_pairs(tmp_path / "few.jsonl", n=1)
    (tmp_path / "blank.jsonl").write_text(
        '{"positive": "a", "negative": "b"}\n{"positive": " ", "negative": "b"}\n'
    )
    narrow = sae.L1(64).build(64)
    narrow.metadata["site"] = SITE
    narrow.save(tmp_path / "narrow")
    build("llama").save_pretrained(tmp_path / "mute")
    _, _, error = steerkit("concept", *ARGUMENTS, "--out", tmp_path / "r", "--quiet", *change, status=2)
    (line,) = (line for line in error.splitlines() if line)
    assert line.startswith("Error: ")
    assert message in line
    assert not (tmp_path / "r").exists()


def test_a_latent_alone_needs_an_sae(tmp_path):
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/models/stories260k")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    arguments = ["--model", STORIES, "--pairs", pairs, "--methods", "sae_latent", "--out", tmp_path / "r"]
    assert "give sae=" in steerkit("concept", *arguments, "--quiet", status=2)[2]


def test_a_directory_is_needed():
    assert "--out is needed" in steerkit("concept", "--quiet", status=2)[2]
