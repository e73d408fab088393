from __future__ import annotations

import copy

import pytest
import torch

from hybridssl.backbone import Backbone, BackboneOptions, Crops, build
from hybridssl.efficiency import EfficiencyOptions, apply
from hybridssl.errors import UserError

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
FAMILIES = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")


def backbone(name: str = FAMILIES[0], **options) -> Backbone:
    torch.manual_seed(0)
    return build(BackboneOptions(name=name, args=SMALL, **options), 3, 32)


def passed(network: Backbone) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Class tokens of two sizes, and gradients, from one seed."""
    torch.manual_seed(1)
    seen = network.see([Crops(torch.randn(4, 3, 32, 32)), Crops(torch.randn(8, 3, 16, 16))])
    network.zero_grad()
    sum(one.cls[:, 0].sum() for one in seen).backward()
    return [one.cls.detach() for one in seen], [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_computes_blocks_twice_and_the_same(name: str, packed: bool, drop_path: float) -> None:
    network, calls = backbone(name, drop_path=drop_path), []
    network.model.blocks[1].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    apply(network, EfficiencyOptions(packed=packed))
    kept, once = passed(network), len(calls)
    calls.clear()
    apply(network, EfficiencyOptions(packed=packed, checkpoint=True))
    torch.testing.assert_close(passed(network), kept)
    assert len(calls) == 2 * once
    calls.clear()
    with torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
    assert len(calls) == 1


def test_sizes_share_a_pass_where_they_can_unless_told_otherwise() -> None:
    network = backbone()
    assert network.packed
    apply(network, EfficiencyOptions(packed=False))
    assert not network.packed
    convolutional = build(BackboneOptions(name="resnet10t"), 3, 32)
    apply(convolutional, EfficiencyOptions(packed=True))
    assert not convolutional.packed


def test_what_an_architecture_cannot_is_named() -> None:
    with pytest.raises(UserError, match=r"efficiency\.compile: ResNet.*leave the key out"):
        apply(build(BackboneOptions(name="resnet10t"), 3, 32), EfficiencyOptions(compile=True))
    with pytest.raises(UserError, match=r"efficiency\.checkpoint: ResNet has batch norms.*leave the key out"):
        apply(build(BackboneOptions(name="resnet10t"), 3, 32), EfficiencyOptions(checkpoint=True))
    apply(build(BackboneOptions(name="convnext_atto"), 3, 32), EfficiencyOptions(checkpoint=True))  # layer norms


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_compiled_blocks_give_the_same_under_the_same_names(packed: bool) -> None:
    network = backbone(drop_path=0.5)
    names = network.state_dict().keys()
    apply(network, EfficiencyOptions(packed=packed))
    expected = passed(network)
    apply(network, EfficiencyOptions(packed=packed, compile=True))
    torch.testing.assert_close(passed(network), expected, rtol=1e-4, atol=1e-5)
    assert network.state_dict().keys() == names
    copied = copy.deepcopy(network).eval()  # the teacher
    torch.testing.assert_close(copied(torch.ones(1, 3, 32, 32)).cls, network.eval()(torch.ones(1, 3, 32, 32)).cls)
