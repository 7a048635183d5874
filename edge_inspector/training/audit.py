"""What is odd about a folder of pictures of good parts, in words, before anything is trained on it.

Plain numbers of every picture (brightness, contrast, sharpness, a thumbnail) are enough to notice what spoils training:
copies, two products in one folder, a picture that is not like the others, a lamp that drifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.errors import PictureError
from edge_inspector.frames import Pixels

THUMBNAIL_PX = 24
_NEAR = 0.1
"""Pictures nearer than this share of how much pictures differ are near copies."""
_BLOCK = 256
_SHOWN = 8


@dataclass(frozen=True)
class Facts:
    """Plain numbers of one picture."""

    path: Path
    height_px: int
    width_px: int
    channels: int
    depth_bits: int
    brightness: float
    """Mean, 0 to 1."""
    sharpness: float
    """Variance of the Laplacian over that of the picture."""
    thumbnail: NDArray[np.float32]
    """[THUMBNAIL_PX, THUMBNAIL_PX, 3], 0 to 1."""
    taken_at: float
    """The file's own time, seconds."""


@dataclass(frozen=True)
class Remark:
    """One thing worth knowing, and the pictures it is about."""

    level: Literal["note", "warning"]
    text: str
    paths: tuple[Path, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(pictures.printable(path.name) for path in self.paths[:_SHOWN])
        more = f" and {len(self.paths) - _SHOWN} more" if len(self.paths) > _SHOWN else ""
        return f"{self.text}: {shown}{more}" if self.paths else self.text

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"level": self.level, "text": self.text, "pictures": [pictures.printable(path) for path in self.paths]}


def facts(path: Path, image: Pixels, window: tuple[int, int] | None = None) -> Facts:
    """The numbers of one picture, uint8 or uint16 [H, W] or [H, W, 3]; `window`: the levels that are black and white."""
    height, width = image.shape[:2]
    low, high = window or (0, np.iinfo(image.dtype).max)
    scaled = ((image.astype(np.float32) - low) / (high - low)).clip(0, 1)
    grey = cv2.cvtColor(scaled, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else scaled
    thumbnail = cv2.resize(scaled, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    return Facts(
        path=path, height_px=height, width_px=width, channels=1 if image.ndim == 2 else 3,
        depth_bits=image.dtype.itemsize * 8, brightness=float(grey.mean()),
        sharpness=float(cv2.Laplacian(grey, cv2.CV_32F).var() / (grey.var() + 1e-6)),
        thumbnail=thumbnail if thumbnail.ndim == 3 else np.repeat(thumbnail[..., None], 3, 2),
        taken_at=path.stat().st_mtime,
    )  # fmt: skip


def remarks(found: Sequence[Facts]) -> tuple[Remark, ...]:
    """Everything odd about the pictures, in name order; nothing for a sound folder."""
    thumbnails = np.stack([f.thumbnail.ravel() for f in found])
    earlier, second = _neighbours(thumbnails)
    return (
        *_sizes(found), *_near_copies(found, thumbnails, earlier), *_sessions(found),
        *_groups(found, thumbnails), *_strangers(found, second), *_blurred(found), *_lighting(found),
    )  # fmt: skip


def _neighbours(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distance of each row to the nearest earlier one (infinite for the first), and to the second nearest other one."""
    squares = (x**2).sum(1)
    earlier, second = np.full(len(x), np.inf, np.float32), np.empty(len(x), np.float32)
    for start in range(0, len(x), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(x)))
        distance = np.sqrt(np.maximum(squares[rows, None] + squares[None] - 2 * x[rows] @ x.T, 0))
        distance[rows - start, rows] = np.inf
        second[rows] = np.partition(distance, 1, axis=1)[:, 1]
        earlier[rows] = np.where(np.arange(len(x))[None] < rows[:, None], distance, np.inf).min(1)
    return earlier, second


def _sizes(found: Sequence[Facts]) -> list[Remark]:
    sizes: dict[tuple[int, int], int] = {}
    for f in found:
        sizes[f.width_px, f.height_px] = sizes.get((f.width_px, f.height_px), 0) + 1
    if len(sizes) == 1:
        return []
    common = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{w}x{h} ({n})" for (w, h), n in common)
    return [Remark("note", f"pictures differ in size ({len(sizes)} sizes): {listed}; each is fitted to the network's input")]


def _near_copies(found: Sequence[Facts], thumbnails: NDArray[np.float32], earlier: NDArray[np.float32]) -> list[Remark]:
    """Pictures that hardly differ from an earlier one, where a tenth of them or more do."""
    spread = float(np.median(np.linalg.norm(thumbnails - np.median(thumbnails, 0), axis=1)))
    near = [f.path for f, distance in zip(found, earlier, strict=True) if distance < _NEAR * spread]
    if len(near) < max(3, 0.1 * len(found)):
        return []
    text = (
        f"{len(near)} of {len(found)} pictures are near copies of another: the same part again, or one scene filmed;"
        f" what the threshold promises counts them as parts of their own"
    )
    return [Remark("warning", text, tuple(near))]


def _sessions(found: Sequence[Facts]) -> list[Remark]:
    """Files whose times are their own (all different) and lie within an hour: one shift, one lamp, one batch."""
    times = np.array([f.taken_at for f in found])
    span_s = float(np.ptp(times))
    if len(set(times.tolist())) < len(times) or not 60 < span_s < 3600:
        return []
    text = f"all pictures were taken within {span_s / 60:.0f} minutes: other shifts, lots and lamps may look different"
    return [Remark("note", text)]


def _groups(found: Sequence[Facts], thumbnails: NDArray[np.float32]) -> list[Remark]:
    """Two clearly separate groups of thumbnails: two products, cameras or lightings in one folder."""
    x = (thumbnails - thumbnails.mean(0)).astype(np.float64)
    along = x @ np.linalg.eigh(x.T @ x)[1][:, -1]
    ordered = np.sort(along)
    best, cut = 0.0, 0.0
    for i in range(max(2, len(x) // 20), len(x) - max(2, len(x) // 20) + 1):
        a, b = ordered[:i], ordered[i:]
        within = np.sqrt((a.var() * len(a) + b.var() * len(b)) / len(x)) + 1e-9
        gap = ordered[i] - ordered[i - 1]
        # A gap as wide as the groups themselves; a continuous spread has none.
        if gap > 2.5 * within and gap / within > best:
            best, cut = gap / within, (ordered[i] + ordered[i - 1]) / 2
    if best == 0:
        return []
    smaller = along < cut if (along < cut).sum() <= len(x) / 2 else along >= cut
    text = (
        f"the pictures fall into two groups of {int((~smaller).sum())} and {int(smaller.sum())}: two products, cameras or"
        " lightings? One bundle for each finds more; the smaller group"
    )
    return [Remark("warning", text, tuple(f.path for f, odd in zip(found, smaller, strict=True) if odd))]


def _strangers(found: Sequence[Facts], second: NDArray[np.float32]) -> list[Remark]:
    """Pictures far from every other one; the second nearest counts, so that a pair of strangers is seen too."""
    level = np.median(second)
    limit = 1.5 * level + 8 * 1.4826 * np.median(np.abs(second - level))
    odd = [i for i in np.argsort(-second).tolist() if second[i] > limit]
    text = "are these really good? They look unlike every other picture"
    return [Remark("warning", text, tuple(found[i].path for i in odd))] if odd else []


def _blurred(found: Sequence[Facts]) -> list[Remark]:
    sharpness = np.log([f.sharpness + 1e-9 for f in found])
    level = np.median(sharpness)
    odd = np.flatnonzero(sharpness < level - max(np.log(4), 6 * np.median(np.abs(sharpness - level)))).tolist()
    text = "much less sharp than the others: out of focus, or the part moved"
    return [Remark("warning", text, tuple(found[i].path for i in odd))] if len(odd) else []


def _lighting(found: Sequence[Facts]) -> list[Remark]:
    """Brightness that rises or falls with the order of names, and pictures that are black or white."""
    brightness = np.array([f.brightness for f in found])
    said = []
    ranks = brightness.argsort().argsort()
    order = np.arange(len(found))
    drift = float(np.corrcoef(ranks, order)[0, 1]) if np.ptp(brightness) > 0 else 0.0
    if abs(drift) > 0.7 and np.ptp(brightness) > 0.05:
        way = "brighter" if drift > 0 else "darker"
        said.append(Remark("note", f"pictures get {way} in the order of their names: the lamp or the exposure drifts"))
    empty = tuple(f.path for f in found if not 0.02 < f.brightness < 0.98)
    if empty:
        said.append(Remark("warning", "almost black or white: was the lamp off?", empty))
    return said


def montage(paths: Sequence[Path], side: int = 96) -> Pixels:
    """Thumbnails in a row, so that a person can look: uint8 [side, n * side, 3]; black where a picture cannot be read."""
    shown = []
    for path in paths[:_SHOWN]:
        try:
            image = pictures.to_bgr8(pictures.read(path))
        except PictureError:
            image = np.zeros((1, 1, 3), np.uint8)
        shown.append(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
    return np.hstack(shown)
