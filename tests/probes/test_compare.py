"""A base and a tuned model compared: planted changes are found where they are, and nowhere else."""

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.comparison import ComparisonConfig, compare
from probes.comparison_report import findings, holm
from probes.data import LabelledData
from probes.dictionaries import compare_dictionaries
from probes.freezing import freezing_sweep
from probes.similarity import SimilarityWarning
from sae.architectures import TopK
from steerkit import adapters, storyworld
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.objectives import LanguageModelling

STORIES260K = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
SMALL = ComparisonConfig(
    texts=16, per_text=6, permutations=5, Cs=(0.01,), n_folds=2, score_texts=4, rollback=False, context=64
)
TEXTS = [story.text for story in storyworld.sample(12, seed=5)]
SITES = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(4))]


@pytest.fixture(scope="module")
def base():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def planted(base):
    """The base with another MLP in block 2."""
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(0)
    weight = model.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1 + torch.randn(weight.shape, generator=generator))
    return HookedModel.from_pretrained(model, tokenizer=base.tokenizer)


@pytest.fixture(scope="module")
def found(base, planted, tmp_path_factory):
    before = [copy.deepcopy(m.model.state_dict()) for m in (base, planted)]
    out = tmp_path_factory.mktemp("out")
    found = compare(base, planted, labels=["mood"], config=replace(SMALL, rollback=True), out=out)
    for model, weights in zip((base, planted), before):
        assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())
    return found, out


def test_a_planted_change_is_found_where_it_is(found):
    layers = {row.layer: row for row in found[0].layers}
    assert list(layers) == ["embed", 0, 1, 2, 3]
    for layer in ("embed", 0, 1):
        assert layers[layer].drift.relative_change.estimate == 0
        assert layers[layer].cka.value == pytest.approx(1, abs=1e-9)
    for layer in (2, 3):
        assert layers[layer].drift.relative_change.low > 0
        assert layers[layer].cka.value < 0.999
    assert [w.name for w in found[0].weights if w.norm] == ["model.layers.2.mlp.down_proj.weight"]
    assert next(w for w in found[0].weights if w.norm).layer == 2
    assert found[0].cka.matrix.shape == (5, 5)


def test_rolling_the_planted_block_back_gives_the_base_and_others_nothing(found):
    sweep, change = found[0].rollback["loss"], found[0].scores["loss"].change.difference.estimate
    assert abs(change) > 1e-3
    for layer in range(4):
        expected = -change if layer == 2 else 0
        assert sweep["single", layer].change.difference.estimate == pytest.approx(expected, abs=1e-6)
    assert found[0].scores["loss"].base.estimate == pytest.approx(sweep.base.score.estimate, abs=1e-6)


def test_the_files_hold_what_the_design_promises(found):
    summary = json.loads((found[1] / "summary.json").read_text())
    for row in summary["layers"]:
        assert {"layer", "cka", "cka_ci", "procrustes", "rsa", "probe_base", "probe_tuned"} < set(row)
    assert summary["layers"][0]["rollback_delta"] is None
    assert summary["layers"][3]["rollback_delta"] == pytest.approx(
        found[0].rollback["loss"]["single", 2].change.difference.estimate
    )
    assert tuple(summary["findings"]) == found[0].findings
    told = "\n".join(found[0].findings)
    assert "bit for bit, at the embedding, block 0 and block 1" in told
    assert "1 of 39 weight tensors changed, in block 2;" in told
    page = (found[1] / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page


def test_a_model_and_itself_are_told_to_be_the_same(base):
    found = compare(base, base, labels=["tense"], config=replace(SMALL, rollback=True))
    assert all(row.drift.relative_change.estimate == 0 for row in found.layers)
    assert all(c.difference.estimate == 0 for c in found.probes["tense"].change.values())
    told = "\n".join(found.findings)
    assert "The loss on this text (nats a token) is the same in both models." in told
    assert "No weight has changed." in told
    assert "no difference that can be told" in told
    assert "better" not in told
    assert "worse" not in told


def test_an_adapter_is_compared_with_the_model_it_sits_in(base):
    own = HookedModel.from_pretrained("storyworld")
    tuned = adapters.get(own, "lora", rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    inside = compare(own, tuned, TEXTS, config=SMALL)
    outside = compare(base, tuned, TEXTS, config=SMALL)
    for a, b in zip(inside.layers, outside.layers):
        assert a.cka.value == pytest.approx(b.cka.value, abs=1e-6)
    assert inside.layers[4].drift.relative_change.estimate > 0.01
    changes = tuned.changes()
    for w in inside.weights:
        path = w.name.removesuffix(".weight")
        expected = changes[path].norm if path in changes else 0
        assert w.norm == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_an_adapter_that_is_no_change_of_weights_has_no_weights_to_roll_back():
    own = HookedModel.from_pretrained("storyworld")
    tuned = adapters.get(own, "houlsby")
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.fill_(0.02)
    found = compare(own, tuned, TEXTS, config=replace(SMALL, rollback=True))
    assert found.layers[1].drift.relative_change.estimate > 0
    assert not found.weights
    assert not found.rollback
    assert any("is no change of weights" in reason for reason in found.left_out)


def test_a_steered_model_is_the_base_with_something_around_it(base):
    site = "blocks.1.hook_resid_post"
    vector = torch.ones(base.d_model)
    found = compare(
        base, base, TEXTS, config=SMALL, tuned_in=lambda: base.hooks({site: lambda h: h + vector})
    )
    moved = {row.site: row.drift.relative_change.estimate for row in found.layers}
    assert [moved[site] > 0 for site in SITES] == [False, False, True, True, True]
    assert found.layers[2].cka.value == pytest.approx(1, abs=1e-6)  # a shift of all rows is none
    assert not found.weights
    assert any("no weights of its own" in reason for reason in found.left_out)


def test_models_of_other_sizes_are_compared_as_far_as_it_makes_sense(base):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=base.d_vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    small = HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=base.tokenizer)
    found = compare(base, small, TEXTS, config=replace(SMALL, rollback=True))
    assert found.cka.matrix.shape == (5, 3)
    assert [row.layer for row in found.layers] == ["embed", 0, 1]
    assert all(row.drift is None for row in found.layers)
    assert found.scores["loss"].tuned.estimate > found.scores["loss"].base.estimate
    assert not found.rollback
    told = "\n".join(found.left_out)
    assert "drift" in told
    assert "weight changes and rollback" in told


def test_models_of_other_tokenizers_are_compared_text_by_text(base):
    if not STORIES260K.exists():
        pytest.skip("needs ../shared/models/stories260k")
    other = HookedModel.from_pretrained(str(STORIES260K))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SimilarityWarning)
        found = compare(base, other, labels=["tense", "voice"], config=SMALL)
    assert (found.reading, found.rows) == ("mean", SMALL.texts)
    told = "\n".join(found.left_out)
    assert "each row is a text" in told
    assert "nats a token are not comparable" in told
    assert "probes of voice: it labels tokens" in told
    assert list(found.probes) == ["tense"]
    assert "loss" not in found.scores


def test_scores_come_with_the_loss_and_first(base, planted):
    def share(model):
        return np.arange(5.0) * (2 if model is planted else 1)

    found = compare(base, planted, TEXTS, config=SMALL, scores={"share": share})
    assert list(found.scores) == ["share", "loss"]
    assert found.scores["share"].change.difference.estimate == pytest.approx(2)


def test_what_cannot_be_compared_is_an_error(base):
    one_class = LabelledData(TEXTS, ["a"] * len(TEXTS), np.arange(len(TEXTS)))
    with pytest.raises(InputError, match="tells classes apart"):
        compare(base, base, one_class, config=SMALL)
    with pytest.raises(InputError, match="leave out labels"):
        compare(base, base, "storyworld:mood", labels=["tense"], config=SMALL)
    with pytest.raises(InputError, match="does not exist"):
        compare(base, base, TEXTS, config=replace(SMALL, sites=("blocks.9.hook_resid_post",)))
    broken = HookedModel.from_pretrained(copy.deepcopy(base.model), tokenizer=base.tokenizer)
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        compare(base, broken, TEXTS, config=SMALL)


# words


def test_holm_is_the_step_down_method():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert math.isnan(holm([math.nan, 0.02])[0])
    assert holm([math.nan, 0.02])[1] == pytest.approx(0.02)


def test_words_claim_only_what_intervals_support():
    def score(low, high):
        side = {"estimate": 1.0, "low": 0.9, "high": 1.1}
        return {
            "base": side,
            "tuned": side,
            "change": {"difference": {"estimate": 0.1, "low": low, "high": high}},
        }

    def layer(i, cka, change):
        relative = {"estimate": change[1], "low": change[0], "high": change[2]}
        own = {"layer": i, "site": f"s{i}", "cka": cka[1], "cka_ci": [cka[0], cka[2]]}
        return own | {"cka_null": {"high": 0.5}, "drift": {"relative_change": relative}}

    def told(**figures):
        return "\n".join(
            findings({"scores": {}, "probes": {}, "rollback": {}, "freezing": None, "weights": [], **figures})
        )

    apart = [layer(0, (0.8, 0.85, 0.9), (0.1, 0.2, 0.3)), layer(1, (0.3, 0.4, 0.6), (0.4, 0.5, 0.6))]
    assert "rose" in told(scores={"x": score(0.05, 0.15)}, layers=apart)
    assert "cannot be told to have changed" in told(scores={"x": score(-0.05, 0.25)}, layers=apart)
    said = told(layers=apart)
    assert "moved most at block 1: by 0.5 [0.4, 0.6] of their size." in said
    assert "At block 1 the CKA is not above" in said
    near = [apart[0], layer(1, (0.6, 0.8, 0.85), (0.25, 0.4, 0.5))]
    said = told(layers=near)
    assert "block 0 cannot be told from it" in said
    assert "no layer is less alike than another" in said


def test_freezing_is_told_only_where_training_all_blocks_is_better():
    def sweep(gain_low, *ways):
        results = [
            {"k": k, "normalised": {"estimate": way, "low": way - 0.1, "high": way + 0.1}}
            for k, way in enumerate(ways)
        ]
        gain = {"estimate": gain_low + 0.1, "low": gain_low, "high": gain_low + 0.2}
        return {"side": "top", "score_name": "accuracy", "gain": gain, "results": results}

    def told(found):
        layer = {"layer": 0, "cka": 1.0, "cka_ci": [0.9, 1.1], "cka_null": None, "drift": None}
        figures = {"scores": {}, "probes": {}, "rollback": {}, "weights": [], "layers": [layer]}
        return findings({**figures, "freezing": found})[-1]

    said = told(sweep(0.1, 0.0, 0.95, 1.0, 1.0))
    assert "takes the top 1 (0.95 [0.85, 1.05]), and beyond doubt the top 2 (1.00 [0.90, 1.10])." in said
    assert "takes all 2, and beyond doubt all 2." in told(sweep(0.1, 0.0, 0.5, 1.0))
    assert "cannot be told to be better" in told(sweep(-0.1, 0.0, 0.95, 1.0))


def test_a_freezing_sweep_stands_beside_rollback(base, tmp_path):
    objective = LanguageModelling(base, TEXTS[:8], TEXTS[8:10], TEXTS[10:], context=32)
    sweep = freezing_sweep(base, objective, counts=(), learning_rates=(1e-4,))
    found = compare(base, base, TEXTS, labels=[], config=SMALL, freezing=sweep, out=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["freezing"]["results"][1]["k"] == 4
    assert found.findings[-2].startswith("Freezing: ") or found.findings[-1].startswith("Freezing: ")
    assert "<h2>Freezing</h2>" in (tmp_path / "report.html").read_text()


# dictionaries


def dictionary(directions):
    sae = TopK(d_sae=len(directions), k=1).build(directions.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
    return sae


def test_latents_are_matched_whatever_their_order():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    acts = 5 * directions[torch.arange(400) % 40]
    order = torch.randperm(40, generator=generator)
    tokens = [f"t{i % 40}" for i in range(400)]
    found = compare_dictionaries(
        dictionary(directions), dictionary(directions[order]), acts, acts, tokens=tokens
    )
    assert found.counts == {"kept": 40, "rotated": 0, "split": 0, "vanished": 0, "appeared": 0}
    assert all(int(order[m.tuned]) == m.base for m in found.matches)
    assert all(m.correlation == pytest.approx(1, abs=1e-5) for m in found.matches)
    assert found.examples["base", 7] == ("t7",)


def test_latents_that_appear_vanish_or_turn_are_named():
    generator = torch.Generator().manual_seed(0)
    unit = torch.eye(64)
    before, after = unit[:40].clone(), unit[:40].clone()
    after[3] = unit[50]
    after[5] = math.cos(0.7) * unit[5] + math.sin(0.7) * unit[60]
    acts_before, acts_after = (
        5 * side[torch.randint(40, (800,), generator=generator)] for side in (before, after)
    )
    found = compare_dictionaries(dictionary(before), dictionary(after), acts_before, acts_after)
    assert [m.base for m in found.of_kind("vanished")] == [3]
    assert [m.tuned for m in found.of_kind("appeared")] == [3]
    (turned,) = found.of_kind("rotated")
    assert (turned.base, turned.tuned) == (5, 5)
    assert turned.cosine == pytest.approx(math.cos(0.7), abs=1e-6)
    assert found.counts["kept"] == 38
    assert 0.2 < found.chance < 0.7


def test_dictionaries_that_have_no_cosine_are_refused():
    a, b = dictionary(torch.eye(8)), dictionary(torch.eye(6))
    with pytest.raises(InputError, match="different spaces"):
        compare_dictionaries(a, b, torch.eye(8), torch.eye(6))
    with pytest.raises(InputError, match="row by row"):
        compare_dictionaries(a, a, torch.eye(8), torch.eye(8)[:4])
