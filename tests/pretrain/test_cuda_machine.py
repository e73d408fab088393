"""What goes on around a step on a GPU, where it can be shown without one."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from hybridssl import backbone, precision
from hybridssl.backbone import BackboneOptions
from hybridssl.depth import draw, residual
from hybridssl.views import resize_for_eval
from pretrain import data, fingerprint, fit, measure, profiling
from pretrain.command import load
from pretrain.guard import Unchanged
from pretrain.profiling import Profiler
from shards.format import decode
from shards.index import Index
from tests.pretrain.test_fit import CPU, Memory

SMALL = BackboneOptions("vit_tiny_patch16_224", {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2})


class Called(TorchDispatchMode):
    """The operations that run in here, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_gpu_that_only_emulates_bf16_has_no_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says of a T4: yes to whoever does not ask about emulation."""
    t4 = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: t4)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    assert not fingerprint.machine().bf16
    t4.major = 8
    assert fingerprint.machine().bf16


def test_a_trace_counts_the_time_of_a_gpu_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lists it with the operation that started a kernel, with the kernel, and with whatever was around both."""

    def event(key: str, device: DeviceType, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(key=key, device_type=device, self_device_time_total=microseconds, count=3)

    listed = [
        event("aten::mm", DeviceType.CPU, 3000),
        event("aten::add", DeviceType.CPU, 1000),
        event("sm90_xmma_gemm", DeviceType.CUDA, 3000),
        event("vectorized_elementwise_kernel", DeviceType.CUDA, 1000),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 500),
        event("ProfilerStep*", DeviceType.CPU, 0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiling, "profile", lambda **_: None)
    table = Profiler(tmp_path)._table(cast(Any, SimpleNamespace(key_averages=lambda: listed)))
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["aten::mm", "75.0%", "1.00"], ["aten::add", "25.0%", "0.33"]]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("CUDA error: out of memory"),
            True,
        ),  # of the driver, which loads a kernel when it is first called
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_is_full_is_known_whoever_says_so(
    error: Exception, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit.torch, "cuda", Memory(free=100))

    def trial(*_: Any) -> None:
        raise error

    monkeypatch.setattr(fit, "try_step", trial)
    if full:
        assert not fit._fits(cast(Any, None), cast(Any, None), CPU, 4, 4)
    else:
        with pytest.raises(type(error)):
            fit._fits(cast(Any, None), cast(Any, None), CPU, 4, 4)


def test_what_a_trial_held_is_free_when_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever still knew of the error would hold its traceback, that the frames, and these all tensors of the step."""
    memory, held, gone = Memory(free=100), [], []
    monkeypatch.setattr(fit.torch, "cuda", memory)

    def trial(*_: Any) -> None:
        images = torch.zeros(8)
        held.append(weakref.ref(images))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit, "try_step", trial)
    monkeypatch.setattr(memory, "empty_cache", lambda: gone.append([one() is None for one in held]))
    assert not fit._fits(cast(Any, None), cast(Any, None), CPU, 4, 4)
    assert gone == [[], [True]]


def test_the_doctor_times_the_step_that_the_run_will_take(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    """Recomputed where the recipe says so, or it would not fit where it was found to; in the precision it will find."""
    recipe = load([*tiny, f"out={tmp_path}", "precision=auto", "efficiency.checkpoint=true", "efficiency.packed=false"])
    seen: list[Any] = []
    build, autocast = measure.build_student, torch.autocast

    def watched(*args: Any, **more: Any) -> Any:
        learner = build(*args, **more)
        learner.register_forward_pre_hook(lambda *_: seen.append(learner.backbone))
        return learner

    monkeypatch.setattr(measure, "build_student", watched)
    monkeypatch.setattr(precision, "faster_in_bf16", lambda device: True)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: asked.append((a, k)) or autocast(*a, **k))
    measure.measure(recipe, Index.open(recipe.data.train))
    assert seen
    assert all(one.model.grad_checkpointing and not one.packed for one in seen)
    assert (("cpu", torch.bfloat16), {"enabled": True}) in asked


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_images_of_a_probe_keep_their_order_whoever_decodes_them(threads: int, count: int, index: Path) -> None:
    there = Index.open(index)
    numbers = np.arange(20, 20 + count)
    found = list(data.eval_images(there, numbers, 32, 4, threads))
    assert [len(one) for one in found] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    wanted = [resize_for_eval(decode(there.read(int(n)).image, 32, 3), 32) for n in numbers]
    assert np.array_equal(torch.cat(found).numpy(), np.stack(wanted))


def test_what_a_probe_cannot_read_is_black(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, read = Index.open(index), Index.read

    def damaged(self: Index, number: int) -> Any:
        sample = read(self, number)
        return replace(sample, image=sample.image[:20]) if number == 5 else sample

    monkeypatch.setattr(Index, "read", damaged)
    (found,) = data.eval_images(there, np.array([4, 5, 6]), 32, 8, 2)
    assert [bool(image.any()) for image in found] == [True, False, True]
    network = backbone.build(SMALL, 3, 32).eval()
    options = load(["recipe=demo", "data.train=x", "out=y", "views.global_size=32"]).views
    features = data.features(network, there, np.arange(9), options, batch=4, threads=2)
    assert features.shape == (9, 32)
    assert np.allclose(features, data.features(network, there, np.arange(9), options, batch=9), atol=1e-5)


def test_buffers_take_a_few_kernels_however_many_there_are() -> None:
    calls = []
    for layers in (1, 40):
        network = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers)))
        with Called() as called:
            unchanged = Unchanged(network)
            network[0].running_mean += 1
            unchanged.keep(torch.tensor(1.0))
        assert network[0].running_mean.abs().max() == 0
        calls.append(sum(name in ("where", "gt", "cat", "clone", "copy_", "_foreach_copy_") for name in called.names))
    assert calls[0] == calls[1]


def test_samples_that_are_picked_out_go_back_without_a_sort() -> None:
    """On a GPU the gradient of x[rows] sorts them first; that of `index_select` adds, and no row is there twice."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, requires_grad=True)
    drawn = draw(((10, 4),), 0.5, x)
    with Called() as called:
        residual(x, drawn, lambda t: 2 * t).sum().backward()
    assert drawn.rows is not None
    assert not {"index", "index_put", "index_put_", "_index_put_impl_"} & set(called.names)
    assert x.grad is not None
    assert x.grad[drawn.rows].eq(1 + 2 * 2).all()
    assert x.grad.sum() == 40 * 6 + 20 * 6 * 4
