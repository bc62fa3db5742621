"""Penalties for stability: closed forms, and what training with them comes to."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import classification, decoder, encoder, modelling

from probes.instability import Remedies, seed_runs
from probes.regularisation import SpectralPenalty, WithMargin, margin_penalty
from steerkit.errors import InputError
from steerkit.finetuning import FinetuneConfig

CONFIG = FinetuneConfig(lr=1e-2, batch_size=10, epochs=3)


def test_the_margin_s_penalty_in_closed_form():
    states = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 4.0]])  # means (1, 0) and (4, 4): 5 apart
    assert margin_penalty(states, torch.tensor([0, 0, 1])).item() == pytest.approx(1 / 6)
    three = margin_penalty(states, torch.tensor([0, 1, 2]))
    apart = torch.tensor([2.0, 32.0**0.5, 20.0**0.5])
    assert three.item() == pytest.approx((1 / (1 + apart)).mean().item())
    assert margin_penalty(states, torch.tensor([1, 1, 1])).item() == 0.0
    assert margin_penalty(states[:1].expand(2, 2), torch.tensor([0, 1])).item() == 1.0


def test_the_spectral_penalty_converges_to_the_largest_singular_values():
    model = decoder()
    penalty = SpectralPenalty(weight=3.0)
    for _ in range(100):
        found = penalty(model)
    matrices = [p.detach() for p in model.model.parameters() if p.requires_grad and p.ndim == 2]
    wanted = 1.5 * sum(torch.linalg.matrix_norm(m, 2).square() for m in matrices)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)
    found.backward()
    first = next(p for p in model.model.parameters() if p.ndim == 2)
    u, s, v = torch.linalg.svd(first.detach(), full_matrices=False)
    assert torch.allclose(first.grad, 3 * s[0] * torch.outer(u[:, 0], v[0]), atol=3e-2 * s[0].item())


def test_a_margin_is_in_the_loss_of_training_and_not_in_evaluation():
    model = encoder()
    objective = classification(model)
    objective.reset(model, 0)
    batch = objective.examples("train")[:8]
    plain, penalised = objective.outcomes(model, batch), WithMargin(objective, 2.0).outcomes(model, batch)
    added = penalised["loss"] - plain["loss"]
    labels = torch.tensor([example.label for example in batch])
    wanted = 2.0 * margin_penalty(objective.pooled(model, batch), labels)
    assert torch.allclose(added, wanted.expand(8), atol=1e-6)
    assert WithMargin(objective, 2.0).evaluate(model).mean("loss") == objective.evaluate(model).mean("loss")


def test_classes_end_further_apart_and_matrices_smaller():
    model = encoder(dropout=0.0)
    objective = classification(model)
    batch = objective.examples("test")
    labels = torch.tensor([example.label for example in batch])

    def ends(remedies):
        def read(tuned):
            near = margin_penalty(objective.pooled(tuned, batch), labels).item()
            return {
                "near": near,
                "norms": sum(p.norm().item() for p in tuned.model.parameters() if p.ndim == 2),
            }

        return seed_runs(model, objective, CONFIG, seeds=(0, 1), remedies=remedies, read=read).acts

    plain, margin, spectral = ends(Remedies()), ends(Remedies(margin=2.0)), ends(Remedies(spectral=0.1))
    for seed in range(2):
        assert margin[seed]["near"] < plain[seed]["near"]
        assert spectral[seed]["norms"] < plain[seed]["norms"]


def test_a_margin_needs_classes():
    model = decoder()
    with pytest.raises(InputError, match="between classes"):
        Remedies(margin=1.0).train(model, modelling(model), replace(CONFIG, epochs=1))
