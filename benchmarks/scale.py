"""By calculation: what 100 million images take on 8, 64 and 512 GPUs, and what is short first: benchmarks/scale.md.

    python -m benchmarks.scale

Measured are the cores that crops need (results/views.json) and the arithmetic of a step (pretrain/cost.py, held by
tests); everything about GPUs and networks is an assumption, and the page says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS
from hybridssl.backbone import BackboneOptions
from pretrain import cost

PAGE = Path(__file__).with_name("scale.md")
IMAGES, EPOCHS = 100e6, 10
MODELS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
PROTOTYPES, HIDDEN, BOTTLENECK = 65_536, 2048, 256
BATCH = {8: 1024, 64: 2048, 512: 4096}  # images a step, over all GPUs

# Assumptions.
PEAK, REACHED = (
    989e12,
    0.40,
)  # FLOP/s of one H100 in bf16, and the share of it that a step reaches
CORES = 16  # CPU cores a GPU
NODE = 8  # GPUs of a node
INSIDE, BETWEEN = 300e9, 50e9  # bytes/s a GPU: NVLink inside a node, 400 Gb/s a GPU between nodes
LATENCY = 50e-6  # s, of one collective over many nodes
STORAGE = 1e9  # bytes/s a node from object storage
DISK = 2e9  # bytes/s to where checkpoints lie
HOST = 20e9  # bytes/s from a GPU to its host: what a checkpoint holds the run for
COLLECTIVES = 2 * 3 + 4  # small ones a step: three Sinkhorn iterations for two heads; norm, verdict, counts


@dataclass(frozen=True)
class Plan:
    """One backbone on so many GPUs."""

    name: str
    gpus: int
    parameters: float  # of backbone and both heads
    work: float  # FLOP an image
    memory: float  # bytes of a GPU, with a micro-batch of all its images

    @property
    def mine(self) -> int:
        return BATCH[self.gpus] // self.gpus

    @property
    def compute(self) -> float:
        """s a step."""
        return self.mine * self.work / (PEAK * REACHED)

    @property
    def gradients(self) -> float:
        """s a step for the ring all-reduce of float32 gradients, were nothing of it hidden behind the backward pass."""
        speed = INSIDE if self.gpus <= NODE else BETWEEN
        return 2 * (self.gpus - 1) / self.gpus * 4 * self.parameters / speed

    @property
    def agreement(self) -> float:
        """s a step for Sinkhorn's sums over prototypes, and what else all processes agree on."""
        speed = INSIDE if self.gpus <= NODE else BETWEEN
        return COLLECTIVES * LATENCY + 2 * 3 * 2 * 4 * PROTOTYPES / speed

    @property
    def step(self) -> float:
        """s; gradients travel during the backward pass, half of the work."""
        return self.compute + max(0.0, self.gradients - self.compute / 2) + self.agreement

    def needs(self, crops: float, size: float) -> dict[str, float]:
        """Shares of what there is; above 1 is short. crops: images/s a core; size: bytes an image."""
        speed = self.mine / self.step  # images/s a GPU
        return {
            "cores for crops": speed / crops / CORES,
            "object storage, first epoch": speed * NODE * size / STORAGE,
            "gradients": self.gradients / (self.compute / 2),
            "agreement": self.agreement / (0.05 * self.step),  # more than a twentieth of the step is a bottleneck
            "memory": self.memory / 80e9,
        }


def plans() -> Iterator[Plan]:
    for name, architecture in MODELS.items():
        network = cost.network(BackboneOptions(name=architecture))
        assert network is not None  # a vision transformer
        step = cost.Step(network, 224, 96, 8, PROTOTYPES, HIDDEN, BOTTLENECK, item=2, cuda=True)
        parameters = network.parameters + 2 * cost._head_parameters(step)
        for gpus, batch in BATCH.items():
            mine = batch // gpus
            memory = cost.step_bytes(step, mine, mine)
            yield Plan(name, gpus, parameters, cost.image_work(step), memory)


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def page() -> str:
    views = json.loads((RESULTS / "views.json").read_text(encoding="utf-8"))["sides"]
    crops = {side: views[side]["images_per_s"]["ours, worker"] for side in ("1024", "256")}
    size = {side: 1000 * views[side]["kilobytes"] for side in crops}
    rows: list[str] = []
    short: list[str] = []
    for plan in plans():
        speed = plan.gpus * plan.mine / plan.step
        needs = {side: plan.needs(crops[side], size[side]) for side in crops}
        first = {side: max(needs[side], key=lambda name: needs[side][name]) for side in crops}
        checkpoint = 16 * plan.parameters  # weights, teacher, two moments; float32
        each = speed / plan.gpus
        cores, read = ({side: each / crops[side] for side in crops}, {side: each * NODE * size[side] for side in crops})
        cells = {
            "backbone": plan.name,
            "GPUs": plan.gpus,
            "images a GPU and step": plan.mine,
            "images/s": f"{speed:,.0f}",
            "hours": f"{IMAGES * EPOCHS / speed / 3600:,.1f}",
            "ms a step": f"{1000 * plan.step:.0f}",
            "gradients, if nothing hid them": f"{plan.gradients / plan.step:.0%}",
            "agreement": f"{plan.agreement / plan.step:.1%}",
            "cores a GPU, 1,024 / 256 px": f"{cores['1024']:.0f} / {cores['256']:.0f}",
            "GB/s a node, first epoch, 1,024 / 256 px": f"{read['1024'] / 1e9:.1f} / {read['256'] / 1e9:.2f}",
            "checkpoint, GB": f"{checkpoint / 1e9:.1f}",
            "s that it holds the run / until it is written": f"{checkpoint / HOST:.1f} / {checkpoint / DISK:.0f}",
        }
        rows = rows or [_row(cells), _row(["---"] * len(cells))]
        rows.append(_row(cells.values()))
        told = [f"{side} px: {first[side]} ({needs[side][first[side]]:.1f} x what there is)" for side in crops]
        short.append(f"- {plan.name}, {plan.gpus} GPUs: " + "; ".join(told))
    return TEXT.format(
        images=f"{IMAGES / 1e6:.0f} million",
        total=f"{IMAGES * EPOCHS / 1e9:.0f} billion",
        epochs=EPOCHS,
        rows="\n".join(rows),
        short="\n".join(short),
        large=f"{crops['1024']} from a 1,024 px JPEG of {views['1024']['kilobytes']} kB",
        small=f"{crops['256']} from a 256 px one of {views['256']['kilobytes']} kB",
        faster=f"{crops['256'] / crops['1024']:.1f}",
        peak=f"{PEAK / 1e12:.0f}",
        reached=f"{REACHED:.0%}",
        cores=CORES,
        inside=f"{INSIDE / 1e9:.0f}",
        between=f"{BETWEEN / 1e9:.0f}",
        storage=f"{STORAGE / 1e9:.0f}",
        disk=f"{DISK / 1e9:.0f}",
        host=f"{HOST / 1e9:.0f}",
        latency=f"{LATENCY * 1e6:.0f}",
    )


TEXT = """# {images} images: what 8, 64 and 512 GPUs take

Written by `python -m benchmarks.scale`. **A calculation, not a measurement**: nothing here has run on a GPU.

- Measured, on one core: crops a second, {large}
  and {small} (`results/views.json`). The work of an image and the memory of a step are
  the arithmetic of `pretrain/cost.py`.
- Assumed: {reached} of an H100's {peak} TFLOP/s in bf16 (an aim of this project, not yet shown); {cores} CPU cores a
  GPU; {inside} GB/s a GPU inside a node and {between} between nodes; {latency} microseconds a collective;
  {storage} GB/s a node from object storage; {disk} GB/s to where checkpoints lie, {host} from a GPU to its host.
- Crops 2 x 224 + 8 x 96, 65,536 prototypes for each of two heads, {epochs} epochs: {total} presentations.

{rows}

Agreement: Sinkhorn's sums over prototypes (three iterations, two heads), the gradient's norm, the verdict on the step.

## What is short first

{short}

## What follows

- **Pack at the size that is trained on.** `python -m shards build --short-side 256` costs one pass over the images, and
  afterwards a core cuts {faster} times as many crops and reads a fraction of the bytes. From 1,024 px images storage
  and the loader's cores, not the GPUs, set the pace of small backbones.
- **Later epochs come from the cache** of the node, if it holds the node's share of the shards; the first asks storage.
- **Small backbones do not want many GPUs**: with 8 images a GPU and step, gradients take as long as the work. A larger
  batch, or fewer GPUs, is the remedy; DDP hides at most the backward pass.
- **Memory above 1** means accumulation (`batch.micro=auto`) or `efficiency.checkpoint=true`, not another machine.
- **Checkpoints hold nothing up**: the run waits for the copy to the host alone, and a thread writes.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote benchmarks/{PAGE.name}")
