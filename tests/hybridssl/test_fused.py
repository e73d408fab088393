from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hybridssl import fused
from hybridssl.assign import sinkhorn
from hybridssl.fused import Targets, cross_entropy
from tests.hybridssl import dense

ROOT = Path(__file__).resolve().parents[2]
MIX = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)


def some(views: int = 3, teachers: int = 2, tokens: int = 5, prototypes: int = 7, seed: int = 0):
    """Student rows, prototypes, targets and shares, in float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    z, weight = F.normalize(draw(views, tokens, 4), dim=-1), F.normalize(draw(prototypes, 4), dim=-1)
    targets = Targets(F.normalize(draw(teachers, tokens, 4), dim=-1), F.normalize(draw(prototypes, 4), dim=-1), 0.07,
                      draw(1, prototypes))  # fmt: skip
    return z.requires_grad_(), weight.requires_grad_(), targets, draw(views, tokens).abs()


@pytest.fixture(params=[1, 50, 1 << 22], ids=["a token a chunk", "two tokens a chunk", "whole"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunked")
def test_targets_are_the_distributions_that_they_stand_for() -> None:
    _, _, targets, _ = some()
    whole = targets.dense()
    assert whole.shape == (2, 5, 7)
    for v in range(2):
        for n in range(5):
            scores = [(targets.z[v, n] @ targets.weight[k] / 0.07 + targets.bias[0, k]).item() for k in range(7)]
            total = sum(math.exp(s) for s in scores)
            assert whole[v, n].tolist() == pytest.approx([math.exp(s) / total for s in scores], rel=1e-9)
    parts = targets.split([2, 3])
    torch.testing.assert_close(torch.cat([p.dense() for p in parts], dim=1), whole)


@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_scores_that_are_kept_give_what_scores_computed_again_give(temperature: float) -> None:
    _, _, targets, _ = some(teachers=2, tokens=6)
    rows = targets.z.flatten(0, 1)
    scores = fused.kept(rows, targets.weight, temperature)
    assert scores is not None
    bias = sinkhorn(rows, targets.weight, temperature)
    torch.testing.assert_close(sinkhorn(rows, targets.weight, temperature, kept=scores), bias)
    again = Targets(targets.z, targets.weight, temperature, bias[None])
    at_hand = replace(again, kept=scores.unflatten(0, (2, -1)))
    torch.testing.assert_close(at_hand.dense(), again.dense())
    for one, other in zip(at_hand.split([4, 2]), again.split([4, 2]), strict=True):
        torch.testing.assert_close(one.dense(), other.dense())


def test_scores_are_kept_where_they_are_few_and_none_can_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below COLDEST all of a row may be zero in float32, of which no distribution can be made."""
    opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    coldest = fused.kept(*opposite, fused.COLDEST)
    assert coldest is not None
    assert coldest.min() > torch.finfo(torch.float32).tiny
    assert fused.kept(*opposite, fused.COLDEST / 2) is None
    monkeypatch.setitem(fused.KEPT, "cpu", 11)
    rows = torch.eye(4)
    assert fused.kept(rows[:2], rows, 0.1) is not None
    assert fused.kept(rows[:3], rows, 0.1) is None


@pytest.mark.usefixtures("chunked")
def test_equals_the_naive_triple_loop() -> None:
    z, weight, targets, share = some()
    wanted, total = targets.dense(), 0.0
    for v in range(3):
        for n in range(5):
            logits = [sum(z[v, n, j].item() * weight[k, j].item() for j in range(4)) / 0.1 for k in range(7)]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            mixed = [sum(MIX[v, t].item() * wanted[t, n, k].item() for t in range(2)) for k in range(7)]
            total += share[v, n].item() * -sum(m * (x - log_sum) for m, x in zip(mixed, logits, strict=True))
    assert cross_entropy(z, weight, targets, 0.1, share, MIX).item() == pytest.approx(total, rel=1e-10)


@pytest.mark.usefixtures("chunked")
def test_gradients_equal_those_of_the_whole() -> None:
    z, weight, targets, share = some()
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, targets, 0.1, share, MIX), (z, weight))
    got = torch.autograd.grad(3 * cross_entropy(z, weight, targets, 0.1, share, MIX), (z, weight))
    wanted = torch.tensordot(MIX, targets.dense(), 1).flatten(0, 1)
    rows = dense.cross_entropy(z.flatten(0, 1), weight, wanted, 0.1)
    expected = torch.autograd.grad(3 * (rows * share.flatten()).sum(), (z, weight))
    torch.testing.assert_close(got, expected)


def test_without_a_mix_each_view_has_its_own_target() -> None:
    z, weight, targets, share = some(views=2)
    got = cross_entropy(z, weight, targets, 0.1, share)
    torch.testing.assert_close(got, cross_entropy(z, weight, targets, 0.1, share, torch.eye(2)))
    assert not torch.isclose(got, cross_entropy(z, weight, targets, 0.1, share, torch.eye(2).flip(0)))


def test_no_tokens_stay_on_the_graph() -> None:
    z, weight, targets, share = some(tokens=0)
    loss = cross_entropy(z, weight, targets, 0.1, share, MIX)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def test_the_loss_is_float32_under_autocast() -> None:
    z, weight, targets, share = some()
    z, weight = z.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    targets = Targets(targets.z.float(), targets.weight.float(), 0.07, targets.bias.float())
    alone = cross_entropy(z, weight, targets, 0.1, share, MIX)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z[0] @ weight.T).dtype == torch.bfloat16  # what would have happened
        again = cross_entropy(z.bfloat16().float(), weight, targets, 0.1, share, MIX)
        mixed = cross_entropy(z, weight, targets, 0.1, share, MIX)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, alone)
    assert not torch.equal(again, alone)
    got, expected = (torch.autograd.grad(loss, (z, weight)) for loss in (mixed, alone))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


MEASURE = """
import sys, torch, torch.nn.functional as F
from hybridssl.assign import sinkhorn
from hybridssl.fused import Targets, cross_entropy
from tests.hybridssl import dense
def held():  # the most that this process ever held; ru_maxrss would start from what its parent held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
n, k, d = 2048, 24576, 64
z, t = (F.normalize(torch.randn(1, n, d), dim=2) for _ in range(2))
w = F.normalize(torch.randn(k, d), dim=1).requires_grad_()
z.requires_grad_()
before = held()
if sys.argv[1] == "ours":
    targets = Targets(t, w.detach(), 0.07, sinkhorn(t[0], w.detach(), 0.07)[None])
    cross_entropy(z, w, targets, 0.1, torch.ones(1, n)).backward()
else:
    targets = dense.sinkhorn(t[0] @ w.detach().T, 0.07)
    dense.cross_entropy(z[0], w, targets, 0.1).sum().backward()
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks the Linux kernel")
def test_memory_grows_with_the_sum_and_not_the_product() -> None:
    """2,048 tokens x 24,576 prototypes, more than are kept: 192 MiB a score tensor; the plain version holds several."""

    def peak(which: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, which], capture_output=True, text=True, check=True, cwd=ROOT
        )
        return int(done.stdout)

    assert peak("ours") < peak("plain") / 3
