"""What `make docs` makes out of the code: the recipe keys, the list of recipes, and equations as MathML.

mkdocs calls the functions `on_...`. A page asks for a part with a comment, such as `<!-- recipe keys -->`, so nothing
of it is written twice, and nothing can go stale. No page loads anything from elsewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe
import yaml

from hybridssl.recipe import read_yaml, to_dict
from pretrain import recipe as recipes

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the recipe."""

    path: str  # views.global_size
    type: str
    default: Any
    help: str  # the comment beside the field


def on_config(config: Any) -> Any:
    fence = {"name": "math", "class": "math", "format": equation}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, make in (("<!-- recipe keys -->", key_lists), ("<!-- recipes -->", recipe_list)):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def equation(source: str, *_: Any, **__: Any) -> str:
    """TeX -> MathML, which browsers draw by themselves; several lines are several equations."""
    from latex2mathml.converter import convert

    lines = [line for line in source.splitlines() if line.strip()]
    return '<div class="math">' + "".join(convert(line, display="block") for line in lines) + "</div>"


def key_lists() -> str:
    """A heading for each section of the recipe, and its keys below it."""
    out = []
    for path, about, keys in sections(recipes.Recipe):
        out += [f"## `{path}`" if path else "## The run", "", *([about, ""] if about else [])]
        for key in keys:
            out += [f"`{key.path}`", f":   {key.type}, default `{_yaml(key.default)}`<br>", f"    {key.help}", ""]
    return "\n".join(out)


def sections(cls: type, path: str = "") -> Iterator[tuple[str, str, list[Key]]]:
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
    return {key.path: key for _, _, found in sections(recipes.Recipe) for key in found}


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


class FieldComments(griffe.Extension):
    """For the reference: a class names its fields with their types and comments, which say the shapes.

    Options are left to the page of the recipe keys.
    """

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.name.endswith("Options"):
            return
        fields = [(cls.members[name], text) for name, text in field_comments(cls.source).items() if text]
        said = [f"- `{field.name}: {field.annotation}`: {text}" for field, text in fields]  # type: ignore
        if said:
            about = cls.docstring.value if cls.docstring else ""
            cls.docstring = griffe.Docstring("\n".join([about, "", *said]), parent=cls)


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


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).strip()
    return '""' if value == "" else text.removesuffix("...").strip()


def recipe_list() -> str:
    """Each bundled recipe with the head of its file, and the keys that it sets."""
    out = []
    for name in recipes.names():
        path = recipes.find(name)
        head = [line[1:].strip() for line in _head(path.read_text(encoding="utf-8"))]
        out += [f"## `{name}`", "", head[0], "", '<dl class="facts">']
        for label, text in _facts(head[1:]):
            shown = f"<code>{_escape(text)}</code>" if label == "command" else _escape(text)
            out.append(f"<dt>{label}</dt><dd>{shown}</dd>")
        parts = ", ".join(f"`{part}`" for part in read_yaml(path)["objectives"])
        out += ["</dl>", "", f"Objectives: {parts}.", ""]
    return "\n".join(out)


def _head(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def _facts(lines: list[str]) -> list[tuple[str, str]]:
    """`data   10 images` and the lines that go on below it."""
    found: list[tuple[str, str]] = []
    for line in lines:
        word, _, rest = line.partition("  ")
        if rest and word.isalpha() and word.islower():
            found.append((word, rest.strip()))
        elif line and found:
            found[-1] = found[-1][0], f"{found[-1][1]} {line}"
    return found


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
