"""What a vector does to a few prompts, at several strengths, to look at: in a notebook, or as a page.

    shown = steering.preview(model, vector, ["Anna is", "One rainy day"], strengths=[-4, -2, 2, 4])
    shown                                    # in a notebook: a slider over the strengths, steered beside unsteered
    shown.save("happy.html")                 # the same as one file that works offline

Every text is drawn with the same random numbers at every strength, and each of its tokens has KL(steered ‖ unsteered) of the
distribution it was drawn from, in nats, exactly.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sae.dashboard.pieces import context_texts
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.plots import alone, notebook_frame
from steerkit.runs import atomic_write
from steerkit.steering.sampling import divergence, encode_prompts, sample, unchanged
from steerkit.steering.vector import SteeringVector
from steerkit.steering.where import Where

_STRONG_KL = 5.0
"""Nats of a token that is shaded as dark as can be."""


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt."""

    tokens: tuple[str, ...]
    kl: tuple[float, ...] = field(repr=False)
    """Of each token, in nats; 0 for the unsteered model."""

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def mean_kl(self) -> float:
        """Nats a token; NaN without tokens."""
        return sum(self.kl) / len(self.kl) if self.kl else math.nan


@dataclass(frozen=True)
class Preview:
    """Continuations of prompts by strength; a notebook shows them with a slider."""

    title: str
    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    """Rising; 0 is among them."""
    continuations: tuple[tuple[Continuation, ...], ...] = field(repr=False)
    """[prompt][strength]"""

    def save(self, path: str | Path) -> Path:
        """Write a page of its own; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, alone(self.title, self._body(), _CSS, script=_SCRIPT))
        return path

    def _repr_html_(self) -> str:
        height = min(640, 110 + 150 * len(self.prompts))
        return notebook_frame(self._body(), _CSS, height=height, script=_SCRIPT)

    def _body(self) -> str:
        names = [f"{strength:+g}".replace("-", "−") if strength else "0" for strength in self.strengths]
        options = "".join(f'<option value="{i}" label="{name}"></option>' for i, name in enumerate(names))
        slider = (
            f'<label class="slider">strength <input type="range" min="0" max="{len(names) - 1}" value="{len(names) - 1}" '
            f'list="strengths"><output></output><datalist id="strengths">{options}</datalist></label>'
        )
        blocks = "".join(
            self._block(prompt, row, names) for prompt, row in zip(self.prompts, self.continuations)
        )
        return f"<h1>{html.escape(self.title)}</h1>{slider}{blocks}"

    def _block(self, prompt: str, row: Sequence[Continuation], names: Sequence[str]) -> str:
        plain = self.strengths.index(0.0)
        cells = "".join(
            f'<div class="steered" data-name="{name}"><h2>strength {name}{_kl(found)}</h2><p>{_shaded(found)}</p></div>'
            for name, found in zip(names, row)
        )
        return (
            f"<section><h3>{html.escape(prompt)}</h3><div><h2>unsteered</h2><p>{_shaded(row[plain])}</p></div>"
            f"<div>{cells}</div></section>"
        )


def preview(
    model: HookedModel,
    vector: SteeringVector,
    prompts: Sequence[str] | str,
    strengths: Sequence[float],
    *,
    where: Where | None = None,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    other_model: bool = False,
) -> Preview:
    """Continue each prompt once at each strength, and unsteered; nearly greedily at a temperature near 0.

    Raises InputError when there is no prompt, a strength is not finite, or the model and the vector cannot be used so.
    """
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise InputError("There is no prompt: give at least one.")
    if not all(math.isfinite(s) for s in strengths):
        raise InputError(f"The strengths are {list(strengths)}; they must be finite.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature is {temperature}; it must be above 0.")
    levels = sorted({0.0, *map(float, strengths)})
    columns = [
        _continued(model, vector, prompts, s, where, max_new_tokens, temperature, seed, other_model)
        for s in levels
    ]
    origin = vector.provenance
    title = " ".join(str(origin[key]) for key in ("method", "data") if origin.get(key)) or "Steering vector"
    return Preview(title, prompts, tuple(levels), tuple(zip(*columns)))


def _continued(
    model: HookedModel,
    vector: SteeringVector,
    prompts: Sequence[str],
    strength: float,
    where: Where | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    other_model: bool,
) -> list[Continuation]:
    def steered(prompt_lengths: Sequence[int]) -> AbstractContextManager[None]:
        if strength == 0.0:
            return unchanged(prompt_lengths)
        lengths = list(prompt_lengths)
        return model.steer(
            vector, strength=strength, where=where, prompt_lengths=lengths, other_model=other_model
        )

    drawn = sample(
        model,
        encode_prompts(model, prompts),
        steered,
        samples=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    measured = divergence(model, drawn, steered)
    found = []
    for i, new in enumerate(drawn.new):
        kl = measured.kl[np.flatnonzero(measured.row == i)][: len(new)]
        found.append(Continuation(tuple(context_texts(model.tokenizer, new)), tuple(kl.tolist())))
    return found


def _kl(found: Continuation) -> str:
    return f" · KL {found.mean_kl:.2g} nats a token" if found.kl else ""


def _shaded(found: Continuation) -> str:
    """The text, each token the darker the larger its KL."""
    if not found.tokens:
        return "<i>nothing: the logits were NaN or infinite</i>"
    return "".join(
        f'<span style="background:rgba(var(--heat),{min(0.8, 0.8 * kl / _STRONG_KL):.2f})" title="KL {kl:.2g} nats">'
        f"{html.escape(token)}</span>"
        if kl >= 0.01
        else html.escape(token)
        for token, kl in zip(found.tokens, found.kl)
    )


_CSS = """
section { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px; border-top: 1px solid var(--line); padding: 8px 0; }
section h3 { grid-column: 1 / -1; font-size: 14px; font-weight: 500; margin: 0; }
section p { margin: 2px 0 6px; line-height: 1.65; white-space: pre-wrap; overflow-wrap: anywhere; }
section span { border-radius: 3px; }
.slider { display: flex; align-items: center; gap: 10px; color: var(--quiet); font-size: 13px; padding: 2px 0 10px; }
.slider input { width: 300px; accent-color: var(--accent); }
.slider output { color: var(--ink); font-weight: 500; min-width: 48px; }
html:not(.live) .slider { display: none; }
.live .steered:not(.shown) { display: none; }
@media (max-width: 560px) { section { grid-template-columns: minmax(0, 1fr); } }
"""

_SCRIPT = """
const slider = document.querySelector("input");
const names = [...document.querySelectorAll("option")].map((option) => option.label);
function show() {
  const name = names[slider.value];
  document.querySelector("output").textContent = name;
  for (const cell of document.querySelectorAll(".steered")) cell.classList.toggle("shown", cell.dataset.name === name);
}
slider.addEventListener("input", show);
document.documentElement.classList.add("live");
show();
"""
