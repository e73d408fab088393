"""What a dermatologist reads off an outline, as numbers: area, longest diameter, asymmetry, border, colours.

After the ABCD rule of dermatoscopy (Stolz et al. 1994, Eur J Dermatol 4:521; Nachbar et al. 1994, J Am Acad Dermatol
30:551), with continuous measures in the place of its grades, since agreement is judged on them. Lengths are in pixels,
or in mm where the length of a pixel is known. All but the area are of the largest connected part: a stray pixel at the
other end of the image would else be the longest diameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter1d
from scipy.spatial.distance import pdist

from hybridssl.errors import UserError

Array = np.ndarray
NAMES = ("area", "diameter", "asymmetry", "irregularity", "variegation")
SMOOTH = 2.0  # points of the outline: enough to take off the staircase of the pixels, not the notches of a border
AXES = np.deg2rad(np.arange(0, 90, 6))  # the pairs of perpendicular axes that are tried beside the principal one
MOST = 20_000  # points of a lesion that are mirrored: enough for the third decimal


def measure(mask: Array, image: Array | None = None, pixel: float = 1.0) -> dict[str, float]:
    """mask bool [H, W], image uint8 [H, W, 3] (without: no variegation), pixel: length of its side -> NAMES: value.

    An empty mask has area and diameter 0 and nothing else that could be measured (NaN).
    """
    found = dict.fromkeys(NAMES, np.nan) | {"area": float(mask.sum()) * pixel**2, "diameter": 0.0}
    if not mask.any():
        return found
    lesion = largest(mask)
    found |= {"diameter": diameter(lesion) * pixel, "asymmetry": asymmetry(lesion)}
    found |= {"irregularity": irregularity(lesion)}
    if image is not None:
        found["variegation"] = variegation(lesion & mask, image)  # what shows through a hole is not of the lesion
    return found


def unit(name: str, length: str = "px") -> str:
    """The unit of a measurement, for people: px², px, or nothing."""
    return {"area": f"{length}²", "diameter": length, "variegation": "ΔE"}.get(name, "")


def pixel_length(meta: Mapping[str, Any], key: str) -> float | None:
    """mm of a pixel's side from the column `mm_per_pixel`; None where it is not given. UserError names the sample."""
    given = meta.get("mm_per_pixel")
    if given in (None, ""):
        return None
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = np.nan
    if not 0 < value < np.inf:
        raise UserError(f"sample {key}: mm_per_pixel is {given!r}, and must be a length above 0; mend the table")
    return value


def largest(mask: Array) -> Array:
    """The largest 8-connected part with its holes filled: bool [H, W]."""
    _, label, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return binary_fill_holes(label == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())  # type: ignore[return-value]


def diameter(mask: Array) -> float:
    """The greatest Feret diameter: between the outermost corners of the pixels, so a square of side s has s * sqrt(2).

    The farthest two points of a set are corners of its convex hull, of which there are few.
    """
    y, x = np.nonzero(mask)
    corners = np.concatenate([np.stack([x + dx, y + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    hull = cv2.convexHull(corners.astype(np.float32))[:, 0]
    return float(pdist(hull).max())


def asymmetry(mask: Array) -> float:
    """Share of the lesion that does not meet its mirror image, mean over two perpendicular axes: 0 is symmetric.

    The area difference of Stoecker et al. 1992 (Comput Med Imaging Graph 16:191) after folding about an axis through
    the centroid. The pair of axes is the principal one, or another that folds better: the rule of Stolz lays its axes
    where the asymmetry is least, and the principal axes of a round lesion point anywhere.
    """
    points = np.argwhere(mask).astype(float)
    centre = points.mean(0)
    points -= centre
    covariance = points.T @ points
    points = points[:: 1 + len(points) // MOST]
    principal = 0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])

    def outside(angle: float) -> float:
        across = np.array([-np.sin(angle), np.cos(angle)])
        mirrored = points - 2 * np.outer(points @ across, across) + centre
        y, x = np.rint(mirrored).astype(int).T
        within = (y >= 0) & (x >= 0) & (y < mask.shape[0]) & (x < mask.shape[1])
        return 1 - mask[y[within], x[within]].sum() / len(points)

    return float(min(outside(a) + outside(a + np.pi / 2) for a in (principal, *AXES)) / 2)


def irregularity(mask: Array) -> float:
    """Compactness of the border, perimeter² / (4 pi area): 1 for a disc, 4 / pi for a square, more where notched.

    The index of Golston et al. 1992 (Comput Med Imaging Graph 16:199) for the B of ABCD. Perimeter and area are those
    of the outline through the outer pixels, smoothed; counted pixel sides would give a disc the perimeter of a square.
    """
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=len)[:, 0].astype(float)
    if len(outline) < 8:  # a few pixels have no border to speak of
        return np.nan
    x, y = gaussian_filter1d(outline, SMOOTH, axis=0, mode="wrap").T
    perimeter = np.hypot(x - np.roll(x, 1), y - np.roll(y, 1)).sum()
    area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
    return float(perimeter**2 / (4 * np.pi * area)) if area > 1 else np.nan


def variegation(mask: Array, image: Array) -> float:
    """Root mean square distance (CIE 1976 Delta E) of the lesion's pixels from their mean colour in CIELAB.

    The C of ABCD counts six colours; the spread of colour inside the lesion is its continuous kin (Celebi et al. 2007,
    Comput Med Imaging Graph 31:362, colour features). Two halves of two colours give half of their Delta E.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[mask].astype(float)
    return float(np.sqrt(lab.var(0).sum()))
