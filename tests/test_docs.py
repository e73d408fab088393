"""README and the pages of docs/, held to the code: commands parse, keys and links exist, examples run.

Figures are those that were measured. docs/log.md is a diary of what was true on its day, and is left out.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import struct
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser

import finetune.__main__ as finetune_door
import hybridssl.__main__ as hybridssl_door
import shards.__main__ as shards_door
from hybridssl import objectives
from hybridssl.recipe import parse_overrides, read_yaml, resolve
from pretrain import cost, doctor, keys, loop
from pretrain import recipe as recipes
from shards import demo, readers
from shards.build import build
from shards.format import decode
from shards.options import BuildOptions
from tests import figures

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "log.md"}
ALL = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **PAGES}
PACKAGES = ("shards", "hybridssl", "pretrain", "finetune")
ADDED = {f"objectives.byol.{key}": value for key, value in {"weight": 1, "hidden": 1, "start": 0, "ramp": 1}.items()}
# by add-a-loss.md


@pytest.fixture(scope="module")
def hooks() -> Iterator[ModuleType]:
    """docs/hooks.py, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_hooks"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["docs_hooks"]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of an indented or fenced block, and every `...` in a sentence, that is one."""
    found = []
    for page, text in ALL.items():
        lines = re.findall(r"^ *(?:exec )?((?:python -m|accelerate launch) [^\n]*)", text.replace("\\\n", " "), re.M)
        inline = re.findall(r"`((?:python -m|accelerate launch) [^`]+)`", re.sub(r"\n\s*", " ", text))
        found += [(page, line.strip().rstrip("'")) for line in [*lines, *inline]]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_one_that_its_door_understands(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.training_script == "pretrain"
        return recipe_of(args.training_script_args)
    module, rest = words[2], words[3:]
    doors = {"shards": shards_door, "hybridssl": hybridssl_door, "finetune": finetune_door}
    if module in doors and (len(rest) < 2 or "--help" in rest):
        help_of(doors[module], [*(word for word in rest if word.isalpha() and word.islower()), "--help"])
    elif module == "pretrain":
        recipe_of(rest)
    elif module == "shards":
        shards_door._parser().parse_args(rest)
    elif module == "hybridssl":
        doctor._parser().parse_args(rest[1:]) if rest[0] == "doctor" else hybridssl_door.parser().parse_args(rest)
    elif module == "finetune":
        if rest[0] != "centroid":  # which add-an-evaluation.md adds: below
            finetune_door.parser(rest[0]).parse_args(rest)
    elif module.startswith("benchmarks."):
        with pytest.raises(Understood):
            understand(module, rest)
    elif module == "pytest":
        assert all((ROOT / path).is_file() for path in rest)
    else:
        assert module in ("pip", "http.server"), f"{page}: {command}"


class Understood(Exception):
    pass


def understand(module: str, arguments: list[str]) -> None:
    """Raises Understood once the benchmark's own parser has taken the arguments; SystemExit where it refuses them."""
    parse = ArgumentParser.parse_args

    def parse_and_stop(parser: ArgumentParser) -> None:
        parse(parser, arguments)
        raise Understood

    with mock.patch.object(ArgumentParser, "parse_args", parse_and_stop):
        importlib.import_module(module).main()


def recipe_of(arguments: list[str]) -> None:
    """The keys exist and have values that they can have; a bundled recipe that is named exists."""
    if arguments in ([], ["--help"]):  # the door's name alone
        return
    if arguments[0] == "--help":
        assert keys.told(arguments[1])
        return
    given = parse_overrides(arguments)
    name = str(given.pop("recipe", "auto"))
    given.get("objectives", {}).pop("byol", None)
    layer = read_yaml(recipes.find(name)) if name != "auto" and not name.endswith(".yaml") else {}
    recipe = resolve(recipes.Recipe, [layer, given])
    assert recipe.data.sets
    assert recipe.out.startswith("runs/")


def help_of(door: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        door.main(words)
    assert ended.value.code == 0


def test_there_are_commands_to_test() -> None:
    assert len(commands()) > 80


@pytest.mark.parametrize("page", ALL)
def test_every_recipe_key_that_a_page_names_exists(page: str) -> None:
    known = {*keys.all_keys(), *ADDED}
    parts = {path for path, _, _ in keys.sections()} - {""}
    heads = {path.split(".")[0] for path in parts}
    for code in re.findall(r"`([^`\n]+)`", ALL[page]):
        for word in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?![\w/(])", code):
            if word.split(".")[0] in heads and not word.endswith((".py", ".yaml", ".html", ".jsonl")):
                assert word in known | parts, f"{page}: there is no recipe key {word}"


def test_every_key_says_what_it_is(hooks: ModuleType) -> None:
    known = keys.all_keys()
    assert len(known) > 100
    assert {path for path, key in known.items() if not key.help} == set()
    assert known["optim.lr"].default == 1e-3
    page = hooks.on_page_markdown(PAGES["keys.md"])
    for path in ("steps", "views.mask_shape", "objectives.labels.pseudo_above"):
        assert f"\n`{path}`\n:   " in page
    assert "\n`views.mask_shape`\n:   `block`, `random`, `inverse_block`, default `block`" in page


def test_no_key_is_without_a_reader() -> None:
    """A key that no line of the packages reads by its name is a promise that nobody keeps."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for folder in PACKAGES for p in (ROOT / folder).rglob("*.py")]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [path for path in keys.all_keys() if path.rpartition(".")[2] not in read] == []


def test_a_comment_belongs_to_its_field() -> None:
    source = """\
    class Options:
        # above the first
        first: int = 0
        second: int = 0  # beside, and
        # going on
        third: int = 0  # beside
        # above the last
        last: int = 0

        # of a method
        def method(self): ...
    """
    assert keys.field_comments(source) == {
        "first": "above the first",
        "second": "beside, and going on",
        "third": "beside",
        "last": "above the last",
    }


def test_every_recipe_is_on_its_page_with_the_facts_of_its_file(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown(PAGES["recipes.md"])
    for name in recipes.names():
        section = page.split(f"## `{name}`\n")[1].split("\n## ")[0]
        for fact in ("data", "hardware", "duration", "result", "command"):
            assert f"<dt>{fact}</dt>" in section, (name, fact)
        assert f"`{name}`" in PAGES["recipes.md"], f"{name} is not in the table of what is for whom"
        found = re.findall(r"(?<!\w)\.\d{3}\b", section.split("<dt>result</dt>")[1].split("</dd>")[0])
        results = ROOT / "benchmarks" / "results" / f"{name}.json"
        if found and results.is_file():  # else the recipe quotes its paper
            metrics = json.loads(results.read_text(encoding="utf-8"))["metrics"]
            measured = {f"{m['balanced_accuracy']['value']:.3f}"[1:] for m in metrics.values()}
            assert set(found) <= measured, f"{name} promises what {results.name} does not hold"
    took = round(figures.read("demo")["last step"]["seconds"] / 60)
    assert f"<dt>duration</dt><dd>{took} minutes" in page.split("## `demo`\n")[1]


def test_every_verb_and_objective_has_its_place() -> None:
    for verb in finetune_door.VERBS:
        assert f"**`{verb}`: " in PAGES["evaluation.md"] or f"**`{verb}`:" in PAGES["evaluation.md"], verb
        assert f"    python -m finetune {verb} " in PAGES["evaluation.md"], verb
    for name in objectives.options_types():
        assert re.search(rf"^(## .*|\| )`{name}`", PAGES["method.md"], re.M), name


def lead_somewhere(page: str, folder: Path, target: str, heading: str) -> None:
    if target.startswith("https://arxiv.org/abs/"):
        return
    assert (folder / target).is_file(), (page, target)
    if heading:
        headings = re.findall(r"^#+ (.*)$", (folder / target).read_text(encoding="utf-8"), re.M)
        assert heading in {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}, (
            page,
            heading,
        )


def test_links_lead_somewhere() -> None:
    for target, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", ALL["README.md"]):
        lead_somewhere("README.md", ROOT, target, heading)
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
            lead_somewhere(page, ROOT / "docs", target, heading)
    nav = re.findall(r": ([a-z-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(nav) == sorted([*PAGES, "log.md"])


def test_figures_were_measured() -> None:
    known: set[str] = set()

    def collect(part: object) -> None:
        if isinstance(part, dict):
            if part.keys() >= {"value", "low", "high"} and isinstance(part["value"], float):
                known.update(figures.interval(part, sign) for sign in ("", "+"))
                known.add(figures.interval(figures.turned(part), "+"))
            part = list(part.values())
        if isinstance(part, list):
            for one in part:
                collect(one)

    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        collect(json.loads(path.read_text(encoding="utf-8")))
    written = re.findall(r"[+-]?\d\.\d{3} \[[^\]]+\]", " ".join(" ".join(PAGES.values()).split()))
    assert len(written) > 20
    assert set(written) <= known
    assert f"about {cost.PER_PARAMETER} bytes for each parameter" in " ".join(PAGES["operations.md"].split())


def test_figures_stand_in_their_own_cells() -> None:
    page, written = PAGES["method.md"], []
    for line in page.splitlines():
        if line.startswith("|") and re.search(r"\d\.\d{3} \[", line):
            written.append(line)
            columns = ["ham linear 10 %", "ham linear", "ham knn", "composite"]
            assert line == figures.budget_row(line.split(" | ")[0][2:], columns)
    assert len(written) == 24
    gap = {name: figures.interval(row, "+") for name, row in figures.read("ham-cpu")["differences"].items()}
    text, shift = " ".join(page.split()), figures.read("pad")["shift"]["logistic"]
    assert f"over five draws of that tenth, {gap['ssl - histogram, logistic, labels 0.1x5']}, and" in text
    assert f"where all labels vote, {gap['ssl - histogram, knn, labels 1']}." in text

    def seeds(arm: str, figure: str) -> str:
        return " and ".join(f"{row[figure]:.3f}" for row in figures.budget()["by_seed"][arm].values())

    tenth, unseen = "ham linear 10 %", "pad linear"
    assert f"that pretraining saw: {seeds('hybrid-late-text', tenth)}; self-supervision {seeds('ssl', tenth)};" in text
    assert f"the labels alone {seeds('labels', tenth)}." in text
    assert (
        f"is at {seeds('hybrid-late-text', unseen)} with late labels and at {seeds('ssl', unseen)} without any." in text
    )
    saved = figures.read("budget-cpu-seconds")
    (crops,) = (gap for gap in saved["differences"] if (gap["a"], gap["b"]) == ("ssl-brief", "ssl-curriculum"))
    spent = {arm: round(saved["training"][arm]["0"]["seconds"] / 60) for arm in ("ssl-curriculum", "ssl-brief")}
    ends = {arm: figures.interval(row["composite"]) for arm, row in saved["arms"].items()}
    assert f"{spent['ssl-curriculum']} minutes with small crops first end at {ends['ssl-curriculum']}" in text
    assert f"{spent['ssl-brief']} minutes of .6 of the plain steps at {ends['ssl-brief']}" in text
    assert f"which is {figures.interval(figures.turned(crops['composite']), '+')} for the small crops" in text
    words = figures.budget_gap("late, text prototypes", "late, random prototypes")[tenth]
    assert f"{words} on the tenth over two seeds" in text
    home, away = (
        {arm: figures.interval(shift[arm]["metrics"][which]) for arm in ("ham-hybrid", "ham-ssl", "histogram")}
        for which in ("in_domain", "out_of_domain")
    )
    assert f"hybrid {home['ham-hybrid']} at home and {away['ham-hybrid']} there" in text
    for name, arm in (("self-supervised", "ham-ssl"), ("histogram", "histogram")):
        assert f"{name} {home[arm]} and {away[arm]}" in text


# ---------------------------------------------------------------------------------------------- the three extensions


def example(page: str) -> tuple[str, str]:
    """(the Python file of a page, the line that names it elsewhere)."""
    (file,) = re.findall(r'```python title="[^"]+"\n(.*?)```', PAGES[page], re.S)
    line = re.findall(r'```text title="[^"]+"\n(.*?)\n```', PAGES[page], re.S)
    return file, line[0].strip() if line else ""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a page's file where it says, or rather in a folder that its package takes for a part of itself."""
    names = []

    def add(page: str, package: ModuleType, name: str) -> str:
        file, line = example(page)
        folder = tmp_path / "added"
        folder.mkdir()
        (folder / f"{name}.py").write_text(file, encoding="utf-8")
        assert f'title="{"/".join(package.__name__.split("."))}/{name}.py"' in PAGES[page]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        names.append((package, name))
        return line

    yield add
    for package, name in names:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        if hasattr(package, name):
            delattr(package, name)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "demo"
    demo.generate(folder, samples=160, seed=0, size=48)
    return folder


@pytest.fixture
def run(added, lesions: Path, tmp_path: Path) -> Path:
    """Of add-a-loss.md's objective, four steps."""
    from accelerate.state import AcceleratorState

    from tests.pretrain.conftest import TINY

    AcceleratorState._reset_state(True)  # it keeps the precision of whatever this process trained last
    added("add-a-loss.md", objectives, "byol")
    arguments = [*TINY, f"data.train={lesions}", f"out={tmp_path / 'run'}", "objectives.byol.weight=1"]
    assert loop.main(arguments) == 0
    return tmp_path / "run"


def test_a_new_loss_is_one_file_and_one_line(run: Path) -> None:
    from tests.pretrain.conftest import lines

    assert keys.all_keys().keys() >= set(ADDED)
    assert keys.all_keys()["objectives.byol.hidden"].help == "width of the predictor"
    found = [line["loss/byol"] for line in lines(run)]
    assert len(found) == 4
    assert all(0 <= value <= 4 for value in found)
    assert len(set(found)) == 4, "it learns"
    assert "near 0 early" in (run / "report.html").read_text(encoding="utf-8")


def test_the_quick_start_loads_the_weights(run: Path, tmp_path: Path) -> None:
    """timm makes a network of random weights for whoever forgets to ask for them."""
    import timm
    import torch
    import transformers

    from hybridssl.export import export

    export(run, tmp_path / "exported")
    (code,) = re.findall(r"```python\n(import timm.*?)```", PAGES["index.md"], re.S)
    _, *lines = ast.parse(code.replace("models/derm", str(tmp_path / "exported"))).body
    assert len(lines) == 2
    images, features = torch.rand(2, 3, 32, 32), []
    for line in lines:
        made: dict = {"timm": timm, "transformers": transformers}
        exec(ast.unparse(line), made)  # of our own page
        out = made["model"].eval()(images)
        features.append(out if isinstance(out, torch.Tensor) else out.pooler_output)
    assert torch.allclose(*features, atol=1e-5)


def test_a_new_evaluation_is_one_file_and_one_line(
    added, lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import finetune

    monkeypatch.setenv("HYBRIDSSL_CACHE", str(tmp_path / "cache"))
    line = added("add-an-evaluation.md", finetune, "centroid")
    monkeypatch.setattr(finetune_door, "VERBS", finetune_door.VERBS | ast.literal_eval(f"{{{line}}}"))
    for page, command in commands():
        if "finetune centroid" in command:
            args = finetune_door.parser("centroid").parse_args(shlex.split(command)[3:])
            assert args.verb == "centroid", page
    for name in ("histogram", "random:vit_tiny_patch16_224"):
        words = ["--backbone", name, "--data", lesions, "--out", tmp_path / "results" / name[:6]]
        words += ["--size", 32] if name != "histogram" else []
        assert finetune_door.main(["centroid", *map(str, words)]) == 0
    result = tmp_path / "results" / "histog" / "centroid" / "results.json"
    metric = json.loads(result.read_text(encoding="utf-8"))["metrics"]["balanced_accuracy"]
    assert metric["low"] <= metric["value"] <= metric["high"]
    assert metric["high"] > metric["low"]
    judged = [str(path.parent) for path in sorted((tmp_path / "results").rglob("results.json"))]
    assert finetune_door.main(["compare", *judged, "--out", str(tmp_path / "compared")]) == 0
    assert "centroid" in capsys.readouterr().out


def test_a_new_format_is_one_file_and_one_name(added, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shards

    line = added("add-a-source.md", shards, "nifti")
    monkeypatch.setattr(readers, "READERS", [*readers.READERS, *ast.literal_eval(f"[{line}]")])
    scans = tmp_path / "scans"
    scans.mkdir()
    volume = np.zeros((5, 20, 30), np.int16)  # depth, height, width
    volume[2, 0, 0], volume[2, 19, 0] = 240, 40  # the first row lies at the bottom
    volume[2, 19, 29] = -160
    (scans / "a.nii").write_bytes(nifti(volume))
    (scans / "without-a-suffix").write_bytes(nifti(volume))
    (scans / "broken.nii").write_bytes(nifti(volume)[:-100])
    built = build(scans, tmp_path / "out", options=BuildOptions(channels=1, frames=3, window="40,400", workers=1))
    assert (len(built.index), built.quarantined) == (6, 1)
    reason = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8"))["reason"]
    assert "no NIfTI image" in reason
    slices = {sample.key: decode(sample.image, 0, 1) for sample in map(built.index.read, range(6))}
    (middle,) = [image for key, image in slices.items() if key.startswith("a-") and key.endswith("-00002")]
    assert middle.shape == (20, 30, 1)
    assert [int(middle[at][0]) for at in ((19, 0), (0, 0), (0, 29))] == [255, 128, 0]
    assert len({built.index.read(i).group for i in range(6)}) == 2, "slices of a file stay together"


def nifti(volume: np.ndarray) -> bytes:
    """A file as the standard has it, of int16 [depth, height, width]."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *volume.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 4, 16)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    header[344:348] = b"n+1\0"
    return bytes(header) + volume.astype("<i2").tobytes()


# ------------------------------------------------------------------------------------------------------------ the site


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert pages.keys() >= {page.replace(".md", ".html") for page in [*PAGES, "log.md"]}
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]+href=\"([^\"]+)", text)
        assert not [address for address in loaded if "//" in address], name
    assert pages["method.html"].count("<math") >= 9
    assert "objectives.labels.pseudo_above" in pages["keys.html"]
    assert "bool [2, B, P]: patches of the global views" in pages["reference.html"]
