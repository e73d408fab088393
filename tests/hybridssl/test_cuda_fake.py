"""What a forward pass on a GPU would refuse, asked without one: torch's fake tensors know of device and type, as CUDA
kernels do, and compute nothing. (They cannot go back: the engine of autograd asks a fake device for its streams.)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hybridssl import attention, backbone, fused, student
from hybridssl.assign import sinkhorn
from hybridssl.backbone import BackboneOptions
from hybridssl.fused import Targets
from hybridssl.student import Student
from hybridssl.types import Batch, Views
from pretrain.guard import Guard, GuardOptions, Unchanged
from tests.hybridssl import arms

ARMS = arms.arms()
GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA device at all")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors on `GPU` can be made; autocast is as on a GPU that computes in bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: self)
    attention.usable.cache_clear()
    attention._mask.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    attention.usable.cache_clear()
    attention._mask.cache_clear()


def there(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    plain = tensor.detach().clone()
    with mode:
        return mode.from_tensor(plain).to(GPU)


def moved(mode: FakeTensorMode, model: nn.Module) -> Any:
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(there(mode, parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else there(mode, buffer)
    return model


def data(mode: FakeTensorMode, even: bool) -> tuple[Views, Batch]:
    views, batch = arms.data(4, even=even)
    batch = batch.counted()
    whole = Views(*(there(mode, view) for view in (views.global_, views.local, views.clean)))  # type: ignore[arg-type]
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "colour"}
    return whole, replace(batch, **{k: there(mode, t) for k, t in tensors.items() if isinstance(t, Tensor)})


@pytest.mark.parametrize("name", [name for name in ARMS if ARMS[name].objective != "guide"])  # which goes back itself
def test_a_step_mixes_neither_devices_nor_types(name: str, gpu: FakeTensorMode) -> None:
    learner = arms.learner({name: ARMS[name]})
    a_step(gpu, learner, arms.taught(learner), data(gpu, arms.of_visible_patches(ARMS[name])))


NETWORKS = {
    "samples dropped": {"name": "vit_tiny_patch16_224", "args": arms.ROOM, "registers": 2, "drop_path": 0.05},
    "samples picked out": {"name": "vit_tiny_patch16_224", "args": arms.ROOM, "registers": 2, "drop_path": 0.3},
    "norms of queries": {"name": "vit_tiny_patch16_224", "args": {**arms.ROOM, "qk_norm": True}},
    "EVA": {"name": "eva02_tiny_patch14_224", "args": arms.ROOM},
    "convolutions": {"name": "resnet10t"},
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_nor_does_a_network(network: str, packed: bool, gpu: FakeTensorMode) -> None:
    options = BackboneOptions(**NETWORKS[network])  # type: ignore[arg-type]
    built = backbone.build(options, 3, arms.SIDE)
    learner = arms.learner({name: ARMS[name] for name in ("dino", "ibot") if built.maskable or name == "dino"})
    for objective in learner.each().values():
        objective.head.mlp[0] = nn.Linear(built.dim, 16)  # type: ignore[index, union-attr]
    learner = Student(built, learner.objectives)
    learner.backbone.packed = packed and built.packable
    a_step(gpu, learner, student.make_teacher(learner), data(gpu, even=False))


def a_step(mode: FakeTensorMode, learner: Student, teacher: Student, given: tuple[Views, Batch]) -> None:
    """All that the loop computes but the way back, and what is one kernel."""
    (views, batch), learner, teacher = given, moved(mode, learner), moved(mode, teacher)
    with mode:
        guard, unchanged = Guard(GuardOptions(), GPU), Unchanged(learner, teacher)
        with torch.autocast("cuda", torch.bfloat16):
            targets = student.targets(teacher, [views, views], [batch, batch], 0.6)
            losses, health = learner(views, targets[1], batch, 0.6, True)
        for parameter in learner.parameters():
            parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(learner.parameters(), 3.0)
        refused = guard.judge(1, torch.stack(list(losses.values())).sum(), norm, 0, [])
        student.update_teacher(teacher, learner, 0.3, refused)
        unchanged.keep(refused)
    assert all(value.device == GPU for value in (*losses.values(), *health.values()))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert {buffer.device for buffer in (*learner.buffers(), *teacher.buffers())} <= {GPU}


def queries(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2 * 5 + 3 * 2, 4, 16, device=GPU, dtype=dtype)


class Xformers(SimpleNamespace):
    """As much of xformers.ops as is called; `kinds`: what it has a kernel for."""

    def __init__(self, *kinds: torch.dtype) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.kinds = kinds
        self.fmha = SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_seqlens=self.from_seqlens))

    def from_seqlens(self, lengths: list[int], device: torch.device) -> tuple[tuple[int, ...], torch.device]:
        return tuple(lengths), device

    def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, p: float = 0.0) -> Tensor:
        if q.dtype not in self.kinds:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs: ...")
        self.calls.append((q.dtype, tuple(q.shape), *attn_bias, p))
        return q


def test_one_kernel_serves_all_lengths_where_xformers_has_one(gpu: FakeTensorMode, monkeypatch) -> None:
    ops = Xformers(torch.bfloat16)
    monkeypatch.setattr(attention, "_xformers", lambda: ops)
    with gpu, torch.autocast("cuda", torch.bfloat16):
        q = queries()  # q and k come in float32 where they have norms of their own
        found = attention.attend(q, q, q.bfloat16(), ((2, 5), (3, 2)), fused=True, dropout=0.1)
    assert found.dtype == torch.bfloat16
    assert ops.calls[1:] == [(torch.bfloat16, (1, 16, 4, 16), (5, 5, 2, 2, 2), GPU, 0.1)]  # the first was the trial


def test_a_trial_in_a_block_that_is_computed_twice_is_not_missed_the_second_time(monkeypatch) -> None:
    tried = []

    class Saves(Xformers):
        def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, p: float = 0.0) -> Tensor:
            tried.append(q.requires_grad and torch.is_grad_enabled())
            return (q * k).exp() * v

    def block(x: Tensor) -> Tensor:
        assert attention.usable(torch.float32, 16, torch.device("cpu"))
        return x.exp().sin()

    monkeypatch.setattr(attention, "_xformers", lambda: Saves(torch.float32))
    attention.usable.cache_clear()
    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    attention.usable.cache_clear()
    with torch.inference_mode():
        block(torch.ones(3))  # a picture of a report may ask first
    assert tried == [True, True]
    attention.usable.cache_clear()
    attention._mask.cache_clear()


@pytest.mark.parametrize("autocast", [True, False])
def test_xformers_that_was_built_for_another_cuda_is_not_called(
    autocast: bool, gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wheel of 0.0.35 is for CUDA 12.8; beside torch for CUDA 13 it imports with a warning, and refuses all."""
    ops = Xformers()
    monkeypatch.setattr(attention, "_xformers", lambda: ops)
    with gpu, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = attention.attend(*[queries()] * 3, ((2, 5), (3, 2)), fused=True)
    assert (found.shape, found.device) == ((16, 4, 16), GPU)
    assert not ops.calls


def test_scores_are_float32_from_factors_that_tensor_cores_take(gpu: FakeTensorMode) -> None:
    with gpu, torch.autocast("cuda", torch.bfloat16):
        z, weight = torch.ones(1, 6, 8, device=GPU), torch.ones(40, 8, device=GPU, requires_grad=True)
        bias = sinkhorn(z[0], weight.detach(), 0.07)
        targets = Targets(z, weight.detach(), 0.07, bias[None])
        loss = fused.cross_entropy(z, weight, targets, 0.1, torch.ones(1, 6, device=GPU))
    assert (bias.dtype, bias.shape) == (torch.float32, (40,))
    assert (loss.dtype, loss.device) == (torch.float32, GPU)


@contextlib.contextmanager
def tensor_cores(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Products as CUDA makes them under autocast, on a CPU; `seen`: their factors."""

    def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
        seen.append((a, b))
        return a.to(low).float() @ b.to(low).float()

    monkeypatch.setattr(fused, "rounding", lambda device: torch.bfloat16)
    monkeypatch.setattr(fused, "product", product)
    monkeypatch.setitem(fused.CHUNK, "cpu", 80)
    yield


def test_what_is_large_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prototypes for all chunks of tokens, and the gradient of the scores for both of its products."""
    torch.manual_seed(0)
    z, theirs = (nn.functional.normalize(torch.randn(1, 6, 8), dim=2) for _ in range(2))
    weight = nn.functional.normalize(torch.randn(40, 8), dim=1)
    targets = Targets(theirs, weight.flip(0), 0.07, torch.zeros(1, 40))
    found = []
    for once in (True, False):
        mine, rows = z.clone().requires_grad_(), weight.clone().requires_grad_()
        seen: list[tuple[Tensor, Tensor]] = []
        with monkeypatch.context() as patch, tensor_cores(patch, seen):
            if not once:
                patch.setattr(fused, "rounded", lambda factor, low: factor)
            loss = fused.cross_entropy(mine, rows, targets, 0.1, torch.full((1, 6), 1 / 6))
        loss.backward()
        found.append((loss, mine.grad, rows.grad))
        large = [factor for pair in seen for factor in pair if 40 in factor.shape]
        assert len(seen) == 4 * 3  # chunks of two tokens
        assert all((factor.dtype == torch.bfloat16) is once for factor in large)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_fake_tensors_refuse_what_cuda_refuses(gpu: FakeTensorMode) -> None:
    """What this file rests on."""
    with gpu:
        here, far = torch.zeros(4, 3), torch.zeros(4, 3, device=GPU)
        with pytest.raises(RuntimeError, match="device"):
            here + far
        with torch.autocast("cuda", torch.bfloat16):
            assert nn.functional.linear(far, far).dtype is torch.bfloat16
