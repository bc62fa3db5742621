"""Activations with a known dictionary, as a stream; and a run that is killed again and again (`python synthetic.py OUT`)."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steerkit.activations import Statistics

SITE, OTHER = "site", "other"
LABELS = ("a", "b")
_SAMPLES: dict[tuple[object, ...], dict[tuple[int, int], torch.Tensor]] = {}
"""Settings -> what was drawn with them: many tests ask for the same."""


class SparseStream:
    """x = Σ_i f_i d_i + mean + noise, with k of n features active a token; `kind` says how often each is, and how strongly.

    Another site is a function of this one, and two labels are what some coordinates say.
    """

    def __init__(
        self,
        kind: str = "even",
        *,
        d: int = 32,
        n: int = 96,
        k: int = 4,
        batch_size: int = 512,
        scale: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(11)
        self.samples: dict[tuple[int, int], torch.Tensor] = _SAMPLES.setdefault((kind, d, n, k, scale), {})
        self.dictionary = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
        self.offset = 0.5 * torch.randn(d, generator=generator)
        self.kind, self.k, self.batch_size, self.scale = kind, k, batch_size, scale
        self.frequencies = torch.ones(n) if kind == "even" else 1 / torch.arange(1, n + 1).float()
        self.batches = 0
        self.seconds_model = 0.0
        self.nan_at: int | None = None

    def sample(self, number: int, n: int | None = None) -> torch.Tensor:
        """Batch `number`, (n, d)."""
        key = number, n or self.batch_size
        if key not in self.samples:
            self.samples[key] = self._sample(*key)
        return self.samples[key].clone()

    def _sample(self, number: int, n: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        active = torch.multinomial(self.frequencies.expand(n, -1), self.k, generator=generator)
        strength = torch.rand(n, self.k, generator=generator)
        strength = 0.5 - strength.log() if self.kind == "heavy" else 0.5 + strength
        latents = torch.zeros(n, len(self.dictionary)).scatter_(1, active, strength)
        noise = 0.02 * torch.randn(n, self.dictionary.shape[1], generator=generator)
        return self.scale * (latents @ self.dictionary + self.offset + noise)

    def held_out(self, n: int = 4096) -> torch.Tensor:
        return self.sample(10**9, n)

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = self.sample(self.batches)
        if self.batches == self.nan_at:
            batch[3, 1] = float("nan")
        self.batches += 1
        labels = {name: (batch[:, i] > self.offset[i]).float() for i, name in enumerate(LABELS)}
        return {SITE: batch, OTHER: self.other(batch), **labels}

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """What stands at the other site, narrower and larger."""
        return 3 * torch.relu(x[:, 8:] - x[:, :-8])

    def statistics(self, site: str) -> Statistics:
        x = self.sample(10**9 + 1, 4096)
        return Statistics.of(x if site == SITE else self.other(x), site, None)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]

    def close(self) -> None:
        pass


def _train(model: Any, texts: list[str], out: Path, resume: bool) -> None:
    import sae

    sae.train(
        model,
        texts,
        "blocks.0.hook_resid_pre",
        sae.Gated(d_sae=160, target_l0=8),
        12_000,
        out,
        batch_size=192,
        block_tokens=2048,
        held_out_tokens=300,
        log_every=3,
        checkpoint_seconds=0.0,
        resume=resume,
        quiet=True,
    )


def _in_child(
    train: Callable[[Path, bool], None], out: Path, resume: bool, kill: random.Random | None
) -> bool:
    """Train in a forked child; with `kill`, SIGKILL it some time after its first new checkpoint. Whether the run is finished."""
    before = {path.name for path in (out / "checkpoint").glob("step-*")}
    child = os.fork()
    if not child:
        status = 1
        try:
            train(out, resume)
            status = 0
        finally:
            os._exit(status)
    if kill is not None:
        while not {path.name for path in (out / "checkpoint").glob("step-*")} - before:
            if os.waitpid(child, os.WNOHANG)[0]:
                return (out / "summary.json").exists()
            time.sleep(0.001)
        time.sleep(kill.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert kill is not None or status == 0, f"the child ended with {status}"
    return (out / "summary.json").exists()


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "sae_weights.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print the digests of an uninterrupted run's weights and of a run that was killed, and how often it was."""
    from steerkit import HookedModel, load_documents

    torch.set_num_threads(1)
    out, kills = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    train = partial(
        _train,
        HookedModel.from_pretrained("storyworld", device="cpu"),
        list(load_documents("storyworld")[:80]),
    )
    _in_child(train, out / "whole", False, None)
    n_kills = 0
    while n_kills < 4 and not _in_child(train, out / "killed", True, kills):
        n_kills += 1
    _in_child(train, out / "killed", True, None)
    print(_digest(out / "whole"), _digest(out / "killed"), n_kills)


if __name__ == "__main__":
    main()
