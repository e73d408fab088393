from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards import scan
from shards.audit import FORMAT, excluded
from shards.errors import DataError
from shards.format import hash64
from shards.index import Index


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def copy(index: Index, tmp_path: Path) -> Path:
    shutil.copytree(index.root, tmp_path / "set")
    return tmp_path / "set"


def test_columns_agree_with_the_samples(index: Index) -> None:
    assert len(index) == 60
    assert index.classes == ("melanoma", "nevus", "ulcer")
    assert index.sources == ("a", "b")
    assert index.vocabulary == {"a": ["melanoma", "ulcer"], "b": ["nevus"]}
    assert index.named().tolist() == [[True, False, True], [False, True, False]]
    for i in range(len(index)):
        sample = index.read(i)
        label = index.column("label")[i]
        assert (index.classes[label] if label >= 0 else None) == (sample.labels[0] if sample.labels else None)
        assert index.sources[index.column("source")[i]] == sample.source
        assert index.column("group")[i] == hash64(sample.group.encode())
        assert index.column("digest")[i] == hash64(sample.image)
        name, offset = index.shard_of(i)
        with (index.root / name).open("rb") as file:
            file.seek(offset)
            assert file.read(len(sample.image)) == sample.image
    index.verify()


def test_webdataset_reads_the_same_samples(index: Index) -> None:
    import webdataset

    tars = [str(index.root / shard["name"]) for shard in index.shards]
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [index.key(i) for i in range(len(index))]
    assert [sample["jpg"] for sample in theirs] == [index.read(i).image for i in range(len(index))]


def test_an_index_can_be_sent_to_a_spawned_process(index: Index) -> None:
    index.read(3)
    again = pickle.loads(pickle.dumps(index))
    assert not again._maps
    assert len(pickle.dumps(index)) < 10_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(index.read, (3,)) == index.read(3)


def test_maps_are_closed_beyond_a_number(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.index.OPEN_SHARDS", 2)
    fresh = Index.open(index.root)
    assert [fresh.read(i).key for i in range(60)] == [index.key(i) for i in range(60)]
    assert len(fresh._maps) == 2


def test_select_by_split(index: Index) -> None:
    assert len(index.select()) == len(index.select(None)) == 60  # no split: all of it is for training
    with pytest.raises(DataError, match=r"no sample in split 'val'; it has \(none\) 60"):
        index.select(["val"])


def test_members_that_lie_apart_are_named(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    images = [(f"{i}.jpg", jpeg(i)) for i in range(3)]
    write_tar(tmp_path / "a.tar", [*images, *((f"{i}.cls", b"1") for i in range(3))])
    with pytest.raises(DataError, match=r"a\.tar: the members of sample '0' do not lie together"):
        scan.write(tmp_path)


def test_foreign_tars_are_indexed_where_they_lie(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    members = [
        ("in/0001.jpg", jpeg(1)),
        ("in/0001.cls", b"3\n"),
        ("in/0002.JPEG", jpeg(2)),
        ("in/0002.json", json.dumps({"label": ["x", "y"], "width": 64}).encode()),
        ("in/0002.npy", b"whatever"),
        ("in/0003.txt", b"no image here"),
        ("in/0004.png", b"\x89PNG\r\n\x1a\n"),
        ("in/0004.txt", "Bläschen".encode()),
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    before = tar.read_bytes()
    index = scan.write(tmp_path, source="clinic", split="train", in_place=True)
    assert tar.read_bytes() == before
    assert [index.key(i) for i in range(3)] == ["in/0001", "in/0002", "in/0004"]
    samples = [index.read(i) for i in range(3)]
    assert [sample.labels for sample in samples] == [("3",), ("x", "y"), ()]
    assert [sample.source for sample in samples] == ["clinic"] * 3
    assert [sample.split for sample in samples] == ["train"] * 3
    assert samples[1].meta == {"width": 64}
    assert samples[2].text == "Bläschen"
    assert index.column("label").tolist() == [0, 1, -1]


def test_a_key_names_one_sample_where_shards_number_alike(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    """Left out by its key, an image of another shard would go with it."""
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"{i:04d}.jpg", jpeg(10 * shard + i)) for i in range(2)])
    index = scan.write(tmp_path, in_place=True)
    assert [index.key(i) for i in range(4)] == ["00000/0000", "00000/0001", "00001/0000", "00001/0001"]
    assert index.read(2).image == jpeg(10)
    document = {"index": {"sha256": index.sha256}, "drop": ["00001/0000"], "leaks": [], "format": FORMAT, "version": 1}
    (tmp_path / "audit.json").write_text(json.dumps(document))
    assert excluded(tmp_path / "audit.json", index).tolist() == [2]


@pytest.mark.parametrize("name", ["a.pkl", "a.PTH", "a.seg.pickle", "a.pt", "a.pyd"])
def test_pickled_members_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"x")])
    with pytest.raises(DataError, match=rf"x.tar: member '{name}' is pickled"):
        scan.write(tmp_path)


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg"])
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"x")])
    with pytest.raises(DataError, match="leaves its folder"):
        scan.write(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"x.tar: member 'a.jpg' is a link or a special file"):
        scan.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("keep", [100, 700, 1536 + 512, 3 * 512 + 40])
def test_a_cut_tar_is_not_indexed(tmp_path: Path, keep: int) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", bytes(700)), ("b.jpg", bytes(700))])
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x.tar.*cut off"):
        scan.write(tmp_path)


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", bytes(700)), ("b.jpg", bytes(700))])
    data = bytearray(tar.read_bytes())
    data[1536 + 20] = 7
    tar.write_bytes(data)
    with pytest.raises(DataError, match="damaged or cut off at byte 1,536"):
        scan.write(tmp_path)


def test_a_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="to index"):
        scan.write(tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack x.tar.gz first"):
        scan.write(tmp_path)


def test_a_missing_index_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="python -m shards build"):
        Index.open(tmp_path)
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match="python -m shards index"):
        Index.open(tmp_path)


def test_a_cut_or_missing_shard(copy: Path) -> None:
    shard = copy / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"shard-000002.tar has .* bytes where the index says"):
        Index.open(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar is missing"):
        Index.open(copy)


def test_a_changed_byte_is_found_by_verify(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001.tar is not what was indexed"):
        Index.open(copy).verify()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "has version 2, and this hybridssl reads up to 1: update"),
        ({"format": "other"}, "is no index of shards"),
        ({"sources": None}, "is no index of shards"),
        ({"shards": [{"name": "../x.tar", "samples": 60, "bytes": 1, "sha256": ""}]}, "is no file name of a shard"),
        ({"shards": []}, "do not belong together"),
    ],
)
def test_a_header_that_is_not_ours(copy: Path, change: dict[str, object], says: str) -> None:
    header = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(header | change))
    with pytest.raises(DataError, match=says):
        Index.open(copy)


@pytest.mark.parametrize("name", ["index.json", "index.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 64])
def test_a_corrupt_index(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=r"index the folder again"):
        Index.open(copy)


def test_columns_are_mapped_and_not_read(index: Index) -> None:
    assert isinstance(Index.open(index.root).column("image"), np.memmap)
    with pytest.raises(DataError, match=r"no column 'labels'; it has"):
        index.column("labels")
