"""Pages made of hostile data: no element, attribute or address of the attacker's is in them, and his words are."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from finetune.__main__ import main as finetune
from hybridssl import page_check
from hybridssl.__main__ import main as hybridssl
from hybridssl.errors import UserError
from hybridssl.page import Page, body_of
from pretrain import report as pretraining_report
from pretrain.loop import main as pretrain
from shards.__main__ import main as shards
from shards.terminal import Terminal
from tests.pretrain.conftest import TINY

SCRIPT = "<script>alert(1)</script>"
EVIL = [
    f'"><img src=x onerror=alert(2)>{SCRIPT}',
    "'><svg/onload=alert(3)>",
    "javascript:alert(4)//</style></title></script>",
    "<a href=javascript:alert(5)>x</a>&lt;b&gt;{0.__class__}[/red][link=http://evil.example]",
]
OUTSIDE = {"html", "head", "meta", "title", "style", "body", "main", "header", "footer", "nav", "h1"}
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """What a browser would find: elements, attributes and addresses."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.text: list[str] = []
        self.policy = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not (tag in OUTSIDE or page_check.ELEMENT.fullmatch(tag)):
            self.faults.append(f"<{tag}>")
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        if tag == "meta":
            if given.get("http-equiv") == "Content-Security-Policy":
                self.policy = given["content"] or ""
            elif "http-equiv" in given:
                self.faults.append(f"<meta http-equiv={given['http-equiv']}>")
        for name, value in attrs:
            known = page_check.ATTRIBUTE.fullmatch({"viewbox": "viewBox"}.get(name, name))
            if not (known or name in ("lang", "charset", "name", "content", "http-equiv")):
                self.faults.append(f"<{tag} {name}>")
            if name == "href" and (re.match(r"\s*[a-z]+:|//", value or "", re.IGNORECASE)):
                self.faults.append(f"<{tag} href={value}>")
            if name == "src" and not re.match(r"data:image/(png|jpeg|webp);base64,", value or ""):
                self.faults.append(f"<{tag} src={str(value)[:40]}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes what is not open")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> str:
    """The words of a page. AssertionError for anything in it that is not ours."""
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.faults == [], path
    assert reader.open == []
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in reader.policy
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style + " ".join(re.findall(r'style="([^"]*)"', text))
    assert "@import" not in style
    body = re.search(r"<main><header>.*?</header>(?:<nav>.*?</nav>)?\n(.*)\n</main>", text, re.DOTALL)
    assert body
    assert page_check.strange(body[1]) == ""
    return "".join(reader.text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images of 80 patients: every word in the table means harm."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "images").mkdir()
    rows = []
    for n in range(160):
        who = n // 2
        split = ("train", "train", "val", "test")[who % 4]
        kind, pixels = (who // 4) % 2, np.random.default_rng(n).integers(0, 120, (40, 48, 3)).astype(np.uint8)
        pixels[..., 2 * kind] += 100
        name = f"{n:02d}{EVIL[0].replace('/', '')[:40]}.png"
        cv2.imwrite(str(root / "images" / "x.png"), pixels)
        (root / "images" / "x.png").rename(root / "images" / name)
        row = {
            "path": name,
            "label": EVIL[kind],
            "source": EVIL[2 + (who // 8) % 2],
            "group": f"{EVIL[0]}{who}",
            "split": split,
        }
        rows.append({**row, "text": EVIL[3], EVIL[3]: EVIL[who % 2], "ward": EVIL[(n + who) % 2]})
    with (root / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    out = root / "shards"
    build = ["--images", str(root / "images"), "--table", str(root / "table.csv"), "--out", str(out)]
    assert shards(["build", *build]) == 0
    return out


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an exported model, in folders whose names mean harm too."""
    root = tmp_path_factory.mktemp("made") / "'><svg onload=alert(6)>"
    keys = [*TINY, "steps=2", f"name={json.dumps(EVIL[0])}", f"data.train={data}"]
    assert pretrain([*keys, f"out={root / 'run'}", "probe.every=2"]) == 0
    assert hybridssl(["export", str(root / "run"), "--out", str(root / "model")]) == 0
    return root


def test_what_the_terminal_is_shown(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with brackets are no markup for rich either, which would raise, or draw links."""
    monkeypatch.setattr("shards.__main__.console", Terminal(width=400))  # a narrow one would part the names
    assert shards(["stats", str(data)]) == 0
    said = capsys.readouterr().out
    assert "[/red]" in said
    assert "\x1b]8" not in said


def test_audit(data: Path, tmp_path: Path) -> None:
    assert shards(["audit", str(data), "--out", str(tmp_path)]) == 0
    assert "alert(" in read(tmp_path / "audit.html")


def test_report_of_a_run(made: Path, tmp_path: Path) -> None:
    words = read(made / "run" / "report.html")
    assert EVIL[0] in words  # the name of the run
    assert EVIL[2] in words  # a source
    # What a damaged metrics file and a folder that is gone make of it.
    lines = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    lines[-1][f"loss/{EVIL[0]}"] = 1.0
    (made / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = read(pretraining_report.write(made / "run", tmp_path / EVIL[1].replace("/", "-")))
    assert f"{EVIL[0]}" in words
    assert "onload=alert(3)" in words  # in an error message


@pytest.fixture(scope="module")
def results(made: Path, data: Path) -> Path:
    """Most verbs, one after the other, on the hostile set."""
    out = made / "results"
    model = ["--backbone", str(made / "model"), "--data", str(data), "--out", str(out / "ours")]
    calls = [
        ["knn", *model],
        ["probe", *model, "--methods", "logistic"],
        ["probe", *model[:1], f"random:{made / 'model'}", *model[2:5], str(out / "random"), "--methods", "logistic"],
        ["retrieve", *model, "--k", "1", "3"],
        ["fewshot", *model, "--shots", "1", "--episodes", "3"],
        ["compare", str(out / "ours" / "logistic"), str(out / "random" / "logistic"), "--out", str(out)],
        ["calibrate", str(out / "ours" / "logistic")],
        ["fair", str(out / "ours" / "logistic"), "--by", "ward", "--least", "1"],
        ["explain", *model, "--result", str(out / "ours" / "logistic")],
        ["crossdomain", *model, "--by", "source", "--methods", "logistic", "--min-images", "4"],
        ["robust", *model, "--corruptions", "noise"],
        ["report", str(out), "--out", str(out / "all.html"), "--title", EVIL[0]],
    ]
    for words in calls:
        assert finetune(words) == 0, words
    return out


@pytest.mark.timeout(900)  # the first test to ask for `results` runs a dozen verbs
def test_pages_of_results(results: Path) -> None:
    pages = sorted(results.rglob("*.html"))
    assert len(pages) >= 7, pages
    said = {path.relative_to(results).as_posix(): read(path) for path in pages}
    assert all("alert(" in words for words in said.values())
    assert EVIL[0] in said["all.html"]


def test_a_result_that_others_made(results: Path, tmp_path: Path) -> None:
    """Every string of a results.json replaced, numbers kept."""
    found = sorted(results.rglob("results.json"))
    fixed = {"format", "protocol", "select_by", "sha256"}

    def spoil(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        return EVIL[len(value) % 4] if isinstance(value, str) and key not in fixed else value

    for n, path in enumerate(found):
        document = spoil(json.loads(path.read_text()))
        folder = tmp_path / "in" / str(n)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(document))
    assert finetune(["report", str(tmp_path / "in"), "--out", str(tmp_path / "all.html")]) == 0
    assert "alert(" in read(tmp_path / "all.html")


@pytest.mark.parametrize(
    "body",
    [
        SCRIPT,
        "<p onclick=x>a</p>",
        '<p class="a" onclick="x">a</p>',
        '<a href="javascript:x">a</a>',
        '<a href="java&#115;cript:x">a</a>',
        '<a href="https://evil.example">a</a>',
        '<a href="//evil.example">a</a>',
        '<img src="https://evil.example/x.png">',
        '<img src="data:image/svg+xml;base64,AAAA">',
        '<p style="background:url(x)">a</p>',
        '<p style="position:fixed">a</p>',
        "<iframe></iframe>",
        "<form></form>",
        '<meta http-equiv="refresh" content="0">',
        "<!-- -->",
        "<p",
        "<P>",
        "<svg><style>a</style></svg>",
        "<p\tclass=x>",
    ],
)
def test_a_page_of_others_is_not_taken_over(tmp_path: Path, body: str) -> None:
    page = tmp_path / "report.html"
    Page("t").text("fine").write(page)
    assert "fine" in body_of(page, tmp_path)
    for old in ("fine", "<h1>t"):
        page.write_text(Page("t").text("fine").render().replace(old, f"{old}{body}"))
        with pytest.raises(UserError, match=r"report\.html is not a page of this program"):
            body_of(page, tmp_path)
