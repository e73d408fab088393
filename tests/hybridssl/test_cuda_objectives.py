"""Every objective on a CUDA device: what it says there, and whether the host waits for it. `pytest -m gpu`.

test_waiting.py asks the second without a GPU, of all that torch's Python side does; a kernel that waits inside is seen
here alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hybridssl import student
from hybridssl.types import Views
from pretrain.guard import Guard, GuardOptions, Unchanged
from tests.hybridssl import arms

pytestmark = pytest.mark.gpu
ARMS = arms.arms()
CUDA = "cuda"


def step(name: str, device: str, bf16: bool = False, times: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step; of the last, where there are several, in which the host may not wait."""
    learner = arms.learner({name: ARMS[name]})
    teacher = arms.taught(learner).to(device)
    learner = learner.to(device)
    views, batch = arms.data(4, even=arms.of_visible_patches(ARMS[name]))
    seen = Views(*(view.to(device) for view in (views.global_, views.local, views.clean)))  # type: ignore[union-attr]
    given = batch.pin_memory() if device == CUDA else batch
    guard, losses = Guard(GuardOptions(), next(learner.parameters()).device), {}
    for time in range(times):
        learner.zero_grad()
        with nothing_waits() if time else contextlib.nullcontext():
            unchanged = Unchanged(learner, teacher)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                losses = arms.losses(learner, teacher, [(seen, given.to(device))])
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 1e9)
            refused = guard.judge(time, torch.stack(list(losses.values())).sum(), norm, 0, [])
            student.update_teacher(teacher, learner, 1.0, refused)
            unchanged.keep(refused)
    gradients = {n: p.grad.cpu() for n, p in learner.named_parameters() if p.grad is not None}
    return {k: v.detach().cpu() for k, v in losses.items()}, gradients


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ARMS)
def test_an_objective_says_on_the_device_what_it_says_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding; products have none
    (losses, gradients), (here, mine) = step(name, CUDA), step(name, "cpu")
    torch.testing.assert_close(losses, here, rtol=1e-3, atol=1e-4)
    assert gradients.keys() == mine.keys()
    largest = max(float(gradient.abs().max()) for gradient in mine.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, mine[parameter], rtol=1e-2, atol=1e-3 * largest, msg=parameter)


@pytest.mark.parametrize("name", ARMS)
def test_in_bf16_the_host_does_not_wait_and_all_is_finite(name: str) -> None:
    losses, gradients = step(name, CUDA, bf16=True, times=3)
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))
