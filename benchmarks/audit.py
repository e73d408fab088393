"""Does the audit find copies, and only copies? Planted ones, and the known lesions of HAM10000.

    python -m benchmarks.audit                  # all three sets: minutes on an idle core
    python -m benchmarks.audit --sets pad nuclei
    python -m benchmarks.audit --backbone ssl=RUN   # and once more with what a backbone finds alike

Planted: up to 300 images of each set are resized, re-encoded, flipped, turned or cropped, and looked for among all.
Found in the sets as they are: near copies are compared with the groups (HAM10000: several pictures of one lesion; PAD:
of one patient). A pair of one lesion need not be a copy: most were photographed anew, at another magnification, and
recall is against all of them. A pair of two lesions need not be an error either: the page shows them, look. HAM10000 is
also audited against PAD, on which its heads are tested (benchmarks/pad.py): no picture may be in both.
Data and work folder: benchmarks/sets.py. Results: benchmarks/results/audit.json; pages in the work folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks import sets
from benchmarks.common import machine, write_results
from finetune import audit_page
from finetune.lookalikes import suggester
from shards import audit, hashes
from shards.format import decode
from shards.index import Index
from shards.looks import Looks, look

SETS = {"pad": sets.pad_index, "nuclei": sets.nuclei_index, "ham": sets.ham_index}
AGAINST = {"ham": "pad"}
PLANTED = 300

Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--backbone", default="", metavar="NAME=SPEC", help="as for `shards audit`, with a name")
    args = parser.parse_args()
    name, spec = next(iter(sets.named([args.backbone]).items())) if args.backbone else ("", "")
    work = sets.work_folder()
    found = {}
    for data in args.sets:
        against = [SETS[AGAINST[data]](work)] if data in AGAINST else []
        found[data] = trial(SETS[data](work), work / "audit" / data, against)
        if spec:
            found[data]["with_backbone"] = {"name": name, **with_backbone(SETS[data](work), spec)}
    limits = {"hash_bits": hashes.FAR, "agreement": hashes.AGREE, "agreement_wide": hashes.AGREE_WIDE}
    words = [f"{name}=RUN" if word == args.backbone else word for word in sys.argv[1:]]  # no folder of this machine
    command = " ".join(["python -m benchmarks.audit", *words])
    write_results("audit.json", {**machine(), "command": command, "thresholds": limits, **found})


def trial(data: Path, out: Path, against: Sequence[Path]) -> dict[str, Any]:
    index, start = Index.open(data), time.process_time()
    found = audit.audit(index, [Index.open(other) for other in against])
    seconds = time.process_time() - start
    audit.write(found.document, out / "audit.json")
    audit_page.write(found, out / "audit.html")
    findings = found.document["findings"]
    result = {
        "images": len(index),
        "cpu_seconds": round(seconds, 1),
        "said": audit_page.answer(found.document),
        "redundant": len(found.document["drop"]),
        "unreadable": len(findings["unreadable"]),
        "constant": len(findings["constant"]),
        "label_conflicts": sum(group["label_conflict"] for group in findings["duplicates"]),
        "groups_across_splits": len(findings["groups_across_splits"]),
        "against": {
            leak["index"]: {"samples": leak["samples"], "pairs": leak["pairs"]} for leak in findings["against"]
        },
        "across_splits": sum(group["across_splits"] for group in findings["duplicates"]),
        "rims": {kind: len(keys) for kind, keys in findings["rims"].items()},
        "too_plain_to_compare": findings["too_plain_to_compare"],
        "against_groups": against_groups(index, found),
        "confounding": findings["confounding"],
        "planted": planted(index, look(index)),
    }
    print(data.name, result["said"], result["against_groups"], result["planted"], sep="\n", flush=True)
    return result


def with_backbone(data: Path, spec: str) -> dict[str, Any]:
    """What is found when features propose pairs too."""
    index, start = Index.open(data), time.process_time()
    found = audit.audit(index, suggest=suggester(spec))
    result = {
        "cpu_seconds": round(time.process_time() - start, 1),
        "redundant": len(found.document["drop"]),
        "across_splits": sum(group["across_splits"] for group in found.document["findings"]["duplicates"]),
        "against_groups": against_groups(index, found),
    }
    print(data.name, "with a backbone", result, flush=True)
    return result


def against_groups(index: Index, found: audit.Audit) -> dict[str, Any]:
    """Precision and recall of pairs of copies, where a pair of one lesion (patient) counts as right."""
    group = np.asarray(index.column("group"))
    pairs = {(a, b) for g in found.groups for a in g.rows for b in g.rows if a < b}
    same = {(a, b) for a, b in pairs if group[a] == group[b] != 0}
    counts = np.unique(group[group != 0], return_counts=True)[1]
    possible = int((counts * (counts - 1) // 2).sum())
    touched = {int(group[a]) for a, _ in same}
    return {
        "pairs": len(pairs),
        "of_one_group": len(same),
        "precision": len(same) / max(len(pairs), 1),
        "recall_of_pairs": len(same) / max(possible, 1),
        "recall_of_groups": len(touched) / max(int((counts > 1).sum()), 1),
        "of_two_groups": [[index.key(a), index.key(b)] for a, b in sorted(pairs - same)][:50],
    }


def planted(index: Index, looks: Looks) -> dict[str, dict[str, float]]:
    """For each change: the share that the hash proposes, the share that is found, and the lowest agreements."""
    rng = np.random.default_rng(0)
    usable = np.flatnonzero(looks.telling)
    chosen = np.sort(rng.choice(usable, min(PLANTED, len(usable)), replace=False))
    images = [decode(index.read(int(i)).image, 0, index.channels) for i in chosen]
    known = hashes.hashes(looks.thumbs)
    asked = looks.thumbs[chosen]
    result = {}
    for name, change in changes(rng).items():
        copies = np.stack([hashes.thumbnail(change(image)) for image in images])
        pairs = hashes.propose(asked, np.concatenate([hashes.hashes(copies), known]))
        own = pairs[pairs[:, 0] == pairs[:, 1]]
        agree = [
            hashes.agreement(hashes.turned(hashes.details(asked[x]), turn), hashes.details(copies[y]))
            for x, y, turn in own.tolist()
        ]
        result[name] = {
            "proposed": len(own) / len(chosen),
            "found": float(np.sum(np.array(agree) >= hashes.AGREE) / len(chosen)),
            "agreement_min": float(np.min(agree, initial=1)),
            "agreement_5": float(np.percentile(agree, 5)) if agree else 0.0,
        }
    return result


def changes(rng: np.random.Generator) -> dict[str, Callable[[Array], Array]]:
    """What happens to pictures on their way from one set to another. Each image [H, W, C] -> image."""

    def encode(image: Array, quality: int = 90) -> Array:
        colour = ("RGB", "420") if image.shape[2] == 3 else ("GRAY", "Gray")
        return decode(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, *colour), 0, image.shape[2])

    def resize(image: Array, by: float) -> Array:
        size = max(1, round(image.shape[1] * by)), max(1, round(image.shape[0] * by))
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1)

    def crop(image: Array, by: float) -> Array:
        height, width = (round(side * by) for side in image.shape[:2])
        y, x = (
            int(rng.integers(0, whole - part + 1)) for whole, part in zip(image.shape, (height, width), strict=False)
        )
        return image[y : y + height, x : x + width]

    return {
        "resized to half": lambda image: encode(resize(image, 0.5)),
        "JPEG quality 50": lambda image: encode(image, 50),
        "mirrored": lambda image: encode(image[:, ::-1]),
        "upside down": lambda image: encode(image[::-1]),
        "turned by 90 degrees": lambda image: encode(np.rot90(image)),
        "cropped to 90 % of the area": lambda image: encode(crop(image, 0.9**0.5)),
        "cropped to 90 % of each side": lambda image: encode(crop(image, 0.9)),
        "cropped to 90 % of each side, mirrored, 3/4 size, JPEG 75": lambda image: encode(
            resize(crop(image, 0.9)[:, ::-1], 0.75), 75
        ),
        "cropped to 80 % of each side": lambda image: encode(crop(image, 0.8)),
    }


if __name__ == "__main__":
    main()
