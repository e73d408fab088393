"""What a step costs in memory and in work, by arithmetic from tokens x width x depth: nothing is run here.

The figures are for vision transformers. They are held against what autograd really saves, and against the published
work of ViT-S, B and L, in tests/pretrain/test_cost.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hybridssl import backbone as backbones
from hybridssl import fused
from hybridssl.backbone import BackboneOptions

GIB = 2**30
CONTEXT = 1.5 * GIB  # what a GPU's driver, libraries and fragments hold
PER_PARAMETER = 22  # bytes: weight, gradient, two moments of AdamW, the teacher's copy in float32; a copy in bf16
# Tensors as wide as the network that autograd keeps of a block, for each token. In float32 also under bf16: input and
# output of two norms. Besides: q k v (3), attention output, its projection, the MLP's hidden layer before and after
# GELU (8), the MLP's output.
NORMS, OTHERS = 4, 14

# Floating point operations a second that training reaches.
CPU_CORE = 50e9  # float32, measured on two cores with AVX2 (docs/log.md)
CPU_BF16 = 1.7  # times that with bf16 units (FACTS: ViT-Ti at 96 px, 207 against 123 images/s)
GPU_LARGE = 100e12  # 80 GB class in bf16: 70-159 images/s of ViT-L at 1,522 GFLOP (DINOv2 on A100, DINOv3 on H100)
GPU_SMALL = 40e12  # other GPUs with bf16
GPU_OLD = 10e12  # without bf16: 106 images/s of ViT-S at 111 GFLOP in 2021
NARROW = 0.5  # of these where the network is narrower than 768: small matrices leave a GPU waiting
LOADER = 190  # images a second and core, 2 x 224 + 8 x 96 crops from a 1,024 px JPEG


@dataclass(frozen=True)
class Network:
    """A vision transformer in numbers."""

    width: int
    depth: int
    patch: int
    prefix: int  # class and register tokens
    parameters: int

    def tokens(self, size: int) -> int:
        return (size // self.patch) ** 2 + self.prefix


HIDDEN = 0.15  # share of the patches of the global views: half the views, .1-.5 of each


@dataclass(frozen=True)
class Step:
    """What one image goes through in a step."""

    network: Network
    global_size: int
    local_size: int
    local_count: int
    prototypes: int
    hidden: int
    bottleneck: int
    masked: float = HIDDEN  # share of the patches of the global views that meets prototypes because it is hidden
    clean: float = 0.0  # share of the images that have a mild view too
    short: float = 0.0  # share of the global views that leave patches out, and
    left_out: float = 0.0  # the share of their patches that they leave out
    item: int = 4  # bytes of an activation; 2 under bf16
    cuda: bool = False

    def views(self) -> Iterator[tuple[int, float]]:
        """(tokens, how many such views an image has) of what the student sees."""
        whole = self.network.tokens(self.global_size)
        yield whole, 2 * (1 - self.short) + self.clean
        yield whole - round(self.left_out * (whole - self.network.prefix)), 2 * self.short
        yield self.network.tokens(self.local_size), self.local_count

    def rows(self) -> float:
        """Tokens an image that meet the prototypes: CLS of every crop, and hidden patches."""
        return 2 + self.local_count + self.hidden_patches()

    def hidden_patches(self) -> float:
        return 2 * self.masked * (self.global_size // self.network.patch) ** 2


def network(options: BackboneOptions, channels: int = 3, size: int = 224) -> Network | None:
    """The numbers of a backbone, built without memory; None for a convolutional one. UserError as in `build`."""
    with torch.device("meta"):
        built = backbones.build(replace(options, drop_path=0.0), channels, size)
    if not built.maskable:
        return None
    model, count = built.model, sum(p.numel() for p in built.parameters())
    blocks = list(model.blocks)  # type: ignore[arg-type]
    return Network(built.dim, len(blocks), built.patch_size, built.prefix, count)


def image_bytes(step: Step) -> float:
    """What autograd keeps of the student for one image of a micro-batch."""
    net = step.network
    total = 0.0
    for tokens, views in step.views():  # of attention no matrix: the fused kernel keeps none
        total += views * tokens * net.depth * net.width * (4 * NORMS + step.item * OTHERS)
    # Heads: two hidden layers, each before and after GELU, in the precision of activations; in float32 the bottleneck,
    # its unit vector and that one's gradient. No scores: they come and go in chunks (hybridssl/fused.py).
    heads = step.rows() * (4 * step.hidden * step.item + 3 * 4 * step.bottleneck)
    return total + heads


def held_bytes(step: Step, channels: int = 3) -> float:
    """What is held for one image of the effective batch, however it is parted: pixels and the teacher's targets."""
    pixels = sum(n * side**2 for n, side in ((2 + step.clean, step.global_size), (step.local_count, step.local_size)))
    # Of the teacher's targets, their unit vectors.
    return 5 * channels * pixels + 4 * step.bottleneck * (2 + step.hidden_patches())


def fixed_bytes(step: Step) -> float:
    """What the model holds whatever the batch is."""
    scores = 4 * 4 * fused.CHUNK["cuda" if step.cuda else "cpu"]  # target, logits, log-softmax, one on its way
    scores += 2 * 4 * fused.KEPT.get("cuda" if step.cuda else "cpu", 0)  # of both heads
    unit = 3 * 4 * 2 * step.bottleneck * step.prototypes  # both heads' unit prototypes, the teacher's, their gradient
    return CONTEXT + scores + unit + PER_PARAMETER * (step.network.parameters + 2 * _head_parameters(step))


def step_bytes(step: Step, micro: int, held: int, channels: int = 3) -> float:
    """The peak of a step of a process: `held` images in micro-batches of `micro`."""
    return fixed_bytes(step) + held * held_bytes(step, channels) + micro * image_bytes(step)


def image_work(step: Step) -> float:
    """Floating point operations an image: forward and backward of the student (3 forwards), forward of the teacher."""
    net = step.network

    def forward(tokens: int) -> float:
        return tokens * net.depth * (24 * net.width**2 + 4 * tokens * net.width)

    student = 3 * sum(views * forward(tokens) for tokens, views in step.views())
    teacher = 2 * forward(net.tokens(step.global_size))
    heads = 2 * _head_parameters(step) * (3 * step.rows() + 2 + step.hidden_patches())
    return student + teacher + heads


def images_per_second(step: Step, cores: int, gpus: int = 0, gpu_memory: float = 0.0, bf16: bool = False) -> float:
    """What the machine should reach: the slower of model and loader. An order of magnitude; `measure` is better."""
    if not gpus:
        return cores * CPU_CORE * (CPU_BF16 if bf16 else 1) / image_work(step)
    speed = (GPU_LARGE if gpu_memory > 60 else GPU_SMALL) if bf16 else GPU_OLD
    model = gpus * speed * (NARROW if step.network.width < 768 else 1) / image_work(step)
    return min(model, cores * LOADER)


def _head_parameters(step: Step) -> float:
    dim, hidden, bottleneck = step.network.width, step.hidden, step.bottleneck
    return dim * hidden + hidden**2 + hidden * bottleneck + bottleneck * step.prototypes
