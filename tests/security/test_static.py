"""What the code of the packages never does, read from its syntax: unpickle, evaluate text, or start a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "hybridssl", "pretrain", "finetune")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"),
    *("torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.full_load_all", "yaml.unsafe_load_all"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
}
OFF = ("trust_remote_code", "allow_pickle", "shell", "allow_all_kernels")  # arguments that are False or not there
FROM_ELSEWHERE = ("AutoModel", "AutoTokenizer", "AutoConfig", "AutoImageProcessor")  # they run code of a repository


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
            names += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in CALLS]
        yield from (f"line {node.lineno}: imports {name}" for name in names if name in UNPICKLERS | CALLS)  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {fault}" for fault in of_call(node))


def of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in CALLS and not (called == "yaml.load" and is_safe(node)):
        yield f"calls {called}"
    for name in OFF:
        if name in given and not is_false(given[name]):
            yield f"{called} with {name}={ast.unparse(given[name])}"
    loader = called.rpartition(".")[0].rpartition(".")[2]
    if called.endswith(".from_pretrained") and loader in FROM_ELSEWHERE:
        spread = [ast.unparse(value) for name, value in given.items() if name is None]
        if "trust_remote_code" not in given and spread != ["options"]:  # `options` holds it: see foreign.py
            yield f"{called} without trust_remote_code=False"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def is_safe(node: ast.Call) -> bool:
    """yaml.load with the loader of hybridssl/plain_yaml.py, which descends from SafeLoader (a test)."""
    loaders = [ast.unparse(value) for value in node.args[1:]] + [ast.unparse(k.value) for k in node.keywords]
    return bool(loaders) and all(name == "_Plain" for name in loaders)


def test_there_is_something_to_read() -> None:
    assert len(FILES) > 100


# The one place, behind a key that is off: backbone.pickled.
BY_FLAG = "torch.load(path, map_location='cpu', weights_only=True)"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_unpickles_evaluates_or_starts_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "trust.py":
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == BY_FLAG]
        assert len(calls) == 1
        calls[0].func = ast.Name("allowed")
    assert list(faults(tree)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "from torch import load\nfrom os import system",
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "AutoModel.from_pretrained(x)",
        "transformers.AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=ask)",
        "model.from_pretrained(x, allow_all_kernels=True)",
    ],
)
def test_the_reader_sees(line: str) -> None:
    assert list(faults(ast.parse(line)))
