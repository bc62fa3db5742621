"""What scripts/reproduce_sae.py concludes must follow from what it measured."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_sae.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_sae", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_sae"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def power_law(l0s: tuple[float, ...], factor: float = 1.0) -> list[tuple[float, float]]:
    """error = 1 / L0, times a factor."""
    return [(l0, factor / l0) for l0 in l0s]


def test_ratios_of_power_laws_are_those_of_their_factors(script: ModuleType) -> None:
    worse, better = power_law((8, 16, 32, 64)), power_law((6, 12, 24, 48), 0.5)
    ratio, bound = script.l0_ratio(better, worse)
    assert ratio == pytest.approx(0.5)
    assert not bound
    assert script.l0_ratio(worse, better)[0] == pytest.approx(2.0)
    assert script.error_ratio(better, worse) == pytest.approx(0.5)


def test_curves_without_a_common_error_give_a_bound(script: ModuleType) -> None:
    better, worse = [(8.0, 0.02), (16.0, 0.01)], [(8.0, 0.5), (64.0, 0.3)]
    assert script.l0_ratio(better, worse) == (8 / 64, True)
    assert script.l0_ratio(worse, better) == (64 / 8, True)


def test_a_denser_sae_that_is_no_better_does_not_count(script: ModuleType) -> None:
    points = [(32.0, 0.3), (8.0, 0.4), (16.0, 0.2), (4.0, None)]
    assert script.curve(points, "fvu") == [(8.0, 0.4), (16.0, 0.2), (32.0, 0.2)]


def test_verdicts_need_the_whole_interval_on_one_side(script: ModuleType) -> None:
    below, across, above = (script.Estimate(m, m - 0.1, m + 0.1, 3) for m in (0.8, 1.0, 1.2))
    assert [script.at_most(e, 1.0) for e in (below, across, above)] == ["confirmed", "undecided", "refuted"]
    assert [script.at_least(e, 1.0) for e in (below, across, above)] == ["refuted", "undecided", "confirmed"]
    assert script.at_most(script.Estimate.of([0.5]), 1.0) == "undecided", "one seed has no interval"


def test_what_may_go_is_read_off_the_curve(script: ModuleType) -> None:
    points = [{"l0": 20.0, "fvu": 0.1}, {"l0": 10.0, "fvu": 0.12}]
    assert script._saved(points, "fvu") == pytest.approx(0.25), "half of the way to half of the L0"
    assert script._saved([{"l0": 20.0, "fvu": 0.1}, {"l0": 5.0, "fvu": 0.1}], "fvu") == pytest.approx(0.75)


def test_pca_as_an_sae_has_n_active_latents_and_leaves_the_other_components(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(400, 6, generator=generator) * torch.tensor([5.0, 4, 3, 2, 1, 0.5]) + 2
    found = script.pca(acts, 3)
    assert ((found.encode(acts) > 0).sum(1) == 3).all()
    centred = acts - acts.mean(0)
    left = torch.linalg.svdvals(centred)[3:].square().sum() / centred.square().sum()
    assert float((acts - found(acts)).square().sum() / centred.square().sum()) == pytest.approx(
        float(left), rel=1e-4
    )


@pytest.mark.parametrize("arch", ["l1", "gated", "topk", "batch_topk", "jumprelu"])
def test_what_sae_lens_trained_is_read_for_raw_activations(script: ModuleType, arch: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    scale = 0.25
    peer = script.PeerTraining(arch, 8, 32, 4, 0.05 if arch in script.PENALTIES else None, 1e-2, 12, 256, 0)
    for _ in range(12):
        peer.step(x)
    own = peer.trainer.sae.eval()
    latents = own.encode(x)
    expected = own.decode(latents).detach() / scale
    if arch == "batch_topk":  # it chooses over the batch; what is saved has a threshold instead
        values = peer.trainer.sae.encode_with_hidden_pre(x)[1].relu()
        expected = own.decode(values * (values > own.topk_threshold)).detach() / scale
    made = peer.result(scale)
    torch.testing.assert_close(made(x / scale), expected, rtol=1e-3, atol=1e-3)


def test_finished_parts_are_read_and_others_are_not(script: ModuleType, tmp_path: Path) -> None:
    calls = []

    def work(value: Any) -> dict[str, Any]:
        calls.append(value)
        return {"found": value}

    plan = script.Plan(tmp_path, 3.0)
    assert plan.part("a", {"tokens": (1, 2)}, 1.0, work, 5) == {"found": 5}
    assert plan.part("a", {"tokens": (1, 2)}, 1.0, work, 5) == {"found": 5}
    assert plan.part("a", {"tokens": (1, 3)}, 1.0, work, 6) == {"found": 6}
    assert calls == [5, 6]


def test_intervals_over_seeds_are_students(script: ModuleType) -> None:
    found = script.Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
