"""Settings: precedence, types, and errors that name the way out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from steerkit.cli.settings import build, merge
from steerkit.errors import InputError


@dataclass(frozen=True)
class Inner:
    lr: float | None = None
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: bool = True
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    model: str
    tokens: int = 10
    out: Path = Path("x")
    inner: Inner = field(default_factory=Inner)
    arch: dict = field(default_factory=dict)


def test_defaults_then_file_then_set_then_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("kind: train sae\nmodel: file\ntokens: 1\ninner: {lr: 1.0}\n")
    values = merge(
        file, ["tokens=2", "inner.lr=2e-3", "inner.betas=[0, 0.99]"], {"tokens": 3, "inner.clip": None}
    )
    assert build(Outer, values) == Outer("file", 3, inner=Inner(lr=2e-3, betas=(0.0, 0.99)))
    assert build(Outer, merge(file, ["tokens=2"], {})).tokens == 2
    assert build(Outer, merge(file, [], {})).tokens == 1
    assert build(Outer, {"model": "m"}) == Outer("m")


def test_numbers_as_people_write_them():
    values = merge(None, ["model=m", "tokens=2_000_000", "inner.lr=1e-3"], {})
    assert build(Outer, values) == Outer("m", 2_000_000, inner=Inner(lr=0.001))
    assert build(Outer, merge(None, ["model=m", "tokens=1e6"], {})).tokens == 1_000_000
    assert build(Outer, merge(None, ["model=m", "inner.lr=null"], {})).inner.lr is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.lrr=1", r"Unknown setting 'inner\.lrr'.*Did you mean 'lr'"),
        ("tokns=1", r"Unknown setting 'tokns'.*Did you mean 'tokens'"),
        ("tokens=many", "tokens is 'many'; it must be a whole number"),
        ("tokens=1.5", "whole number"),
        ("inner.clip=3", "true or false"),
        ("inner.kind=c", "it is one of a, b"),
        ("inner=3", "group of settings"),
        ("tokens", "not of the form name=value"),
        ("model.x=1", "single value"),
    ],
)
def test_a_bad_setting_is_one_clear_line(assignment, message):
    with pytest.raises(InputError, match=message):
        build(Outer, merge(None, ["model=m", assignment], {}))


def test_a_missing_value_names_its_flag():
    with pytest.raises(InputError, match="--model is needed"):
        build(Outer, {})


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        merge(tmp_path / "none.yaml", [], {})
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(InputError, match="no YAML"):
        merge(tmp_path / "bad.yaml", [], {})
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="must hold settings"):
        merge(tmp_path / "list.yaml", [], {})
