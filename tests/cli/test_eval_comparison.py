"""`steerkit eval sae` with several runs and with --judge: one page, figures that are those of the runs, one line for bad input."""

import json
import re

import pytest
from typer.testing import CliRunner

from sae.comparison import comparison_page, run_names
from steerkit import storyworld
from steerkit.cli.main import app
from steerkit.errors import InputError

SETTINGS = [
    "--site", "blocks.1.hook_resid_post", "--d-sae", "64", "--tokens", "8192",
    "--set", "training.batch_size=256", "--set", "training.block_tokens=4096", "--quiet",
]  # fmt: skip


def steerkit(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    stories = folder / "stories.txt"
    stories.write_text("\n".join(story.text for story in storyworld.sample(120, seed=3)))
    found = []
    for k in (2, 8):
        out = folder / f"topk-{k}"
        steerkit("train", "sae", "--data", stories, *SETTINGS, "--arch", "topk", "--k", k, "--out", out)
        found.append(out)
    return found


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    rows = [
        {"text": s.text, "gender": s.attributes["gender"], "mood": s.attributes["mood"]}
        for s in storyworld.sample(240, seed=8)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def compared(runs, labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "page"
    columns = ("--label-column", "gender", "--label-column", "mood")
    found = steerkit(
        "eval", "sae", *runs, "--labels", labels, *columns, "--out", out, "-n", 2000, "--json", "--quiet"
    )
    return out, found


def drawn(page):
    """The data of every figure of a page."""
    calls = re.findall(
        r"steerkit\.draw\(document\.getElementById\(\"figure-\d+\"\), (\[.*\]), (\{.*\})\);", page
    )
    return [json.loads(data) for data, _ in calls]


def test_the_page_shows_the_figures_of_every_run(compared, runs):
    out, found = compared
    page = (out / "comparison.html").read_text()
    assert found["page"] == str(out / "comparison.html")
    assert json.loads((out / "comparison.json").read_text())["runs"] == found["runs"]
    results = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    assert found["runs"] == results
    figures = drawn(page)
    for figure, key in zip(figures, ("delta_ce", "ce_recovered", "fvu")):
        for trace, result in zip(figure, results):
            assert (trace["x"], trace["y"]) == ([result["l0"]], [result[key]])
            assert trace["error_y"]["array"][0] == pytest.approx(
                result["intervals"][key]["high"] - result[key]
            )
    densities = figures[3]
    assert all(sum(trace["y"][:-1]) == pytest.approx(1) for trace in densities)
    for name in ("topk-2", "topk-8", "supervised probes", "token identity", "FMS@1"):
        assert name in page


def test_baselines_that_runs_share_stand_in_the_table_once(compared):
    page = (compared[0] / "comparison.html").read_text()
    assert page.count("<td>PCA</td>") == 1
    assert page.count("<td>random SAE · topk-2</td>") == page.count("<td>random SAE · topk-8</td>") == 1


def test_the_page_asks_the_network_for_nothing(compared):
    out, _ = compared
    page = (out / "comparison.html").read_text()
    assert (out / "plotly.min.js").is_file()
    assert not re.search(r"(src|href)=[\"'](https?:)?//", page)


def test_without_out_the_page_lies_beside_the_runs(runs):
    found = steerkit("eval", "sae", *runs, "-n", 1000, "--json", "--quiet")
    assert found["page"] == str(runs[0].parent / "comparison" / "comparison.html")
    page = (runs[0].parent / "comparison" / "comparison.html").read_text()
    assert "Judged by labels" not in page
    assert len(drawn(page)) == 4


def test_one_run_makes_no_page_unless_asked(runs, tmp_path):
    found = steerkit("eval", "sae", runs[0], "-n", 1000, "--json", "--quiet")
    assert "page" not in found
    found = steerkit("eval", "sae", runs[0], "-n", 1000, "--out", tmp_path / "one", "--json", "--quiet")
    assert "1 SAE:" in (tmp_path / "one" / "comparison.html").read_text()
    assert len(found["runs"]) == 1


def test_bad_input_is_one_line(runs, labels, tmp_path):
    assert "given twice" in steerkit("eval", "sae", runs[0], runs[0], status=2)
    assert "give that with --labels" in steerkit("eval", "sae", runs[0], "--label-column", "mood", status=2)
    assert "no column 'label'" in steerkit("eval", "sae", runs[0], "--labels", labels, status=2)
    with pytest.raises(InputError, match="nothing to compare"):
        comparison_page([], tmp_path / "x.html")


def test_names_are_the_shortest_ends_that_differ():
    assert run_names(["/a/one", "/a/two"]) == ["one", "two"]
    assert run_names(["/a/x/run", "/a/y/run", "/a/y/other"]) == ["x/run", "y/run", "y/other"]


def test_what_runs_do_not_share_is_said_and_names_are_escaped(compared, tmp_path):
    first, second = compared[1]["runs"]
    other = {**second, "run": "runs/<b>odd", "data": "other.txt", "delta_ce": None, "intervals": {}}
    page = comparison_page([first, other], tmp_path / "page.html").read_text()
    assert "<b>different texts</b>" in page
    assert "<b>odd" not in page
    assert "&lt;b&gt;odd" in page


def test_pruning_curves_nulls_and_cautions_are_on_the_page(compared, tmp_path):
    curve = [
        {"kind": kind, "value": value, "l0": l0, "fvu": 0.1, "delta_ce": 0.5, "final_cosine": 0.9}
        for kind, value, l0 in (("original", None, 8.0), ("quantile", 0.5, 4.0), ("top", 2, 2.0))
    ]
    nulls = [{"name": name, "fvu": 1.0} for name in ("trained", "random SAE", "mean ablation")]
    more = {"prune_curve": curve, "nulls": nulls, "caution": "Trained <elsewhere>."}
    results = [{**result, **more} for result in compared[1]["runs"]]
    results[1]["nulls"] = [nulls[0], {"name": "random SAE", "fvu": 0.9}, nulls[2]]
    page = comparison_page(results, tmp_path / "page.html").read_text()
    figures = drawn(page)
    for figure, key in zip(figures[4:6], ("delta_ce", "fvu")):
        assert [trace["x"] for trace in figure] == [[8.0, 4.0]] * 2
        assert figure[0]["y"] == [point[key] for point in curve[:2]]
    assert page.count("<td>mean ablation</td>") == 1
    assert page.count("<td>random SAE · topk-2</td>") == page.count("<td>random SAE · topk-8</td>") == 2
    assert "<td>trained</td>" not in page
    assert "Trained &lt;elsewhere&gt;." in page
    headless = [{**point, "delta_ce": None} for point in curve]
    page = comparison_page([{**results[0], "prune_curve": headless}], tmp_path / "one.html").read_text()
    assert "final cosine" in page.split("Without the lowest activations")[1]
