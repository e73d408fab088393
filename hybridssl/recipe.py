"""Recipe machinery: defaults < YAML < key=value into a tree of frozen dataclasses, every mistake named.

Each module owns the dataclass of its own options; the assembly joins them in one root dataclass. This file knows
neither: it only fills, checks, prints and compares.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hybridssl import plain_yaml
from hybridssl.errors import UserError

T = TypeVar("T")


def resolve(cls: type[T], layers: Iterable[Mapping[str, Any]]) -> T:
    """Merge `layers` (later ones win) over the defaults of the dataclass `cls` and validate the result.

    A field whose metadata has `types` (a callable that returns {name: dataclass}) is a table of named parts, each
    with a dataclass of its own; `null` removes a part. Raises UserError for an unknown or ill-typed key, with the
    nearest right one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise UserError(f"the recipe takes keys of its own ({_names(cls)}), not {_short(layer)}")
        _merge(merged, layer)
    return _fill(cls, merged, "", sorted(_known_keys(cls)))


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """["a.b=1", "c=[x, y]"] -> {"a": {"b": 1}, "c": ["x", "y"]}; values are YAML. Raises UserError without a '='."""
    tree: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.lstrip("-")
        if not equals or not key:
            raise UserError(f"'{argument}' is not key=value; write for example steps=1000 or views.local_count=4")
        try:
            value: Any = plain_yaml.parse(text) if text else ""
        except ValueError as error:
            shown = text if len(text) < 80 else f"{text[:77]}..."
            raise UserError(f"the value of {key} cannot be read, {shown!r}: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(tree, value)
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError that names the file and, for a syntax error, the place."""
    try:
        tree = plain_yaml.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except ValueError as error:  # that of plain_yaml, or a text that is not UTF-8
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of recipe keys, not a {type(tree).__name__}")
    return tree


def to_dict(options: Any) -> Any:
    """Plain dicts, lists and scalars, ready for YAML or JSON.

    A field whose metadata has `recorded` (a function of the value) is written so: without passwords, say.
    """
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        kept = {f.name: f.metadata.get("recorded", lambda value: value) for f in dataclasses.fields(options)}
        return {name: to_dict(recorded(getattr(options, name))) for name, recorded in kept.items()}
    if isinstance(options, Mapping):
        return {str(key): to_dict(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [to_dict(value) for value in options]
    return options


def to_yaml(options: Any) -> str:
    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Lines `key: old -> new` for each dotted key that differs, apart from `ignore` (keys or whole sections)."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    skip = tuple(ignore)
    absent = object()
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
        and not any(key == name or key.startswith(name + ".") for name in skip)
    ]


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _copy(value)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _fill(cls: type[T], values: Any, path: str, known: list[str]) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the recipe'} takes keys of its own ({_names(cls)}), not {_short(values)}")
    hints, filled = get_type_hints(cls), {}
    names = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise UserError(f"unknown recipe key '{where}'{_nearest(where, known)}")
        hint, types = hints[key], names[key].metadata.get("types")
        if types is not None:
            filled[key] = _fill_parts(types, value, where, known)
        elif dataclasses.is_dataclass(hint):
            filled[key] = _fill(hint, {} if value is None else value, where, known)  # type: ignore[type-var]
        else:
            filled[key] = _convert(hint, value, where)
    try:
        return cls(**filled)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe{' section ' + path if path else ''}: {error}") from error


def _fill_parts(types: Callable[[], Mapping[str, type]], value: Any, path: str, known: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a mapping of {', '.join(types())}, not {_short(value)}")
    available, parts = types(), {}
    for name, options in value.items():
        if name not in available:
            raise UserError(f"unknown recipe key '{path}.{name}'{_nearest(f'{path}.{name}', known)}")
        if options is not None:
            parts[name] = _fill(available[name], options, f"{path}.{name}", known)
    return parts


def _convert(hint: Any, value: Any, path: str) -> Any:
    # A boolean is an int in Python and "yes" a truth to pydantic; in a recipe both are slips of the pen.
    if isinstance(value, bool) != (hint is bool) and hint in (bool, int, float, str):
        raise UserError(f"{path} must be {_type_name(hint)}, not {_short(value)}")
    if value is False and "no" in get_args(hint):  # precision=no is a word, whatever YAML thinks
        value = "no"
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise UserError(f"{path} must be {_type_name(hint)}, not {_short(value)} ({reason})") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _type_name(hint: Any) -> str:
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return simple.get(hint, str(hint).replace("typing.", ""))


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]


def _nearest(path: str, known: list[str]) -> str:
    last = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(path, known, 1, 0.75)
    # `learning_rate` is far from `optim.lr` as a path, but a right last name in the wrong section is common.
    close = close or [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
    close = close or difflib.get_close_matches(path, known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _known_keys(cls: type, path: str = "") -> Iterable[str]:
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        where = f"{path}.{f.name}" if path else f.name
        yield where
        if "types" in f.metadata:
            for name, part in f.metadata["types"]().items():
                yield f"{where}.{name}"
                yield from _known_keys(part, f"{where}.{name}")
        elif dataclasses.is_dataclass(hints[f.name]):
            yield from _known_keys(hints[f.name], where)  # type: ignore[arg-type]


def _flatten(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, where)
        else:
            yield where, value
