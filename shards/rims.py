"""Does a picture carry a burnt-in rim: a black or white frame, or the dark ring of a dermatoscope or an endoscope?

Such rims tell a classifier which device took the picture, and so, often, which disease it shows.
"""

from __future__ import annotations

import numpy as np

RIMS = ("", "frame", "ring")
DARK, BRIGHT = 28, 235  # grey levels of 255 below and above which a band counts as black or white
FLAT = 6.0  # levels that a band may deviate from its own mean
STEP, ALONG = 24, 0.6  # levels between a frame and what it frames, over so much of its length
OUTSIDE, INSIDE = 0.97, 0.8  # shares that are dark beyond a ring's edge, and not dark within it

Array = np.ndarray


def rim(thumb: Array, height: int, width: int) -> str:
    """`frame`, `ring` or nothing. thumb: grey uint8 [S, S] of an image that had height x width pixels."""
    if _framed(thumb.astype(np.float32)):
        return "frame"
    return "ring" if _ringed(thumb, height, width) else ""


def _framed(thumb: Array) -> bool:
    """At least two opposite sides end in a flat black or white band with a straight, sharp edge."""
    sides = [_band(turned) for turned in (thumb, thumb[::-1], thumb.T, thumb.T[::-1])]
    return (sides[0] and sides[1]) or (sides[2] and sides[3])


def _band(thumb: Array) -> bool:
    """Does the picture begin, from above, with such a band? It ends where the rows change; a third is too wide."""
    mean = float(thumb[0].mean())
    if not (mean < DARK or mean > BRIGHT) or thumb[0].std() > FLAT:
        return False
    off = np.abs(thumb - mean)
    changed = np.flatnonzero(off[: len(thumb) // 3].mean(axis=1) > FLAT)
    if not len(changed):
        return False
    edge = off[changed[0] : changed[0] + 2]  # the row of the edge may lie half in the band, so the next decides with it
    return bool((edge > STEP).mean(axis=1).max() > ALONG)


def _ringed(thumb: Array, height: int, width: int) -> bool:
    """Dark all round a circle about the middle, not dark within it. The corners of the picture must lie beyond."""
    at = (np.arange(len(thumb)) + 0.5) / len(thumb) - 0.5
    y, x = at[:, None] * height, at[None] * width
    radius = np.hypot(y, x) / np.hypot(height / 2, width / 2)  # 1: the corners
    dark = thumb < DARK
    for edge in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55):
        within = (radius < edge - 0.05) & (radius > edge - 0.2)
        if dark[radius > edge].mean() >= OUTSIDE and (~dark[within]).mean() >= INSIDE:
            return True
    return False
