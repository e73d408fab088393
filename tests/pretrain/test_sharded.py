"""A model parted over two processes takes the steps of one that is whole in each, and leaves the same files.

Run as a program, this file becomes the two processes: one import for all runs, which follow one another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from hybridssl import sharding
from pretrain import report
from pretrain.keeper import Keeper
from pretrain.loop import main
from pretrain.stop import Stop
from tests.pretrain.conftest import TINY, lines, losses
from tests.pretrain.forks import join, meeting
from tests.pretrain.test_curriculum import DENSENET
from tests.pretrain.test_processes import MASKED, WITHOUT

ROOT = Path(__file__).resolve().parents[2]
SHARDED = "efficiency.sharded=true"
# Two micro-batches a step and process, two probes, and every checkpoint.
LONG = ["batch.micro=2", "objectives.spread.group=2", "probe.every=2", "probe.images=30", "save.keep=9"]
ROUNDING = 1e-4  # of float32 in four steps: relative for losses, of a tensor's largest for moments; for weights 10 x


@pytest.fixture(scope="module")
def begun(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four runs: whole, sharded, and each gone on with from the other's step 2."""
    folder = tmp_path_factory.mktemp("sharded")
    common = [*TINY, *LONG, f"data.train={index}"]
    two([[*common, f"out={folder / 'whole'}"], [*common, SHARDED, f"out={folder / 'sharded'}"]])
    for name in ("whole", "sharded"):
        half(folder / name, folder / f"{name}-on")
    two([[*common, SHARDED, f"out={folder / 'whole-on'}"], [*common, f"out={folder / 'sharded-on'}"]])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["sharded", "whole-on", "sharded-on"])
def test_a_sharded_run_is_that_of_whole_models(name: str, begun: Path) -> None:
    alike(begun / name, begun / "whole", ROUNDING)
    probes = [[line for line in lines(begun / run) if "probe/knn" in line] for run in (name, "whole")]
    assert [line["step"] for line in probes[0]] == [2, 4]
    for one, other in zip(*probes, strict=True):
        assert one["probe/rankme"] == pytest.approx(other["probe/rankme"], rel=1e-3)
        assert one["probe/knn"] == pytest.approx(other["probe/knn"], abs=0.1)  # of few images


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_goes_on_with_what_two_began(begun: Path, index: Path, tmp_path: Path) -> None:
    half(begun / "sharded", tmp_path / "one")
    with mock.patch.object(report, "write", lambda run, *_: run / "report.html"):
        AcceleratorState._reset_state(True)
        assert main([*TINY, *LONG, f"data.train={index}", f"out={tmp_path / 'one'}"]) == 0
    alike(tmp_path / "one", begun / "whole", ROUNDING)


def test_what_cannot_be_parted_is_told(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    AcceleratorState._reset_state(True)
    assert main([*tiny, SHARDED, f"out={tmp_path / 'run'}"]) == 2
    assert "there is one: start more with `accelerate launch --multi_gpu" in capsys.readouterr().err
    assert main([*tiny, SHARDED, "batch.micro=auto", f"out={tmp_path / 'run'}"]) == 2
    assert "batch.micro=auto tries steps with the whole model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


HOW = {
    "mae": [*WITHOUT, *MASKED, "objectives.pixels={style: mae, width: 32, depth: 1}"],
    "anchored": ["objectives.gram={refresh: 0.5}", "objectives.anchor.weight=1", "efficiency.packed=false"],
    "recomputed": ["efficiency.checkpoint=true", "backbone.drop_path=0.3"],
    "lora": ["backbone.lora=2", "optim.layer_decay=0.7", "objectives.anchor.weight=1"],  # and weights to begin with
    "late": ["objectives.ibot.start=0.5", "objectives.labels.start=0.5"],
    "resting": ["optim.heads_first=0.5"],
    "convolutional": DENSENET,
    # Its features are all alike at first, and KoLeo takes the logarithm of the rounding between them.
    "eva": ["backbone.name=vit_small_patch16_dinov3", "objectives.spread=null"],
    "compiled": ["efficiency.compile=true", "efficiency.checkpoint=true"],
    "bf16": ["precision=bf16"],
}
LOOSE = {"bf16": 0.05}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_that_a_recipe_may_ask_for_is_the_same_sharded(index: Path, weights: Path, tmp_path: Path) -> None:
    begin = {"lora": [f"backbone.weights={weights}"], "anchored": [f"backbone.weights={weights}"]}
    table = [
        [*kept(keys), *keys, *begin.get(name, []), *more, f"data.train={index}", f"out={tmp_path / name}{end}"]
        for name, keys in HOW.items()
        for end, more in (("-whole", []), ("-sharded", [SHARDED]))
    ]
    two(table, "traced")
    for name in HOW:
        alike(tmp_path / f"{name}-sharded", tmp_path / f"{name}-whole", LOOSE.get(name, ROUNDING))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_that_is_bad_in_one_part_is_refused_in_all(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    two([[*TINY, SHARDED, f"data.train={index}", f"out={out}", "save.keep=9"]], "poisoned")
    assert [line["skipped"] for line in lines(out)] == [0, 0, 1, 0]
    before, bad, after = (tensors(out, step) for step in (2, 3, 4))
    student = [key for key in before if key.startswith("student.")]
    assert all(torch.equal(before[key], bad[key]) for key in before)
    assert sum(not torch.equal(bad[key], after[key]) for key in student) > 10
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_resumed_a_sharded_run_is_the_same_bit_for_bit(begun: Path, index: Path, tmp_path: Path) -> None:
    run = [*TINY, *LONG, SHARDED, f"data.train={index}", f"out={tmp_path / 'run'}"]
    two([run], "killed", codes=[-signal.SIGKILL] * 2)
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
    assert not (tmp_path / "run" / "checkpoints" / "step-4").exists()
    two([run])
    assert losses(tmp_path / "run") == losses(begun / "sharded")
    mine, theirs = tensors(tmp_path / "run"), tensors(begun / "sharded")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def kept(keys: Sequence[str]) -> list[str]:
    """Of TINY, what `keys` do not set themselves."""
    return [word for word in TINY if word.partition("=")[0] not in {one.partition("=")[0] for one in keys}]


def alike(run: Path, other: Path, rounding: float) -> None:
    """Losses, norms, and all that the last checkpoint holds."""
    for mine, theirs in zip(losses(run), losses(other), strict=True):
        assert mine == pytest.approx(theirs, rel=rounding, abs=rounding), run.name
    ours, its = tensors(run), tensors(other)
    assert ours.keys() == its.keys()
    apart = {key: difference(ours[key], its[key]) for key in its}
    # A key's bias has no gradient but for rounding, of which Adam makes steps.
    wrong = {key: far for key, far in apart.items() if not far <= rounding * (1 if "|" in key else 10)}
    assert not wrong, "\n".join(f"{far:.1e} {key}" for key, far in wrong.items())


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6)) if one.numel() else 0.0


def tensors(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")


def half(run: Path, other: Path) -> None:
    """The run as it was when it had been killed in its third step."""
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints" / "step-4")


def two(runs: Sequence[Sequence[str]], fault: str = "", codes: Sequence[int] = (0, 0)) -> None:
    """Make `runs`, one after the other, in two processes, which end with `codes`."""
    places = [meeting() for _ in runs]
    table = json.dumps([(place.port, list(run)) for place, run in zip(places, runs, strict=True)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, __file__, fault, table]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1000)
    assert json.loads(done.stdout.splitlines()[-1]) == list(codes), done.stdout + done.stderr


def one_of_two(rank: int, fault: str, table: str) -> None:
    FAULTS.get(fault, lambda _: None)(rank)  # what is patched stays: the process ends with these runs
    with mock.patch.object(report, "write", lambda run, *_: run / "report.html"):
        for port, arguments in json.loads(table):
            join(rank, port)  # a run ends with its process group
            assert main(arguments) == 0
            AcceleratorState._reset_state(True)


def poisoned(rank: int) -> None:
    """In the third step the part of a gradient that the second process holds is not finite."""
    clip, calls = Accelerator.clip_grad_norm_, []

    def clipped(self: Accelerator, parameters, *rest):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3 and rank == 1:
            sharding.local(next(p.grad for p in parameters if p.grad is not None and len(p) > 1)).fill_(float("nan"))
        return clip(self, parameters, *rest)

    Accelerator.clip_grad_norm_ = clipped  # type: ignore[method-assign]
    Keeper.due = lambda *_: True  # type: ignore[method-assign]  # after a bad step, too


def killed(rank: int) -> None:
    """Both die at the end of the third step; the checkpoint of the second is on the disk by then."""
    save, share, calls = Keeper.save, Stop.share, []

    def saved(self: Keeper, *arguments) -> None:
        save(self, *arguments)
        self.wait()

    def shared(self: Stop) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        share(self)

    Keeper.save, Stop.share = saved, shared  # type: ignore[method-assign]


def traced(rank: int) -> None:
    """Blocks are traced and cut into graphs as ever, but no code is generated: that takes minutes."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]


FAULTS = {"poisoned": poisoned, "killed": killed, "traced": traced}


if __name__ == "__main__":
    import peft  # noqa: F401  # what runs import late, they would import twice

    children = []
    for number in (0, 1):
        child = os.fork()
        if not child:
            code = 1
            try:
                one_of_two(number, *sys.argv[1:])
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
