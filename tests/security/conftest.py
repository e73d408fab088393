"""Hostile things to put in the way of every reader, and a sign that shows when one of them was obeyed."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.finetune.conftest import cache, export_folder, index, new_index, run_folder, table  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _own_precision() -> None:
    """accelerate keeps the device and precision of whatever this process trained last, and refuses another."""
    AcceleratorState._reset_state(True)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Sign:
    """What says that something of an attacker's was run."""

    def __init__(self, folder: Path):
        self.path = folder / "was-run"

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(Bomb(self.path))

    @property
    def checkpoint(self) -> bytes:
        """As torch.save writes it, with what any state dict could hold."""
        file = io.BytesIO()
        torch.save({"model": torch.zeros(2), "bomb": Bomb(self.path)}, file)
        return file.getvalue()

    @property
    def numpy(self) -> bytes:
        file = io.BytesIO()
        np.save(file, np.array([Bomb(self.path)], dtype=object), allow_pickle=True)
        return file.getvalue()

    @property
    def python(self) -> str:
        """A module that shows the sign when it is imported."""
        return f"import os\nos.makedirs({str(self.path)!r}, exist_ok=True)\nclass Evil: pass\n"

    @property
    def yaml(self) -> str:
        return f"!!python/object/apply:os.mkdir [{str(self.path)!r}]\n"

    def shown(self) -> bool:
        return self.path.exists()


@pytest.fixture
def sign(tmp_path: Path) -> Iterator[Sign]:
    made = Sign(tmp_path)
    yield made
    assert not made.shown(), "something of the attacker's was run"


def picture(seed: int = 0, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
