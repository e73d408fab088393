"""Which backbone, at which size, for which data and machine: the part of a proposal that all else follows from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hybridssl.backbone import BackboneOptions
from pretrain import cost, rules
from pretrain.cost import Step
from pretrain.fingerprint import Data, Machine

RELEASED = ("vit_base_patch14_dinov2", "vit_small_patch14_dinov2")  # whose weights a run may continue from
CPU_HOURS = 4.0  # a larger network is worth no more than an afternoon on a CPU
LONGEST_CPU, LONGEST_GPU = 24.0, 72.0  # hours; no longer run is proposed
GPU_SHARE, CPU_SHARE = 0.8, 0.5  # of the memory that a step may take
SEEN = 64  # pixels, below which released weights have seen nothing
ENOUGH = 8  # images a pass, below which a network is too large for the memory
ABSENT = object()


@dataclass(frozen=True)
class Candidate:
    """A backbone that these data might get."""

    options: BackboneOptions
    wanted: int  # pixels, where the images have as many
    reason: str

    @property
    def continuing(self) -> bool:
        return bool(self.options.weights)


@dataclass(frozen=True)
class Draft:
    """A candidate on these data and this machine, worked out so far that its cost is known."""

    data: Data
    machine: Machine
    options: BackboneOptions
    reason: str
    size: int  # of global crops, in pixels
    local: int
    patch: int
    batch: int
    shown: int  # images in the whole run
    labels: str  # kind of the label loss; "": none
    patches: str  # the objective of hidden patches; "": none
    step: Step | None  # None: a convolutional backbone, whose cost is not computed

    @property
    def cpu(self) -> bool:
        return self.machine.gpus == 0

    @property
    def continuing(self) -> bool:
        return bool(self.options.weights)

    @property
    def share(self) -> int:
        """Images of a batch on one process."""
        return max(self.batch // self.machine.processes, 1)

    @cached_property
    def fits(self) -> float:
        """Images a pass that the memory would hold."""
        if self.step is None:
            return 32.0  # what batch norm wants
        machine = self.machine
        share = machine.memory * CPU_SHARE / machine.processes if self.cpu else machine.gpu_memory * GPU_SHARE
        room = share * cost.GIB - cost.step_bytes(self.step, 0, self.share, self.data.channels)
        return room / cost.image_bytes(self.step)

    @cached_property
    def images_per_second(self) -> float:
        """By arithmetic; 0 where it is not known."""
        m = self.machine
        return cost.images_per_second(self.step, m.cores, m.gpus, m.gpu_memory, m.bf16) if self.step else 0.0

    def hours(self) -> float:
        return self.shown / self.images_per_second / 3600 if self.images_per_second else 0.0


def best(data: Data, machine: Machine, fixed: Mapping[str, Any]) -> Draft:
    """The first candidate that is done in time and fits into memory; else the last."""
    limit = LONGEST_GPU if machine.gpus else CPU_HOURS
    draft = None
    for candidate in candidates(data, machine, fixed):
        draft = _work_out(candidate, data, machine, fixed)
        if draft.hours() <= limit and draft.fits >= min(ENOUGH, draft.share):
            return draft
    assert draft is not None
    return draft


def lookup(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where it, or what it belongs to, is null; ABSENT where nothing is said."""
    at: Any = tree
    for part in key.split("."):
        if at is None:
            return None
        if not isinstance(at, Mapping) or part not in at:
            return ABSENT
        at = at[part]
    return at


def given(fixed: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """What the user says of a key, or what the rules do."""
    value = lookup(fixed, key)
    return otherwise if value is ABSENT or value is None else value


def candidates(data: Data, machine: Machine, fixed: Mapping[str, Any]) -> Iterator[Candidate]:
    """The most wanted first. Released weights come before a start from scratch; larger networks before smaller ones."""
    name, weights = given(fixed, "backbone.name", ""), given(fixed, "backbone.weights", None)
    if name:
        yield Candidate(BackboneOptions(name, weights=weights or ""), 224, "you chose it")
        return
    if weights or (weights is None and data.short_side >= SEEN):
        yield from _continuing(data, machine, weights or "")
    if not weights:
        yield from _from_scratch(data, machine)


def _continuing(data: Data, machine: Machine, weights: str) -> Iterator[Candidate]:
    large, small = RELEASED
    roomy = machine.gpu_memory >= 30 and data.images >= 10_000
    if roomy and not weights and large in machine.had:
        options = BackboneOptions(large, weights="pretrained", drop_path=0.1)
        yield Candidate(options, 224, "86 M parameters: 10,000 images on a large GPU can move them")
    if weights or small in machine.had:
        options = BackboneOptions(small, weights=weights or "pretrained", drop_path=0.2 if data.images < 5_000 else 0.1)
        yield Candidate(options, 224, "22 M parameters, and good features to begin with")


def _from_scratch(data: Data, machine: Machine) -> Iterator[Candidate]:
    scaled = {"init_values": 1e-5}  # LayerScale
    if not machine.gpus:
        yield Candidate(
            BackboneOptions("vit_tiny_patch16_224"), 96, f"the largest that these cores train in {CPU_HOURS:g} hours"
        )
        options = BackboneOptions("vit_tiny_patch16_224", {"depth": 6})
        yield Candidate(options, 64, "small enough for these cores (as recipe ham-cpu)")
        return
    if data.images >= 200_000 and machine.gpu_memory >= 30:
        options = BackboneOptions("vit_base_patch16_224", scaled, registers=4, drop_path=0.1)
        yield Candidate(options, 224, "200,000 images and more keep 86 M parameters busy")
    if data.images >= 5_000:
        options = BackboneOptions("vit_small_patch16_224", scaled, registers=4, drop_path=0.1)
        yield Candidate(options, 224, "22 M parameters: what 5,000 images and more can teach from scratch")
    options = BackboneOptions("vit_tiny_patch16_224", scaled, registers=4)
    yield Candidate(options, 224, "so few images teach no larger network from scratch")


def _work_out(candidate: Candidate, data: Data, machine: Machine, fixed: Mapping[str, Any]) -> Draft:
    cpu, args = machine.gpus == 0, dict(candidate.options.args)
    if not candidate.continuing and not given(fixed, "backbone.name", ""):
        patch = rules.patch_size(min(data.short_side, candidate.wanted), cpu)
        args |= {"patch_size": patch} if patch != 16 else {}  # what these are made with
    args |= given(fixed, "backbone.args", {})
    options = replace(candidate.options, args=args)
    net = cost.network(options, data.channels, 16 * args.get("patch_size", 14))
    patch = net.patch if net else 32
    least = 8 if candidate.continuing else 2  # patches a side
    size = given(fixed, "views.global_size", rules.global_size(data.short_side, candidate.wanted, patch, least))
    batch = given(fixed, "batch.size", rules.batch_size(data.images, machine.processes))
    steps = given(fixed, "steps", 0)
    grid = size // patch
    chosen = "ibot" if lookup(fixed, "objectives.ibot") not in (None, ABSENT) else ""
    draft = Draft(
        data=data,
        machine=machine,
        options=options,
        reason=candidate.reason,
        size=size,
        local=given(fixed, "views.local_size", rules.local_size(size, patch)),
        patch=patch,
        batch=batch,
        shown=steps * batch or rules.presentations(data.images, batch, candidate.continuing, cpu),
        labels=_labels(data, fixed),
        patches=(chosen or rules.patch_objective(grid, candidate.continuing))
        if net
        else "",  # others see around a mask
        step=None,
    )
    return replace(draft, step=_step(net, draft, fixed)) if net else draft


def _step(net: cost.Network, draft: Draft, fixed: Mapping[str, Any]) -> Step:
    data, machine = draft.data, draft.machine
    late = rules.label_start(data.labelled, data.images, draft.continuing)
    share = data.labelled / data.images if late else rules.labelled_fraction(data.labelled, data.images)
    hidden, bottleneck = rules.head_width(data.images, draft.cpu)
    return Step(
        network=net,
        global_size=draft.size,
        local_size=draft.local,
        local_count=given(fixed, "views.local_count", rules.local_count(data.images, draft.cpu)),
        prototypes=given(fixed, "objectives.dino.prototypes", rules.prototypes(data.images)),
        hidden=given(fixed, "objectives.dino.hidden", hidden),
        bottleneck=given(fixed, "objectives.dino.bottleneck", bottleneck),
        clean=share if draft.labels else 0.0,
        masked=cost.HIDDEN if draft.patches == "ibot" else 0.0,
        item=2 if machine.bf16 else 4,
        cuda=not draft.cpu,
    )


def _labels(data: Data, fixed: Mapping[str, Any]) -> str:
    """The kind of the label loss; "" where it is switched off, or fewer than two classes are there."""
    off = lookup(fixed, "objectives.labels") is None or len(data.per_class) < 2
    return "" if off else rules.label_kind(data.several)
