"""The loaders of others: from a folder of JPEG files to the tensors that the steps of peers.py ask for.

Each is the package's own dataset and augmentations with the crop sizes and scales of all contestants, in torch's
DataLoader. Two things are kinder than their own training is: images come in random order without end, so nobody waits
where an epoch begins, and each worker works as many batches ahead as ours do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.contestants import Setting
from benchmarks.peers import Feed, needed
from hybridssl.views import ViewOptions

SCALES = ViewOptions.global_scale, ViewOptions.local_scale
ENDLESS = 10**9  # images
AHEAD = 4  # batches a worker

Loader = Callable[[Setting, Path, int, torch.device], Feed]


def endless(
    dataset: Any, setting: Setting, workers: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator:
    """Batches of a dataset by `workers` processes, each image once a round."""
    return iter(
        DataLoader(
            dataset,
            setting.batch,
            sampler=RandomSampler(dataset, num_samples=ENDLESS),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            prefetch_factor=AHEAD if workers else None,
        )
    )


def onto(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def lightly(setting: Setting, images: Path, workers: int, device: torch.device) -> Feed:
    """LightlyDataset and DINOTransform: Pillow, colour and blur included."""
    from lightly.data import LightlyDataset
    from lightly.transforms import DINOTransform

    transform = DINOTransform(
        global_crop_size=setting.global_size,
        global_crop_scale=SCALES[0],
        local_crop_size=setting.local_size,
        local_crop_scale=SCALES[1],
        n_local_views=setting.local_count,
    )
    batches = endless(LightlyDataset(str(images), transform=transform), setting, workers)  # type: ignore[arg-type]

    def feed() -> tuple[Tensor, Tensor]:
        views = onto(device, next(batches)[0])
        return torch.cat(views[:2]), torch.cat(views[2:])

    return feed


def lightly_train(setting: Setting, images: Path, workers: int, device: torch.device) -> Feed:
    """The dataset of lightly-train and the transform of its `dinov2` method, whose scales are DINOv2's like ours."""
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no telemetry
    with needed("lightly-train", "pip install lightly-train"):
        from lightly_train._data.image_dataset import ImageDataset
        from lightly_train._methods.dinov2.dinov2_transform import (
            DINOv2ViTLocalViewTransformArgs,
            DINOv2ViTTransform,
            DINOv2ViTTransformArgs,
        )

    large, small = ((side, side) for side in (setting.global_size, setting.local_size))
    local = DINOv2ViTLocalViewTransformArgs(num_views=setting.local_count, view_size=small)
    transform = DINOv2ViTTransform(DINOv2ViTTransformArgs(image_size=large, num_channels=3, local_view=local))
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    batches = endless(ImageDataset(images, names, transform, 3), setting, workers)
    return lambda: onto(device, next(batches)["views"])


def dinov2(setting: Setting, images: Path, workers: int, device: torch.device) -> Feed:
    """DINOv2's own augmentations, masks and collate over torchvision's ImageFolder, in half precision on a GPU."""
    with needed("dinov2", "clone facebookresearch/dinov2 and put it on PYTHONPATH"):
        from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
    from torchvision.datasets import ImageFolder

    side = setting.global_size // setting.patch
    transform = DataAugmentationDINO(
        *SCALES, setting.local_count, global_crops_size=setting.global_size, local_crops_size=setting.local_size
    )
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=ViewOptions.mask_ratio,
        mask_probability=ViewOptions.mask_probability,
        dtype=torch.half if device.type == "cuda" else torch.float,
        n_tokens=side * side,
        mask_generator=MaskingGenerator((side, side), max_num_patches=0.5 * side * side),
    )
    batches = endless(ImageFolder(str(images), transform), setting, workers, collate)
    names = ("collated_global_crops", "collated_local_crops", "collated_masks", "mask_indices_list", "masks_weight")

    def feed() -> list[Tensor]:
        batch = next(batches)
        return onto(device, [batch[name] for name in names])

    return feed


FEEDS: dict[str, Loader] = {"lightly's parts": lightly, "lightly-train": lightly_train, "DINOv2": dinov2}
