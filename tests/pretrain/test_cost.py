"""The arithmetic of memory and work, against what autograd keeps and against published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybridssl import backbone
from hybridssl.backbone import BackboneOptions
from hybridssl.fused import Targets
from hybridssl.objectives import Context, build, options_types
from hybridssl.objectives.ibot import Target
from hybridssl.student import Student
from hybridssl.types import Batch, Views
from pretrain import cost
from pretrain.cost import Network, Step

SMALL = BackboneOptions("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4})
WORK = {"vit_small_patch16_224": 111, "vit_base_patch16_224": 431, "vit_large_patch16_224": 1522}  # GFLOP (FACTS 3)


@pytest.mark.parametrize("name", WORK)
def test_work_is_what_is_published(name: str) -> None:
    net = cost.network(BackboneOptions(name))
    assert net is not None
    step = Step(net, 224, 96, 8, prototypes=0, hidden=0, bottleneck=0)
    assert cost.image_work(step) / 1e9 == pytest.approx(WORK[name], rel=0.05)
    headed = replace(step, prototypes=65_536, hidden=2048, bottleneck=256)
    assert 2 < (cost.image_work(headed) - cost.image_work(step)) / 1e9 < 15  # FACTS: about 12


def test_speed_of_two_cores_is_what_was_measured() -> None:
    """docs/log.md: `ham-cpu` makes 88 images/s, the loader's part included."""
    net = cost.network(BackboneOptions("vit_tiny_patch16_224", {"depth": 6}), 3, 64)
    assert net is not None
    step = Step(net, 64, 32, 4, prototypes=512, hidden=512, bottleneck=128, clean=0.25)
    assert cost.images_per_second(step, cores=2) == pytest.approx(88, rel=0.1)


def test_a_gpu_waits_for_its_loader() -> None:
    step = Step(Network(768, 12, 16, 1, 86_000_000), 224, 96, 8, 8192, 2048, 256)
    fast = cost.images_per_second(step, cores=96, gpus=1, gpu_memory=80, bf16=True)
    assert fast == pytest.approx(230, rel=0.1)
    assert cost.images_per_second(step, cores=1, gpus=1, gpu_memory=80, bf16=True) == cost.LOADER


def test_a_convolution_is_not_computed() -> None:
    tiny = {"growth_rate": 4, "block_config": [1, 1, 1, 1]}
    assert cost.network(BackboneOptions("densenet121", tiny), 3, 64) is None


def test_a_network_is_counted_without_being_built() -> None:
    built = backbone.build(SMALL, 3, 32)
    assert cost.network(SMALL, 3, 32) == Network(48, 2, 8, 1, sum(p.numel() for p in built.parameters()))


def said(views: int, tokens: int, prototypes: int, width: int = 8) -> Targets:
    """What a teacher might say."""
    z, weight = torch.randn(views, tokens, width), torch.randn(prototypes, width)
    return Targets(F.normalize(z, dim=2), F.normalize(weight, dim=1), 0.07, torch.zeros(1, prototypes))


def kept_bytes(bf16: bool, images: int, prototypes: int) -> float:
    """What autograd keeps of the forward pass of a whole student, weights and their copies aside."""
    torch.manual_seed(0)
    sizes = {"prototypes": prototypes, "hidden": 32, "bottleneck": 8}
    options = {name: options_types()[name](**sizes) for name in ("dino", "ibot")}
    context = Context(48, 0, torch.zeros(0, 0), batch=images, micro=images, patch=8, patches=16)
    learner = Student(backbone.build(SMALL, 3, 32), build(options, context))
    masks = torch.zeros(2, images, 16, dtype=torch.bool)
    masks[:, ::2, :5] = True
    views = Views(torch.randn(2 * images, 3, 32, 32), torch.randn(4 * images, 3, 16, 16))
    nothing = torch.zeros(0)
    batch = Batch(nothing, nothing, nothing, nothing, masks, nothing, nothing, nothing)
    hidden = int(masks.sum())
    dino, ibot = said(2, images, prototypes), said(1, hidden, prototypes)
    targets = {"dino": dino, "ibot": Target(ibot, torch.ones(()))}
    apart = {t.untyped_storage().data_ptr() for t in (*learner.parameters(), views.global_, views.local)}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        learner(views, targets, batch, 0.5)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_of_an_image_is_what_autograd_keeps(bf16: bool) -> None:
    one, two, many = kept_bytes(bf16, 8, 16), kept_bytes(bf16, 16, 16), kept_bytes(bf16, 16, 2048)
    net = cost.network(SMALL, 3, 32)
    assert net is not None
    step = Step(net, 32, 16, 4, 16, 32, 8, masked=5 / 32, item=2 if bf16 else 4)
    kept = (two - one) / 8
    assert 0.9 * kept < cost.image_bytes(step) < 1.35 * kept
    # More prototypes cost what they are themselves (a unit copy, its gradient, norms), never that times the images.
    assert many - two < 2 * (2048 - 16) * 4 * 8 * 4


def test_memory_of_a_step_grows_with_what_is_held() -> None:
    step = Step(Network(384, 12, 16, 5, 22_000_000), 224, 96, 8, 8192, 2048, 256, item=2, cuda=True)
    first = cost.step_bytes(step, micro=32, held=64)
    assert cost.step_bytes(step, micro=64, held=64) - first == pytest.approx(32 * cost.image_bytes(step))
    assert cost.step_bytes(step, micro=32, held=128) - first == pytest.approx(64 * cost.held_bytes(step))
    assert cost.fixed_bytes(step) > cost.CONTEXT + 16 * 22_000_000
    assert cost.image_bytes(step) < cost.image_bytes(replace(step, item=4)) < 2 * cost.image_bytes(step)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_is_computed() -> None:
    """A real network at a real size: within a quarter of torch's own counter."""
    options = BackboneOptions("vit_small_patch16_224", registers=4)
    net = cost.network(options)
    assert net is not None
    images, prototypes = 32, 4096
    learner = Student(
        backbone.build(options),
        build({"dino": options_types()["dino"](prototypes=prototypes)}, Context(384, 0, torch.zeros(0, 0))),
    ).cuda()
    views = Views(torch.randn(2 * images, 3, 224, 224).cuda(), torch.randn(8 * images, 3, 96, 96).cuda())
    masks = torch.zeros(2, images, 196, dtype=torch.bool, device="cuda")
    nothing = torch.zeros(0, device="cuda")
    batch = Batch(nothing, nothing, nothing, nothing, masks, nothing, nothing, nothing)
    said_on_cpu = said(2, images, prototypes, 256)
    target = replace(
        said_on_cpu, z=said_on_cpu.z.cuda(), weight=said_on_cpu.weight.cuda(), bias=said_on_cpu.bias.cuda()
    )
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        losses, _ = learner(views, {"dino": target}, batch, 0.5)
    kept = torch.cuda.memory_allocated() - before
    assert torch.isfinite(losses["dino"])
    step = Step(net, 224, 96, 8, prototypes, 2048, 256, masked=0.0, item=2, cuda=True)
    assert cost.image_bytes(step) == pytest.approx(kept / images, rel=0.25)
