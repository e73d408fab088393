"""What every page of a result must be: the answer first, each figure linked, no raw names or numbers, limits last."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from finetune import results

RAW = re.compile(
    r"\b[a-z]+_[a-z_]+\b(?!\.)|\bnan\b|\d\.\d{7,}|`"
)  # snake_case but file names, NaN, long decimals, markdown


def without_pictures(html: str) -> str:
    """A page without the bytes of its pictures: in as much base64 any short word comes up some day."""
    return re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", html)


def words(html: str, between: str = "") -> str:
    """What is read on a page, without its style, what only a tooltip shows, and its markup (`between` in its place)."""
    body = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", html, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", between, body)).replace("\xa0", " ")


def look(page: Path) -> str:
    """The text of a page that a verb wrote beside its results.json, after these checks."""
    html, about = page.read_text(), results.read(page.with_name("results.json")).about
    said = about["detail"]["said"]
    (first, *_) = re.findall(r'<p class="(?:answer|note \w+)">(.*?)</p>', html)
    assert words(first) == said[0], "the first sentence is the answer"
    last = words(html.rpartition("<h2")[2])
    assert "What was shown, and what was not" in last
    assert "Not shown: " in said[-1]
    assert said[-1] in last
    links = [unquote(unescape(link)) for link in re.findall(r'href="([^"#]+)"', html)]
    assert "results.json" in links
    assert all((page.parent / link).is_file() for link in links), links
    ours = words(html, between=" ").replace(about["backbone"]["name"], "")
    ours = re.sub(r"(?<!\S)/\S+", "", ours)  # the folder of the tests may have any name
    assert not (raw := RAW.findall(ours)), raw
    return words(html)
