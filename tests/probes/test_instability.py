"""Instability: closed forms and identities of the measures, and runs that differ in the seed and nothing else."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import classification, decoder, encoder, modelling, state

from probes.instability import (
    STABLE,
    Remedies,
    fleiss_kappa,
    instability,
    jensen_shannon,
    representation_instability,
    seed_runs,
    standard_deviation,
)
from probes.similarity import similarity
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, finetune, layers
from steerkit.optimisers import UncorrectedAdamW

CONFIG = FinetuneConfig(lr=1e-2, batch_size=10, epochs=1)


def predictions(seed=0, runs=4, n=40, classes=3):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), (runs, n))


LABELS = np.arange(40) % 3


def test_fleiss_kappa_of_its_first_paper_s_kind_of_table():
    """Fleiss 1971's ten subjects, fourteen raters, five categories: 0.210."""
    counts = np.array(
        [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
         [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    )  # fmt: skip
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_kappa_is_what_disagreement_leaves_above_chance():
    p = predictions()
    found = instability(p, LABELS)
    shares = np.bincount(p.argmax(-1).ravel(), minlength=3) / p[..., 0].size
    chance = np.square(shares).sum()
    wanted = (1 - found.disagreement.estimate - chance) / (1 - chance)
    assert found.fleiss_kappa.estimate == pytest.approx(wanted, abs=1e-12)
    assert found.scores == tuple((p.argmax(-1) == LABELS).mean(1))


def test_runs_that_agree_and_runs_that_contradict_each_other():
    certain = np.eye(3)[LABELS]
    same = instability(np.stack([certain] * 3), LABELS)
    assert same.disagreement.estimate == same.jsd.estimate == same.sd.estimate == 0
    assert same.fleiss_kappa.estimate == 1
    assert same.failed == ()
    other = instability(np.stack([certain, np.roll(certain, 1, axis=1)]), LABELS)
    assert other.disagreement.estimate == 1
    assert other.jsd.estimate == pytest.approx(np.log(2))
    assert other.failed == (1,)
    assert np.isnan(other.disagreement.low)  # two runs have one pair
    assert np.isnan(fleiss_kappa(np.array([[2.0, 0], [2, 0]])))


def test_jensen_shannon_is_the_mean_divergence_from_the_mixture():
    from scipy.spatial.distance import jensenshannon

    p, q = predictions()[:2]
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, axis=1) ** 2)
    assert (jensen_shannon(p, q) == jensen_shannon(q, p)).all()


def test_the_interval_of_a_standard_deviation_is_chi_square_s():
    """Reference: 0.76 to 1.46 times s with 20 seeds, 0.60 to 2.87 with 5."""
    for n, low, high in ((20, 0.76, 1.46), (5, 0.60, 2.87)):
        found = standard_deviation(np.random.default_rng(0).normal(size=n))
        assert found.low / found.estimate == pytest.approx(low, abs=0.006)
        assert found.high / found.estimate == pytest.approx(high, abs=0.006)


def test_the_jackknife_leaves_out_runs_not_pairs():
    p = predictions(runs=5)
    found = instability(p, LABELS).disagreement
    left_out = [instability(np.delete(p, i, axis=0), LABELS).disagreement.estimate for i in range(5)]
    assert found.standard_error == pytest.approx(
        np.sqrt(4 / 5 * np.square(left_out - np.mean(left_out)).sum())
    )


@pytest.mark.filterwarnings("ignore:.*rows are few")
def test_representations_are_compared_by_any_measure():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 5, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    noise = torch.randn(60, 5, generator=generator)
    acts = [
        {"x": base, "y": base},
        {"x": base @ rotation, "y": base + noise},
        {"x": 2 * base, "y": base - noise},
    ]
    for measure in ("linear_cka", "procrustes", "svcca"):
        found = representation_instability(acts, measure)
        assert found["x"].estimate == pytest.approx(0, abs=1e-5)
        pairs = [(0, 1), (0, 2), (1, 2)]
        own = [similarity(acts[i], acts[j], measure, pairs="matched", interval=False) for i, j in pairs]
        assert found["y"].estimate == pytest.approx(1 - np.mean([f["y", "y"].value for f in own]))
    own = representation_instability(acts, lambda a, b: {"n": 0.75})
    assert own["n"].estimate == pytest.approx(0.25)


def test_an_optimiser_without_bias_correction_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
    wanted, m, v = p.detach().clone(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    optimiser = UncorrectedAdamW([p], lr=0.1, weight_decay=0.2)
    for _ in range(4):
        p.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        wanted = (1 - 0.1 * 0.2) * wanted - 0.1 * m / (v.sqrt() + 1e-6)
        optimiser.step()
    torch.testing.assert_close(p.detach(), wanted)


def test_steps_without_bias_correction_are_longer_by_a_known_factor():
    """(1 - β1^t) / √(1 - β2^t): from 3.16 times AdamW's to 6.56 times, at t = 12."""
    steps = []
    for kind in (torch.optim.AdamW, UncorrectedAdamW):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimiser = kind([p], lr=1.0, weight_decay=0.0)
        places = [0.0]
        for _ in range(30):
            p.grad = torch.ones(1, dtype=torch.float64)
            optimiser.step()
            places.append(float(p.detach()))
        steps.append(-np.diff(places))
    ratio = steps[1] / steps[0]
    assert ratio[0] == pytest.approx(np.sqrt(10), rel=1e-3)
    assert ratio.max() == pytest.approx(6.56, abs=0.01)
    assert ratio.argmax() == 11


def test_remedies_are_settings_of_the_run():
    assert Remedies().config(CONFIG) == CONFIG
    found = STABLE.config(CONFIG)
    assert (found.lr, found.warmup, found.epochs, found.optimiser) == (2e-5, 0.1, 20, "AdamW")
    plain = Remedies(bias_correction=False).config(CONFIG)
    assert plain == replace(CONFIG, optimiser="UncorrectedAdamW")
    weights = []
    for config in (CONFIG, plain):
        model = encoder(dropout=0.0)
        finetune(model, classification(model), config)
        weights.append(state(model))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_top_blocks_are_made_anew_and_no_others():
    model = encoder()
    before = state(model)
    Remedies(reinitialised=1).initialise(model, seed=5)
    top, after = set(layers(1)(model)), state(model)
    for name in before:
        if name not in top:
            assert torch.equal(before[name], after[name])
    fresh = model.randomized(5)
    assert all(torch.equal(after[name], state(fresh)[name]) for name in top)
    with pytest.raises(InputError, match="2 blocks"):
        Remedies(reinitialised=3).initialise(model, seed=0)


def test_runs_begin_alike_end_apart_and_leave_the_model_as_it_was():
    model = encoder()
    objective = classification(model)
    before, head = state(model), objective.head
    texts = ["The fox took the red ball.", "The hen took the blue ball. The ball is blue."]
    sites = ["blocks.1.hook_resid_post"]
    runs = seed_runs(
        model, objective, CONFIG, seeds=(0, 1, 2), remedies=Remedies(warmup=0.2, reinitialised=1),
        read=lambda m: m.activations(texts, sites),
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert objective.head is head
    assert runs.scores == pytest.approx(runs.instability().scores)
    assert runs.instability().jsd.estimate > 0
    again = seed_runs(model, objective, CONFIG, seeds=(2, 0), remedies=Remedies(warmup=0.2, reinitialised=1))
    np.testing.assert_array_equal(again.probabilities, runs.probabilities[[2, 0]])
    assert 0 < representation_instability(runs.acts)[sites[0]].estimate < 2
    assert "3 seeds" in repr(runs)


def test_runs_without_classes_have_scores_only():
    model = decoder()
    runs = seed_runs(model, modelling(model), CONFIG, seeds=(0, 1))
    assert runs.sd.estimate == pytest.approx(np.std(runs.scores, ddof=1))
    with pytest.raises(InputError, match="classification"):
        runs.instability()


def test_errors_name_what_is_wrong(tmp_path):
    model = encoder()
    objective = classification(model)
    with pytest.raises(InputError, match="1 run"):
        seed_runs(model, objective, CONFIG, seeds=(0,))
    with pytest.raises(InputError, match="twice"):
        seed_runs(model, objective, CONFIG, seeds=(0, 0))
    p = predictions()
    with pytest.raises(InputError, match="1 run"):
        instability(p[:1], LABELS)
    with pytest.raises(InputError, match="softmax"):
        instability(p * 2, LABELS)
    with pytest.raises(InputError, match="for 39 labels"):
        instability(p, LABELS[1:])
    with pytest.raises(InputError, match="from 0 to 2"):
        instability(p, LABELS + 1)
    p[2, 3, 1] = np.nan
    with pytest.raises(NumericsError, match="Run 2"):
        instability(p, LABELS)
    instability(predictions(), LABELS).save(tmp_path / "instability.json")
