"""Where and when to steer: which tokens, and how strongly at each step.

    Where.everywhere()                        every token but BOS and pads (the default)
    Where.prompt_only();  Where.generation_only()
    Where.positions(0, 3, -1)                 tokens of the text; negative ones count from the prompt's end
    Where.spans((0, 7), (-7, None), generation=False)      ReFT's f7+l7
    Where.after("[/INST]")                    all that follows the last such marker of the prompt
    replace(Where.everywhere(), schedule=Decay(half_life=10))

Positions are the row's own: pads are not counted, BOS is. A generated token keeps its position whether it is fed alone, with a
cache of what came before, or with the whole text again; so the same tokens are steered either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.errors import InputError

Span = tuple[int | None, int | None]


@dataclass
class Tokens:
    """The tokens of one forward: (batch, pos) each, (batch, 1) while single tokens are generated."""

    position: Int[Tensor, "batch pos"]
    """Place in the row, pads not counted, from 0."""
    real: Bool[Tensor, "batch pos"]
    """No pad."""
    bos: Bool[Tensor, "batch pos"]
    prompt_length: Int[Tensor, "batch 1"]
    after: Int[Tensor, "batch 1"] | None = None
    """Position of the first token after the marker."""
    uniform_step: int | None = None
    """The step of generation, where all rows are at the same and nothing else is in the forward."""

    @property
    def step(self) -> Int[Tensor, "batch pos"]:
        """0 for the prompt's tokens, then 1, 2, … for generated ones."""
        return (self.position - self.prompt_length + 1).clamp_(min=0)


@dataclass(frozen=True)
class Constant:
    """The same strength at every step."""

    name: ClassVar[str] = "constant"

    def factor(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Decay:
    """Strength that halves every `half_life` generated tokens."""

    half_life: float
    name: ClassVar[str] = "decay"

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise InputError(f"half_life is {self.half_life}; it must be positive.")

    def factor(self, step: int) -> float:
        return 0.5 ** (step / self.half_life)


@dataclass(frozen=True)
class Window:
    """Full strength from step `start` until before `stop` (None: to the end); step 0 is the prompt, 1 the first generated token."""

    start: int = 0
    stop: int | None = None
    name: ClassVar[str] = "window"

    def factor(self, step: int) -> float:
        return float(self.start <= step and (self.stop is None or step < self.stop))


@dataclass(frozen=True)
class Custom:
    """Any function of the step. It cannot be saved."""

    function: Callable[[int], float]
    name: ClassVar[str] = "custom"

    def factor(self, step: int) -> float:
        return float(self.function(step))


Schedule = Constant | Decay | Window | Custom
SCHEDULES: dict[str, type[Any]] = {kind.name: kind for kind in (Constant, Decay, Window)}


@dataclass(frozen=True)
class Where:
    """Which tokens an intervention acts on, and the factor of its strength at each step."""

    prompt: bool = True
    """Whether the prompt's tokens are steered."""
    generation: bool = True
    """Whether generated tokens are, once they are fed back."""
    ranges: tuple[Span, ...] = ()
    """Half-open ranges of positions, any of them; negative numbers, and 0 as a stop, count from the prompt's end. Empty: all."""
    marker: str | tuple[int, ...] | None = None
    """Text, or its token ids: only what follows its last occurrence in the prompt is steered."""
    bos: bool = False
    """Whether a BOS (or CLS) token at the beginning is steered too. It is an attention sink: steering it does harm."""
    schedule: Schedule = Constant()

    @classmethod
    def everywhere(cls) -> Where:
        return cls()

    @classmethod
    def prompt_only(cls) -> Where:
        return cls(generation=False)

    @classmethod
    def generation_only(cls) -> Where:
        return cls(prompt=False)

    @classmethod
    def positions(cls, *positions: int) -> Where:
        """Single tokens; -1 is the prompt's last."""
        if not positions:
            raise InputError("Give at least one position.")
        return cls(ranges=tuple((p, p + 1) for p in positions), bos=True)

    @classmethod
    def spans(cls, *ranges: Span, generation: bool = True) -> Where:
        """Half-open ranges of positions."""
        if not ranges:
            raise InputError("Give at least one range, such as (0, 7).")
        return cls(ranges=tuple((start, stop) for start, stop in ranges), generation=generation, bos=True)

    @classmethod
    def after(cls, marker: str | Sequence[int]) -> Where:
        """What follows the last `marker` of the prompt, such as the end of the user's turn."""
        return cls(marker=marker if isinstance(marker, str) else tuple(marker))

    @classmethod
    def every_token(cls) -> Where:
        """BOS too: where weights act, and other tools."""
        return cls(bos=True)

    def __post_init__(self) -> None:
        if not (self.prompt or self.generation):
            raise InputError("Neither prompt nor generation is steered: nothing is left to do.")
        if self.marker is not None and not self.marker:
            raise InputError("The marker is empty.")

    def weights(self, tokens: Tokens) -> float | Float[Tensor, "batch pos"]:
        """The factor of the strength at each token; one number where it is the same for all."""
        step = tokens.uniform_step
        if step is not None and not self.ranges and (self.marker is None or tokens.after is not None):
            return self.schedule.factor(step) if self.generation else 0.0
        position, length = tokens.position, tokens.prompt_length
        on = tokens.real.clone()
        if not self.bos:
            on &= ~tokens.bos
        if not (self.prompt and self.generation):
            generated = position >= length
            on &= generated if self.generation else ~generated
        if self.ranges:
            inside = torch.zeros_like(on)
            for start, stop in self.ranges:
                within = torch.ones_like(on)
                if start is not None:
                    within &= position >= (start if start >= 0 else length + start)
                if stop is not None:
                    within &= position < (stop if stop > 0 else length + stop)
                inside |= within
            on &= inside
        if self.marker is not None and tokens.after is not None:
            on &= position >= tokens.after
        if isinstance(self.schedule, Constant):
            return on.float()
        steps, factors = tokens.step, torch.zeros_like(on, dtype=torch.float32)
        for step in steps.unique().tolist():
            factors.masked_fill_(on & (steps == step), self.schedule.factor(step))
        return factors

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Raises InputError for a schedule that is a function."""
        if isinstance(self.schedule, Custom):
            raise InputError("A schedule that is a function cannot be saved: use Constant, Decay or Window.")
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**found, "schedule": {"name": self.schedule.name, **asdict(self.schedule)}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Where:
        schedule = dict(found["schedule"])
        marker = found["marker"]
        return cls(
            prompt=found["prompt"],
            generation=found["generation"],
            ranges=tuple((start, stop) for start, stop in found["ranges"]),
            marker=tuple(marker) if isinstance(marker, list) else marker,
            bos=found["bos"],
            schedule=SCHEDULES[schedule.pop("name")](**schedule),
        )
