"""The bar of a run on a terminal of 80 columns: how far it is stays in sight, however much there is to tell."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from pretrain.record import Bar


def test_news_do_not_push_the_bar_out_of_a_narrow_terminal() -> None:
    news = "8 images/s, 2% waiting for data, 2.8 GFLOP/s, 1.0 GiB  dino 6.243  ibot 6.213  labels [b]0.1[/b]"
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    bar = Bar(TextColumn("{task.description}", markup=False), MofNCompleteColumn(), console=console)
    bar.add_task("small-data", total=30, completed=5, news=news)
    bar.add_task("quiet", total=1, news="")
    with console.capture() as said:
        console.print(bar.get_renderable())
    first, *rest = said.get().splitlines()
    assert first.split() == ["small-data", "5/30"]
    assert " ".join(" ".join(rest[1:]).split()) == " ".join(news.split())
