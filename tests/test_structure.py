"""The shape of the project: which package may import which, files small enough to read, no address of any machine."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shards", "hybridssl", "pretrain", "finetune")
MAY_IMPORT = {
    "shards": set(),
    "hybridssl": set(),
    "pretrain": {"shards", "hybridssl"},
    "finetune": {"shards", "hybridssl"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        strangers = (imports(path) & set(PACKAGES)) - MAY_IMPORT[package] - {package}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_every_file_says_what_it_is_for_and_stays_readable(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        assert text.count("\n") <= 320, f"{path.relative_to(ROOT)} is long: is there one idea in it?"


def modules_of(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, inside functions and for types alone too."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in known else node.module for whole in wholes}
    return found & known


def test_no_module_reaches_itself_through_another() -> None:
    """Circles of imports, also those that an import inside a function hides."""
    files = {path: path.relative_to(ROOT).with_suffix("").parts for p in PACKAGES for path in (ROOT / p).rglob("*.py")}
    names = {path: ".".join(parts[:-1] if parts[-1] == "__init__" else parts) for path, parts in files.items()}
    graph = {name: modules_of(path, set(names.values())) - {name} for path, name in names.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these import one another: " + " <- ".join(error.args[1]))
