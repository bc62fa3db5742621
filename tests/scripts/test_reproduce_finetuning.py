"""scripts/reproduce_finetuning.py: it runs on StoryWorld, goes on where it was stopped, and counts as it says."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_finetuning.py"
TINY = [
    "--n-train",
    "16",
    "--n-test",
    "8",
    "--n-small",
    "12",
    "--seeds",
    "2",
    "--counts",
    "1",
]
TINY += ["--n-texts", "6", "--n-rollback", "6", "--long", "1", "--short", "1"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reproduce_finetuning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_finetuning"] = module
    spec.loader.exec_module(module)
    return module


def test_it_runs_small_and_repeats_nothing(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, "--out", str(out)])
    script.main()
    assert "validation" in capsys.readouterr().err
    found = json.loads((out / "summary.json").read_text())
    assert set(found) == {"date", "verdicts", "layers", "freezing", "stability"}
    assert len(found["layers"]["rollback"]["single"]) == 4
    assert len(found["layers"]["changes"]["CKA"]["by_layer"]) == 5
    assert [row["k"] for row in found["freezing"]["by_count"]] == [0, 1, 4]
    assert next(iter(found["stability"])) == "baseline"
    parts = {
        path: path.stat().st_mtime_ns
        for path in (*(out / "parts").iterdir(), *(out / "freezing" / "trainings").iterdir())
    }
    script.main()
    again = capsys.readouterr()
    assert "validation" not in again.err
    assert all(path.stat().st_mtime_ns == time for path, time in parts.items())
    assert (out / "summary.md").read_text().strip() in again.out


def test_halves_leave_the_block_in_the_middle_out(script):
    assert script.upper_less_lower([1.0, 2.0, 5.0, 7.0]) == pytest.approx(4.5)
    assert script.upper_less_lower([1.0, 2.0, 100.0, 5.0, 7.0]) == pytest.approx(4.5)


def test_an_arm_beside_itself_is_no_different_and_its_sds_have_the_ratio_1(script):
    values = {"estimate": 0.1, "low": 0.05, "high": 0.15, "standard_error": 0.02, "level": 0.95}
    arm = {
        "scores": [0.8, 0.9, 0.7],
        "failed": 0,
        "epochs": 3,
        "measures": {"SD": values, "disagreement": values},
    }
    found = script.against(arm, arm)
    assert found["sd_ratio"].estimate == 1
    assert found["sd_ratio"].low * found["sd_ratio"].high == pytest.approx(1)
    gap = found["less_baseline"]["disagreement"]
    assert gap.estimate == 0
    assert gap.high == pytest.approx(4.303 * 0.02 * math.sqrt(2), rel=1e-3)
    assert "not told apart" in script.sure(gap)
