"""Edits of a single map, without a model around it."""

import torch
from torch import nn

from steerkit.adapters.tuner import Edit, Target


def linear(d_out, d_in, *, bias=True, dtype=torch.float32, seed=0):
    """A random linear map."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_in**0.5)
    return module


def edit_of(method, module, *, path="m", model=None, shared=None, seed=0, facts=None) -> Edit:
    """The method's edit of the map."""
    shared = {} if shared is None else shared
    return method.edit(Target(path, module, model or nn.Module(), shared, seed, facts or {}))


def trained(edit, module, *, steps=5, lr=0.05, seed=0):
    """The edit after some steps towards another random map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, module.weight.shape[1], generator=generator)
    y = torch.randn(64, module.weight.shape[0], generator=generator)
    optimiser = torch.optim.Adam(edit.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        (edit(x, module) - y).square().mean().backward()
        optimiser.step()
    return edit


def fill(edit, size, seed=0):
    """The edit with random parameters of this size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return edit
