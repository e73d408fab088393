"""Studies as recipes: the steps of a published study with their arguments filled in.

A study is a YAML file: `arguments` (name -> help, default, many), `steps` (title, why, run, and optionally `for`: once
for every value of an argument, `with`: once for every named value, `if` / `unless`: an argument is given or not) and
`limits`, what it does not show. In `run`, {name} stands for an argument, {each} for the value of `for` or `with`, {out}
for the step's own folder, {results} for the study's, {first} for the folder name of the first backbone. A word that is
nothing but an argument with many values becomes many words, and an option left without any value goes. A word with *
becomes the folders of earlier steps that it fits, else the paths; its command runs again when these are others, so say
--overwrite where it has to.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hybridssl import plain_yaml
from hybridssl.errors import UserError

STUDIES = Path(__file__).parent / "studies"
DOORS = ("finetune", "pretrain", "hybridssl")
STEP_KEYS = {"title", "why", "run", "for", "with", "if", "unless"}
Values = dict[str, "str | list[str]"]


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    asks: str
    arguments: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    limits: list[str]


@dataclass(frozen=True)
class Step:
    """One step, filled in. commands: folder -> words; none when it is left out, and `left_out` says why."""

    title: str
    why: str
    commands: dict[Path, list[str]]
    left_out: str = ""


def names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read(name: str) -> Study:
    """A study by its name or the path of a YAML file. UserError for an unknown name, a bad file, or a bad step."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no study '{name}'{hint} There are {', '.join(names())}, or the path of a .yaml file")
    try:
        found = plain_yaml.parse(path.read_text(encoding="utf-8"))
        study = Study(path.stem, *(found[key] for key in ("title", "asks", "arguments", "steps", "limits")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a study ({error}): it needs title, asks, arguments, steps, limits") from error
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """UserError for what no study can be: the file may be a stranger's."""
    arguments = study.arguments if isinstance(study.arguments, dict) else {}
    texts = isinstance(study.limits, list) and all(isinstance(t, str) for t in (study.title, study.asks, *study.limits))
    told = all(isinstance(a, dict) and isinstance(a.get("help"), str) for a in arguments.values())
    if not (texts and told and arguments and isinstance(study.steps, list)):
        raise UserError(
            f"{path} is not a study: title and asks are texts, limits a list of them, steps a list, and every argument "
            "a mapping with its help"
        )
    for step in study.steps:
        if not (isinstance(step, dict) and _is_step(step, arguments)):
            title = str(step.get("title", "?"))[:80] if isinstance(step, dict) else "?"
            raise UserError(
                f"{path}, step '{title}': it needs a title and a run that begins with one of {', '.join(DOORS)}, and "
                f"may have {', '.join(sorted(STEP_KEYS))}; for, if and unless name an argument, and what `with` names "
                "are plain names of folders"
            )


def _is_step(step: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    named = step.get("with", {})
    return (
        set(step) <= STEP_KEYS
        and all(isinstance(step.get(key, ""), str) for key in STEP_KEYS - {"with"})
        and bool(step.get("title"))
        and str(step.get("run")).split()[:1] in [[door] for door in DOORS]
        and all(step[key] in arguments for key in ("for", "if", "unless") if key in step)
        and isinstance(named, dict)
        and all(isinstance(label, str) and re.fullmatch(r"\w[\w .-]*", label) for label in named)
    )


def fill(study: Study, given: Sequence[str]) -> Values:
    """The arguments of a study from key=value words. UserError for an unknown, repeated or missing one."""
    values: Values = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or key not in study.arguments:
            near = difflib.get_close_matches(key, study.arguments, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"'{word}': {study.name} takes key=value with {', '.join(study.arguments)}{hint}")
        many = study.arguments[key].get("many", False)
        values[key] = [v for v in value.split(",") if v] if many else value
    for key, about in study.arguments.items():
        if key not in values:
            if "default" not in about:
                raise UserError(f"{study.name} needs {key}=...: {about['help']}")
            values[key] = about["default"]
        if not values[key] and "default" not in about:
            raise UserError(f"{key}= is empty: {about['help']}")
    return values


def plan(study: Study, values: Values, out: Path) -> list[Step]:
    """Every step with its commands, in order. UserError when a command names what the study does not have."""
    steps: list[Step] = []
    for part in study.steps:
        step = _step(study, part, values, out)
        places = [place for before in steps for place in before.commands]
        commands = {at: [one for w in words for one in _of_steps(w, places)] for at, words in step.commands.items()}
        steps.append(replace(step, commands=commands))
    return steps


def _of_steps(word: str, places: Sequence[Path]) -> list[str]:
    """A word with * for the folders of earlier steps that it fits; not for what an earlier call left beside them."""
    parts = Path(word).parts if "*" in word else ()
    fit = [at for at in places if all(map(fnmatchcase, at.parts, parts)) and len(at.parts) <= len(parts)]
    return [str(Path(at, *parts[len(at.parts) :])) for at in fit] or [word]


def _step(study: Study, step: Mapping[str, Any], values: Values, out: Path) -> Step:
    title, why, folder = step["title"], step.get("why", ""), out / slug(step["title"])
    if "if" in step and not values[step["if"]]:
        return Step(title, why, {}, f"left out: no {step['if']}= was given ({study.arguments[step['if']]['help']})")
    if "unless" in step and values[step["unless"]]:
        return Step(title, why, {})
    backbones = values.get("backbones") or []
    words = {**values, "results": str(out), "first": slug(backbones[0]) if backbones else ""}
    if "for" in step:
        every = {slug(value): value for value in values[step["for"]]}
        if not every:
            return Step(title, why, {}, f"left out: no {step['for']}= was given")
        if len(every) < len(values[step["for"]]):
            raise UserError(f"{step['for']}= names two whose folders would both be called the same: {list(every)}")
    elif "with" in step:
        every = {label: _filled(str(value), words, study.name) for label, value in step["with"].items()}
    else:
        every = {"": ""}
    commands = {}
    for label, value in every.items():
        place = folder / label
        commands[place] = _words(step["run"], {**words, "each": value, "out": str(place)}, study.name)
    return Step(title, why, commands)


def _words(run: str, values: Mapping[str, Any], name: str) -> list[str]:
    words: list[str] = []
    try:
        parts = shlex.split(run)
    except ValueError as error:  # a quote that does not end
        raise UserError(f"study {name}: its command '{run}' cannot be read: {error}") from error
    for word in parts:
        whole = re.fullmatch(r"\{(\w+)(?:\.(first|rest))?\}", word)
        value = values[whole[1]] if whole and whole[1] in values else _filled(word, values, name)
        if whole and whole[2]:
            value = value[:1] if whole[2] == "first" else value[1:]
        words += value if isinstance(value, list) else [value] if value else []
    return [word for word in words if word not in _alone(words) - _alone(parts)]


def _filled(text: str, values: Mapping[str, Any], name: str) -> str:
    """`text` with the values of its {names}: names only, for Python's own formats reach into objects."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"study {name}: '{text}' names '{match[1]}', which is not an argument of it")
        return str(values[match[1]])

    return re.sub(r"\{([^{}]*)\}", value, text)


def _alone(words: Sequence[str]) -> set[str]:
    """The options that no value follows."""
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word for word, after in pairs if word.startswith("--") and after.startswith("--")}


def slug(text: str) -> str:
    """A name for a folder: the last part of a spec or path, in small letters and dashes."""
    last = text.rstrip("/").rsplit("/", 1)[-1]
    prefix = "random-" if text.startswith("random:") and "/" in text else ""
    return prefix + re.sub(r"[^a-z0-9_.]+", "-", last.lower()).strip("-.")
