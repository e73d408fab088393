"""What each key of a recipe means, with its type and default: read from the fields of the options and their comments.

So nothing is written twice. `python -m pretrain --help views` prints a part of it, and docs/keys.md has all.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hybridssl.errors import UserError
from hybridssl.recipe import to_dict
from pretrain.recipe import Recipe

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the recipe."""

    path: str  # views.global_size
    type: str
    default: Any
    help: str  # the comment beside the field

    @property
    def shown(self) -> str:
        """Its default, as YAML."""
        text = yaml.safe_dump(self.default, default_flow_style=True, width=1000, allow_unicode=True).strip()
        return '""' if self.default == "" else text.removesuffix("...").strip()


def told(asked: str) -> str:
    """What `--help ASKED` says: of a key, of a section with all inside it, or of all (`keys`). Raises UserError."""
    out = []
    for path, about, keys in sections():
        inside = asked == "keys" or path == asked or path.startswith(f"{asked}.")
        found = [key for key in keys if inside or key.path == asked]
        if found:
            out += ["", path or "the run", *_wrapped(about)] if inside else [""]
            out += [line for key in found for line in _lines(key)]
    if not out:
        known = [*all_keys(), *(path for path, _, _ in sections() if path)]
        near = difflib.get_close_matches(asked, known, n=1)
        raise UserError(
            f"there is no recipe key {asked}" + (f"; did you mean {near[0]}?" if near else "") + " All: --help keys"
        )
    return "\n".join(out[1:])


def _lines(key: Key) -> list[str]:
    return [f"  {key.path}={key.shown}   {key.type}".replace("`", ""), *_wrapped(key.help, "      ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def sections(cls: type = Recipe, path: str = "") -> Iterator[tuple[str, str, list[Key]]]:
    """(path, what the class says of itself, its own keys) of a dataclass of options and of those inside it."""
    hints, notes, own, inner = get_type_hints(cls), comments(cls), [], []
    for field in dataclasses.fields(cls):
        where = f"{path}.{field.name}" if path else field.name
        if "types" in field.metadata:
            inner += [(f"{where}.{name}", part) for name, part in field.metadata["types"]().items()]
        elif dataclasses.is_dataclass(hints[field.name]):
            inner.append((where, hints[field.name]))
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            own.append(Key(where, _words(hints[field.name]), to_dict(default), notes[field.name]))
    about = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else inspect.cleandoc(cls.__doc__ or "")
    yield path, about.split("\n\n")[0], own
    for where, part in inner:
        yield from sections(part, where)


def all_keys() -> dict[str, Key]:
    return {key.path: key for _, _, found in sections() for key in found}


def comments(cls: type) -> dict[str, str]:
    """{field: its comment} of a dataclass and of those that it builds on."""
    found: dict[str, str] = {}
    for base in [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]:
        own = field_comments(inspect.getsource(base))
        found |= {name: text or found.get(name, "") for name, text in own.items()}
    return found


def field_comments(source: str) -> dict[str, str]:
    """{field: its comment} of a class: beside the field and going on below it, or above one that has none beside it."""
    source = textwrap.dedent(source)
    lines, said = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.lstrip("# ")
    alone = {number for number in said if lines[number - 1].lstrip().startswith("#")}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]  # type: ignore
    above = [said[number] for number in sorted(alone) if fields and number < fields[0].lineno]  # the next field
    found = {}
    for node, after in zip(fields, (*fields[1:], None)[: len(fields)], strict=True):
        rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        until = after.lineno if after else next(n for n in range(rows[-1] + 1, len(lines) + 2) if n not in alone)
        below = [said[number] for number in range(rows[-1] + 1, until) if number in alone]
        beside = [said[number] for number in rows if number in said] or above
        ahead = after is not None and not any(n in said for n in range(after.lineno, (after.end_lineno or 0) + 1))
        found[ast.unparse(node.target)] = " ".join(beside if ahead else beside + below)
        above = below if ahead else []
    return found


def _words(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    inside = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_words, inside))
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is tuple:
        return f"list of {_words(inside[0])}" if inside[-1] is ... else f"[{', '.join(map(_words, inside))}]"
    return WORDS[hint]
