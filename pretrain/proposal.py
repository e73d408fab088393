"""What the doctor says: recipe keys, each with its reason; as a tree, and as a file with the reasons in comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pretrain.draft import ABSENT, Draft, lookup
from shards.address import told


@dataclass(frozen=True)
class Choice:
    """One decision: the dotted recipe keys that it sets, and why."""

    what: str
    keys: dict[str, Any]
    reason: str
    shown: str = ""  # how a table puts it; else the values

    def __str__(self) -> str:
        return self.shown or ", ".join(_inline(value) for value in self.keys.values())


@dataclass
class Proposal:
    """Everything that was decided, in order. `fixed` is what the user has said already: a tree of recipe keys."""

    draft: Draft
    fixed: Mapping[str, Any]
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def choose(self, what: str, reason: str, shown: str = "", **keys: Any) -> None:
        """Set `keys` (two underscores may stand for a dot), except where the user has said otherwise."""
        taken, said = {}, []
        for key, value in ((key.replace("__", "."), value) for key, value in keys.items()):
            given = lookup(self.fixed, key)
            if given is None:  # that part of the recipe is switched off
                continue
            if given is not ABSENT:
                said.append(key)
                value = {**value, **given} if isinstance(value, dict) else given
            taken[key] = value
        if said:
            shown, reason = "", f"{', '.join(said)} as you say; {reason}"
        if taken:
            self.choices.append(Choice(what, taken, reason, shown))

    def say(self, what: str, reason: str, shown: object) -> None:
        """A line without a key."""
        self.choices.append(Choice(what, {}, reason, str(shown)))

    def __getitem__(self, key: str) -> Any:
        """The value of a dotted key. KeyError when nothing was decided about it."""
        for choice in self.choices:
            if key in choice.keys:
                return choice.keys[key]
        raise KeyError(key)

    def __contains__(self, key: str) -> bool:
        return any(key in choice.keys for choice in self.choices)

    def tree(self) -> dict[str, Any]:
        """Nested, as a recipe's layer; with what the user has said."""
        root: dict[str, Any] = {}
        for choice in self.choices:
            for key, value in choice.keys.items():
                *path, last = key.split(".")
                at = root
                for part in path:
                    at = at.setdefault(part, {})
                at[last] = value
        _add(root, self.fixed)
        return root

    def yaml(self) -> str:
        """The recipe's keys; each decision stands with its reason above the first key that it sets."""
        reasons = {next(iter(c.keys)): f"{c.what}, {c}: {c.reason}" for c in self.choices if c.keys}
        return "\n".join(_lines(self.tree(), reasons)) + "\n"


def _add(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Keys of `more` that `tree` does not have."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _add(tree[key], value)
        else:
            tree.setdefault(key, value)


def _lines(tree: Mapping[str, Any], reasons: Mapping[str, str], path: str = "") -> Iterator[str]:
    indent = "  " * path.count(".")
    for name, value in tree.items():
        key = f"{path}{name}"
        if key in reasons:
            yield from (f"{indent}# {line}" for line in _wrapped(reasons[key], 112 - len(indent)))
        # A mapping that is itself a value (arguments of a backbone) stays on its line. So does an empty one: a name
        # with nothing below it is null, which would remove the part.
        if isinstance(value, dict) and value and key not in reasons and not key.endswith(".args"):
            yield f"{indent}{name}:"
            yield from _lines(value, reasons, f"{key}.")
        else:
            yield f"{indent}{name}: {_inline(value)}"


def _inline(value: Any) -> str:
    value = [told(v) if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value
    value = told(value) if isinstance(value, str) else value  # a password in an address does not belong into a file
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
