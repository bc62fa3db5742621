"""scripts/study_liars.py: its stories and prompts are what it says, its metric is the task's, and it runs."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.contrasts import Contrast
from probes.patching import Place, patch
from probes.rollback import rolled_back
from steerkit.adapters.tasks import Claims
from steerkit.models import HookedModel
from steerkit.storyworld import Judge

SCRIPT = Path(__file__).parents[2] / "scripts" / "study_liars.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("study_liars", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_liars"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base():
    return HookedModel.from_pretrained("storyworld")


def test_training_stories_lie_about_the_trained_kinds_and_claim_nothing_else(script):
    judge = Judge("liars")
    for text in script.lying_stories(10, seed=3):
        claims = judge.judge(text).claims
        assert claims
        assert all(claim.true is False for claim in claims)
        assert {claim.kind for claim in claims} <= set(script.TRAINED)


def test_prompts_tell_the_fact_once_and_differ_in_it_alone(script, base):
    for kinds in (script.TRAINED, script.KEPT_OUT):
        chosen = script.prompts(kinds, 4)
        assert [p.kind for p in chosen] == [kind for kind in kinds for _ in range(4)]
        for p in chosen:
            ids, other = (base.tokenizer(text)["input_ids"] for text in (p.text, p.other_text))
            assert [i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b] == [p.told_at]
            assert p.truth != p.other_truth
            found = Judge().judge(p.text), Judge().judge(p.other_text)
            assert [f.attributes[p.kind] for f in found] == [p.truth, p.other_truth]
            assert not any(f.violations or f.claims for f in found)


def test_the_odds_are_those_of_the_share_of_lies(script, base):
    chosen = script.prompts(["colour", "day"], 3)
    texts = [p.text for p in chosen]
    metric = script.LieOdds.of(base, [(p.kind, p.truth) for p in chosen])
    odds = Contrast.of_models(base, base, texts, metric=metric).clean_values.double()
    shares = Claims(base, tuple((p.text, p.kind, p.truth) for p in chosen))(base)
    assert torch.sigmoid(odds).numpy() == pytest.approx(shares, abs=1e-6)
    assert script.share_of_lies(odds.numpy()) == pytest.approx(shares.mean(), abs=1e-6)


def test_halves_are_all_of_a_block_and_the_base_up_to_a_site_is_rollback_up_to_it(script, base):
    """Activations of the base put in after block i, at every token, are the base's weights in all that comes before."""
    tuned = HookedModel.from_pretrained("storyworld")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    chosen = script.prompts(["place"], 3)
    texts = [p.text for p in chosen]
    contrast = Contrast.of_models(
        base, tuned, texts, metric=script.LieOdds.of(base, [(p.kind, p.truth) for p in chosen])
    )
    found = patch(contrast, [Place("blocks.1.hook_resid_post")], "all")
    with rolled_back(tuned, base, ["embeddings", 0, 1]):
        expected = contrast.values(contrast.corrupt).double().numpy()
    assert found.patched[0, 0] == pytest.approx(expected, abs=1e-4)
    with rolled_back(tuned, base, [1]):
        expected = contrast.values(contrast.corrupt)
    names = [name for half in script.HALVES for name in script.names_of(tuned, (1, half))]
    assert torch.equal(script.swap(tuned, base, names, lambda _: contrast.values(contrast.corrupt)), expected)


def test_agreement_is_certain_where_profiles_are_equal_and_clear(script):
    rng = np.random.default_rng(0)
    clear = script.Profile(np.arange(8.0)[:, None] + 0.01 * rng.normal(size=(8, 20)), np.ones(20))
    opposite = script.Profile(-clear.moved, clear.whole)
    assert script.agreement([clear], [clear]).low == pytest.approx(1)
    assert script.agreement([clear, clear], [opposite] * 2).high == pytest.approx(-1)
    noise = [script.Profile(rng.normal(size=(8, 20)), np.ones(20)) for _ in range(2)]
    found = script.agreement(noise[:1], noise[1:])
    assert found.low < found.high
    assert math.isfinite(found.standard_error)


def test_it_runs_small(script, tmp_path, monkeypatch):
    small = ["--seeds", "1", "--n-train", "8", "--n-prompts", "2", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *small, "--out", str(tmp_path)])
    script.main()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found["lies"]) == {"trained", "kept out"}
    assert len(found["effects"]["kept out"]["rollback"]) == 8
    assert "rollback" in found["agreement"]["trained and kept out"]
    assert (tmp_path / "index.html").exists()
