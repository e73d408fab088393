"""The doctor's rules, one by one: they give what worked, they are monotone, and they stay within their bounds."""

from __future__ import annotations

import math

import pytest

from hybridssl.recipe import read_yaml
from pretrain import recipe, rules


def test_the_measured_recipe_is_what_the_rules_give_for_its_data() -> None:
    """`ham-cpu`: 7,037 images on two cores."""
    ham = read_yaml(recipe.find("ham-cpu"))
    images, size = 7_037, ham["views"]["global_size"]
    assert rules.batch_size(images, 1) == ham["batch"]["size"]
    assert rules.prototypes(images) == ham["objectives"]["dino"]["prototypes"]
    assert rules.head_width(images, cpu=True) == tuple(ham["objectives"]["dino"][k] for k in ("hidden", "bottleneck"))
    assert rules.teacher_temperature(ham["steps"]) == ham["objectives"]["dino"]["teacher_temperature"]
    assert rules.local_size(size, 16) == ham["views"]["local_size"]
    assert rules.patch_objective(size // 16, continuing=False) in ham["objectives"]
    assert rules.local_count(images, cpu=True) == ham["views"]["local_count"]
    assert list(map(list, rules.scales(images, size))) == [ham["views"][k] for k in ("global_scale", "local_scale")]
    assert rules.label_start(706, images, continuing=False) == ham["objectives"]["labels"]["start"]
    assert rules.learning_rate(64, continuing=False, small=True) == ham["optim"]["lr"]
    assert rules.presentations(images, 64, continuing=False, cpu=True) == pytest.approx(420_000, rel=0.01)


@pytest.mark.parametrize(
    ("steps", "worked"), [(650, (0.9, 0.98)), (3_000, (0.98, 0.998)), (6_500, (0.99, 0.9995)), (100_000, (0.994, 1.0))]
)
def test_teacher_momentum_is_near_what_worked(steps: int, worked: tuple[float, float]) -> None:
    low, high = rules.momentum(steps, continuing=False)
    assert low == pytest.approx(worked[0], abs=0.003)
    assert worked[1] - 0.001 <= high <= worked[1] + 0.012
    assert low <= high


@pytest.mark.parametrize("continuing", [False, True])
def test_teacher_memory_grows_with_the_run_and_is_never_longer(continuing: bool) -> None:
    pairs = [rules.momentum(steps, continuing) for steps in (1, 3, 50, 650, 3_000, 6_500, 19_999, 20_000, 10**6)]
    assert pairs == sorted(pairs)
    assert all(0.9 <= low <= high <= 1 for low, high in pairs)
    if continuing:
        assert {high for _, high in pairs} == {1.0}
    else:
        assert all(1 / (1 - low) <= steps / 10 for (low, _), steps in zip(pairs[3:], (650, 3000, 6500), strict=False))


@pytest.mark.parametrize(
    ("images", "batch"),
    [(10, 32), (999, 32), (1_000, 64), (9_999, 64), (10_000, 128), (50_000, 256), (200_000, 512), (10**7, 1024)],
)
def test_batch_by_images(images: int, batch: int) -> None:
    assert rules.batch_size(images, 1) == batch


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 8, 16])
def test_batch_parts_into_whole_groups(processes: int) -> None:
    for images in (500, 30_000, 2_000_000):
        batch = rules.batch_size(images, processes)
        assert batch % (processes * rules.GROUP) == 0
        assert batch <= max(2 * rules.batch_size(images, 1), processes * rules.GROUP)


def test_length_of_a_run() -> None:
    assert rules.presentations(500, 32, continuing=False, cpu=True) == 3_000 * 32
    assert rules.presentations(432_776, 512, continuing=False, cpu=False) == pytest.approx(82e6, rel=0.06)  # DermINO
    assert rules.presentations(2_000, 64, continuing=True, cpu=False) == 128_000
    assert rules.presentations(50_000, 128, continuing=True, cpu=False) == 1_000_000  # nanopath


@pytest.mark.parametrize(("size", "cpu", "patch"), [(224, False, 16), (128, False, 16), (64, False, 8), (28, False, 4)])
def test_patch_on_a_gpu(size: int, cpu: bool, patch: int) -> None:
    assert rules.patch_size(size, cpu) == patch


@pytest.mark.parametrize(("size", "patch"), [(96, 16), (64, 16), (48, 8), (32, 8), (28, 4), (5, 4)])
def test_patch_on_a_cpu(size: int, patch: int) -> None:
    assert rules.patch_size(size, True) == patch


@pytest.mark.parametrize(
    ("short", "patch", "least", "size", "local"),
    [(1024, 16, 2, 224, 96), (1024, 14, 8, 224, 98), (150, 16, 2, 144, 64), (64, 14, 8, 112, 56), (20, 16, 2, 32, 32)],
)
def test_crops_are_multiples_of_the_patch(short: int, patch: int, least: int, size: int, local: int) -> None:
    assert rules.global_size(short, 224, patch, least) == size
    assert rules.local_size(size, patch) == local
    assert size % patch == local % patch == 0


def test_prototypes_by_images() -> None:
    found = {n: rules.prototypes(n) for n in (1, 500, 7_037, 30_000, 60_000, 400_000, 500_000)}
    assert list(found.values()) == [256, 256, 512, 2_048, 4_096, 8_192, 65_536]
    assert all(math.log2(count).is_integer() for count in found.values())


@pytest.mark.parametrize(
    ("labelled", "share"),
    [(0, 0.0), (10, 0.04), (100, 0.25), (1_000, 0.25)],  # of 1,000 images
)
def test_labelled_images_come_at_most_four_times_as_often(labelled: int, share: float) -> None:
    assert rules.labelled_fraction(labelled, 1_000) == share


def test_few_labels_join_late_and_released_weights_have_them_from_the_start() -> None:
    assert [rules.label_start(count, 1_000, continuing=False) for count in (1, 250, 251, 1_000)] == [0.7, 0.7, 0, 0]
    assert rules.label_start(1, 1_000, continuing=True) == 0


def test_kind_of_labels() -> None:
    assert [rules.label_kind(share) for share in (0.0, 0.005, 0.01, 0.7)] == ["one_of", "one_of", "multi", "multi"]


@pytest.mark.parametrize(
    ("share", "fits", "micro"),
    [(64, 1e9, 64), (64, 63, 32), (64, 20, 16), (64, 15, 8), (64, 0.2, 1), (96, 50, 48), (8, 100, 8), (12, 5, 4)],
)
def test_micro_batch_divides_and_fits(share: int, fits: float, micro: int) -> None:
    assert rules.micro_batch(share, fits) == micro
    assert micro % rules.neighbours(micro) == 0


def test_neighbours_divide_a_pass() -> None:
    assert [rules.neighbours(n) for n in (1, 4, 8, 16, 48, 20)] == [1, 4, 8, 16, 16, 10]


def test_a_continued_run_peaks_at_one_rate_and_holds_on_the_more_the_fewer_images() -> None:
    for batch in (64, 128, 512):
        assert rules.learning_rate(batch, True, False) * math.sqrt(batch / 1024) == pytest.approx(1e-4, rel=0.03)
    sizes = (300, 5_000, 50_000)
    assert [rules.layer_decay(n) for n in sizes] == [0.65, 0.7, 0.8]
    assert [rules.anchor(n) for n in sizes] == [1.0, 0.5, 0.0]


def test_prototypes_rest_for_an_epoch() -> None:
    assert rules.freeze_last(7_037, 422_400) == pytest.approx(1 / 60, abs=1e-3)
    assert rules.freeze_last(10**6, 10**6) == 0.05
    assert rules.freeze_last(10, 10**6) == 0.01


def test_loader_leaves_a_core_to_each_process() -> None:
    assert [rules.workers(*a) for a in ((2, 1, True), (16, 1, False), (96, 8, False), (4, 8, False))] == [1, 15, 11, 1]


def test_steps_are_rounded() -> None:
    assert [rules.tidy(n) for n in (0.2, 3, 47, 6_597, 160_300)] == [1, 3, 47, 6_600, 160_000]
