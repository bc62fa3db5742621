"""Tiny models and an objective to fine-tune them for."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
from families import build
from finetune_cases import classification, decoder, encoder, labelled, modelling

__all__ = ["build", "changed", "classification", "decoder", "encoder", "labelled", "modelling", "state"]


def state(model):
    """Copies of all weights and buffers."""
    return {name: value.clone() for name, value in model.model.state_dict().items()}


@torch.no_grad()
def changed(model, seed=1, by=0.3):
    """The model with every weight moved, as by training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.model.parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model
