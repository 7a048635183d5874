"""Defects drawn into pictures of good parts, with their masks; and the harmless changes good parts show.

Two sets of families that share neither shape nor filling: LEARNED is what a discriminator may see, WITHHELD is what
choices and detection limits are measured with, so that nobody is examined on the questions they practised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator
Picture = NDArray[np.uint8]
"""uint8 [H, W, C]."""
Mask = NDArray[np.uint8]
"""uint8 [H, W], 1 where the defect is."""
Filled = NDArray[Any]
"""Floats [H, W, C], to be mixed into a picture."""
_VISIBLE = 6
"""Grey levels by which a pixel must have changed to be called defective."""


def noise(rng: Rng, height: int, width: int, cells: float) -> NDArray[np.float32]:
    """Smooth random field [H, W] with about `cells` bumps along its shorter side."""
    pitch = max(1.0, min(height, width) / cells)
    coarse = rng.standard_normal((int(height / pitch) + 2, int(width / pitch) + 2)).astype(np.float32)
    field: NDArray[np.float32] = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    return field


# --- shapes: where


def _blobs(rng: Rng, height: int, width: int) -> Mask:
    field = noise(rng, height, width, float(2 ** rng.uniform(2, 5.2)))
    above = (field > np.quantile(field, rng.uniform(0.93, 0.99))).astype(np.uint8)
    count, labels = cv2.connectedComponents(above)
    kept = rng.permutation(np.arange(1, count))[: rng.integers(1, 4)]
    return np.isin(labels, kept).astype(np.uint8)


def _scratch(rng: Rng, height: int, width: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    point, angle = rng.uniform(0.1, 0.9, 2) * (width, height), rng.uniform(0, np.pi)
    points = [point]
    for _ in range(rng.integers(3, 12)):
        angle += rng.normal(0, 0.35)
        point = point + min(height, width) * 0.06 * rng.uniform(0.5, 1.5) * np.array([np.cos(angle), np.sin(angle)])
        points.append(point)
    cv2.polylines(mask, [np.array(points, np.int32)], False, 1, int(rng.integers(1, 5)))
    return mask


def _spots(rng: Rng, height: int, width: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(0.05, 0.95, 2) * (width, height)
        a, b = rng.uniform(2, max(3.0, min(height, width) * 0.06), 2)
        cv2.ellipse(mask, (int(x), int(y)), (int(a), int(b)), rng.uniform(0, 180), 0, 360, 1, -1)
    return mask


def _chip(rng: Rng, height: int, width: int, radius: float | None = None) -> Mask:
    """A polygon with straight edges."""
    radius = radius or min(height, width) * rng.uniform(0.01, 0.08) + 2
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    centre = rng.uniform(0.05, 0.95, 2) * (width, height)
    corners = centre + radius * rng.uniform(0.6, 1.3, (len(angles), 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
    return mask


def _hair(rng: Rng, height: int, width: int) -> Mask:
    """A thin arc."""
    mask = np.zeros((height, width), np.uint8)
    x, y = rng.uniform(0.05, 0.95, 2) * (width, height)
    axes = min(height, width) * rng.uniform(0.05, 0.3, 2)
    start = rng.uniform(0, 360)
    end, turned = start + rng.uniform(40, 160), rng.uniform(0, 180)
    cv2.ellipse(mask, (int(x), int(y)), (int(axes[0]), int(axes[1])), turned, start, end, 1, int(rng.integers(1, 4)))
    return mask


# --- fillings: what


def _elsewhere(rng: Rng, picture: Picture, other: Picture) -> Filled:
    """Another place of another good part, turned."""
    height, width = picture.shape[:2]
    source = other[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    if height == width and rng.random() < 0.5:
        source = source.transpose(1, 0, 2)
    pasted = np.roll(source, (int(rng.integers(height)), int(rng.integers(width))), (0, 1)).astype(np.float32)
    if rng.random() < 0.5:
        pasted = pasted * rng.uniform(0.6, 1.5) + rng.uniform(-40, 40)
    return 255 - pasted if rng.random() < 0.2 else pasted


def _texture(rng: Rng, picture: Picture, _: Picture) -> Filled:
    """A procedural texture of any tone; grey where the picture is."""
    height, width, channels = picture.shape
    field = np.sum([noise(rng, height, width, float(2 ** rng.uniform(2, 7))) / (i + 1) for i in range(3)], 0)
    field = (field - np.mean(field)) / (np.std(field) + 1e-6)
    tone = rng.uniform(0, 255, channels if rng.random() < 0.5 and not _is_grey(picture) else 1)
    return np.broadcast_to(tone + field[..., None] * rng.uniform(5, 60), picture.shape)


def _blurred(rng: Rng, picture: Picture, _: Picture) -> Filled:
    soft: Filled = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), rng.uniform(1.5, 5))
    return _with_channels(soft)


def _toned(rng: Rng, picture: Picture, _: Picture) -> Filled:
    """The part itself, darker or brighter."""
    toned: Filled = picture.astype(np.float32) + (1 if rng.random() < 0.5 else -1) * rng.uniform(30, 120)
    return toned


def _smeared(rng: Rng, picture: Picture, _: Picture) -> Filled:
    """The part itself, pulled aside by a few pixels."""
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(4, 16)
    shift = int(reach * np.sin(angle)), int(reach * np.cos(angle))
    return np.roll(picture, shift, (0, 1)).astype(np.float32)


def _with_channels(picture: NDArray[Any]) -> NDArray[Any]:
    with_channels: NDArray[Any] = picture.reshape(*picture.shape[:2], -1)
    return with_channels


def _is_grey(picture: Picture) -> bool:
    return picture.shape[2] == 1 or int(np.abs(picture[..., 0].astype(np.int16) - picture[..., 2]).max()) < 3


Shape = Callable[[Rng, int, int], Mask]
Filling = Callable[[Rng, Picture, Picture], Filled]


@dataclass(frozen=True)
class Family:
    """A kind of defects."""

    shapes: dict[Shape, float]
    """With their shares."""
    fillings: dict[Filling, float]
    opacity: tuple[float, float]
    """Least and most."""


LEARNED = Family(
    {_blobs: 0.6, _scratch: 0.2, _spots: 0.2}, {_elsewhere: 0.5, _texture: 0.35, _blurred: 0.15}, opacity=(0.25, 1.0)
)
WITHHELD = Family({_chip: 0.5, _hair: 0.5}, {_toned: 0.6, _smeared: 0.4}, opacity=(0.7, 1.0))
"""Defects a person would see: among defects that nobody sees, noise would decide what the terms are worth."""


def spoiled(rng: Rng, picture: Picture, other: Picture, family: Family) -> tuple[Picture, Mask]:
    """The picture with a defect of one family in it, and where it is: pixels that did change, and visibly.

    `other`: another good part of the same size, to cut from.
    """
    height, width = picture.shape[:2]
    shape = list(family.shapes)[rng.choice(len(family.shapes), p=list(family.shapes.values()))]
    filling = list(family.fillings)[rng.choice(len(family.fillings), p=list(family.fillings.values()))]
    mask = shape(rng, height, width)
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.5, 1.5))[..., None]
    alpha = alpha * rng.uniform(*family.opacity)
    mixed = picture * (1 - alpha) + filling(rng, picture, other).clip(0, 255) * alpha
    out = mixed.clip(0, 255).astype(np.uint8)
    changed = np.abs(out.astype(np.int16) - picture).max(2) > _VISIBLE
    return out, (mask.astype(bool) & changed).astype(np.uint8)


def visibly_spoiled(rng: Rng, picture: Picture, other: Picture, family: Family, tries: int = 20) -> tuple[Picture, Mask]:
    """As `spoiled`, again and again until a defect can be seen; the last try where none can."""
    for _ in range(tries):
        made, mask = spoiled(rng, picture, other, family)
        if mask.any():
            break
    return made, mask


def chipped(
    rng: Rng, picture: NDArray[Any], diameter_px: float, contrast: float, scale: tuple[int, int] = (0, 255)
) -> NDArray[Any]:
    """The picture, uint8 or uint16 [H, W] or [H, W, C], with one chip of that size, darker or brighter.

    `contrast` is a share of the intensity `scale`, black to white.
    """
    height, width = picture.shape[:2]
    mask = _chip(rng, height, width, diameter_px / 2)
    if not mask.any():  # a polygon smaller than a pixel
        row, column = rng.integers(height), rng.integers(width)
        mask[row, column] = 1
    inside = mask.astype(bool)
    low, high = scale
    # Away from the nearer end of the scale, so that the contrast asked for is the contrast drawn.
    sign = -1 if picture[inside].mean() > (low + high) / 2 else 1
    out = picture.astype(np.float32)
    out[inside] = (out[inside] + sign * contrast * (high - low)).clip(low, high)
    return out.astype(picture.dtype)


def jittered(rng: Rng, picture: Picture) -> Picture:
    """The picture as the next good part might lie: at most 2 degrees, 3 px, 2 %, and 5 % brightness off."""
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-2, 2), 1 + rng.uniform(-0.02, 0.02))
    turn = turn + np.array([[0, 0, rng.uniform(-3, 3)], [0, 0, rng.uniform(-3, 3)]])
    moved = cv2.warpAffine(picture, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    lit = _with_channels(moved.astype(np.float32)) * (1 + rng.uniform(-0.05, 0.05)) + rng.uniform(-4, 4)
    return lit.clip(0, 255).astype(np.uint8)
