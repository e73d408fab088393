"""Studies: every command of every bundled one is a command of ours, and one is run to its page."""

from __future__ import annotations

import json
import re

import pytest

from finetune import studies, study, study_page
from finetune.__main__ import main, parser
from hybridssl.errors import UserError
from hybridssl.page import Page
from pretrain.command import load
from tests.finetune import looked

GIVEN = {
    "derm-suite": ["data=d", "backbones=models/a,random:models/a,histogram", "subgroup=sex", "masks=m", "seeds=0,1"],
    "natural-vs-domain": ["data=d", "adapted=models/a,timm:vit_small_patch16_224"],
    "mitosis-lora-scaling": ["data=d", "backbones=models/a"],
    "cxr-transfer": ["data=d", "backbone=models/a", "recipe=cxr-densenet121", "pretrain=batch.size=32,seed=1"],
    "seg-efficiency": ["data=d", "backbone=models/a", "promptable=hf:org/sam"],
}
MINE = """
title: Which is better?
asks: Is the first backbone better than the others?
arguments:
  data: {help: an index}
  backbones: {help: what is compared, many: true}
  column: {help: of subgroups, default: ""}
steps:
  - title: Linear probe
    why: How much is read out.
    for: backbones
    run: finetune probe --methods logistic --backbone {each} --data {data} --out {out}
  - title: Verdict
    why: In pairs.
    run: finetune compare {results}/linear-probe/*/logistic --overwrite --out {out}
  - title: Subgroups
    if: column
    run: finetune fair {results}/linear-probe/{first}/logistic --by {column} --out {out}
limits: [Nothing about tomorrow.]
"""


def test_the_five_studies_are_there():
    assert studies.names() == sorted(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_every_command_is_one_of_ours(name, tmp_path):
    found = studies.read(name)
    steps = studies.plan(found, studies.fill(found, GIVEN[name]), tmp_path)
    assert all(step.commands for step in steps if step.title != "Measurements of the trained segmenter")
    for step in steps:
        for words in step.commands.values():
            if words[0] == "finetune":
                parsed = parser(words[1]).parse_args(words[1:])
                assert parsed.verb == words[1]
            elif words[0] == "pretrain":
                load(words[1:])
            else:
                assert words[:2] == ["hybridssl", "export"]


def test_many_values_become_words_and_an_option_without_any_goes(tmp_path):
    found = studies.read("mitosis-lora-scaling")
    one = studies.plan(found, studies.fill(found, ["data=d", "backbones=a"]), tmp_path)[0]
    two = studies.plan(found, studies.fill(found, ["data=d", "backbones=a,b,c", "seeds=7"]), tmp_path)[0]
    assert "--also" not in next(iter(one.commands.values()))
    words = next(iter(two.commands.values()))
    assert words[words.index("--also") : words.index("--data")] == ["--also", "b", "c"]
    assert words[words.index("--seeds") + 1 : words.index("--out")] == ["7"]


def test_a_study_runs_to_its_page_and_goes_on_where_it_stopped(index, export_folder, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(MINE)
    out = tmp_path / "out"
    words = ["study", str(tmp_path / "mine.yaml"), f"data={index.root}", f"backbones={export_folder},histogram"]
    words += ["--out", str(out)]
    assert main([*words, "--dry-run"]) == 0
    assert not out.exists()
    assert main(words) == 0
    page = (out / "report.html").read_text()
    result = json.loads((out / "verdict" / "compare-logistic" / "results.json").read_text())
    assert result["detail"]["said"][0].split(":")[0] in page
    first = re.search(r'<p class="answer">(.*?)</p>', page)
    assert first is not None
    assert looked.words(first[1]) == result["detail"]["said"][0]
    last = looked.words(page.rpartition("<h2")[2])
    assert "Verdict " + result["detail"]["said"][0] in last
    assert "histogram (baseline), logistic: balanced accuracy 0." in last, "a result without a page of its own"
    assert "Limits of this study: Nothing about tomorrow." in last
    assert "left out: no column= was given" in page
    assert 'href="verdict/compare-logistic/results.json"' in page
    assert 'href="linear-probe/histogram/logistic/results.json"' in page
    assert page.count('<h2 id="s1">') == 1, "the pages inside keep no ids of their own"
    capsys.readouterr()
    stamp = (out / "linear-probe" / "histogram" / "logistic" / "results.json").stat().st_mtime_ns
    assert main(words) == 0
    assert capsys.readouterr().out.count("done already") == 3
    assert (out / "linear-probe" / "histogram" / "logistic" / "results.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["derm-suit"], "no study 'derm-suit'; did you mean derm-suite?"),
        (["derm-suite", "backbones=a"], "needs --out DIR"),
        (["derm-suite", "backbones=a", "--out", "o"], "derm-suite needs data=...: index with labels and splits"),
        (["derm-suite", "datta=a", "--out", "o"], "did you mean data?"),
        (["derm-suite", "data=d", "backbones=a/x,b/x", "--out", "o"], "folders would both be called the same"),
    ],
)
def test_bad_words(words, message, capsys):
    assert main(["study", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_step_keeps_what_is_done(index, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(MINE)
    out = tmp_path / "out"
    words = ["study", str(tmp_path / "mine.yaml"), f"data={index.root}", "backbones=histogram,timm:nothing"]
    assert main([*words, "--out", str(out)]) == 2
    assert "step 'Linear probe' stopped with code 2" in capsys.readouterr().err
    assert len(json.loads((out / "done.json").read_text())) == 1
    assert not (out / "report.html").exists()


def test_what_takes_all_there_is_runs_again_when_there_is_more(index, tmp_path, monkeypatch, capsys):
    """A backbone that is added later is in the comparison too, also when the study was cut off before it."""
    (tmp_path / "mine.yaml").write_text(MINE)
    ran, fails = [], []

    def execute(words, title):
        if title in fails:
            raise UserError("cut off")
        ran.append(title)
        compared.append([word for word in words if word.endswith("/logistic")])

    compared: list[list[str]] = []
    monkeypatch.setattr(study, "_execute", execute)
    words = ["study", "--out", str(tmp_path / "out"), str(tmp_path / "mine.yaml"), f"data={index.root}"]
    monkeypatch.setattr(study_page, "page", lambda *a: Page("none", ""))
    assert main([*words, "backbones=a"]) == 0
    assert main([*words, "backbones=a,b", "--dry-run"]) == 0
    assert "Verdict: finetune compare" in capsys.readouterr().out.splitlines()[-1]
    fails.append("Verdict")
    assert main([*words, "backbones=a,b"]) == 2
    fails.clear()
    assert main([*words, "backbones=a,b"]) == main([*words, "backbones=a,b"]) == 0
    assert ran == ["Linear probe", "Verdict", "Linear probe", "Verdict"]
    a, b = (str(tmp_path / "out" / "linear-probe" / name / "logistic") for name in "ab")
    assert compared == [[], [a], [], [a, b]]
    assert main([*words, "backbones=b,c"]) == 0
    assert compared[4:] == [[], [b, b.replace("/b/", "/c/")]], "a, which is no longer asked about, is not compared"
    done = json.loads((tmp_path / "out/done.json").read_text())
    assert len(done) == len(set(done))


def test_the_suite_compares_with_the_first_backbone(tmp_path):
    """Not with the first path of a sorted glob, which is the histogram's."""
    for name, place in (("derm-suite", "linear-probe"), ("natural-vs-domain", "linear-head-on-frozen-features")):
        found = studies.read(name)
        filled = studies.plan(found, studies.fill(found, ["data=d", "backbones=models/mine,histogram"]), tmp_path)
        (words,) = [w for step in filled for w in step.commands.values() if "compare" in w]
        assert words[words.index("--against") + 1] == str(tmp_path / place / "mine" / "logistic")
        assert "--overwrite" in words


def test_the_list_and_the_needs_of_a_study(capsys):
    assert main(["study"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in studies.names())
    assert main(["study", "cxr-transfer"]) == 0
    said = capsys.readouterr().out
    assert "recipe" in said
    assert "limit: " in said
