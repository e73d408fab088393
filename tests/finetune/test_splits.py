from __future__ import annotations

import numpy as np
import pytest

from finetune.splits import Leaks, find_leaks, guard, label_subset
from hybridssl.errors import UserError


@pytest.fixture
def labelled():
    """y [N], groups [N]: 300 groups of one to four images of one class, class 2 rare."""
    rng = np.random.default_rng(0)
    of_group = rng.choice(3, size=300, p=[0.7, 0.27, 0.03])
    groups = np.repeat(np.arange(300) * 7919, rng.integers(1, 5, 300))
    return of_group[groups // 7919], groups


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_a_fraction_takes_whole_groups_of_every_class(labelled, fraction):
    y, groups = labelled
    taken = label_subset(y, groups, fraction)
    assert not set(groups[taken]) & set(groups[~taken])
    for c in range(3):
        target = max(1, round(fraction * (y == c).sum()))
        assert target <= (y[taken] == c).sum() <= target + 3, "at most the rest of one group more"


def test_a_fraction_does_not_depend_on_the_order_of_the_images(labelled):
    y, groups = labelled
    shuffled = np.random.default_rng(1).permutation(len(y))
    straight = label_subset(y, groups, 0.2, seed=4)
    np.testing.assert_array_equal(label_subset(y[shuffled], groups[shuffled], 0.2, seed=4), straight[shuffled])
    assert (label_subset(y, groups, 0.2, seed=5) != straight).any()


def test_a_smaller_fraction_is_part_of_a_larger_one(labelled):
    y, groups = labelled
    small, large = label_subset(y, groups, 0.1), label_subset(y, groups, 0.3)
    assert small.sum() < large.sum()
    assert not (small & ~large).any()


def test_all_labels_are_all_labels(labelled):
    assert label_subset(*labelled, 1.0).all()


def test_groups_of_several_classes_count_for_each():
    y, groups = np.array([0, 1, 0, 1, 0, 1, 0, 1]), np.array([5, 5, 6, 6, 7, 7, 8, 8])
    assert label_subset(y, groups, 0.5).sum() == 4


def test_a_carved_val_leaves_a_group_of_every_class():
    y, groups = np.array([0, 0, 0, 0, 1]), np.array([1, 2, 3, 4, 9])
    carved = label_subset(y, groups, 0.2, keep_one=True)
    assert carved.sum() == 1
    assert not carved[4], "the only group of class 1 stays in train"


def test_a_carved_val_leaves_the_last_group_of_a_class_whichever_class_asks_for_it():
    """Class 1 is in groups 8 and 9 alone, and 9 holds images of the common class too."""
    groups = np.array([*range(8), 8, 9, 9])
    y = np.array([*[0] * 8, 1, 0, 1])
    for seed in range(20):
        carved = label_subset(y, groups, 0.5, seed, keep_one=True)
        assert carved.any()
        assert set(y[~carved]) == {0, 1}, f"seed {seed}: train has lost a class"


class Columns:
    """What the guard reads of an index."""

    splits = ("test", "", "train", "val")

    def __init__(self, digest, group, split):
        numbers = [self.splits.index(name) for name in split]
        self.columns = {"digest": np.array(digest), "group": np.array(group), "split": np.array(numbers)}

    def column(self, name):
        return self.columns[name]


SPLITS = {"train": np.array([0, 1, 2]), "val": np.array([3]), "test": np.array([4, 5])}
SIX = ["train", "train", "train", "val", "test", "test"]


def test_clean_splits_pass():
    leaks = find_leaks(Columns([1, 2, 3, 4, 5, 6], [10, 10, 0, 0, 12, 12], SIX), SPLITS, np.array([1, 2, 3]))
    assert leaks == Leaks(0, 0, 0)
    assert guard(leaks, allow=False) == leaks
    assert not guard(leaks, allow=True).allowed


def test_every_kind_of_leak_is_counted():
    index = Columns([1, 2, 3, 4, 1, 6], [10, 11, 0, 11, 10, 0], SIX)
    leaks = find_leaks(index, SPLITS, np.array([1, 6, 3]))
    assert leaks == Leaks(pretraining=2, groups=2, images=1)
    with pytest.raises(UserError, match=r"2 val or test images .* 2 groups .* 1 identical .*--allow-leak"):
        guard(leaks, allow=False)
    assert guard(leaks, allow=True).allowed


def test_a_backbone_without_a_record_is_unknown_not_clean():
    assert find_leaks(Columns([1] * 6, [0] * 6, SIX), SPLITS, None).pretraining is None


@pytest.mark.parametrize(
    ("split", "read", "groups"),
    [
        ("", [1, 2, 3, 7], 1),  # pretraining read a follow-up of a test patient
        ("", [1, 2, 3], 0),  # by its record it did not
        ("", None, 1),  # no record: it reads what has no split
        ("train", None, 1),
        ("train", [1, 2, 3], 1),  # the table puts one patient into train and test
        ("test", None, 0),  # other images of a test patient that nothing reads
        ("test", [1, 2, 3], 0),
    ],
)
def test_images_without_a_label_tell_of_their_patient_too(split, read, groups):
    """The seventh image has no label, so it is in none of the splits; its patient, 12, is judged."""
    index = Columns([1, 2, 3, 4, 5, 6, 7], [10, 10, 0, 9, 12, 12, 12], [*SIX, split])
    leaks = find_leaks(index, SPLITS, None if read is None else np.array(read))
    assert leaks == Leaks(None if read is None else 0, groups, 0)


def test_what_to_do_about_a_patient_in_two_splits_is_said():
    with pytest.raises(UserError, match="one split to all images of a patient, also to those without a label"):
        guard(Leaks(0, 1, 0), allow=False)


def test_a_judged_image_that_pretraining_read_is_counted_once():
    """Not again as a patient in two splits: image and patient are in test alone."""
    index = Columns([1, 2, 3, 4, 5, 6], [10, 10, 0, 9, 12, 12], SIX)
    assert find_leaks(index, SPLITS, np.array([1, 5])) == Leaks(1, 0, 0)
