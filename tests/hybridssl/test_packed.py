"""One pass over crops of several sizes gives what a pass for each gives, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridssl import attention, lora, packed
from hybridssl.backbone import Backbone, BackboneOptions, Crops, build

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
VIT, DINOV3 = "vit_tiny_patch16_224", "vit_small_patch16_dinov3"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers and LayerScale": {"registers": 4, "args": {**SMALL, "init_values": 0.5}},
    "norms and a gate": {"args": {**SMALL, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}},
    "DINOv2's": {"name": "vit_base_patch14_dinov2", "args": {**SMALL, "patch_size": 8}},
    "DeiT III's": {"name": "deit3_small_patch16_224", "args": SMALL},
    "DINOv3's rotary positions": {"name": DINOV3, "args": SMALL},
    "mixed rotary positions": {"name": "vit_small_patch16_rope_mixed_224", "args": SMALL},
    "EVA-02's": {"name": "eva02_tiny_patch14_224", "args": {**SMALL, "init_values": 0.5}},
    "LoRA": {"lora": 2},
}


def backbone(**options: Any) -> Backbone:
    """In double precision, with weights large enough for every path to matter."""
    torch.manual_seed(0)
    made = build(BackboneOptions(**{"name": VIT, "args": SMALL, **options}), 3, 32)
    if options.get("lora"):
        lora.add(made.model, options["lora"])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.double()


def crops(leave_out: bool = True) -> list[Crops]:
    g = torch.Generator().manual_seed(1)
    big, small = (torch.randn(n, 3, s, s, generator=g).double() for n, s in ((4, 32), (6, 16)))
    masks = torch.rand(4, 16, generator=g).argsort(dim=1) < 5
    seen = [Crops(big, masks), Crops(small)]
    return [*seen, Crops(big, masks, left_out=True)] if leave_out else seen


def see(network: Backbone, shared: bool, chosen: list[Crops]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every token of every crop, and the gradients of a loss of all of them."""
    network.packed = shared
    network.zero_grad()
    tokens = [part for one in network.see(chosen) for part in (one.cls, one.registers, one.patches)]
    weights = torch.Generator().manual_seed(2)
    sum((t * torch.randn(t.shape, generator=weights).double()).sum() for t in tokens).backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return [t.detach() for t in tokens], found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_one_pass_equals_a_pass_for_each_size(kind: str, fused: bool) -> None:
    network = backbone(**KINDS[kind])
    assert network.packable
    for part in network.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    apart, together = (see(network, shared, crops()) for shared in (False, True))
    assert len(apart[1]) > 5
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_one_pass_runs_the_blocks_once() -> None:
    network, calls = backbone(), []
    network.model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for shared, times in ((False, 3), (True, 1)):
        calls.clear()
        see(network, shared, crops())
        assert len(calls) == times


def test_what_cannot_share_a_pass_sees_the_crops_one_after_the_other() -> None:
    for name, more in (("vit_base_patch16_18x2_224", SMALL), ("densenet121", {"growth_rate": 4, "block_config": [1]})):
        network = build(BackboneOptions(name=name, args=more), 3, 32)
        assert not network.packable
        seen = network.see([Crops(torch.randn(2, 3, s, s)) for s in (64, 32)])
        assert [len(one.patches[0]) for one in seen] == [(s // network.patch_size) ** 2 for s in (64, 32)]


def test_names_of_weights_and_timms_own_pass_stay() -> None:
    """What is exported, and what a checkpoint holds, knows nothing of packing."""
    import timm

    network = backbone(registers=4)
    plain = timm.create_model(VIT, num_classes=0, img_size=32, dynamic_img_size=True, reg_tokens=4, **SMALL).double()
    plain.load_state_dict(network.model.state_dict())
    images = torch.randn(2, 3, 48, 32).double()
    whole = plain.eval().forward_features(images)
    assert torch.equal(network.eval()(images).patches, whole[:, 5:])


def test_attention_stays_within_a_sample() -> None:
    """A change of one sample changes that sample alone, in each kernel."""
    layout = ((2, 3), (1, 5), (0, 4))
    q, k, v = (torch.randn(11, 2, 4).double() for _ in range(3))
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[3:6] += 1.0
    for fused in (True, False):
        before, after = (attention.attend(*qkv, layout, fused) for qkv in ((q, k, v), changed))
        differs = (before != after).flatten(1).any(dim=1)
        assert differs.tolist() == [3 <= row < 6 for row in range(11)]


def test_every_parameter_has_a_gradient_from_one_pass() -> None:
    """Of the parameters, DDP waits for each."""
    network = backbone(registers=2)
    _, gradients = see(network, True, crops())
    assert gradients.keys() == {name for name, _ in network.named_parameters()}


def test_under_autocast_a_shared_pass_is_as_close_to_float32_as_separate_ones() -> None:
    network = backbone(args={**SMALL, "qk_norm": True, "init_values": 0.5}).float()
    chosen = [Crops(one.images.float(), one.hidden) for one in crops(leave_out=False)]
    exact = see(network, False, chosen)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [see(network, shared, chosen)[0] for shared in (False, True)]
    for one in rounded:
        errors = [float((a - b).abs().mean()) for a, b in zip(one, exact, strict=True) if a.numel()]
        assert max(errors) < 0.05
    assert packed.split(torch.zeros(6, 2), ((1, 2), (2, 2)))[1].shape == (2, 2, 2)
