"""The folder of a build takes its place whatever an earlier one has left beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shards.build import build, build_part, join
from shards.options import BuildOptions


@pytest.mark.parametrize("stays", [False, True])
def test_what_an_earlier_build_could_not_remove_is_not_in_the_way(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """A file that was open elsewhere, say, or the program was killed as it removed what it had replaced."""
    out, old = tmp_path / "out", tmp_path / "out.old.partial"
    build(photos / "images", out)
    shutil.copytree(out, old)
    (old / "index.json").unlink()
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path == old and not ignore_errors:
            raise OSError("busy")
        if path != old:
            real(path, ignore_errors)

    if stays:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
    built = build(photos / "images", out, photos / "labels.csv", BuildOptions(overwrite=True))
    assert built.index.sources == ("a", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", old.name] if stays else ["out"])


def test_the_parts_of_another_build_are_no_leftovers(photos: Path, tmp_path: Path) -> None:
    """One whose folder is called OUT.old has its unfinished shards where OUT would go."""
    quiet = lambda done, total: None  # noqa: E731
    build_part(photos / "images", tmp_path / "out.old", None, BuildOptions(shard_size="30", part=(1, 2)), quiet)
    for overwrite in (False, True):
        build(photos / "images", tmp_path / "out", options=BuildOptions(overwrite=overwrite))
    build_part(photos / "images", tmp_path / "out.old", None, BuildOptions(shard_size="30", part=(2, 2)), quiet)
    assert len(join(tmp_path / "out.old").index) == 60
