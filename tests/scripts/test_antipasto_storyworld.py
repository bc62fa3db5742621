"""scripts/antipasto_storyworld.py: what is measured, and how it is counted."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from steerkit.storyworld import ATTRIBUTES, Judge

SCRIPT = Path(__file__).parents[2] / "scripts" / "antipasto_storyworld.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("antipasto_storyworld", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["antipasto_storyworld"] = module
    spec.loader.exec_module(module)
    return module


def test_items_end_before_the_word_that_is_true(script):
    targets, controls = script.beginnings(["place", "weather"], 30, seed=5)
    assert len(targets) == 90
    assert len(controls) > 30
    judge = Judge()
    for item in targets:
        assert item.truth in ATTRIBUTES[item.kind]
        assert item.kind in ("place", "weather")
        assert not judge.judge(item.text).claims
        assert judge.judge(item.text).unfinished.startswith('"')
        assert item.cue in item.text
    for honest, lying, uncued in zip(targets[::3], targets[1::3], targets[2::3]):
        assert honest.text.replace(honest.cue, lying.cue) == lying.text
        assert judge.judge(honest.text).attributes["cue"] == "honest"
        assert judge.judge(lying.text).attributes["cue"] == "liar"
        assert len(uncued.text) == len(honest.text) - len(honest.cue) - 1
        for late in (False, True):
            text = script.prompted(uncued, False, 2, late)
            assert text.count(uncued.liar) == 2
            assert judge.judge(text).grammatical == 1.0
    for item in controls:
        assert f" {item.truth}" in item.text


def test_the_score_is_its_definition(script):
    mass = torch.full((4,), 0.9)
    base = (torch.tensor([-4.0, -2.0, 3.0, 1.0]), mass)
    up = (torch.tensor([1.0, -1.0, 3.0, -1.0]), mass)
    down = (torch.tensor([-4.0, -2.0, -3.0, 1.0]), 0.5 * mass)
    controls = (torch.tensor([6.0, 3.0, 1.0]), torch.tensor([6.0, 3.0, -1.0]), torch.tensor([6.0, 3.0, 1.0]))
    f1, target, wrong, arbitrary = script.steering_f1(base, up, down, controls)
    assert (target, wrong, arbitrary) == pytest.approx((0.4, 0.1, 0.1))
    assert f1 == pytest.approx(100 * 2 * 0.75 * 0.3 / 1.05 * 0.25)
    assert script.steering_f1(base, base, base, controls)[0] == 0.0
    gone = (up[0], torch.full((4,), 0.01))
    assert script.steering_f1(base, gone, down, controls)[0] == 0.0
