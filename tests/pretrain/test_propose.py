"""What is proposed for which data and machine, and that every proposal is a recipe that fits together."""

from __future__ import annotations

from typing import Any

import pytest

from hybridssl.recipe import read_yaml, resolve
from pretrain import cost
from pretrain.draft import RELEASED
from pretrain.fingerprint import Data, Machine
from pretrain.propose import parts, propose
from pretrain.recipe import Recipe

CLASSES = {"nevus": 900, "melanoma": 200}
LAPTOP = Machine(cores=8, memory=16)
TWO_CORES = Machine(cores=2, memory=24)
H100 = Machine(16, 128, gpus=1, gpu="H100", gpu_memory=80, bf16=True)
NODE = Machine(96, 1024, gpus=8, gpu="H100", gpu_memory=80, bf16=True, processes=8)
OLD = Machine(8, 64, gpus=1, gpu="T4", gpu_memory=15)
WITH_WEIGHTS = Machine(16, 128, gpus=1, gpu="H100", gpu_memory=80, bf16=True, had=frozenset(RELEASED))
TINY, SMALL, BASE = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base"))

# data, machine, what the proposal must say
CASES: dict[str, tuple[Data, Machine, dict[str, Any]]] = {
    "500 images on a CPU": (
        Data(500, short_side=600),
        LAPTOP,
        {
            "backbone.name": TINY,
            "backbone.weights": "",
            "batch.size": 32,
            "steps": 3_000,
            "precision": "no",
            "objectives.dino.prototypes": 256,
            "teacher.momentum": [0.978, 0.998],
            "views.global_size": 96,
        },
    ),
    "7,000 on two cores": (
        Data(7_037, short_side=150, per_class=CLASSES),
        TWO_CORES,
        {
            "backbone.args": {"depth": 6},
            "views.global_size": 64,
            "views.local_size": 32,
            "batch.size": 64,
            "batch.micro": 64,
            "steps": 6_600,
            "objectives.dino.prototypes": 512,
            "objectives.labels.kind": "one_of",
            "objectives.labels.head_first": 0.75,
            "objectives.labels.unfreeze_at": 0.75,
            "objectives.labels.adjust": True,
            "optim.lr": 3e-3,
            "data.workers": 1,
        },
    ),
    "400,000 on 8 x 80 GB": (
        Data(400_000, short_side=512, per_class=CLASSES, several=0.2, sources={"a": 3, "b": 4}),
        NODE,
        {
            "backbone.name": BASE,
            "batch.size": 512,
            "batch.micro": 64,
            "steps": 160_000,
            "precision": "bf16",
            "objectives.dino.prototypes": 8_192,
            "objectives.labels.kind": "multi",
            "teacher.momentum": [0.994, 1.0],
            "objectives.dino.teacher_temperature": 0.07,
            "data.workers": 11,
        },
    ),
    "grey 16-bit tiles on an old GPU": (
        Data(20_000, short_side=256, grey=True, bits=16),
        OLD,
        {
            "backbone.name": SMALL,
            "views.saturation": 0.0,
            "views.grayscale": 0.0,
            "views.hue": 0.0,
            "precision": "no",
            "batch.size": 128,
            "batch.micro": 32,
        },
    ),
    "no labels": (Data(30_000), H100, {"backbone.name": SMALL, "views.local_size": 96}),
    "several labels": (
        Data(30_000, per_class=CLASSES, several=0.4),
        H100,
        {"objectives.labels.kind": "multi", "objectives.labels.start": 0.7, "objectives.labels.adjust": False},
    ),
    "most are labelled": (
        Data(30_000, per_class={"mel": 10_000, "nv": 9_000}),
        H100,
        {"objectives.labels.kind": "one_of", "stream.labelled_fraction": 0.25},
    ),
    "one source": (
        Data(30_000, per_class=CLASSES, sources={"here": 30_000}),
        H100,
        {"objectives.labels.kind": "one_of"},
    ),
    "tiny images": (
        Data(50_000, short_side=28, channels=1, grey=True, mean=(0.1,), std=(0.3,)),
        WITH_WEIGHTS,
        {
            "backbone.weights": "",
            "backbone.args": {"init_values": 1e-5, "patch_size": 4},
            "views.global_size": 28,
            "views.local_size": 12,
            "views.mean": [0.1],
        },
    ),
    "few, with released weights": (
        Data(3_000, short_side=300, per_class=CLASSES),
        WITH_WEIGHTS,
        {
            "backbone.name": RELEASED[1],
            "backbone.weights": "pretrained",
            "objectives.anchor.weight": 1.0,
            "objectives.labels.head": "mlp",
            "steps": 2_000,
            "optim.layer_decay": 0.65,
            "views.local_size": 98,
            "views.mean": [0.485, 0.456, 0.406],
            "teacher.momentum": [0.99, 1.0],
        },
    ),
    "many, with released weights": (
        Data(60_000, mean=(0.7, 0.5, 0.5)),
        WITH_WEIGHTS,
        {"backbone.name": RELEASED[0], "optim.layer_decay": 0.8, "views.mean": [0.485, 0.456, 0.406]},
    ),
    "grey, one channel, with released weights": (
        Data(6_000, channels=1, grey=True, mean=(0.2,), std=(0.1,)),
        WITH_WEIGHTS,
        {"backbone.name": RELEASED[1], "views.mean": [0.449], "views.std": [0.226]},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Count each network once."""
    seen: dict[str, Any] = {}
    true = cost.network

    def counted(options, channels=3, size=224):
        key = f"{options.name} {options.args} {options.registers} {channels} {size}"
        if key not in seen:
            seen[key] = true(options, channels, size)
        return seen[key]

    patch = pytest.MonkeyPatch()
    patch.setattr(cost, "network", counted)
    yield
    patch.undo()


@pytest.mark.parametrize("name", CASES)
def test_proposal(name: str) -> None:
    data, machine, expected = CASES[name]
    plan = propose(data, machine)
    assert {key: plan[key] for key in expected} == expected
    recipe = resolve(Recipe, [plan.tree()])
    assert all(choice.reason and str(choice) for choice in plan.choices)
    assert recipe.batch.size % (recipe.batch.micro * machine.processes) == 0
    assert recipe.views.global_size % plan.draft.patch == recipe.views.local_size % plan.draft.patch == 0
    assert recipe.batch.micro <= max(plan.draft.fits, 1)
    assert plan.draft.hours() < 72
    labelled = bool(data.per_class)
    assert ("labels" in recipe.objectives) == labelled
    late = labelled and recipe.objectives["labels"].start > 0
    assert (recipe.stream.labelled_fraction > 0) == (labelled and not late)
    grid = recipe.views.global_size // plan.draft.patch
    patches = "pixels" if grid < 8 and not recipe.backbone.weights else "ibot"
    assert recipe.objectives.keys() & {"dino", "ibot", "pixels", "spread"} == {"dino", patches, "spread"}


def notes(name: str) -> str:
    return "\n".join(propose(*CASES[name][:2]).notes)


def test_notes_name_what_the_keys_cannot() -> None:
    assert "--channels 1" in notes("grey 16-bit tiles on an old GPU")
    assert "8 bits" in notes("grey 16-bit tiles on an old GPU")
    assert "2 sources" in notes("400,000 on 8 x 80 GB")
    assert "sources" not in notes("one source")
    assert RELEASED[1] in notes("no labels")  # how to fetch weights
    assert "fetch" not in notes("few, with released weights")
    told = "\n".join(propose(Data(100, per_class={"a": 50, "b": 3}, texts=7, looked_at=50, damaged=2), LAPTOP).notes)
    for word in ("images of b:", "7 images have a report", "2 of the 50"):
        assert word in told


def test_a_set_too_large_for_a_cpu_is_shown_as_often_as_a_day_allows() -> None:
    plan = propose(Data(400_000), TWO_CORES)
    assert plan["steps"] * plan["batch.size"] / plan.draft.images_per_second / 3600 == pytest.approx(24, rel=0.05)
    assert "24 hours" in next(choice.reason for choice in plan.choices if choice.what == "steps")


def test_a_network_too_large_for_the_memory_is_not_proposed() -> None:
    assert propose(Data(30_000), Machine(16, 64, gpus=1, gpu_memory=6, bf16=True))["backbone.name"] == SMALL
    plan = propose(Data(30_000), Machine(16, 64, gpus=1, gpu_memory=4, bf16=True))
    assert plan["backbone.name"] == TINY
    assert "not even one image" not in "".join(plan.notes)
    assert "not even one image" in "".join(propose(Data(30_000), Machine(16, 64, gpus=1, gpu_memory=1)).notes)


def test_processes_on_one_cpu_share_its_memory() -> None:
    one, two = (propose(Data(7_037), Machine(2, 24, processes=count)).draft for count in (1, 2))
    assert two.fits == pytest.approx(one.fits / 2, rel=0.2)  # each holds a model of its own
    assert (one.share, two.share) == (64, 32)


def test_one_class_is_no_label() -> None:
    assert "objectives.labels.kind" not in propose(Data(100, per_class={"a": 50}), LAPTOP)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [({"kind": "multi"}, {"adjust": False, "start": 0.7}), ({"start": 0.2}, {"head_first": 0.25, "adjust": True})],
)
def test_late_labels_follow_what_is_fixed_of_them(fixed: dict, expected: dict) -> None:
    data, fixed = Data(7_037, short_side=150, per_class=CLASSES), {"objectives": {"labels": fixed}}
    labels = resolve(Recipe, [propose(data, TWO_CORES, fixed).tree(), fixed]).objectives["labels"]
    assert {key: getattr(labels, key) for key in expected} == expected


@pytest.mark.parametrize("start", [0.004, 0.7, 0.97, 0.999])
@pytest.mark.parametrize("init", ["random", "text"])
def test_late_labels_may_begin_at_words(start: float, init: str) -> None:
    data, fixed = Data(7_037, short_side=150, per_class=CLASSES), {"objectives": {"labels": {"start": start}}}
    plan = propose(data, TWO_CORES, fixed).tree()
    assert resolve(Recipe, [plan, {"objectives": {"labels": {"init": init}}}]).objectives["labels"].start == start


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ({"batch": {"size": 8}}, {"batch.size": 8, "batch.micro": 8, "objectives.spread.group": 8}),
        ({"batch": {"size": 96, "micro": 24}}, {"batch.micro": 24, "objectives.spread.group": 12}),
        ({"steps": 20}, {"steps": 20, "teacher.momentum": [0.9, 0.9], "save.every": 50}),
        ({"views": {"global_size": 128}}, {"views.global_size": 128, "views.local_size": 64}),
        ({"objectives": {"labels": None}}, {"backbone.name": TINY}),
        ({"objectives": {"dino": {"prototypes": 32}}},
         {"objectives.dino.prototypes": 32, "objectives.pixels.weight": 1.0}),
        ({"objectives": {"dino": {"prototypes": 32}, "ibot": {}}},
         {"objectives.dino.prototypes": 32, "objectives.ibot.prototypes": 512}),
        ({"backbone": {"name": "vit_small_patch14_dinov2", "weights": "mine"}},
         {"backbone.weights": "mine", "views.global_size": 140, "objectives.anchor.weight": 0.5}),
        ({"backbone": {"weights": "mine"}}, {"backbone.name": RELEASED[1], "backbone.weights": "mine"}),
        ({"backbone": {"args": {"depth": 2}}}, {"backbone.args": {"depth": 2}}),
    ],
)  # fmt: skip
def test_the_rest_follows_what_is_fixed(fixed: dict, expected: dict) -> None:
    plan = propose(Data(7_037, short_side=150, per_class=CLASSES), TWO_CORES, fixed)
    assert {key: plan[key] for key in expected} == expected
    recipe = resolve(Recipe, [plan.tree(), fixed])
    assert recipe == resolve(Recipe, [plan.tree()])  # what is fixed is in the proposal, too
    assert ("labels" in recipe.objectives) == (fixed.get("objectives", {}).get("labels", 1) is not None)
    if "labels" not in recipe.objectives:
        assert recipe.stream.labelled_fraction == 0
    said = [choice for choice in plan.choices if "as you say" in choice.reason]
    assert bool(said) or fixed.get("objectives")


@pytest.mark.parametrize(
    ("said", "patches"),
    [({}, {"pixels"}), ({"ibot": {}}, {"ibot"}), ({"ibot": None}, {"pixels"}), ({"pixels": None}, set())],
)
def test_hidden_patches_have_one_objective_or_none(said: dict, patches: set[str]) -> None:
    fixed = {"objectives": said}
    recipe = resolve(Recipe, [propose(Data(7_037), TWO_CORES, fixed).tree(), fixed])
    assert recipe.objectives.keys() & {"ibot", "pixels"} == patches


def test_a_convolution_gets_no_masked_patches() -> None:
    plan = propose(Data(1_000), H100, {"backbone": {"name": "resnet18"}})
    assert parts(plan.draft) == ("dino",)
    assert not {"objectives.ibot.prototypes", "objectives.pixels.weight"} & {
        key for c in plan.choices for key in c.keys
    }
    assert plan["views.global_size"] % 32 == plan["views.local_size"] % 32 == 0
    assert plan["batch.micro"] == 32


def test_the_file_says_the_same_and_why(tmp_path) -> None:
    for data, machine, _ in list(CASES.values())[1:3]:
        plan = propose(data, machine, {"text": {"shrinkage": 0.3}, "objectives": {"ibot": None}})
        (tmp_path / "a.yaml").write_text(plan.yaml())
        assert resolve(Recipe, [read_yaml(tmp_path / "a.yaml")]) == resolve(Recipe, [plan.tree()])
        for choice in plan.choices:
            if choice.keys:
                words = "".join(plan.yaml().replace("#", "").split())
                assert "".join(choice.reason.split()) in words
    assert "shrinkage: 0.3" in plan.yaml()


def test_a_part_with_its_defaults_is_in_the_file(tmp_path) -> None:
    """`anchor:` with nothing below it would be null: no anchor."""
    fixed = {"objectives": {"anchor": {}, "ibot": None}, "text": {}}
    plan = propose(Data(1_000), H100, fixed)
    (tmp_path / "a.yaml").write_text(plan.yaml())
    assert "  anchor: {}\n" in plan.yaml()
    assert resolve(Recipe, [read_yaml(tmp_path / "a.yaml")]) == resolve(Recipe, [plan.tree()])
