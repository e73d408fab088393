"""Synthetic, dermoscopy-like pictures: skin, one lesion whose structure tells its class, and what gets in the way.

A lesion lives in its own plane (radius about 1) and is drawn from its own seed, so that several photographs of it, each
with its own angle, light and hair, show the same lesion. Colours overlap between classes on purpose: structure decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

# sRGB of unlit skin, Fitzpatrick-like I..VI.
SKIN = np.array(
    [[238, 205, 190], [228, 190, 168], [212, 168, 138], [184, 134, 100], [140, 95, 68], [92, 62, 48]], np.float32
)
# What a lesion does to the skin it lies in, a factor a channel.
TINTS = {
    "brown": (0.64, 0.47, 0.38),
    "dark brown": (0.42, 0.31, 0.28),
    "tan": (0.84, 0.69, 0.57),
    "grey-brown": (0.58, 0.53, 0.52),
    "red": (0.80, 0.46, 0.44),
    "pink": (0.95, 0.71, 0.70),
}
# How often a class has each tint, in the order above.
TINT_ODDS = {
    "melanocytic nevus": (0.30, 0.22, 0.22, 0.08, 0.08, 0.10),
    "melanoma": (0.28, 0.28, 0.10, 0.16, 0.10, 0.08),
    "seborrheic keratosis": (0.28, 0.20, 0.24, 0.14, 0.04, 0.10),
    "basal cell carcinoma": (0.20, 0.08, 0.16, 0.14, 0.16, 0.26),
    "dermatofibroma": (0.26, 0.10, 0.26, 0.06, 0.12, 0.20),
    "vascular lesion": (0.14, 0.18, 0.06, 0.10, 0.32, 0.20),
    "actinic keratosis": (0.16, 0.06, 0.22, 0.10, 0.22, 0.24),
}
CLASSES = tuple(TINT_ODDS)
# A site's light: gain a channel, how dark the corners are, how often a ruler is in view, blur in pixels at 128.
SITES = {
    "site_a": ((1.00, 1.00, 1.00), 0.15, 0.10, 0.0),
    "site_b": ((1.08, 0.98, 0.86), 0.95, 0.25, 0.5),
    "site_c": ((0.90, 0.97, 1.09), 0.40, 0.60, 0.3),
}


@dataclass(frozen=True)
class Photo:
    image: np.ndarray  # uint8 [S, S, 3]
    mask: np.ndarray  # bool [S, S]
    colour: str  # of TINTS
    blob: str  # the outline in a word
    extras: tuple[str, ...]  # what else can be seen


class Plane:
    """The lesion's plane as one photograph sees it: coordinates u, v [S, S], and drawing in them."""

    def __init__(self, size: int, lesion: np.random.Generator, photo: np.random.Generator):
        self.size, self.rng = size, lesion
        zoom = lesion.uniform(0.5, 0.76) * photo.uniform(0.88, 1.12)
        angle = photo.uniform(0, 2 * np.pi)
        self.turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.centre = photo.uniform(-0.14, 0.14, 2)
        self.unit = zoom * size / 2  # pixels of one unit
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        x, y = np.meshgrid(axis - self.centre[0], axis - self.centre[1])
        turned = np.tensordot(self.turn.T / zoom, np.stack([x, y]), 1).astype(np.float32)
        self.u, self.v = turned[0], turned[1]
        self.radius, self.angle = np.hypot(self.u, self.v), np.arctan2(self.v, self.u)

    def noise(self, cells: int) -> np.ndarray:
        """Smooth noise of the lesion, about -1..1, with `cells` bumps along 4 units: [S, S]."""
        grid = self.rng.normal(0, 0.5, (cells, cells)).astype(np.float32)
        scale = cells / 4
        return cv2.remap(
            grid, self.u * scale + cells / 2, self.v * scale + cells / 2, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
        )

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] of the plane -> pixels in 1/16 (OpenCV's `shift=4`), int32."""
        at = (points @ self.turn.T) * self.unit + (self.centre + 1) * self.size / 2 - 0.5
        return np.round(at * 16).astype(np.int32)

    def discs(self, points: np.ndarray, radii: np.ndarray, soft: float = 0.6) -> np.ndarray:
        """Filled discs at points [N, 2] of radii [N] (units): coverage [S, S] in 0..1."""
        layer = np.zeros((self.size, self.size), np.uint8)
        for (x, y), radius in zip(self.pixels(points), np.maximum(radii * self.unit, 0.8) * 16, strict=True):
            cv2.circle(layer, (int(x), int(y)), int(radius), 255, -1, cv2.LINE_AA, 4)
        return _soft(layer, soft * self.size / 128)

    def lines(self, paths: list[tuple[np.ndarray, float]], soft: float = 0.4) -> np.ndarray:
        """Polylines ([N, 2], width in units): coverage [S, S]."""
        layer = np.zeros((self.size, self.size), np.uint8)
        for points, width in paths:
            thick = max(1, round(width * self.unit))
            cv2.polylines(layer, [self.pixels(points)], False, 255, thick, cv2.LINE_AA, 4)
        return _soft(layer, soft * self.size / 128)

    def scatter(self, count: int, reach: float = 0.85) -> np.ndarray:
        """Points [count, 2] spread evenly over a disc."""
        radius, angle = reach * np.sqrt(self.rng.random(count)), self.rng.uniform(0, 2 * np.pi, count)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)

    def honeycomb(self, cells: float, warp: float) -> np.ndarray:
        """Lines of a honeycomb, 0..1, `cells` to a unit, bent by `warp`."""
        bent_u, bent_v = self.u + self.noise(6) * warp, self.v + self.noise(6) * warp
        total = np.zeros_like(self.u)
        for turn in (0.0, np.pi / 3, 2 * np.pi / 3):
            along, across = cells * 2 * np.pi * math.cos(turn), cells * 2 * np.pi * math.sin(turn)
            total += np.cos(bent_u * along + bent_v * across)
        return 1 - _step(total, -0.9, 0.5)


def photograph(size: int, kind: str, tone: int, site: str, lesion_seed: int, photo_seed: int) -> Photo:
    """One photograph of one lesion. `tone` 0..5 indexes SKIN."""
    lesion, photo = np.random.default_rng(lesion_seed), np.random.default_rng(photo_seed)
    plane = Plane(size, lesion, photo)
    skin = SKIN[tone] * lesion.uniform(0.93, 1.07, 3).astype(np.float32)
    image = np.ones((size, size, 3), np.float32) * skin
    grain = photo.standard_normal((size, size, 1), np.float32)
    image *= 1 + 0.06 * plane.noise(8)[..., None] + 0.02 * cv2.GaussianBlur(grain, (0, 0), 0.8)[..., None]

    uneven = {"melanoma": 0.17, "basal cell carcinoma": 0.12, "actinic keratosis": 0.13}.get(kind, 0.06)
    uneven *= lesion.uniform(0.5, 1.5)
    outline = np.full_like(plane.u, lesion.uniform(0.88, 1.0))
    for wave in range(2, 7):
        outline += uneven * lesion.normal() * 1.4 / wave * np.cos(wave * plane.angle + lesion.uniform(0, 6.3))
    inside = outline - plane.radius + 0.04 * plane.noise(24)
    soft = lesion.uniform(0.08, 0.35) * (0.5 if kind == "seborrheic keratosis" else 1)
    alpha = _step(inside, -soft / 2, soft / 2)

    colour = str(lesion.choice(list(TINTS), p=TINT_ODDS[kind]))
    other = TINTS[str(lesion.choice(list(TINTS)))]
    mix = lesion.uniform(0, 0.35)
    tint = (np.array(TINTS[colour]) * (1 - mix) + np.array(other) * mix) * lesion.normal(1, 0.07, 3)
    tint = np.clip(tint, 0.2, 1).astype(np.float32)
    shade = 1 + 0.16 * plane.noise(5) + 0.07 * plane.noise(20)
    body = image * (1 - (1 - tint) * lesion.uniform(0.75, 1.0)) * shade[..., None]
    if lesion.random() < 0.5:  # a stray globule or two tells nothing
        count = int(lesion.integers(2, 9))
        dots = plane.discs(plane.scatter(count), lesion.uniform(0.02, 0.05, count))
        body = _blend(body, body * 0.6, dots)
    body = _STRUCTURES[kind](plane, body, inside)
    image = _blend(image, body, alpha)
    image, extras = _in_the_way(image, photo, site)
    return Photo(
        image=np.clip(image, 0, 255).astype(np.uint8),
        mask=inside > 0,
        colour=colour,
        blob="irregular" if uneven > 0.12 else "slightly irregular" if uneven > 0.07 else "regular",
        extras=extras,
    )


def _nevus(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A regular pigment network that fades towards the edge."""
    net = plane.honeycomb(plane.rng.uniform(3.4, 5.2), 0.10)
    return _blend(body * 1.06, body * 0.58, net * _step(inside, 0, 0.45) * plane.rng.uniform(0.75, 1.0))


def _melanoma(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Streaks at the edge, unevenly around it, and a blue-white veil off the centre."""
    rng, paths = plane.rng, []
    start, spread = rng.uniform(0, 2 * np.pi), rng.uniform(2.6, 5.0)
    for angle in start + np.sort(rng.random(int(rng.integers(14, 24)))) * spread:
        reach = np.linspace(rng.uniform(0.55, 0.7), rng.uniform(0.95, 1.1), 5)
        bend = angle + np.linspace(0, rng.normal(0, 0.08), 5)
        paths.append((np.stack([reach * np.cos(bend), reach * np.sin(bend)], 1), rng.uniform(0.03, 0.06)))
    body = _blend(body, body * 0.5, plane.lines(paths))
    off = rng.uniform(0.15, 0.4)
    far = np.hypot(plane.u - off * math.cos(start), plane.v - off * math.sin(start)) + 0.15 * plane.noise(7)
    veil = (1 - _step(far, 0.15, rng.uniform(0.4, 0.6))) * rng.uniform(0.45, 0.8)
    haze = float(body.mean()) * np.array([0.92, 1.04, 1.24], np.float32) * 1.1
    return _blend(body, np.broadcast_to(haze, body.shape), veil)


def _keratosis(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Milia-like cysts (small, bright) and comedo-like openings (larger, dark), with a sharp edge."""
    rng = plane.rng
    dark, bright = int(rng.integers(7, 14)), int(rng.integers(8, 18))
    holes = plane.discs(plane.scatter(dark, 0.8), rng.uniform(0.05, 0.095, dark))
    cysts = plane.discs(plane.scatter(bright, 0.85), rng.uniform(0.03, 0.06, bright))
    ridges = _step(np.sin(2 * np.pi * (plane.noise(7) * 2.2)), 0.3, 0.9)
    body = _blend(_blend(body, body * 0.8, ridges * 0.6), body * 0.42, holes)
    return _blend(body, np.minimum(body * 1.5 + 42, 250), cysts * 0.85)


def _basal(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Arborising vessels: sharp red trees that branch; a few blue-grey ovoid nests."""
    rng, paths = plane.rng, []

    def grow(at: np.ndarray, angle: float, width: float, depth: int) -> None:
        steps = [at]
        for _ in range(int(rng.integers(3, 6))):
            angle += rng.normal(0, 0.28)
            steps.append(steps[-1] + 0.11 * np.array([np.cos(angle), np.sin(angle)]))
        paths.append((np.array(steps), width))
        for side in (-1, 1) if depth else ():
            grow(steps[-1], angle + side * rng.uniform(0.4, 0.9), width * 0.7, depth - 1)

    for _ in range(int(rng.integers(2, 4))):
        angle = rng.uniform(0, 2 * np.pi)
        grow(0.95 * np.array([np.cos(angle), np.sin(angle)]), angle + np.pi + rng.normal(0, 0.4), 0.055, 2)
    count = int(rng.integers(1, 5))
    nests = plane.discs(plane.scatter(count, 0.7), rng.uniform(0.09, 0.17, count), 1.5)
    body = _blend(body * 1.04, body * np.array([0.6, 0.66, 0.8], np.float32), nests * 0.8)
    return _blend(body, body * np.array([0.82, 0.38, 0.42], np.float32), plane.lines(paths))


def _fibroma(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A white scar-like patch in the centre, and a delicate network in the ring around it."""
    rng = plane.rng
    far = plane.radius + 0.22 * plane.noise(8)
    scar = 1 - _step(far, rng.uniform(0.2, 0.32), rng.uniform(0.45, 0.58))
    ring = _step(plane.radius, 0.4, 0.6) * _step(inside, 0, 0.2)
    body = _blend(body, body * 0.68, plane.honeycomb(rng.uniform(4.4, 5.6), 0.11) * ring * 0.85)
    bands = 0.75 + 0.25 * _step(plane.honeycomb(2.0, 0.3), 0.2, 0.8)
    return _blend(body, np.minimum(body * 1.25 + 30, 245), scar * bands * rng.uniform(0.65, 0.9))


def _vascular(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Lacunae: round, well-defined clods, side by side, with paler septa between them."""
    rng = plane.rng
    points, kept = plane.scatter(90, 0.92), []
    radii = rng.uniform(0.11, 0.2, 90)
    for i, point in enumerate(points):
        if all(np.hypot(*(point - points[j])) > 0.92 * (radii[i] + radii[j]) for j in kept):
            kept.append(i)
    clods = plane.discs(points[kept], radii[kept], 0.7)
    hue = np.array([0.74, 0.5, 0.56 + rng.uniform(0, 0.16)], np.float32)
    return _blend(body * 1.08, body * hue, clods * rng.uniform(0.8, 1.0))


def _actinic(plane: Plane, body: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Strawberry pattern: a coarse red pseudo-network around pale follicles, with white flakes of scale."""
    rng = plane.rng
    net = plane.honeycomb(rng.uniform(1.9, 2.5), 0.2)
    body = _blend(body * 1.05, body * np.array([0.88, 0.62, 0.62], np.float32), net * 0.9)
    flakes = []
    for point in plane.scatter(int(rng.integers(9, 18)), 0.95):
        edge = np.cumsum(rng.normal(0, 0.06, (5, 2)), axis=0)
        flakes.append((point + edge, rng.uniform(0.04, 0.09)))
    return _blend(body, np.minimum(body * 1.3 + 36, 248), plane.lines(flakes, 0.6) * 0.8)


_STRUCTURES = dict(zip(CLASSES, (_nevus, _melanoma, _keratosis, _basal, _fibroma, _vascular, _actinic), strict=True))


def _in_the_way(image: np.ndarray, rng: np.random.Generator, site: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Hair, gel bubbles, a ruler, light and the colour cast of the site, corners, blur."""
    size, extras = image.shape[0], []
    gain, corners, ruler, blur = SITES[site]
    if rng.random() < 0.4:
        extras.append("hairs")
        image = image * (1 - 0.75 * _hairs(rng, size)[..., None])
    if rng.random() < 0.25:
        extras.append("air bubbles")
        bubbles = np.zeros((size, size), np.uint8)
        for x, y in rng.uniform(0, size, (int(rng.integers(2, 7)), 2)):
            cv2.circle(bubbles, (int(x * 16), int(y * 16)), int(rng.uniform(2, 5) * size / 8), 255, 1, cv2.LINE_AA, 4)
        image = _blend(image, np.full_like(image, 245), _soft(bubbles, 0.4) * 0.6)
    if rng.random() < ruler:
        extras.append("a ruler")
        image = image * (1 - 0.8 * _ruler(rng, size)[..., None])
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.normal(0, 0.07, 2).tolist()
    light = rng.uniform(0.78, 1.15) * (1 + slope[0] * axis[None] + slope[1] * axis[:, None])
    cast = np.array(gain, np.float32) * rng.normal(1, 0.035, 3).astype(np.float32)
    image = image * (light[..., None] * cast)
    radius = np.hypot(axis[None], axis[:, None])
    edge = rng.uniform(1.0, 1.15)
    image = image * (1 - corners * _step(radius, edge, edge + 0.18))[..., None]
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), blur * rng.uniform(0.7, 1.4) * size / 128)
    return image + 2.5 * rng.standard_normal(image.shape, np.float32), tuple(extras)


def _hairs(rng: np.random.Generator, size: int) -> np.ndarray:
    layer = np.zeros((size, size), np.uint8)
    lean = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(3, 12))):
        angle, at = lean + rng.normal(0, 0.35), rng.uniform(0, size, 2)
        t = np.linspace(-0.6, 0.6, 12)[:, None] * size
        across = np.array([-np.sin(angle), np.cos(angle)])
        path = at + t * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.5) * t**2 / size * across
        cv2.polylines(layer, [np.round(path * 16).astype(np.int32)], False, 255, max(1, size // 128), cv2.LINE_AA, 4)
    return _soft(layer, 0.3)


def _ruler(rng: np.random.Generator, size: int) -> np.ndarray:
    layer = np.zeros((size, size), np.uint8)
    step, start = size * rng.uniform(0.05, 0.08), rng.uniform(0, size * 0.05)
    for i in range(int(size / step) + 1):
        x, length = start + i * step, size * (0.09 if i % 5 == 0 else 0.05)
        cv2.line(layer, (int(x * 16), 0), (int(x * 16), int(length * 16)), 255, 1, cv2.LINE_AA, 4)
    return np.ascontiguousarray(np.rot90(layer, int(rng.integers(4)))).astype(np.float32) / 255


def _blend(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return under + (over - under) * alpha[..., None]


def _step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _soft(layer: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(layer, (0, 0), max(sigma, 0.1)).astype(np.float32) / 255
