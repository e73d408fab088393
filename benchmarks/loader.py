"""The loader: images a second from tars against the peers' pipelines, and an index of ten million samples.

    python -m benchmarks.loader                    # all of it
    python -m benchmarks.loader --only 256         # one kind of picture; the other figures are kept. Or: --only index

Speed. Arms take turns, one and two loader processes each, on the same JPEG files: `1024` and `256` px of noise with the
spectrum of photographs, dense (441 KB at 1,024 px, so that most of the time goes into their entropy code, which no
scale saves), and `1024 smooth`, images of the demo set enlarged four times. What a worker makes stays there (one number
an image comes back): sending it is the same for all. Two figures: images a second by the clock, and a second of CPU
time, which other programs on the machine disturb less. Ratios are within a round, medians over rounds.

    decoded   uint8 pixels. `ours` shuffles in a window of shards; webdataset reads its tars in sequence, with our
              decoder; `ours, scaled` decodes at the smallest JPEG scale that 224 px crops allow; ImageFolder is PIL's
    crops     2 x 224 + 8 x 96: `ours` cuts uint8 crops and draws the colour parameters, colour being the device's
              part; webdataset with our crops; ImageFolder with PIL crops of torchvision; lightly's dataset with its
              DINOTransform, colour and blur included

Index. See large.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks import large
from benchmarks.common import RESULTS, machine, write_results

ROUNDS = 7
COUNTS = {"1024": 48, "1024 smooth": 48, "256": 192}  # images a round
WORKERS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("index", *COUNTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    path = RESULTS / "loader.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found |= {**machine(), "command": "python -m benchmarks.loader"}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "index"):
            found["index"] = large.figures(Path(folder) / "large")
            print(found["index"])
        for kind in COUNTS if args.only is None else {args.only} & {*COUNTS}:
            found.setdefault("speed", {})[kind] = compare(Path(folder) / "pictures", kind, args.rounds)
            shutil.rmtree(Path(folder) / "pictures")
            write_results("loader.json", found)  # each kind takes minutes, and the next may be interrupted
    write_results("loader.json", found)


# --------------------------------------------------------------------------------------------------------- speed


def compare(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": rounds, "kilobytes": make_pictures(folder, kind)}
    for task, contestants in {"decoded": decoding(folder), "crops": cropping(folder)}.items():
        for workers in WORKERS:
            took: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
            for number in range(rounds + 1):
                for name, dataset in contestants.items():
                    seconds = run(dataset, workers, COUNTS[kind])
                    if number:  # the first round warms caches
                        took[name].append(seconds)
            figures = table(took, COUNTS[kind])
            found[f"{task}, {workers} worker{'s' * (workers > 1)}"] = figures
            print(kind, task, workers, json.dumps(figures))
    return found


def run(dataset: Any, workers: int, count: int) -> tuple[float, float]:
    """Seconds by the clock and of the workers' CPU time for all images once."""
    from torch.utils.data import DataLoader

    before, start = cpu_of_children(), time.perf_counter()
    seen = sum(len(batch) for batch in DataLoader(dataset, 8, num_workers=workers, collate_fn=list))
    clock = time.perf_counter() - start
    assert seen == count, (seen, count)
    return clock, cpu_of_children() - before


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended, as the workers of a round have
    return used.ru_utime + used.ru_stime


def table(took: dict[str, list[tuple[float, float]]], count: int) -> dict[str, Any]:
    peer = next(name for name in took if name.startswith("webdataset"))
    return {
        name: {
            "images_per_s": round(count / median(clock for clock, _ in rounds), 1),
            "images_per_cpu_s": round(count / median(cpu for _, cpu in rounds), 1),
            "times_webdataset": ratio(took[peer], rounds, 0),
            "times_webdataset_cpu": ratio(took[peer], rounds, 1),
        }
        for name, rounds in took.items()
    }


def ratio(theirs: list[tuple[float, float]], ours: list[tuple[float, float]], which: int) -> float:
    return round(median(a[which] / b[which] for a, b in zip(theirs, ours, strict=True)), 2)


def make_pictures(folder: Path, kind: str) -> int:
    """JPEG files in a folder of two classes, and the same bytes in tars of a quarter of them each; mean size in KB."""
    from benchmarks.views import jpeg
    from shards import scan
    from shards.tars import write_tar

    pictures = smooth(folder) if kind == "1024 smooth" else (jpeg(int(kind), i) for i in range(COUNTS[kind]))
    members = []
    for i, data in zip(range(COUNTS[kind]), pictures, strict=False):
        path = folder / "images" / f"class{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        members.append({"__key__": path.stem, "jpg": data})
    for part in range(4):
        write_tar(folder / f"{part}.tar", members[part::4])
    scan.write(folder, in_place=True)
    return round(sum(len(member["jpg"]) for member in members) / len(members) / 1000)


def smooth(folder: Path) -> Iterator[bytes]:
    """Images of the demo set, drawn at 256 px and enlarged to 1,024."""
    from shards import decode, demo

    index = demo.generate(folder / "demo", samples=120, size=256)
    for i in range(len(index)):
        image = cv2.resize(decode(index.read(i).image), (1024, 1024), interpolation=cv2.INTER_CUBIC)
        yield simplejpeg.encode_jpeg(image, 90, "RGB", "420")


def first_pixel(sample: Any, image: np.ndarray, *_: int) -> int:
    return int(image[0, 0, 0])


class Once:
    """The first `count` items of a dataset of positions."""

    def __init__(self, dataset: Any, count: int):
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.dataset[i][0]


def ours(folder: Path, transform: Callable[..., Any], at_least: int) -> Any:
    from shards import Index, Order, SampleDataset, StreamOptions

    index = Index.open(folder)
    order = Order(index, index.select(), StreamOptions(window=2))
    return Once(SampleDataset(index, order, transform, at_least), len(index))


def webdataset(folder: Path, work: Callable[[bytes], Any]) -> Any:
    import webdataset as wds

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return wds.WebDataset(tars, shardshuffle=False).map(lambda sample: work(sample["jpg"]))


def decoding(folder: Path) -> dict[str, Any]:
    from torchvision.datasets import ImageFolder

    from benchmarks.views import OPTIONS
    from shards.format import decode

    return {
        "webdataset, our decoder": webdataset(folder, lambda data: int(decode(data)[0, 0, 0])),
        "ours": ours(folder, first_pixel, 0),
        "ours, scaled": ours(folder, first_pixel, OPTIONS.decode_at_least()),
        "torchvision ImageFolder": ImageFolder(str(folder / "images"), lambda image: int(np.asarray(image)[0, 0, 0])),
    }


def cropping(folder: Path) -> dict[str, Any]:
    from lightly.data import LightlyDataset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from benchmarks.views import LIGHTLY, OPTIONS
    from hybridssl.views import crop, generator
    from shards.format import decode

    def cut(image: np.ndarray, number: int) -> int:
        return len(crop(image, generator(0, 0, number), OPTIONS, 16, number, clean=False).local)

    sizes = {
        OPTIONS.global_size: (2, OPTIONS.global_scale),
        OPTIONS.local_size: (OPTIONS.local_count, OPTIONS.local_scale),
    }
    cuts = [
        transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
        for size, (count, scale) in sizes.items()
        for _ in range(count)
    ]
    flip = transforms.RandomHorizontalFlip()
    images = str(folder / "images")
    return {
        "webdataset, our decoder and crops": webdataset(folder, lambda data: cut(decode(data), len(data))),
        "ours": ours(folder, lambda sample, image, *where: cut(image, where[2]), OPTIONS.decode_at_least()),
        "torchvision ImageFolder, its crops": ImageFolder(
            images, lambda image: len([np.asarray(flip(c(image))) for c in cuts])
        ),
        "lightly, DINOTransform": LightlyDataset(images, transform=lambda image: len(LIGHTLY(image))),
    }


if __name__ == "__main__":
    main()
