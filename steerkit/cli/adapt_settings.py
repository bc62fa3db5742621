"""Settings of `steerkit adapt`: apart, because what they are checked against imports peft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from steerkit.adapters.bench import BenchConfig
from steerkit.finetuning import FinetuneConfig


@dataclass(frozen=True)
class TrainSettings:
    """Every setting of `adapt train`."""

    model: str = "storyworld"
    data: str = "storyworld"
    method: str = "lora"
    settings: dict[str, Any] = field(default_factory=dict)
    """The method's own."""
    modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    text_column: str | None = None
    label_column: str = "label"
    groups: str | None = None
    ood: str | None = None
    unrelated: str | None = None
    n_train: int = 4000
    n_test: int = 500
    device: str | None = None
    dtype: str | None = None
    training: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class BenchSettings:
    """Every setting of `adapt bench`."""

    model: str = "storyworld"
    data: str = "storyworld"
    text_column: str | None = None
    label_column: str = "label"
    groups: str | None = None
    ood: str | None = None
    unrelated: str | None = None
    n_train: int = 2000
    n_test: int = 300
    device: str | None = None
    bench: BenchConfig = field(default_factory=BenchConfig)
