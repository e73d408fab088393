"""A report as one self-contained HTML file: no script, no font, no address outside the file.

    page = Page("ham-cpu", "Pretraining report")
    page.facts([("Steps", 6500), ("Images", 420_000)])
    page.section("Losses", "What to expect of each.")
    page.figures([(line_chart({"dino": points}), "DINO"), (png, "A picture")])
    page.table(["protocol", "value"], [["kNN", 0.43]])
    page.write(run / "report.html")

Every string is escaped. Only `Markup`, which the functions of `hybridssl.charts` return, goes in as it is, and the page
carries a content security policy that forbids scripts and foreign resources, whatever a class name may contain.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hybridssl.errors import UserError
from hybridssl.files import write_text
from hybridssl.page_check import strange

COLOURS = ["#3b76d9", "#e07b39", "#2f9e6e", "#c44e8b", "#8a63d2", "#c9a227", "#2aa5b8", "#d64545", "#7a8b3c", "#8d6e63"]
GREY = "#9aa0a6"


class Markup(str):
    """Markup that is known to be safe: made by this package, with everything from the data escaped."""


def inline(value: Any) -> str:
    """Escape any value for HTML. Numbers are made readable; None and NaN become a dash; `Markup` stays as it is."""
    if isinstance(value, Markup):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        value = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return escape(str(value))


def picture(content: Markup | bytes, alt: str = "") -> Markup:
    """An SVG as it is, or PNG / JPEG / WebP bytes as an inline image. Raises TypeError for anything else."""
    if isinstance(content, Markup):
        return content
    if isinstance(content, bytes):
        for magic, kind in ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp")):
            if content.startswith(magic):
                data = base64.b64encode(content).decode()
                return Markup(f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">')
    raise TypeError(f"a figure is Markup or the bytes of a PNG, JPEG or WebP, not {type(content).__name__}")


class Page:
    """Appends blocks in reading order; `write` puts the file down in one piece. Every method returns the page."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self.sections: list[str] = []
        self.body: list[str] = []

    def _add(self, block: str) -> Page:
        self.body.append(block)
        return self

    def section(self, title: str, intro: str = "") -> Page:
        self.sections.append(title)
        lead = f'<p class="lead">{inline(intro)}</p>' if intro else ""
        return self._add(f'<h2 id="s{len(self.sections)}">{inline(title)}</h2>{lead}')

    def text(self, text: str | Markup) -> Page:
        return self._add(f"<p>{inline(text)}</p>")

    def answer(self, text: str | Markup) -> Page:
        """What the page has found, in a sentence: larger, before everything else."""
        return self._add(f'<p class="answer">{inline(text)}</p>')

    def note(self, text: str | Markup, tone: str = "quiet") -> Page:
        """A line in a box. tone: quiet | good | warn | bad."""
        return self._add(f'<p class="note {escape(tone)}">{inline(text)}</p>')

    def facts(self, pairs: Iterable[tuple[str, Any]]) -> Page:
        """Key figures as tiles."""
        tiles = "".join(
            f"<div{' class=wide' if len(_plain(v)) > 18 else ''}><dt>{inline(k)}</dt><dd>{inline(v)}</dd></div>"
            for k, v in pairs
        )
        return self._add(f"<dl>{tiles}</dl>")

    def table(
        self,
        header: Sequence[Any],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        strong: Iterable[tuple[int, int]] = (),
    ) -> Page:
        """Rows of values; columns of numbers are set flush right. strong: (row, column) of cells to set in bold.

        Words of the first column name their row, so they stand on the left even where they begin with a number.
        """
        rows, bold = [list(row) for row in rows], set(strong)
        right = [all(_numeric(row[c]) for row in rows if c < len(row)) for c in range(len(header))]
        right[:1] = [right[0] and not any(isinstance(row[0], str) for row in rows)]

        def cell(tag: str, value: Any, c: int, is_bold: bool = False) -> str:
            flush = c < len(right) and right[c]
            long = tag == "td" and not flush and not isinstance(value, Markup) and len(str(value)) > 12
            kind = " ".join(["n"] * flush + ["t"] * long + ["b"] * is_bold)
            return f'<{tag} class="{kind}">{inline(value)}</{tag}>'

        head = "".join(cell("th", h, c) for c, h in enumerate(header))
        lines = ("".join(cell("td", v, c, (r, c) in bold) for c, v in enumerate(row)) for r, row in enumerate(rows))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        title = f"<caption>{inline(caption)}</caption>" if caption else ""
        dense = ' class="dense"' if len(header) > WIDE else ""
        table = f"<table{dense}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return self._add(f'<div class="scroll">{table}</div>')

    def figure(self, content: Markup | bytes, caption: str | Markup = "") -> Page:
        """One figure at the width of the page."""
        return self._add(_figure(content, caption))

    def figures(self, items: Iterable[tuple[Markup | bytes, str | Markup]], width: int = 300) -> Page:
        """Figures with captions side by side, each at least `width` px wide; they stack on a phone."""
        cells = "".join(_figure(content, caption) for content, caption in items)
        return self._add(f'<div class="grid" style="--w:{int(width)}px">{cells}</div>')

    def images(
        self, rows: Iterable[Sequence[tuple[Markup | bytes, str | Markup]]], header: Sequence[str] = (), cell: int = 92
    ) -> Page:
        """Rows of small pictures with captions, in columns `cell` to MOST px wide; scrolls in its own box."""
        rows = [list(row) for row in rows]
        columns = max([len(header), *(len(row) for row in rows)])
        cells = "".join(f'<div class="head">{inline(h)}</div>' for h in header)
        for row in rows:
            cells += "".join(_figure(content, caption) for content, caption in row)
            cells += "<figure></figure>" * (columns - len(row))
        style = f"--columns:{columns};--w:{int(cell)}px;--most:{max(int(cell), MOST)}px"
        return self._add(f'<div class="scroll"><div class="images" style="{style}">{cells}</div></div>')

    def raw(self, body: Markup) -> Page:
        """Markup as `body_of` gives it."""
        return self._add(body)

    def render(self) -> str:
        links = "".join(f'<a href="#s{i}">{inline(s)}</a>' for i, s in enumerate(self.sections, 1))
        nav = f"<nav>{links}</nav>" if len(self.sections) > 2 else ""
        subtitle = f'<p class="subtitle">{inline(self.subtitle)}</p>' if self.subtitle else ""
        private = PRIVATE if any(' src="data:image/' in block for block in self.body) else ""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{inline(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main><header><h1>{inline(self.title)}</h1>{subtitle}</header>{nav}\n"
            + "\n".join(self.body)
            + f"\n</main>{private}</body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the file in one piece: a reader sees the old report or the new one, never a half."""
        write_text(Path(path), self.render())
        return Path(path)


def body_of(path: Path, beside: Path) -> Markup:
    """What a page that `Page` wrote says, without its header, for a page in the folder `beside`: its headings a step
    lower, its links made to lead from there, and one link in place of a gallery. UserError for another file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"<main><header>(.*?)</header>(?:<nav>.*?</nav>)?\n(.*)\n</main>", text, re.DOTALL)
    title = re.search(r"<h1>(.*?)</h1>", found[1], re.DOTALL) if found else None
    wrong = strange(found[2] + title[1]) if found and title else "it has no <main> with a header"
    if not found or not title or wrong:
        raise UserError(f"{path} is not a page of this program ({wrong}): remove it, and run its step again")

    def lead(match: re.Match[str]) -> str:
        place = os.path.relpath(path.parent / unquote(match[1]), beside)
        return f'href="{quote(Path(place).as_posix())}"'

    own = f'<a href="{escape(quote(path.name))}">'
    body = GALLERY.sub(f"<p>{own}The pictures</a> are on a page of their own.</p>", _lowered(found[2]))
    body = f"<h3>{own}{title[1]}</a></h3>{body}"
    return Markup(re.sub(r'href="([^"#:]+)"', lead, body))


def _lowered(body: str) -> Markup:
    """Sections as parts of a section: their ids would be there twice."""
    return Markup(re.sub(r'<h2 id="s\d+">(.*?)</h2>', r"<h4>\1</h4>", body, flags=re.DOTALL))


def _plain(value: Any) -> str:
    """As it is read: without markup."""
    return re.sub(r"<[^>]*>", "", inline(value))


def _figure(content: Markup | bytes, caption: str | Markup) -> str:
    alt = "" if isinstance(caption, Markup) else caption
    words = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture(content, alt)}{words}</figure>"


def _numeric(value: Any) -> bool:
    """Numbers, dashes and strings that begin like a number (".43 [.41, .45]", "12 min") are set flush right."""
    if isinstance(value, Markup):
        return False
    return (
        value is None or isinstance(value, (int, float)) or str(value).lstrip("+-−–.<≈")[:1] in set("0123456789") | {""}
    )


WIDE = 6  # columns: a table with more sets an interval below its value
MOST = 240  # px: a picture of a gallery grows no wider
PRIVATE = "<footer>This file holds pictures of the data: it is as confidential as they are.</footer>"
GALLERY = re.compile(r'<div class="scroll"><div class="images".*?</div></div>', re.DOTALL)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--soft:#f5f6f8;--line:#e3e6ea;--ink:#1b1f24;--dim:#667080;--accent:#2f66c8;
--good:#1d7f55;--warn:#a86a00;--bad:#b93838}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--soft:#1d2026;--line:#2d323a;--ink:#e6e8eb;--dim:#98a2b0;
--accent:#82aaff;--good:#5fc796;--warn:#e3ae57;--bad:#f08a8a}}
@media print{:root{color-scheme:light;--paper:#fff;--soft:#f5f6f8;--line:#d5d9de;--ink:#000;--dim:#444;--accent:#000;
--good:#1d7f55;--warn:#a86a00;--bad:#b93838}nav{display:none!important}figure,tr{break-inside:avoid}
h2,.lead{break-after:avoid}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main,footer{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
footer{padding-top:0;font-size:13px;color:var(--dim)}
h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;margin:0;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.01em;margin:56px 0 4px;padding-top:20px;border-top:1px solid var(--line)}
h3{font-size:17px;margin:32px 0 4px}h4{font-size:15px;margin:24px 0 4px}
p{margin:8px 0;max-width:72ch}
.answer{font-size:19px;line-height:1.45;margin:20px 0}
.subtitle,.lead{color:var(--dim)}.subtitle{font-size:18px;margin:6px 0 0}
.lead{margin-bottom:20px}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin:20px 0;font-size:14px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:16px 24px;
margin:24px 0;grid-auto-flow:dense}
dl .wide{grid-column:span 2}
dl div{border-top:2px solid var(--line);padding-top:8px}
dt{font-size:12px;color:var(--dim)}dd{margin:2px 0 0;font-size:17px;font-weight:600;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere;line-height:1.35}
.note{background:var(--soft);border-left:3px solid var(--dim);border-radius:4px;padding:10px 16px;margin:16px 0;
max-width:none}.good{border-color:var(--good)}.warn{border-color:var(--warn)}.bad{border-color:var(--bad);color:var(--bad)}
.scroll{overflow-x:auto;margin:16px 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:min(100%,480px)}
caption{text-align:left;color:var(--dim);padding-bottom:8px}
th,td{text-align:left;padding:8px 16px 8px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim);font-size:13px;white-space:nowrap}.n{text-align:right;white-space:nowrap}.b{font-weight:700}
.t{min-width:15ch}td:first-child{min-width:10ch}
.dense small{display:block}.dense th{white-space:normal;vertical-align:bottom}
td small{font-size:12px;font-weight:400;color:var(--dim);white-space:nowrap}
figure{margin:0;min-width:0}figure svg,figure img{display:block;width:100%;height:auto}
figure img{border-radius:6px}main>figure{margin:16px 0}
figcaption{font-size:14px;line-height:1.45;color:var(--dim);margin-top:6px;max-width:72ch}
figcaption b{color:var(--ink);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w)),1fr));gap:32px 28px;margin:20px 0}
.images{display:grid;grid-template-columns:repeat(var(--columns),minmax(var(--w),var(--most)));gap:10px}
.images .head{font-size:13px;color:var(--dim);font-weight:600}
.images figcaption{font-size:12px;line-height:1.3;margin-top:4px;overflow-wrap:anywhere}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--dim)}
svg .axis{stroke:var(--line);fill:none}svg .ink{fill:var(--ink)}
@media(max-width:600px){main{padding:24px 16px 56px}h1{font-size:26px}h2{margin-top:40px}
dl{grid-template-columns:1fr 1fr}.answer{font-size:17px}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);max-width:40vw;overflow-wrap:break-word}}
"""
