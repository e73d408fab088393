from __future__ import annotations

import copy

import pytest
import torch
from lightly.models.modules import DINOProjectionHead

from hybridssl.heads import Head, linear32


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
