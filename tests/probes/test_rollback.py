"""Rollback: the ends are the two models bit for bit, what is in between is its formula, and the model comes back."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import build, changed, classification, decoder, encoder, state

from probes.rollback import rollback_sweep, rolled_back
from probes.weights import parts, preserved, relative_change, weights_of, weights_set
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel

IDS = torch.tensor([[1, 5, 9, 7, 30, 12]])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model):
    with torch.no_grad():
        return model.logits(IDS)


@pytest.fixture(scope="module")
def base():
    return decoder()


@pytest.fixture(scope="module")
def tuned():
    return changed(decoder())


@pytest.mark.parametrize(
    ("family", "embeddings", "final_norm", "head"),
    [
        ("llama", {"embed_tokens"}, {"norm"}, {"lm_head"}),
        (
            "opt",
            {"embed_tokens", "embed_positions"},
            {"final_layer_norm"},
            set(),
        ),  # tied; the norm is registered first
        (
            "bert",
            {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"},
            set(),
            {"cls"},
        ),
        ("t5", {"shared"}, {"final_layer_norm"}, set()),
    ],
)
def test_every_parameter_is_in_the_part_where_it_acts(family, embeddings, final_norm, head):
    model = HookedModel.from_pretrained(build(family))
    own = parts(model)
    names = [name for part in own.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.model.named_parameters())
    assert [part for part in own if isinstance(part, int)] == list(range(model.n_layers))
    assert {name.split(".")[-2] for name in own["embeddings"]} == embeddings
    assert {name.split(".")[-2] for name in own.get("final_norm", ())} == final_norm
    assert {name.split(".")[0] for name in own.get("head", ())} == head
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_nothing_rolled_back_is_the_tuned_model_and_all_is_the_base_bit_for_bit(base, tuned):
    before, model = state(tuned), logits(tuned)
    with rolled_back(tuned, base, []):
        assert equal(state(tuned), before)
        assert torch.equal(logits(tuned), model)
    with rolled_back(tuned, base, parts(tuned)):
        assert equal(state(tuned), state(base))
        assert torch.equal(logits(tuned), logits(base))
    assert equal(state(tuned), before)


@pytest.mark.parametrize("part", ["embeddings", 0, 1, "final_norm"])
def test_one_part_is_the_base_s_and_the_others_are_tuned(base, tuned, part):
    with rolled_back(tuned, base, [part]):
        found = state(tuned)
    own = set(parts(tuned)[part]) | ({"lm_head.weight"} if part == "embeddings" else set())  # tied
    for name, value in found.items():
        assert torch.equal(value, state(base if name in own else tuned)[name])


def test_interpolation_is_its_formula_and_exact_at_both_ends(base, tuned):
    name = parts(tuned)[1][2]
    a, b = state(base)[name], state(tuned)[name]
    for alpha in (0.0, 0.25, 1.0, 1.5):
        with rolled_back(tuned, base, [1], alpha=alpha):
            torch.testing.assert_close(state(tuned)[name], a + alpha * (b - a))
            if alpha in (0, 1):
                assert torch.equal(state(tuned)[name], b if alpha else a)


def test_the_models_come_back_after_an_exception_and_after_changes_inside(base, tuned):
    before, other = state(tuned), state(base)

    def breaks():
        with rolled_back(tuned, base, [0, "final_norm"]):
            with torch.no_grad():
                for parameter in tuned.model.parameters():
                    if parameter.data_ptr() not in pointers:  # those that were put in
                        parameter.zero_()
            raise RuntimeError

    pointers = {p.data_ptr() for p in tuned.model.parameters()}
    with pytest.raises(RuntimeError):
        breaks()
    assert equal(state(tuned), before)
    assert equal(state(base), other)
    assert {p.data_ptr() for p in tuned.model.parameters()} == pointers


def test_effective_weights_of_an_adapter_are_rolled_back_in_the_base(base, tuned):
    before = {name: weight.clone() for name, weight in weights_of(base).items()}
    effective = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    with weights_set(base, effective):
        assert torch.equal(logits(base), logits(tuned))
        with rolled_back(base, before, [1]):
            found = logits(base)
    with rolled_back(tuned, base, [1]):
        assert torch.equal(logits(tuned), found)
    assert equal(weights_of(base), before)


def test_a_sweep_pairs_the_examples_and_evaluates_equal_sets_once():
    base, tuned = encoder(), changed(encoder(), by=0.05)
    objective = classification(base)
    calls = []

    def evaluate(model):
        calls.append(1)
        return objective.evaluate(model, "test")

    sweep = rollback_sweep(
        tuned, base, evaluate, kinds=("single", "prefix", "suffix", "block", "part"), width=2
    )
    # nothing, all; 0; 1; both (prefix, suffix and block); embeddings – this encoder has no norm after its blocks
    assert len(calls) == 6
    assert sweep.tuned.estimate == objective.evaluate(tuned).score
    assert sweep.base.score.estimate == objective.evaluate(base).score
    entry = sweep["single", 1]
    with rolled_back(tuned, base, [1]):
        values = objective.evaluate(tuned)
    assert entry.score.estimate == pytest.approx(values.score)
    gap = values["correct"] - objective.evaluate(tuned)["correct"]
    assert entry.change.difference.estimate == pytest.approx(gap.mean())
    assert entry.change.difference.standard_error == pytest.approx(
        gap.std() / np.sqrt(len(gap)), rel=0.1, abs=1e-12
    )
    assert sweep["suffix", 0].score == sweep["prefix", 1].score == sweep["block", 0].score
    assert {trace.name for trace in sweep.figure().data} == {"single", "prefix", "suffix", "block", "part"}
    assert "single 1" in repr(sweep)


def test_a_sweep_finds_the_only_block_that_changed(base, tmp_path):
    model = decoder()
    with torch.no_grad():
        for name in parts(model)[1]:
            model.model.get_parameter(name).add_(0.2)
    clean = logits(base)
    sweep = rollback_sweep(model, base, lambda m: float((logits(m) - clean).abs().max()), alphas=(0.0, 1.0))
    assert sweep["single", 1].score.estimate == 0
    assert sweep["single", 0].change.difference.estimate == 0
    assert sweep["single", 1, 1.0].change.difference.estimate == 0
    assert np.isnan(sweep["single", 1].change.p_value)  # one number has no interval
    assert sweep.relative_change[0] == 0 < sweep.relative_change[1]
    sweep.save(tmp_path / "sweep.json")


def test_relative_change_is_its_formula(base):
    model = decoder()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    assert all(value == pytest.approx(0.1, rel=1e-4) for value in relative_change(model, base).values())


def test_what_is_done_while_preserved_is_undone(base):
    model = encoder()
    objective = classification(model)
    before, head = state(model), objective.head
    with preserved(model, objective):
        changed(model)
        objective.reset(model, 7)
        assert not equal(state(model), before)
    assert equal(state(model), before)
    assert objective.head is head


def test_errors_name_what_is_wrong(base, tuned):
    with pytest.raises(InputError, match="no part 2; it has embeddings, 0, 1"), rolled_back(tuned, base, [2]):
        pass
    with (
        pytest.raises(InputError, match="one architecture"),
        rolled_back(tuned, encoder(), [0]),
    ):
        pass
    smaller = {name: w[..., :8] for name, w in weights_of(base).items()}
    with (
        pytest.raises(InputError, match=r"ln_1.weight is torch.float32 \(16,\)"),
        rolled_back(tuned, smaller, [0]),
    ):
        pass
    with pytest.raises(InputError, match="dtype"), rolled_back(tuned, decoder(dtype=torch.float64), [0]):
        pass
    with pytest.raises(InputError, match="kinds"):
        rollback_sweep(tuned, base, lambda m: 0.0, kinds=("singles",))
    with pytest.raises(InputError, match="width"):
        rollback_sweep(tuned, base, lambda m: 0.0, width=3)
    with pytest.raises(NumericsError, match="nothing rolled back"):
        rollback_sweep(tuned, base, lambda m: float("nan"))
    with pytest.raises(InputError, match="finite"), rolled_back(tuned, base, [0], alpha=float("inf")):
        pass
    with pytest.raises(InputError, match="3 groups for 2 values"):
        rollback_sweep(tuned, base, lambda m: np.zeros(2), groups=np.arange(3))
