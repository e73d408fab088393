"""Rerun a published study on your own images: its steps, its figures, one page, and what it does not show.

  python -m finetune study                                   the studies there are
  python -m finetune study derm-suite                        what it needs
  python -m finetune study derm-suite data=data/derm backbones=models/derm-s,histogram --out results/derm

Arguments are key=value; several values are parted by commas. Every step is a command that could be typed by hand, and
is shown as it runs; a finished one is not run again, so a study that was cut off goes on. One that compares what other
steps left runs again when there is more or less of it. Writes OUT/report.html.
"""

from __future__ import annotations

import argparse
import glob
import json
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from finetune import studies, study_page
from finetune.studies import Study
from hybridssl.errors import UserError
from hybridssl.files import write_text
from shards.address import told
from shards.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", metavar="NAME", help="a study of the list, or the path of a .yaml file")
    parser.add_argument("values", nargs="*", metavar="key=value", help="its arguments")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where its results and report.html go")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")


def run(args: argparse.Namespace) -> None:
    if not args.study:
        return _list()
    study = studies.read(args.study)
    if not args.values:
        return _explain(study)
    if not args.out:
        raise UserError(f"{study.name} needs --out DIR, where its results and its page go")
    out, values = args.out, studies.fill(study, args.values)
    steps = studies.plan(study, values, out)
    done = _done(out)
    commands = [(step.title, words, told(" ".join(words))) for step in steps for words in step.commands.values()]
    for at, (title, words, line) in enumerate(commands):
        Terminal().print(f"{'done already' if line in done else title}: {line}", soft_wrap=True)
        if line in done:
            continue
        stale = [after for _, later, after in commands[at + 1 :] if any("*" in word for word in later)]
        done = [before for before in done if before not in stale]
        if args.dry_run:
            continue
        _execute(words, title)
        done.append(line)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "done.json", json.dumps(done, indent=1))
    if not args.dry_run:
        path = study_page.page(study, values, steps, out).write(out / "report.html")
        Terminal().print(f"written: {path}", soft_wrap=True)


def _list() -> None:
    table = Table("study", "asks")
    for name in studies.names():
        table.add_row(name, studies.read(name).asks)
    Terminal().print(table)
    Terminal().print("python -m finetune study NAME tells what a study needs")


def _explain(study: Study) -> None:
    console = Terminal()
    console.print(f"{study.title} {study.asks}")
    table = Table("argument", "what", "default")
    for key, about in study.arguments.items():
        default = about.get("default", "(needed)")
        table.add_row(key, about["help"], ",".join(default) if isinstance(default, list) else default or "-")
    console.print(table)
    for limit in study.limits:
        console.print(f"limit: {limit}")


def _done(out: Path) -> list[str]:
    """The commands that finished in an earlier call."""
    path = out / "done.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and the finished steps run again") from error


def _execute(words: list[str], title: str) -> None:
    """Run one command by its door; UserError when it fails, after it said why."""
    door, rest = words[0], [path for word in words[1:] for path in _expand(word)]
    if door == "finetune":
        from finetune.__main__ import main  # in this process: a new one would import torch again for every step

        code = main(rest)
    else:
        launcher = ["accelerate.commands.launch", "--quiet", "-m", door] if door == "pretrain" else [door]
        code = subprocess.run([sys.executable, "-m", *launcher, *rest], check=False).returncode
    if code:
        raise UserError(f"step '{title}' stopped with code {code}; what it said stands above, and what is done is kept")


def _expand(word: str) -> list[str]:
    """A word with * becomes the paths that it fits, in order."""
    if "*" not in word:
        return [word]
    found = sorted(glob.glob(word))
    if not found:
        raise UserError(f"nothing fits {word}: an earlier step did not leave its result there")
    return found
