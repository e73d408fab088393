"""From the fingerprint to a recipe: every decision with the reason that goes with it.

What nnU-Net (Isensee et al. 2021) does for segmentation: a fingerprint of the data, rules, a plan. The rules are in
rules.py, the choice of the backbone in draft.py, the arithmetic of memory and time in cost.py. Nothing here looks at a
clock or draws at random: the same data, machine and wishes give the same recipe on every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain import draft as drafts
from pretrain import rules
from pretrain.draft import ABSENT, Draft, lookup
from pretrain.fingerprint import Data, Machine
from pretrain.proposal import Proposal


def propose(data: Data, machine: Machine, fixed: Mapping[str, Any] | None = None) -> Proposal:
    """A recipe for `data` on `machine`. `fixed`: recipe keys that are decided; the others are fitted to them."""
    draft = drafts.best(data, machine, fixed or {})
    plan = Proposal(draft, fixed or {})
    for decide in (_start, _views, _heads, _labels, _batch, _length, _optimiser):
        decide(plan, draft, data)
    _notes(plan, draft, data)
    return plan


def _start(plan: Proposal, draft: Draft, data: Data) -> None:
    options, machine = draft.options, draft.machine
    reason, shown = "no released weights lie on this machine", "from scratch"
    if machine.had:
        reason = "the released weights on this machine suit neither these images nor its cores"
    if draft.continuing:
        shown = f"continue from {options.weights} weights"
        reason = "released weights know edges and textures already" + (
            "; they lie on this machine: no network is needed" if options.weights == "pretrained" else ""
        )
    plan.choose("start", reason, shown, backbone__weights=options.weights)
    keys: dict[str, Any] = {"name": options.name, "args": options.args, "drop_path": options.drop_path}
    if options.registers is not None:
        keys["registers"] = options.registers
    blocks = f", {options.args['depth']} blocks" if "depth" in options.args else ""
    keys = {f"backbone.{key}": value for key, value in keys.items()}
    plan.choose("backbone", draft.reason, f"{options.name}{blocks}, patch {draft.patch}", **keys)


def _views(plan: Proposal, draft: Draft, data: Data) -> None:
    size, local = draft.size, draft.local
    reason = f"the images' short side is {data.short_side} px; "
    if size > data.short_side:
        reason += "enlarged, since the released weights see little in fewer patches"
    elif draft.cpu and size <= data.short_side // 2:
        reason += "all that these cores can turn over"
    else:
        reason += "what backbones of this kind are made for" if size >= 224 else "enlarging would show nothing new"
    plan.choose("image size", reason, f"{size} px", views__global_size=size)

    count, (large, small) = rules.local_count(data.images, draft.cpu), rules.scales(data.images, size)
    keys = {"local_size": local, "local_count": count, "global_scale": list(large), "local_scale": list(small)}
    reason = "a small crop must be recognised as a part of the whole"
    reason += "; not too small, for few or small images" if large[0] > 0.32 else ""
    keys = {f"views.{key}": value for key, value in keys.items()}
    plan.choose("crops", reason, f"2 x {size} px, {count} x {local} px", **keys)

    keys = {"views.solarize": 0.0, "views.hue": 0.05, "views.grayscale": 0.1}
    reason = "colour tells diagnoses apart, so it varies mildly"
    if data.grey:
        keys |= {"views.hue": 0.0, "views.grayscale": 0.0, "views.saturation": 0.0}
        reason = "the images are grey: brightness and contrast vary"
    if size <= 128:
        keys |= {"views.blur": [0.5, 0.1, 0.2], "views.blur_sigma": [0.1, 1.0]}
        reason += "; blur fits small crops"
    plan.choose("colour", reason, "grey" if data.grey else "mild", **keys)
    plan.say("channels", f"as the index has it; the images are {'grey' if data.grey else 'in colour'}", data.channels)

    mean, std, reason = list(data.mean), list(data.std), "measured on these images"
    if draft.continuing and data.channels in (1, 3):  # other planes than ImageNet's have statistics of their own
        reason = "ImageNet's, with which the released weights were trained"
        mean, std = ([0.449], [0.226]) if data.channels == 1 else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    plan.choose("mean, std", reason, f"{mean}, {std}", views__mean=mean, views__std=std)


def _heads(plan: Proposal, draft: Draft, data: Data) -> None:
    count, (hidden, bottleneck) = rules.prototypes(data.images), rules.head_width(data.images, draft.cpu)
    head = {"prototypes": count, "hidden": hidden, "bottleneck": bottleneck}
    keys = {f"objectives.{part}.{key}": value for part in parts(draft) for key, value in head.items()}
    reason = f"about one for every eight of {data.images:,} images, within limits: more would stay empty"
    if not draft.patches:
        reason += "; no masked patches, for a convolution sees around a mask"
    plan.choose("prototypes", reason, f"{count:,}", **keys)
    if draft.patches == "pixels":
        grid = draft.size // draft.patch
        reason = f"{grid} x {grid} a view are few: at 4 x 4, painting hidden ones taught more than naming them (ibot)"
        plan.choose("patches", reason, "pixels", objectives__pixels__weight=1.0)
    reason = "pushes neighbours apart, so that images cannot all become alike"
    keys = {"objectives.spread.weight": 0.1}
    if (group := rules.neighbours(_micro(plan, draft))) != rules.GROUP:
        keys["objectives.spread.group"] = group
    plan.choose("spread", reason, "weight 0.1", **keys)
    if draft.continuing and (weight := rules.anchor(data.images)):
        reason = "holds on to what the released weights know, which few images would wash out"
        plan.choose("anchor", reason, f"weight {weight}", objectives__anchor__weight=weight)


def _labels(plan: Proposal, draft: Draft, data: Data) -> None:
    if not draft.labels:
        reason = "as you say" if len(data.per_class) > 1 else "no image has one, or all have the same"
        plan.say("labels", reason, "none")
        return
    reason = "no image names two classes" if not data.several else f"{data.several:.1%} of them name two or more"
    reason += f"; {data.labelled / data.images:.0%} of all images are labelled, and "
    kind = drafts.given(plan.fixed, "objectives.labels.kind", draft.labels)
    keys: dict[str, Any] = {"objectives.labels.kind": kind}
    start = rules.label_start(data.labelled, data.images, draft.continuing)
    if start := drafts.given(plan.fixed, "objectives.labels.start", start):
        reason += f"join after {start:.0%} of the run, as they come: few are soon learnt by heart"
        alone = round(min(start + 0.05, 1.0), 2)  # words, where prototypes begin at some, rest as long as the backbone
        late = {"start": start, "head_first": alone, "unfreeze_at": alone, "adjust": kind == "one_of"}
        keys |= {"stream.labelled_fraction": 0.0, **{f"objectives.labels.{key}": value for key, value in late.items()}}
    else:
        share = rules.labelled_fraction(data.labelled, data.images)
        reason += f"{share:.0%} of each batch are of these"
        keys["stream.labelled_fraction"] = share
    if draft.continuing and data.images < 5_000:
        softened = {"weight": 0.5, "head": "mlp", "smoothing": 0.1, "dropout": 0.2}
        keys |= {f"objectives.labels.{key}": value for key, value in softened.items()}
        reason += "; softened, for so few are soon learnt by heart"
    plan.choose("labels", reason, f"{kind}, {len(data.per_class)} classes", **keys)


def _batch(plan: Proposal, draft: Draft, data: Data) -> None:
    reason = f"{data.images:,} images: the fewer, the smaller, for many steps"
    plan.choose("batch", reason, f"{draft.batch} images a step", batch__size=draft.batch)
    micro, processes = _micro(plan, draft), draft.machine.processes
    memory = draft.machine.memory if draft.cpu else draft.machine.gpu_memory
    reason = f"{memory:.0f} GiB would hold about {max(draft.fits, 0):,.0f} a pass; results do not depend on it"
    if draft.step is None:
        reason = "memory is not computed for this backbone; batch norm wants 32 a pass, or more"
    passes = draft.share // micro
    shown = f"{micro} images a pass, {passes} pass{'es' * (passes > 1)} a step" + f", {processes} processes" * (
        processes > 1
    )
    plan.choose("micro-batch", reason, shown, batch__micro=micro)
    reason = f"this {'CPU' if draft.cpu else 'GPU'} has {'' if draft.machine.bf16 else 'no '}units for bf16"
    name = "bf16" if draft.machine.bf16 else "no"
    plan.choose("precision", reason, name.replace("no", "float32"), precision=name)
    workers = rules.workers(draft.machine.cores, processes, draft.cpu)
    plan.choose("loader", f"{draft.machine.cores} cores", f"{workers} a process", data__workers=workers)


def _length(plan: Proposal, draft: Draft, data: Data) -> None:
    longest = drafts.LONGEST_CPU if draft.cpu else drafts.LONGEST_GPU
    shown, hours = draft.shown, draft.hours()
    steps = lookup(plan.fixed, "steps")
    if steps is ABSENT:
        shown = int(shown * min(1.0, longest / hours)) if hours else shown
        steps = rules.tidy(shown / draft.batch)
    reason = f"each image is shown about {steps * draft.batch / data.images:,.0f} x; "
    reason += "released weights need few looks" if draft.continuing else "from scratch takes many looks"
    if shown < draft.shown:
        reason = f"what {longest:g} hours allow here; {draft.shown:,} images shown would be better"
    plan.choose("steps", reason, f"{steps:,} = {steps * draft.batch:,} images shown", steps=steps)

    low, high = rules.momentum(steps, draft.continuing)
    reason = f"averages over {1 / (1 - low):,.0f} steps at first; the shorter the run, the shorter its memory"
    plan.choose("teacher", reason, f"momentum {low} to {high}", teacher__momentum=[low, high])
    end = rules.teacher_temperature(steps)
    values = {"teacher_temperature": end, "temperature_warmup": 0.3}
    values["freeze_last"] = rules.freeze_last(data.images, steps * draft.batch)
    keys = {f"objectives.{part}.{key}": value for part in parts(draft) for key, value in values.items()}
    reason = "targets start sharp and soften over 30 % of the run; a short run keeps them sharper"
    plan.choose("temperature", reason, f"0.04 to {end}", **keys)
    keys = {"save.every": max(steps // 20, 50), "probe.every": max(steps // 10, 50)}
    shown = f"save every {keys['save.every']:,}, probe every {keys['probe.every']:,}"
    plan.choose("rhythm", "twenty checkpoints, ten looks at held-out images, if there are any", shown, **keys)


def _optimiser(plan: Proposal, draft: Draft, data: Data) -> None:
    small = draft.cpu and not draft.continuing
    lr = rules.learning_rate(draft.batch, draft.continuing, small)
    keys: dict[str, Any] = {"optim.lr": lr, "optim.weight_decay": [0.04, 0.2]}
    reason = "for 1,024 images a step; it scales with the root of the batch"
    if draft.continuing:
        keys |= {"optim.layer_decay": rules.layer_decay(data.images), "optim.heads_first": 0.03}
        reason = "a peak of 1e-4, less for early blocks; new heads settle before the backbone moves"
    elif small:
        keys["optim.patch_embed_lr"] = 1.0
    plan.choose("learning rate", reason, f"{lr:g}", **keys)


def _notes(plan: Proposal, draft: Draft, data: Data) -> None:
    say = plan.notes.append
    if not draft.continuing and not draft.machine.had and lookup(plan.fixed, "backbone.weights") is ABSENT:
        fetch = f"timm.create_model('{drafts.RELEASED[1]}', pretrained=True)"
        say(
            "with a GPU, released weights are the better start: fetch them once, with a network, and ask again\n"
            f'python -c "import timm; {fetch}"'
        )
    if draft.fits < 1:
        say("not even one image a pass may fit into the memory: take a smaller backbone, or fewer prototypes")
    if data.grey and data.channels == 3:
        say("the images are grey but read as three equal channels: build the shards with --channels 1")
    if data.bits > 8:
        say("16-bit images are read with 8 bits: if fine contrasts matter, build the shards with --window or --bits")
    if len(data.sources) > 1:
        say(f"{len(data.sources)} sources: a class counts as absent only where its own source could have named it")
    if rare := [name for name, count in data.per_class.items() if count < 10]:
        say(f"fewer than 10 images of {', '.join(rare[:5])}{', ...' * (len(rare) > 5)}: expect little")
    if data.texts:
        say(
            f"{data.texts:,} images have a report: objectives.text_pairs learns from them, with a text encoder of yours"
        )
    if data.damaged:
        say(f"{data.damaged} of the {data.looked_at} images looked at cannot be read: the run leaves them out, by name")
    say("do the images have an up (X-rays, faces)? Then add views.vflip=0")


def parts(draft: Draft) -> tuple[str, ...]:
    """The objectives with prototypes."""
    return ("dino", "ibot") if draft.patches == "ibot" else ("dino",)


def _micro(plan: Proposal, draft: Draft) -> int:
    given = drafts.given(plan.fixed, "batch.micro", 0)
    return given if given and given != "auto" else rules.micro_batch(draft.share, draft.fits)
