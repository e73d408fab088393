from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.models.modules import DINOProjectionHead

from hybridssl.heads import Head, cross_entropy, linear32


def test_head_equals_lightly_with_the_same_weights() -> None:
    torch.manual_seed(0)
    theirs = DINOProjectionHead(10, 16, 6, 20, batch_norm=False, norm_last_layer=True)
    ours = Head(10, 20, hidden=16, bottleneck=6)
    ours.mlp.load_state_dict(theirs.layers.state_dict())
    ours.prototypes.data.copy_(theirs.last_layer.weight_v)
    x = torch.randn(5, 10)
    torch.testing.assert_close(ours(x), theirs(x))

    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    torch.testing.assert_close(ours.prototypes.grad, theirs.last_layer.weight_v.grad)
    torch.testing.assert_close(ours.mlp[0].weight.grad, theirs.layers[0].weight.grad)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head_has_unit_rows_small_init_and_can_be_copied(layers: int) -> None:
    head = copy.deepcopy(Head(10, 200, hidden=64, bottleneck=32, layers=layers))
    assert sum(isinstance(m, torch.nn.Linear) for m in head.mlp) == layers
    z = head.bottleneck(torch.randn(4, 10))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(200))
    assert head(torch.randn(4, 10)).abs().max() <= 1 + 1e-5
    assert abs(head.prototypes.std().item() - 0.02) < 0.002
    assert all(p.eq(0).all() for n, p in head.named_parameters() if n.endswith("bias"))


def test_scores_are_float32_under_autocast() -> None:
    head = Head(10, 20, hidden=16, bottleneck=6)
    z = head.bottleneck(torch.randn(4, 10)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(4, 10)).dtype == torch.float32
        rounded = z @ head.weight.T
        assert linear32(z, head.weight).dtype == torch.float32
        torch.testing.assert_close(head.logits(z), linear32(z, head.weight))
    assert rounded.dtype == torch.bfloat16  # what would have happened
    torch.testing.assert_close(head.logits(z), z @ head.weight.T)


def test_cross_entropy_equals_the_naive_triple_loop() -> None:
    torch.manual_seed(1)
    z, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    targets = torch.rand(4, 5, dtype=torch.float64) * 2  # rows need not sum to one
    for i, got in enumerate(cross_entropy(z, weight, targets, 0.3).tolist()):
        logits = [sum(z[i, j].item() * weight[k, j].item() for j in range(3)) / 0.3 for k in range(5)]
        total = sum(math.exp(v) for v in logits)
        want = -sum(targets[i, k].item() * math.log(math.exp(logits[k]) / total) for k in range(5))
        assert got == pytest.approx(want, rel=1e-10)


def test_cross_entropy_gradients() -> None:
    torch.manual_seed(2)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, targets, 0.2), (z, weight))


def test_cross_entropy_of_no_rows_stays_on_the_graph() -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    loss = cross_entropy(torch.empty(0, 4), weight, torch.empty(0, 6), 0.1).sum()
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert weight.grad.eq(0).all()
