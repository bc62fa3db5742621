"""Freezing sweeps: only the blocks that should are trained, rates are chosen on validation, scores go from 0 to 1."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import classification, decoder, encoder, labelled, modelling, state

from probes.freezing import _beyond, freezing_sweep
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, finetune, layers, trainable
from steerkit.objectives import Classification

CONFIG = FinetuneConfig(batch_size=10, epochs=2, weight_decay=0.1)


def watched(objective):
    """The objective, noting which parameters have moved whenever it is evaluated on test."""
    seen, evaluate = [], objective.evaluate

    def noting(model, split="test", dtype=None):
        if split == "test":
            seen.append(
                {name for name, p in model.model.named_parameters() if not torch.equal(p, start[name])}
            )
        return evaluate(model, split, dtype)

    objective.evaluate = noting
    return seen, lambda model: start.update(
        {n: p.detach().clone() for n, p in model.model.named_parameters()}
    )


start: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("side", ["top", "bottom"])
def test_only_the_blocks_that_should_are_trained_and_the_model_comes_back(side):
    model = encoder()
    objective = classification(model)
    seen, remember = watched(objective)
    remember(model)
    before, head = state(model), objective.head
    sweep = freezing_sweep(model, objective, CONFIG, side=side, learning_rates=(1e-2,), seeds=(0, 1))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert objective.head is head
    assert all(p.requires_grad for p in model.model.parameters())
    own = set(layers(1 if side == "top" else 0)(model))
    assert seen[0] == seen[1] == set()
    assert seen[2]
    assert seen[2] <= own
    assert seen[4] > own
    assert [r.k for r in sweep.results] == [0, 1, 2]


def test_scores_are_those_of_runs_by_hand_and_normalised_from_head_to_all():
    model = encoder(dropout=0.0)
    objective = classification(model)
    sweep = freezing_sweep(model, objective, CONFIG, learning_rates=(1e-3, 2e-2), seeds=(3, 4), split="train")
    assert sweep[0].normalised.estimate == 0
    assert sweep[2].normalised.estimate == 1
    least, own, most = (np.mean(sweep[k].scores) for k in range(3))
    assert sweep.gain.estimate == pytest.approx(most - least)
    assert sweep[1].score.estimate == pytest.approx(own)
    assert sweep[1].normalised.estimate == pytest.approx((own - least) / (most - least))
    validation = {}
    for lr in (1e-3, 2e-2):
        other = encoder(dropout=0.0)
        with trainable(other, layers(1)):
            outcome = finetune(other, objective, replace(CONFIG, lr=lr, seed=3))
        validation[lr] = outcome.best[1]["accuracy"]
        if lr == sweep[1].lr:
            assert objective.evaluate(other, "train").score == pytest.approx(sweep[1].scores[0])
    assert sweep[1].validation == pytest.approx(validation)
    assert validation[sweep[1].lr] == max(validation.values())
    assert sweep[1].at_edge
    assert "normalised" in repr(sweep)
    assert len(sweep.figure().data[0].x) == 3


def test_without_a_head_nothing_is_trained_at_0_and_less_perplexity_is_more():
    model = decoder(dropout=0.0)
    objective = modelling(model)
    untouched = objective.evaluate(model).score
    sweep = freezing_sweep(model, objective, replace(CONFIG, epochs=6), learning_rates=(1e-2,), counts=(1,))
    assert sweep[0].lr is None
    assert sweep[0].scores == (untouched,)
    assert sweep.resolved
    assert sweep.gain.estimate > 0
    assert 0 < sweep[1].normalised.estimate < 1
    assert sweep.blocks_for(0.01) == 1
    assert sweep.blocks_for(1.0) == 2
    assert sweep.blocks_for(1.5) is None
    assert sweep.blocks_for(1.0, surely=True) == 2


def test_a_rate_that_fails_is_not_chosen():
    model = encoder()
    objective = classification(model)
    sweep = freezing_sweep(model, objective, CONFIG, learning_rates=(1e30, 1e-2), counts=())
    assert sweep[2].lr == 1e-2
    assert np.isnan(sweep[2].validation[1e30])
    with pytest.raises(NumericsError, match="each of the rates"):
        freezing_sweep(model, objective, CONFIG, learning_rates=(1e30,), counts=())


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_best_rate_only_where_it_is_at_the_edge(sign):
    def beyond(*scores):
        return _beyond({rate: sign * score for rate, score in zip((0.1, 0.2, 0.4), scores)}, sign)

    assert beyond(1, 2, 3) == pytest.approx(0.8)
    assert beyond(3, 2, 1) == pytest.approx(0.05)
    assert beyond(1, 3, 2) is None
    assert beyond(1, 3, np.nan) is None
    assert beyond(np.nan, np.nan, np.nan) is None
    assert beyond(1) is None


def test_the_grid_is_drawn_out_so_often_and_no_more():
    model = encoder(dropout=0.0)
    objective = classification(model)
    rates = (1e-6, 1e-5)
    few = freezing_sweep(model, objective, CONFIG, learning_rates=rates, counts=())
    sweep = freezing_sweep(model, objective, CONFIG, learning_rates=rates, counts=(), extend=4)
    for at in (0, 2):
        assert set(few[at].validation) == set(rates)
        assert len(rates) <= len(sweep[at].validation) <= len(rates) + 4
        tried = np.log10(sorted(sweep[at].validation))
        assert np.allclose(np.diff(tried), 1)
        assert max(sweep[at].validation.values()) >= max(few[at].validation.values())


def test_trainings_in_a_directory_are_not_repeated_and_give_the_same_sweep(tmp_path, monkeypatch):
    model = encoder()
    objective = classification(model)
    given = {"learning_rates": (1e-3, 2e-2), "seeds": (0, 1), "extend": 1}
    plainly = freezing_sweep(model, objective, CONFIG, **given)
    kept = freezing_sweep(model, objective, CONFIG, counts=(), out=tmp_path / "sweep", **given)
    assert [r.k for r in kept.results] == [0, 2]
    whole = freezing_sweep(model, objective, CONFIG, out=tmp_path / "sweep", resume=True, **given)
    assert str(whole.to_dict()) == str(plainly.to_dict())

    def never(*_):
        raise AssertionError("a training was repeated")

    monkeypatch.setattr("probes.freezing.finetune", never)
    again = freezing_sweep(model, objective, CONFIG, out=tmp_path / "sweep", resume=True, **given)
    assert str(again.to_dict()) == str(plainly.to_dict())
    with pytest.raises(InputError, match="another run"):
        freezing_sweep(
            model, objective, replace(CONFIG, epochs=1), out=tmp_path / "sweep", resume=True, **given
        )


def test_errors_name_what_is_wrong():
    model = encoder()
    objective = classification(model)
    with pytest.raises(InputError, match="'top' or 'bottom'"):
        freezing_sweep(model, objective, CONFIG, side="left")
    with pytest.raises(InputError, match="3 blocks"):
        freezing_sweep(model, objective, CONFIG, counts=(3,))
    with pytest.raises(InputError, match="one seed"):
        freezing_sweep(model, objective, CONFIG, seeds=())
    with pytest.raises(InputError, match="validation split"):
        freezing_sweep(model, Classification(model, labelled(30)), CONFIG)
