"""No test touches the network; tests marked `gpu` skip with a reason where there is no CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the tests' own servers are


settings.register_profile("busy", deadline=None)  # a machine that does something else makes no test wrong
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Training in this process leaves its allocator as it is: tests of memory come after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.start.keep_freed_memory", lambda: None)
        yield
