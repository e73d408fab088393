"""How many images a second does training take from JPEG files to the new teacher, each method with its own loader?

    python -m benchmarks.endtoend --size cpu                  # ViT-Ti/16 at 96 px
    python -m benchmarks.endtoend --size gpu --models base    # ViT-B/16 at 2 x 224 + 8 x 96, 65,536 prototypes, bf16

Ours is `pretrain` itself, as a command with a recipe, on shards of the same files that the others read from a folder;
its own log says how fast it is. The others (feeds.py, peers.py) are their packages' loaders and steps, where they are
installed. All have the settings of benchmarks/step.py, as many loader processes, and crops of the same sizes and
scales. Each runs alone, in a process of its own and one after the other, for loaders that work ahead would disturb a
race in turns of one step; where a turn is short enough there are several, and a ratio is the median over turns.

A turn is a third of `--seconds` to warm up and at least `--seconds` that count, to the end of the device's work. What
loaders have made ahead by then is in the figures, so let a turn last far longer than that stock does where the loader,
and not the model, is the slower one (data_wait). The images are made up: `jpeg` of benchmarks/views.py, whose dense
spectrum is as hard to decode as that of photographs. Results: benchmarks/results/endtoend-SIZE.json, written after
each contestant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common import write_section
from benchmarks.contestants import Setting
from benchmarks.fed import CONTESTANTS, Contestant, Figures, Terms, device
from benchmarks.step import SIZES, work
from pretrain import meters

COUNTS = {"test": 48, "cpu": 2000, "gpu": 10_000}  # images
TURNS = {"test": 1, "cpu": 3, "gpu": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--models", nargs="+", default=[""], help="parts of names of backbones, such as small; all")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=30.0, help="of a turn that count")
    parser.add_argument("--turns", type=int, default=0, help="of all contestants; 0: by the size")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="loader processes")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--count", type=int, default=0, help="images; 0: by the size")
    parser.add_argument("--side", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--keys", nargs="*", default=[], help="key=value for our recipe, as efficiency.compile=true")
    parser.add_argument("--work", type=Path, default=Path("runs/endtoend"), help="where the images lie")
    args = parser.parse_args(arguments)
    images, packed = pictures(args.work.absolute(), args.count or COUNTS[args.size], args.side)
    terms = Terms(images, packed, args.seconds, args.workers, args.threads, tuple(args.keys))
    command = f"python -m benchmarks.endtoend {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    about: dict[str, Any] = {"images": args.count or COUNTS[args.size], "side": args.side}
    about |= {"others": others(), **{key: getattr(terms, key) for key in ("seconds", "workers", "threads", "keys")}}
    for setting in SIZES[args.size]:
        if not any(part in setting.name for part in args.models):
            continue
        section = f"{setting.name}, {setting.prototypes} prototypes"

        def keep(figures: dict, section: str = section) -> None:
            write_section(f"endtoend-{args.size}.json", section, {**about, **figures}, command)

        race(setting, {name: CONTESTANTS[name] for name in args.only}, terms, args.turns or TURNS[args.size], keep)


def race(
    setting: Setting, contestants: Mapping[str, Contestant], terms: Terms, turns: int, keep: Callable[[dict], object]
) -> None:
    """All contestants in turn; `keep` gets the figures so far after each."""
    found: dict[str, list[Figures]] = {}
    left_out: dict[str, str] = {}
    for _ in range(turns):
        for name, contestant in contestants.items():
            if name in left_out:
                continue
            try:
                figures = contestant(setting, terms)
            except Exception as error:  # whatever fails in somebody's package must not cost the figures of the others
                left_out[name] = f"{type(error).__name__}: {error}"
                print(f"left out: {name}: {left_out[name]}", flush=True)
            else:
                found.setdefault(name, []).append(figures)
                print(f"K {setting.prototypes:,}  {setting.name}  {name:16} {figures}", flush=True)
            keep({"setting": asdict(setting), **compare(setting, found), "left_out": left_out})


def compare(setting: Setting, found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Medians over turns. Work is what the method needs for an image, and the same for all."""
    flop, peak = work(setting, heads=True), meters.peak(device(), setting.precision)
    table: dict[str, Any] = {}
    for name, turns in found.items():
        each = [turn["images_per_s"] for turn in turns]
        speed = statistics.median(each)
        table[name] = {
            "images_per_s": round(speed, 2),
            "turns": [round(one, 2) for one in each],
            "data_wait": round(statistics.median(turn["data_wait"] for turn in turns), 3),
            "memory_gib": round(max(turn["memory_gib"] for turn in turns), 2),
            "tflops": round(speed * flop / 1e12, 4),
        }
        if peak:
            table[name]["mfu"] = round(speed * flop / 1e12 / peak, 4)
        if mine := [turn["images_per_s"] for turn in found.get("ours", ())]:
            ratios = [a / b for a, b in zip(mine, each, strict=False)]  # one may have failed in a later turn
            table[name]["ours_over_it"] = round(statistics.median(ratios), 3)
    return {"gflop_per_image": round(flop / 1e9, 2), "contestants": table}


def others() -> dict[str, str]:
    """Versions of packages that machine() does not name; dinov2 has none."""
    with suppress(PackageNotFoundError):
        return {"lightly-train": version("lightly-train")}
    return {}


def pictures(folder: Path, count: int, side: int) -> tuple[Path, Path]:
    """`count` JPEG files of `side` px in a folder, and shards of them: made once."""
    from shards.build import BuildOptions, build

    images, packed = folder / f"{count}x{side}px" / "images", folder / f"{count}x{side}px" / "shards"
    if not (packed / "index.json").is_file():
        shutil.rmtree(images, ignore_errors=True)  # of a run that was interrupted
        (images / "all").mkdir(parents=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(write_jpeg, images / "all", side), range(count), chunksize=8))
        build(images, packed, options=BuildOptions(shard_size=str(max(8, count // 16))))
    return images, packed


def write_jpeg(folder: Path, side: int, seed: int) -> None:
    from benchmarks.views import jpeg

    (folder / f"{seed:06d}.jpg").write_bytes(jpeg(side, seed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: no `pretrain` is left running
    main()
