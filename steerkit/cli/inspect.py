"""`steerkit inspect MODEL`: its layers and sites, each verified or refused with the reason."""

from __future__ import annotations

from typing import Annotated

import typer

from steerkit.cli.common import Device, Dtype, Json, Quiet, emit, load_model, say


def inspect(
    model: Annotated[
        str, typer.Argument(help="`storyworld`, a Hugging Face id, or a local directory.")
    ] = "storyworld",
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Layers, sites, shapes and the self-check of a model."""
    hooked = load_model(model, device, dtype)
    n_parameters = sum(p.numel() for p in hooked.model.parameters())
    say(
        f"{hooked.name}: {type(hooked.model).__name__}, {hooked.n_layers} layers, d_model {hooked.d_model}, "
        f"{hooked.n_heads} heads, {hooked.d_vocab:,} tokens, context {hooked.context:,}, {n_parameters:,} parameters",
        quiet=quiet,
    )
    say(f"{'site':<44} {'width':>6}  module", quiet=quiet)
    for site in hooked.sites.values():
        note = site.path if site.verified else f"refused: {site.reason}"
        say(f"{site.name:<44} {site.width:>6}  {note}", quiet=quiet)
    emit(
        {
            "model": hooked.name,
            "class": type(hooked.model).__name__,
            "n_layers": hooked.n_layers,
            "d_model": hooked.d_model,
            "n_heads": hooked.n_heads,
            "d_vocab": hooked.d_vocab,
            "context": hooked.context,
            "parameters": n_parameters,
            "sites": [vars(site) if hasattr(site, "__dict__") else site for site in hooked.sites.values()],
        },
        as_json=json,
    )
