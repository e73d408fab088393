"""What a run is made of: the recipe tree, and where recipes are found."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridssl.backbone import BackboneOptions
from hybridssl.efficiency import EfficiencyOptions
from hybridssl.errors import UserError
from hybridssl.objectives import ObjectiveOptions, options_types
from hybridssl.optim import OptimOptions
from hybridssl.recipe import differences, resolve, to_dict
from hybridssl.text import TextOptions
from hybridssl.views import ViewOptions
from pretrain.guard import GuardOptions
from pretrain.usage import RECIPES, names
from shards.address import ADDRESS, public
from shards.index import Index
from shards.mix import open_sets
from shards.stream import StreamOptions

AUTO = "auto"  # no file: what the doctor proposes for the data and the machine


def _recorded(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Folders and addresses as they may be written down: passwords and signatures of an address stay out."""
    if isinstance(names, str):
        return ",".join(public(name) for name in names.split(","))
    return tuple(public(name) for name in names)


_PLACE: dict[str, Any] = {"recorded": _recorded}


@dataclass(frozen=True)
class DataOptions:
    # folder from `python -m shards build`, or its https://, s3://, ...; a,b: both
    train: str | tuple[str, ...] = field(default="", metadata=_PLACE)
    splits: tuple[str, ...] = ("train", "")  # "": rows without a split
    workers: int = 4  # loader processes per GPU
    # folder of the held-out index for the in-loop probe; "": the train/val splits of data.train
    probe: str = field(default="", metadata=_PLACE)
    cache: str = ""  # folder for what comes from an address; "": HYBRIDSSL_CACHE, else ~/.cache/hybridssl/shards
    cache_size: str = ""  # it grows no further, so at least two stream.window; "": HYBRIDSSL_CACHE_SIZE, else 50GB

    @property
    def sets(self) -> tuple[str, ...]:
        """The folders and addresses in `train`."""
        names = self.train.split(",") if isinstance(self.train, str) else self.train
        return tuple(name.strip() for name in names if name.strip())

    def open(self, root: str = "") -> Index:
        """The training set, or the index at `root`. Raises DataError."""
        remote = any(ADDRESS.match(name) for name in (root, *self.sets))
        if remote and (self.cache or self.cache_size):
            from shards.cache import Cache

            return open_sets(root or self.sets, Cache(self.cache, self.cache_size))
        return open_sets(root or self.sets)


@dataclass(frozen=True)
class BatchOptions:
    size: int = 256  # images a step, over all processes and micro-batches; what the method sees
    # Images a forward pass and process; 0: size / processes; auto: as many as fit on the GPU. Memory only, but for
    # batch norm (cnn.py).
    micro: int | Literal["auto"] = 0


@dataclass(frozen=True)
class TeacherOptions:
    momentum: tuple[float, float] = (0.992, 1.0)  # of the moving average, cosine from first to second


@dataclass(frozen=True)
class LogOptions:
    every: int = 10  # steps between lines of metrics.jsonl
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # through accelerate


@dataclass(frozen=True)
class SaveOptions:
    every: int = 1000  # steps between checkpoints; 0: one at the end
    keep: int = 2  # newest checkpoints to keep; the one of the best probe stays too
    keep_every: int = 0  # and those whose step this divides; 0: none


@dataclass(frozen=True)
class ProbeOptions:
    every: int = 1000  # steps between probes; 0: none
    images: int = 2000  # at most so many of each split
    early_stop: int = 0  # the run ends after so many probes without a better one; 0: never
    # folder of a general labelled index, judged before and during the run: is what was there kept?
    keep: str = field(default="", metadata=_PLACE)


@dataclass(frozen=True)
class Recipe:
    """All of a run. `key=value` on the command line beats the YAML file, which beats these defaults."""

    name: str = ""  # of the run, in its report; "": the recipe's
    out: str = ""  # run folder
    seed: int = 0  # every random draw follows from it
    steps: int = 100_000  # how long: steps of batch.size images
    precision: Literal["auto", "bf16", "no"] = "auto"  # auto: bf16 where it is faster, measured as the run begins
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest checkpoint of `out`, if there is one
    # begin where that run, or that checkpoint folder, is: what both have goes on, what only this one has begins there
    branch: str = field(default="", metadata=_PLACE)
    timeout: float = 30.0  # minutes that a step may take, with its probe and checkpoint; then it is taken as stuck
    threads: int = 0  # CPU threads of a process, where there is no GPU; 0: the machine's cores, parted evenly
    profile: bool = False  # trace some steps into the run folder: what takes the time?
    data: DataOptions = field(default_factory=DataOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    efficiency: EfficiencyOptions = field(default_factory=EfficiencyOptions)
    text: TextOptions = field(default_factory=TextOptions)
    objectives: dict[str, ObjectiveOptions] = field(default_factory=dict, metadata={"types": options_types})
    optim: OptimOptions = field(default_factory=OptimOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    log: LogOptions = field(default_factory=LogOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    probe: ProbeOptions = field(default_factory=ProbeOptions)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 at least")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be 1 at least")


# A resumed run may change these; any other difference would make it another run.
MAY_CHANGE = ("name", "out", "resume", "timeout", "threads", "profile", "efficiency", "log", "save", "probe", "guard")
MAY_CHANGE += ("batch.micro", "data.workers", "data.cache", "data.cache_size")
MAY_CHANGE += ("data.train", "data.probe")  # a set may move: what is in it is compared by its sha256


def changes(old: Mapping[str, Any], new: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """Lines `key: old -> new` where `new` is not the recipe of a run that is there, apart from `ignore` and what may
    change. A key that came with a later version has its default in `old`: that is how the run was made."""
    with contextlib.suppress(UserError):  # a key that is no more is told as one that differs
        old = to_dict(resolve(Recipe, [old]))
    return differences(old, to_dict(new), (*MAY_CHANGE, *ignore))


def find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {name}")
        return path
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1, 0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        known = ", ".join((AUTO, *names()))
        raise UserError(f"there is no recipe '{name}'{hint} There are: {known}; or give a .yaml file")
    return RECIPES / f"{name}.yaml"
