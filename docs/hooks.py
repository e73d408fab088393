"""What `make docs` makes out of the code: the recipe keys, the list of recipes, and equations as MathML.

mkdocs calls the functions `on_...`. A page asks for a part with a comment, such as `<!-- recipe keys -->`, so nothing
of it is written twice, and nothing can go stale. No page loads anything from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe

from hybridssl.recipe import read_yaml
from pretrain import recipe as recipes
from pretrain.keys import field_comments, sections


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
    for path, about, keys in sections():
        out += [f"## `{path}`" if path else "## The run", "", *([about, ""] if about else [])]
        for key in keys:
            out += [f"`{key.path}`", f":   {key.type}, default `{key.shown}`<br>", f"    {key.help}", ""]
    return "\n".join(out)


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
