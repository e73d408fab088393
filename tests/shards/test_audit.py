"""Planted copies, leaks, conflicts and damage are found, and nothing else is."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from shards import audit, demo, duplicates, hashes
from shards.__main__ import main
from shards.build import BuildOptions, build
from shards.errors import DataError
from shards.format import decode
from shards.index import Index
from shards.looks import look
from shards.mix import Mix
from shards.stats import stats
from shards.tallies import columns

Array = np.ndarray


def encode(image: Array, quality: int = 92) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420")


def half(image: Array) -> Array:
    return cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)


def crop(image: Array, share: float = 0.9, x: float = 0.5, y: float = 0.5) -> Array:
    height, width = (round(side * share) for side in image.shape[:2])
    top, left = round((image.shape[0] - height) * y), round((image.shape[1] - width) * x)
    return image[top : top + height, left : left + width]


PLANTED: dict[str, Callable[[Array], bytes]] = {
    "resized": lambda image: encode(half(image)),
    "encoded": lambda image: encode(image, 50),
    "mirrored": lambda image: encode(image[:, ::-1]),
    "upside": lambda image: encode(image[::-1]),
    "turned": lambda image: encode(np.rot90(image)),
    "cropped": lambda image: encode(crop(image)),
    "corner": lambda image: encode(crop(image, 0.9, 0.1, 0.95)),
    "all": lambda image: encode(half(crop(image, 0.9, 0.8, 0.3)[:, ::-1]), 75),
}


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> list[Array]:
    """120 different images of the demo set."""
    root = tmp_path_factory.mktemp("demo") / "demo"
    index = demo.generate(root, samples=120, size=96)
    return [decode(index.read(i).image) for i in range(len(index))]


def built(folder: Path, rows: list[dict[str, str]], images: dict[str, bytes]) -> Index:
    (folder / "images").mkdir(parents=True)
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return build(folder / "images", folder / "set", folder / "table.csv", BuildOptions()).index


@pytest.fixture(scope="module")
def planted(lesions: list[Array], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The first 60 lesions in train; of the first eight a changed copy; of two the same file; one of one colour."""
    images = {f"own-{n:03d}.jpg": encode(image) for n, image in enumerate(lesions[:60])}
    rows = [
        {"path": name, "label": f"c{n % 3}", "split": "train", "group": f"g{n}", "device": f"d{n % 3}"}
        for n, name in enumerate(images)
    ]
    for n, (name, change) in enumerate(PLANTED.items()):
        images[f"{name}.jpg"] = change(lesions[n])
        split = "test" if n == 0 else "train"
        rows.append(rows[n] | {"path": f"{name}.jpg", "split": split, "label": "c9" if n == 1 else f"c{n % 3}"})
    images["same.jpg"] = images["own-030.jpg"]
    rows.append(rows[30] | {"path": "same.jpg"})
    images["grey.jpg"] = encode(np.full((40, 40, 3), 90, np.uint8))
    rows.append({"path": "grey.jpg", "label": "", "split": "", "group": "", "device": ""})
    return built(tmp_path_factory.mktemp("planted"), rows, images)


@pytest.fixture(scope="module")
def found(planted: Index) -> audit.Audit:
    return audit.audit(planted)


def stem(key: str) -> str:
    return key.rsplit("-", 1)[0]


def test_every_planted_copy_is_found_with_its_original_and_no_stranger_is(found: audit.Audit) -> None:
    groups = {frozenset(map(stem, group["keys"])) for group in found.document["findings"]["duplicates"]}
    expected = {frozenset({f"own-{n:03d}", name}) for n, name in enumerate(PLANTED)}
    assert groups == expected | {frozenset({"own-030", "same"})}
    how = {stem(key): group["how"] for group in found.document["findings"]["duplicates"] for key in group["keys"]}
    assert how["same"] == "bytes"
    assert how["mirrored"] == "near"


def test_of_copies_one_stays_that_of_the_test_split_or_the_largest(found: audit.Audit) -> None:
    kept = {stem(group["keys"][0]) for group in found.document["findings"]["duplicates"]}
    assert "resized" in kept  # in test: dropping the copy in train mends the leak
    assert {"own-005", "own-006", "own-007"} <= kept  # their copies are smaller
    dropped = {stem(key) for key in found.document["drop"]}
    assert not dropped & kept
    assert len(dropped) == len(PLANTED) + 1


def test_splits_labels_and_damage(found: audit.Audit) -> None:
    findings = found.document["findings"]
    crossing = [g for g in findings["duplicates"] if g["across_splits"]]
    assert [sorted(map(stem, g["keys"])) for g in crossing] == [["own-000", "resized"]]
    conflicts = [g for g in findings["duplicates"] if g["label_conflict"]]
    assert [sorted(map(stem, g["keys"])) for g in conflicts] == [["encoded", "own-001"]]
    assert [
        {split: [stem(k) for k in keys] for split, keys in g.items()} for g in findings["groups_across_splits"]
    ] == [{"train": ["own-000"], "test": ["resized"]}]
    assert [stem(key) for key in findings["constant"]] == ["grey"]


def test_a_column_that_decides_the_label_is_named_first(found: audit.Audit) -> None:
    first = found.document["findings"]["confounding"][0]
    assert first["factor"] == "device"
    assert first["shown"]
    assert first["balanced_accuracy"] >= 0.75  # the fourth class is a single image
    assert first["p"] == 0.001


def test_a_column_that_decides_the_label_is_shown_among_many(planted: Index) -> None:
    rng = np.random.default_rng(0)
    noise = {f"noise {n}": rng.choice(["a", "b"], len(planted)).tolist() for n in range(60)}
    found = audit._confounding(planted, look(planted), columns(planted) | noise)
    assert [row["factor"] for row in found if row["shown"]] == ["device"]


def test_copies_and_patients_in_train_without_saying_so(lesions: list[Array], tmp_path: Path) -> None:
    """Pretraining reads what has no split: a copy or a patient there and in test is a leak; there and in train, no."""
    splits = {"a": "", "b": "test", "c": "", "d": "train"}
    rows = [
        {"path": f"{name}.jpg", "split": split, "group": "xxyy"[n]} for n, (name, split) in enumerate(splits.items())
    ]
    images = {f"{name}.jpg": encode(lesions[n // 2]) for n, name in enumerate(splits)}
    index = built(tmp_path, rows, images)
    findings = audit.audit(index).document["findings"]
    crossing = [
        {split: [stem(key) for key in keys] for split, keys in g.items()} for g in findings["groups_across_splits"]
    ]
    assert crossing == [{"": ["a"], "test": ["b"]}]
    across = {tuple(sorted(map(stem, group["keys"]))): group["across_splits"] for group in findings["duplicates"]}
    assert across == {("a", "b"): True, ("c", "d"): False}
    said = "in more than one split (without a split counts as train: pretraining reads both): a test on them is"
    warnings = stats(index).warnings
    assert warnings[0].startswith(f"1 groups (patients) have images {said}")
    assert warnings[1].startswith(f"1 images lie, byte for byte, {said}")


def test_leaks_are_found_from_both_sides(lesions: list[Array], planted: Index, tmp_path: Path) -> None:
    """Another set holds four images of the first, changed, and forty that it does not."""
    changes = [PLANTED[name] for name in ("resized", "mirrored", "cropped", "all")]
    images = {f"leak-{n}.jpg": change(lesions[40 + n]) for n, change in enumerate(changes)}
    images |= {f"new-{n}.jpg": encode(image) for n, image in enumerate(lesions[70:110])}
    other = built(tmp_path, [{"path": name, "split": "test"} for name in images], images)
    here = audit.audit(planted, [other]).document
    there = audit.audit(other, [planted]).document
    assert sorted(map(stem, here["leaks"])) == [f"own-{40 + n:03d}" for n in range(4)]
    assert sorted(map(stem, there["leaks"])) == [f"leak-{n}" for n in range(4)]
    pairs = here["findings"]["against"][0]["pairs"]
    assert {(stem(p["key"]), p["split"], stem(p["other"]), p["other_split"]) for p in pairs} == {
        (f"own-{40 + n:03d}", "train", f"leak-{n}", "test") for n in range(4)
    }


def test_every_copy_of_a_leak_is_a_leak(lesions: list[Array], tmp_path: Path) -> None:
    """Of two files of the same pixels only one is compared, and another one of them may be the one to keep."""
    level = cv2.IMWRITE_PNG_COMPRESSION
    images = {
        name: cv2.imencode(".png", lesions[0], [level, n])[1].tobytes() for name, n in {"z.png": 1, "a.png": 9}.items()
    }
    images |= {"mirrored.jpg": PLANTED["mirrored"](lesions[0][..., ::-1])}
    images |= {f"new-{n}.jpg": encode(image) for n, image in enumerate(lesions[1:6])}
    index = built(tmp_path / "own", [{"path": name, "split": "train"} for name in images], images)
    test = built(tmp_path / "test", [{"path": "x.jpg"}], {"x.jpg": encode(lesions[0][..., ::-1], 60)})
    document = audit.audit(index, [test]).document
    assert sorted(map(stem, document["leaks"])) == ["a", "mirrored", "z"]
    assert document["findings"]["against"][0]["samples"] == 3


def test_what_a_backbone_suggests_is_judged_by_pixels(lesions: list[Array], tmp_path: Path) -> None:
    """A crop to 70 % of a side is beyond the hash; a suggestion finds it, and a wrong suggestion nothing."""
    images = {f"own-{n}.jpg": encode(image) for n, image in enumerate(lesions[:10])}
    images["crop.jpg"] = encode(cv2.resize(crop(lesions[3], 0.7)[:, ::-1], (96, 96)))
    index = built(tmp_path, [{"path": name} for name in images], images)
    every = np.array([(a, b) for a in range(len(index)) for b in range(a)])
    assert not audit.audit(index).document["drop"]
    found = audit.audit(index, suggest=lambda a, b: every).document["findings"]["duplicates"]
    assert [sorted(map(stem, group["keys"])) for group in found] == [["crop", "own-3"]]


def test_the_demo_set_has_no_copies(lesions: list[Array]) -> None:
    thumbs = np.stack([hashes.thumbnail(image) for image in lesions])
    pairs = hashes.propose(thumbs, hashes.hashes(thumbs), itself=True)
    fine = [hashes.details(thumb) for thumb in thumbs]
    agree = [hashes.agreement(hashes.turned(fine[a], turn), fine[b]) for a, b, turn in pairs.tolist()]
    assert max(agree, default=0) < hashes.AGREE


def test_cells_find_what_comparing_everything_finds(lesions: list[Array], monkeypatch: pytest.MonkeyPatch) -> None:
    thumbs = np.stack([hashes.thumbnail(image) for image in lesions])
    copies = np.stack([hashes.thumbnail(crop(image)[:, ::-1]) for image in lesions[:40]])
    many = np.random.default_rng(0).integers(0, 256, (6000, 18)).astype(np.uint8)
    known = np.concatenate([hashes.hashes(copies), many])
    monkeypatch.setattr(hashes, "EXACT_SEARCH", 1000)
    pairs = hashes.propose(thumbs, known)
    own = pairs[pairs[:, 0] == pairs[:, 1]]
    assert len(own) >= 38
    assert set(own[:, 2]) == {1}


@pytest.mark.parametrize("turn", hashes.ORIENTATIONS)
def test_the_hash_of_a_turned_picture_is_the_turned_hash(lesions: list[Array], turn: int) -> None:
    thumb = hashes.thumbnail(lesions[0])
    turned = hashes._bits(hashes._spectrum(hashes.turned(thumb, turn)[None]), 0)
    assert (hashes._bits(hashes._spectrum(thumb[None]), turn) == turned).all()


def test_what_a_set_consists_of_and_its_rims(lesions: list[Array], tmp_path: Path) -> None:
    images, rows = {}, []
    for n, image in enumerate(lesions[:30]):
        framed = image.copy()
        framed[:9] = framed[-9:] = 0
        images[f"own-{n}.jpg"] = encode(framed if n % 10 == 3 else half(image) if n == 7 else image)
        row = {"path": f"own-{n}.jpg", "label": "" if n % 5 == 0 else "ab"[n % 2], "source": "xy"[n % 2]}
        rows.append(row | {"split": "train" if n < 20 else "test", "site": "arm" if n < 25 else "", "age": str(20 + n)})
    document = audit.audit(built(tmp_path, rows, images)).document
    framed = {stem(key) for key in document["findings"]["rims"]["frame"]}
    assert {"own-3", "own-13", "own-23"} <= framed
    found = document["tallies"]
    assert found["classes"] == {"a": {"train": 8, "test": 4}, "b": {"train": 8, "test": 4}}
    assert found["sources"] == {"x": {"a": 12, "": 3}, "y": {"b": 12, "": 3}}
    assert {split: sum(counts.values()) for split, counts in found["splits"].items() if counts} == {
        "train": 20,
        "test": 10,
    }
    assert found["meta"]["site"] == {"missing": 5, "distinct": 1, "values": {"arm": 25}}
    assert found["meta"]["age"]["quartiles"] == [20, 27.25, 34.5, 41.75, 49]
    assert "values" not in found["meta"]["path"]  # a name of each image
    assert found["sizes"] == {
        "short_side": [48, 96, 96, 96, 96],
        "distinct": 2,
        "common": {"96 x 96": 29, "48 x 48": 1},
    }


def test_an_unreadable_image_is_named_and_the_rest_is_audited(planted: Index, tmp_path: Path) -> None:
    shutil.copytree(planted.root, tmp_path / "set")
    offset, size = planted.column("image")[4]
    shard = tmp_path / "set" / planted.shards[0]["name"]
    with shard.open("r+b") as file:
        file.seek(int(offset))
        file.write(bytes(int(size)))
    document = audit.audit(Index.open(tmp_path / "set")).document
    assert [entry["key"] for entry in document["findings"]["unreadable"]] == [planted.key(4)]
    assert "not a JPEG" in document["findings"]["unreadable"][0]["reason"]


def test_excluded_reads_what_write_wrote(found: audit.Audit, planted: Index, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    audit.write(found.document | {"leaks": [planted.key(20)]}, path)
    numbers = audit.excluded(path, planted)
    assert {planted.key(int(i)) for i in numbers} == {*found.document["drop"], planted.key(20)}


def test_of_a_mix_the_samples_of_the_audited_set_are_left_out(
    found: audit.Audit, planted: Index, index: Index, tmp_path: Path
) -> None:
    audit.write(found.document | {"leaks": [planted.key(20)]}, tmp_path / "audit.json")
    alone = audit.excluded(tmp_path / "audit.json", planted)
    other = {**found.document, "index": {"name": "o", "sha256": index.sha256, "samples": 60}, "drop": [index.key(7)]}
    audit.write(other | {"leaks": []}, tmp_path / "other.json")
    for members, first, own in (([planted, index], 0, len(planted)), ([index, planted], len(index), 0)):
        mix = Mix(members)
        assert audit.excluded(tmp_path / "audit.json", mix).tolist() == (alone + first).tolist()
        assert audit.excluded(tmp_path / "other.json", mix).tolist() == [own + 7]
    audit.write(other | {"index": found.document["index"] | {"sha256": "another"}}, tmp_path / "other.json")
    with pytest.raises(DataError, match=r"made of another index .* than .* \+ .* is now"):
        audit.excluded(tmp_path / "other.json", Mix([planted, index]))


def test_an_audit_of_another_index_excludes_nothing(found: audit.Audit, index: Index, tmp_path: Path) -> None:
    audit.write(found.document, tmp_path / "audit.json")
    with pytest.raises(DataError, match="made of another index"):
        audit.excluded(tmp_path / "audit.json", index)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": "hybridssl-audit", "version": 99})])
def test_what_is_no_audit_is_refused(text: str, planted: Index, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(DataError, match=r"is no audit\.json"):
        audit.excluded(tmp_path / "audit.json", planted)


def test_only_an_audit_is_replaced(found: audit.Audit, tmp_path: Path) -> None:
    audit.write(found.document, tmp_path / "audit.json")
    audit.write(found.document, tmp_path / "audit.json")
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(DataError, match="nothing was touched"):
        audit.write(found.document, tmp_path / "notes.json")


def test_a_label_that_the_other_source_cannot_name_is_no_conflict(lesions: list[Array], tmp_path: Path) -> None:
    rows = [
        {"path": "a.jpg", "label": "naevus", "source": "x"},
        {"path": "b.jpg", "label": "benign", "source": "y"},
        {"path": "c.jpg", "label": "melanoma", "source": "x"},
    ]
    index = built(tmp_path, rows, {row["path"]: encode(lesions[0]) for row in rows})
    at = {stem(index.key(i)): i for i in range(3)}
    assert not audit.conflict(index, (at["a"], at["b"]))
    assert audit.conflict(index, (at["a"], at["c"]))


def test_groups_join_through_others(planted: Index) -> None:
    pairs = duplicates.Pairs(np.array([0, 1]), np.array([1, 2]), ["bytes", "near"], np.array([1.0, 0.7]))
    looks = duplicates.Looks(*[np.zeros((len(planted), 2))] * 7, reasons={})  # type: ignore[arg-type]
    (group,) = duplicates.groups(planted, looks, pairs)
    assert sorted(group.rows) == [0, 1, 2]
    assert (group.how, group.agreement) == ("near", 0.7)


def test_where_an_audit_cannot_go_is_told_before_the_work(
    photos: Path, index: Index, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "audit.json").write_text("{}")
    monkeypatch.setattr("shards.audit.audit", None)
    assert main(["audit", str(index.root), "--out", str(tmp_path)]) == 2
    assert "is there and no audit: choose another --out" in capsys.readouterr().err


def test_threads_do_not_close_each_others_shards(tmp_path: Path, monkeypatch) -> None:
    index, busy = demo.generate(tmp_path / "demo", samples=60, seed=0, size=32), []
    read = index._bytes

    def slow(i: int, member: str) -> bytes | None:
        assert not busy, "two threads at once"
        busy.append(i)
        time.sleep(0.001)
        busy.clear()
        return read(i, member)

    monkeypatch.setattr(index, "_bytes", slow)
    assert look(index).readable.all()
