"""The demo set: synthetic, dermoscopy-like images with everything a real set has, and nobody's data.

Seven classes, three sites, six skin tones, patients with several lesions photographed more than once, masks, reports,
and labels withheld for part of the training patients. It says nothing about skin: what is learnt here was drawn here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from shards import scan
from shards.draw import SITES, Photo, photograph
from shards.errors import DataError
from shards.index import Index
from shards.place import writing
from shards.tars import write_tar

# class: (how many of 20 lesions, what its structure is called in a report, synonyms, definition)
KINDS: dict[str, tuple[int, tuple[str, ...], str, str]] = {
    "melanocytic nevus": (
        5,
        ("a regular pigment network that fades at the edge", "an even honeycomb of brown lines"),
        "nevus|mole|benign melanocytic lesion",
        "a benign, symmetric lesion of melanocytes with a regular, honeycomb-like pigment network",
    ),
    "melanoma": (
        3,
        ("radial streaks at one side and a blue-white veil", "peripheral streaks and an off-centre blue-white veil"),
        "malignant melanoma|cutaneous melanoma",
        "a malignant tumour of melanocytes with asymmetric outline, radial streaks at the edge and a blue-white veil",
    ),
    "seborrheic keratosis": (
        3,
        ("milia-like cysts and comedo-like openings", "many bright cysts and dark openings, sharply cut"),
        "benign keratosis|seborrhoeic wart",
        "a benign, sharply demarcated epidermal growth with bright milia-like cysts and dark comedo-like openings",
    ),
    "basal cell carcinoma": (
        3,
        ("arborising vessels and blue-grey ovoid nests", "sharp, tree-like branching vessels"),
        "basal cell epithelioma|rodent ulcer",
        "a malignant tumour of basal cells with arborising, tree-like red vessels and blue-grey ovoid nests",
    ),
    "dermatofibroma": (
        2,
        ("a central white scar-like patch within a delicate network", "a pale centre ringed by a fine network"),
        "fibrous histiocytoma|cutaneous fibroma",
        "a benign fibrous nodule with a central white scar-like patch and a delicate peripheral pigment network",
    ),
    "vascular lesion": (
        2,
        ("well-defined round lacunae", "crowded red lacunae with paler septa"),
        "haemangioma|angioma|angiokeratoma",
        "a benign proliferation of vessels seen as well-defined, round, red to purple lacunae with paler septa",
    ),
    "actinic keratosis": (
        2,
        ("a red pseudo-network around pale follicles and white scale", "a strawberry pattern with scale"),
        "solar keratosis|intraepithelial carcinoma",
        "a precancerous lesion of sun-damaged skin with a red pseudo-network around pale follicles, and white scale",
    ),
}
PLACES = ("back", "chest", "abdomen", "face", "scalp", "upper arm", "forearm", "hand", "thigh", "lower leg", "foot")
TONES = ("I", "II", "III", "IV", "V", "VI")
TONE_ODDS = (0.14, 0.22, 0.22, 0.18, 0.14, 0.10)
SHARD = 100  # samples
SPLIT_CYCLE = ("train", "test", "train", "train", "val", "train", "train", "test", "train", "train")  # 70/10/20


def generate(
    out: str | Path,
    samples: int = 1600,
    seed: int = 0,
    size: int = 128,
    withheld: float = 0.5,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Write the synthetic set to `out` and open it.

    `size`: side in pixels; `withheld`: share of the training patients whose labels are left out. A smaller set is the
    beginning of a larger one. Raises DataError when `out` is taken or a number makes no sense.
    """
    if samples < 40 or not 32 <= size <= 1024 or not 0 <= withheld < 1 or seed < 0:
        raise DataError(
            f"cannot draw {samples} samples of {size} px with seed {seed} and {withheld} of the labels withheld: "
            "needed are 40 or more samples, 32..1024 px, a seed of 0 or more, and a share from 0 to below 1"
        )
    with writing(Path(out), overwrite) as partial:
        drawn = _samples(samples, seed, size, withheld, progress)
        for number in range(-(-samples // SHARD)):
            write_tar(partial / f"shard-{number:06d}.tar", islice(drawn, SHARD))
        write_classes(partial / "classes.csv")
        scan.write(partial, synthetic=True)
    return Index.open(out)


def write_classes(path: Path) -> None:
    """The table from which text prototypes are made: class, name, synonyms (separated by |), definition."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "name", "synonyms", "definition"])
        writer.writerows([kind, kind, entry[2], entry[3]] for kind, entry in KINDS.items())


def _samples(
    total: int, seed: int, size: int, withheld: float, progress: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    bags = {split: _bag(np.random.default_rng((seed, 1, i))) for i, split in enumerate(("train", "val", "test"))}
    done = patient = trained = 0
    while done < total:
        rng = np.random.default_rng((seed, 2, patient))
        split = SPLIT_CYCLE[patient % len(SPLIT_CYCLE)]
        hidden = split == "train" and int((trained + 1) * withheld) > int(trained * withheld)
        trained += split == "train"
        for photo, row in _patient(rng, patient, size, bags[split]):
            if done == total:
                return
            if hidden:  # in the report, too
                row |= {"text": row["text"].replace(f"; consistent with {row['label']}", ""), "label": None}
            yield _member(done, photo, row | {"split": split})
            done += 1
            progress(done, total)
        patient += 1


def _bag(rng: np.random.Generator) -> Iterator[str]:
    """Classes of lesions without end, each 20 in their exact proportion."""
    kinds = [kind for kind, entry in KINDS.items() for _ in range(entry[0])]
    while True:
        yield from (kinds[i] for i in rng.permutation(len(kinds)))


def _patient(
    rng: np.random.Generator, number: int, size: int, bag: Iterator[str]
) -> Iterator[tuple[Photo, dict[str, Any]]]:
    site, tone = str(rng.choice(list(SITES))), int(rng.choice(6, p=TONE_ODDS))
    age, sex = int(np.clip(rng.normal(52, 17), 5, 95)), str(rng.choice(["female", "male"]))
    for lesion in range(int(rng.integers(1, 4))):
        kind, place, lesion_seed = next(bag), str(rng.choice(PLACES)), int(rng.integers(1 << 62))
        for _ in range(int(rng.integers(1, 4))):
            photo = photograph(size, kind, tone, site, lesion_seed, int(rng.integers(1 << 62)))
            meta = {
                "synthetic": True,
                "lesion": f"patient-{number:05d}-{lesion}",
                "skin_tone": TONES[tone],
                "age": age,
                "sex": sex,
                "localization": place,
            }
            text = _report(rng, kind, place, photo)
            yield photo, {"label": kind, "source": site, "group": f"patient-{number:05d}", "meta": meta, "text": text}


def _report(rng: np.random.Generator, kind: str, place: str, photo: Photo) -> str:
    structure = str(rng.choice(KINDS[kind][1]))
    article = "An" if photo.blob[0] in "aeiou" else "A"
    text = f"{article} {photo.blob}, {photo.colour} lesion of the {place} with {structure}"
    if photo.extras:
        text += f"; {' and '.join(photo.extras)} in view"
    return text + (f"; consistent with {kind}." if rng.random() < 1 / 3 else ".")


def _member(number: int, photo: Photo, row: dict[str, Any]) -> dict[str, Any]:
    text = row.pop("text")
    return {
        "__key__": f"synthetic-{number:06d}",
        "jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(photo.image), 90, "RGB", "420"),
        "json": json.dumps(row, sort_keys=True).encode(),
        "mask.png": cv2.imencode(".png", photo.mask.astype(np.uint8) * 255)[1].tobytes(),
        "txt": text.encode(),
    }
