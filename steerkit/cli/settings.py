"""Settings of a command: defaults < `--config` file < `--set a.b=c` < flags, checked against frozen dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from steerkit.errors import InputError, did_you_mean

T = TypeVar("T")


def merge(config: Path | None, assignments: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dictionary that a settings file, `a.b=c` assignments and dotted flags (None = not given) make together.

    Raises InputError for a file that is missing or no mapping, and for an assignment without `=`.
    """
    import yaml

    values: dict[str, Any] = {}
    if config is not None:
        try:
            loaded = yaml.safe_load(Path(config).read_text())
        except OSError as error:
            raise InputError(f"--config {config} cannot be read: {error.strerror}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"--config {config} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(loaded, dict):
            raise InputError(f"--config {config} must hold settings, one `name: value` a line.")
        loaded.pop("kind", None)
        values = loaded
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {assignment!r} is not of the form name=value.")
        try:
            _assign(values, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError:
            raise InputError(f"--set {assignment!r}: the value is no YAML scalar or list.") from None
    for key, value in flags.items():
        if value is not None:
            _assign(values, key, value)
    return values


def build(schema: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `schema` from nested `values`, each checked against its field's type.

    Raises InputError for an unknown key (with the nearest known one), a wrong type, or a missing value.
    """
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise InputError(f"Unknown setting {where + key!r}.{did_you_mean(key, fields)} Known: {known}.")
    arguments = {key: _convert(value, hints[key], where + key) for key, value in values.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise InputError(f"{_flag(where + name)} is needed.")
    return schema(**arguments)


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {dotted}: {parent!r} is a single value and has nothing inside.")
        values = inner
    values[last] = value


def _flag(dotted: str) -> str:
    return "--" + dotted.split(".")[-1].replace("_", "-")


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(value, option, where)
            except InputError as error:
                problem = error
        raise problem
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        raise InputError(
            f"{where} is {value!r}; it is one of {', '.join(map(str, allowed))}."
            + did_you_mean(str(value), map(str, allowed))
        )
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is a group of settings; set {where}.NAME=VALUE.")
        return build(hint, value, where + ".")
    if origin in (tuple, list) or hint in (tuple, list):
        inner = (typing.get_args(hint) or (Any,))[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        converted = [_convert(item, inner, where) for item in items]
        return tuple(converted) if (origin or hint) is tuple else converted
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is a group of settings; set {where}.NAME=VALUE.")
        return dict(value)
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    refusal = InputError(f"{where} is {value!r}; it must be {_TYPE_NAMES.get(hint, str(hint))}.")
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise refusal
    if hint in (int, float):
        if isinstance(value, bool) or value is None:
            raise refusal
        try:
            number = float(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            raise refusal from None
        if hint is int:
            if number != int(number):
                raise refusal
            return value if isinstance(value, int) else int(number)
        return number
    if hint is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise refusal
    if hint is Path:
        return Path(str(value))
    return value


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
