"""What `pretrain --help` says, and the recipes there are. Nothing slow is imported here: help should come at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HELP_WORDS = {"-h", "--help", "help"}
RECIPES = Path(__file__).parent / "recipes"

HELP = """usage: accelerate launch pretrain [recipe=NAME_OR_PATH] data.train=FOLDER out=RUN_FOLDER [key=value ...]

Pretrain a vision backbone on tar shards. Ctrl-C saves and stops; the same command again goes on where it was.
For one GPU, or the CPU, `python -m pretrain` does the same without the launcher, whose warnings and tracebacks stand
around our own lines.

  recipe=NAME      one of: {names}; or a .yaml file.
                   Without one, what `python -m hybridssl doctor` proposes for the data and this machine (recipe=auto)
  data.train=DIR   a folder made by `python -m shards build` (or `demo`), or its address: s3://, gs://, hf://, https://;
                   several as DIR,DIR, mixed by size, by stream.temperature=T or by stream.weights=[W,W]
  out=DIR          the run folder: recipe.yaml, metrics.jsonl, checkpoints/, report.html
  key=value        any key of the recipe, for example steps=2000 batch.size=128 batch.micro=32 seed=1
                   objectives.labels=null switches a part off; lists as views.local_scale=[0.1,0.4]
                   --help KEY tells what it means, with its default: --help optim.lr, --help views; all: --help keys

examples
  python -m pretrain data.train=data/derm out=runs/derm
  accelerate launch pretrain recipe=demo data.train=data/demo out=runs/demo
  accelerate launch --multi_gpu --num_processes 4 pretrain recipe=derm-s data.train=data/derm out=runs/derm-s
"""


def asked(arguments: Sequence[str]) -> bool:
    return not arguments or bool(HELP_WORDS & set(arguments))


def words(arguments: Sequence[str]) -> list[str]:
    """The recipe keys that help was asked for (pretrain/keys.py tells them)."""
    return [word for word in arguments if word not in HELP_WORDS and "=" not in word]


def text() -> str:
    return HELP.format(names=", ".join(names()))


def names() -> list[str]:
    """Of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
