"""Two processes equal one with the double batch, under DDP and sharded by FSDP2.

Run as a program, this file becomes the two processes: one import and one launch for everything.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from hybridssl import dist, optim, sharding, student
from hybridssl.cnn import follow_statistics
from hybridssl.optim import OptimOptions
from hybridssl.student import Student
from tests.hybridssl import arms, dense

ROOT = Path(__file__).resolve().parents[2]
IMAGES, STEPS = 8, 2
OPTIM = OptimOptions(lr=0.01, warmup=0.0)
SPLITS = (5, 7, 10)  # rows of the first process; at 10 the second has none
WORLDS = {"uneven": False, "even": True}  # masks: as many in every view, as MAE needs them, or not
Wrapped = tuple[nn.Module, Callable[[], contextlib.AbstractContextManager]]  # the second: gradients stay unsummed


def test_alone_everything_is_a_no_op() -> None:
    t = torch.tensor([1.0, 2.0])
    assert dist.all_reduce_sum(t) is t
    assert dist.all_reduce_max(t) is t
    assert (dist.rank(), dist.world_size()) == (0, 1)
    assert dist.all_agree(True)
    assert not dist.all_agree(False)


@pytest.mark.timeout(900)  # half a minute where little else runs
def test_two_processes_equal_one_under_ddp_and_under_fsdp2(tmp_path: Path) -> None:
    """All objectives over two steps: losses, gradients, and in the end the weights and buffers of both copies."""
    store = tmp_path / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, __file__, str(store)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr

    expected = {f"sinkhorn.{rows}": assigned(scores()) for rows in SPLITS}
    expected["running_mean"] = running_mean(scores())
    for world, even in WORLDS.items():
        alone = train(even, lambda learner, _: (learner, contextlib.nullcontext))
        expected |= {f"{how}/{world}/{name}": value for how in HOW for name, value in alone.items()}
    assert {"ddp/uneven/0/loss/dino", "fsdp/even/1/loss/pixels style=mae/pixels"} <= expected.keys()
    found = load_file(f"{store}.safetensors")
    assert found.keys() == expected.keys()
    apart = {name: difference(value, expected[name]) for name, value in found.items()}
    wrong = {name: far for name, far in apart.items() if not far < 1e-6}
    assert not wrong, "\n".join(f"{far:.1e} {name}" for name, far in list(wrong.items())[:40])


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of two tensors of one shape, as a share of the largest value."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12)) if one.numel() else 0.0


def train(even: bool, wrap: Callable[[Student, Student], Wrapped]) -> dict[str, Tensor]:
    """Two steps of the arms that can stand such masks, as the loop makes them; double precision."""
    beside = ("dino", "ibot", "labels")
    chosen = {n: arm for n, arm in arms.arms().items() if arms.of_visible_patches(arm) is even or n in beside}
    with arms.float64():
        learner = arms.learner(chosen)
        teacher = arms.taught(learner)
        model, waits = wrap(learner, teacher)
        optimizer = optim.build(learner.backbone, learner.objectives, OPTIM)
        found: dict[str, Tensor] = {}
        for step in range(STEPS):
            optim.set_hyperparameters(optimizer, OPTIM, IMAGES, step / STEPS)
            mine = micro_batches(even, step)
            for name, loss in arms.losses(model, teacher, mine, step / STEPS, waits).items():
                found[f"{step}/loss/{name}"] = dist.all_reduce_sum(loss) / dist.world_size()
            for name, parameter in learner.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    found[f"{step}/gradient/{name}"] = sharding.whole(parameter.grad).clone()
            optimizer.step()
            optimizer.zero_grad()
            student.update_teacher(teacher, learner, 0.5)
        for who, one in {"student": learner, "teacher": teacher}.items():
            found |= {f"{who}/{name}": sharding.whole(value.detach()) for name, value in one.state_dict().items()}
    return found


def micro_batches(even: bool, step: int) -> list:
    """Of this process: consecutive quarters of the batch, as the stream deals them out; alone: all of it at once."""
    views, batch = arms.data(IMAGES, even, seed=step)
    if dist.world_size() == 1:
        return [(views, batch)]
    return arms.parts(views, batch, 4)[2 * dist.rank() : 2 * dist.rank() + 2]


def ddp(learner: Student, teacher: Student) -> Wrapped:
    model = DistributedDataParallel(learner)
    return model, model.no_sync


def fsdp(learner: Student, teacher: Student) -> Wrapped:
    sharding.shard(learner, teacher, torch.device("cpu"))
    return learner, contextlib.nullcontext  # summed after each micro-batch: a whole gradient would not fit


HOW = {"ddp": ddp, "fsdp": fsdp}


def scores() -> Tensor:
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(3))


def assigned(rows: Tensor) -> Tensor:
    """[N, 4]: as if the four numbers of a row were its coordinates, and the axes the prototypes."""
    return dense.assigned(F.normalize(rows, dim=1), torch.eye(4), 0.1)


def running_mean(rows: Tensor) -> Tensor:
    """The teacher's, after the student has normalised these rows."""
    teacher, student = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    student(rows)
    follow_statistics(teacher, student, 0.5)
    assert torch.equal(teacher.running_mean, student.running_mean)  # the first of their plain mean
    return teacher.running_mean


def one_of_two(rank: int, store: str) -> None:
    torch_dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert (dist.rank(), dist.world_size()) == (rank, 2)
    mine = torch.tensor([rank + 1.0, -float(rank)])
    assert dist.all_reduce_sum(mine).tolist() == [3.0, -1.0]
    assert dist.all_reduce_max(mine).tolist() == [2.0, 0.0]
    assert mine.tolist() == [rank + 1.0, -float(rank)]  # untouched
    assert dist.all_agree(True)
    assert not dist.all_agree(rank == 0)

    found = {}
    for first in SPLITS:
        rows = slice(0, first) if rank == 0 else slice(first, None)
        padded = torch.zeros_like(scores())
        padded[rows] = assigned(scores()[rows])
        found[f"sinkhorn.{first}"] = dist.all_reduce_sum(padded)
    found["running_mean"] = running_mean(scores()[5 * rank : 5 * rank + 5])
    for how, wrap in HOW.items():
        for world, even in WORLDS.items():
            found |= {f"{how}/{world}/{name}": value for name, value in train(even, wrap).items()}
    if rank == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, f"{store}.safetensors")
    torch_dist.barrier()  # gloo aborts now and then when one process leaves before the other
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
