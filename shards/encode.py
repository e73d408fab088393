"""From a frame to the bytes that are stored: JPEG where loss was asked for, else PNG, or TIFF for several planes."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

from shards.sources import Frame

# Baseline TIFF tags: by MaxSampleValue a reader knows that values are scaled, however small those in one image are.
_FULL_RANGE = {280: 0, 281: 65535}


def shrink(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """[H, W, C] with a short side of at most `short_side` pixels (0: as it is), area-averaged."""
    height, width, channels = pixels.shape
    if not short_side or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    fours = [pixels[..., i : i + 4] for i in range(0, channels, 4)]  # OpenCV's area filter takes no more
    small = [cv2.resize(part, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], -1) for part in fours]
    return np.concatenate(small, axis=2)


def encode(frame: Frame, quality: int) -> bytes:
    """`quality` 0: without loss. JPEG and PNG hold 8 bits of grey or RGB, PNG 16 bits of grey, and TIFF the rest.

    A TIFF has a page a channel, so that any viewer of stacks opens it; uncompressed, for deflate saves a quarter of a
    noisy stack and makes reading it four times as slow. PNG at level 3: for 16 bits both smaller and faster than 6.
    """
    pixels, planes = np.ascontiguousarray(frame.pixels), frame.pixels.shape[2]
    wide = pixels.dtype == np.uint16
    if planes in (1, 3) and not wide and quality:
        space, subsampling = ("RGB", "420") if planes == 3 else ("GRAY", "Gray")
        return simplejpeg.encode_jpeg(pixels, quality, space, subsampling)
    buffer = io.BytesIO()
    if planes == 1 or (planes == 3 and not wide):
        info = PngImagePlugin.PngInfo()
        if wide and frame.full:
            info.add(b"sBIT", bytes([16]))  # so that a reader takes the values for scaled, however small they are
        Image.fromarray(pixels[..., 0] if planes == 1 else pixels).save(buffer, "PNG", pnginfo=info, compress_level=3)
    else:
        pages = [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(planes)]
        tags: dict[str, Any] = {"tiffinfo": _FULL_RANGE} if wide and frame.full else {}
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], **tags)
    return buffer.getvalue()
