"""The null of the untrained model: the same SAE, trained on the same text through random weights.

    null = train_on_random_model(run)                                     # runs/g/random-model
    evaluate_nulls(model, run.sae, run.held_out(), site, random_model_sae=null.sae)

Dictionaries of a randomly initialised transformer can look interpretable, as they show what is in the tokens
(Heap et al. 2025, https://arxiv.org/abs/2501.17727). What a trained model's SAE has found must be seen beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.training import SAERun, train
from steerkit.activations import Tokenization


def train_on_random_model(
    run: SAERun, out: str | Path | None = None, *, seed: int = 0, data: Any = None, quiet: bool = False
) -> SAERun:
    """Train an SAE with the settings of `run` on its model's architecture with fresh weights from `seed`.

    It goes to `out`, by default `random-model` in the run's directory; one that is there is continued or
    returned. `data` is only needed when the run's text had no name (a list). Raises InputError as `train` does.
    """
    return train(
        run.hooked().randomized(seed),
        run.config["data"] if data is None else data,
        run.config["site"],
        run.sae.config,
        run.config["tokens"],
        run.path / "random-model" if out is None else out,
        config=run.train_config(),
        tokenization=Tokenization(**run.config["tokenization"]),
        text_column=run.config["text_column"],
        resume=True,
        quiet=quiet,
    )
