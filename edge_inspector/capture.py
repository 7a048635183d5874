"""Pictures for training, taken with the camera that will inspect: numbered PNGs in a folder, near copies left out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.cameras import Camera, CameraState
from edge_inspector.errors import CameraEnded, CameraError, InspectorError
from edge_inspector.frames import Frame, Pixels

_CELLS = 160
"""Cells along the longer side of a frame, whose means are compared: a speck of a few pixels changes one of them."""
_LEAST_CELL_PX = 4
_REMEMBERED = 200
"""Pictures, the last ones, that new ones are compared with."""
_BEYOND_NOISE = 8.0
"""A part lies still where no cell differs by more than this many times what noise makes of cells as bright."""
_GROUPS, _SPREAD = 8, 4.0
"""Bright pixels are noisier than dark ones: noise is told for groups of cells, at most so many times that of all of them."""
_MOST_NOISE = 0.03
"""Of one pixel, as a share of the range; more is no noise."""
_NEVER_NOISE = 0.1
_COARSE, _TEXTURE = 24, 0.001
"""Mean difference of a coarse grid, as a share of the range, that shows another part where all of it differs by little.

A quarter of a grey level: noise averages out of the cells, and of five sets of real good parts no two are nearer than 0.0018.
"""
_FINEST = 0.0005
"""Half of this is what 8 bit can still tell of a cell's mean."""
_BRIGHTEST, _CLIPPED = 0.98, 0.01
_DARK = 0.05
_BLURRED = 0.5
_WAIT_S = 0.25


@dataclass(frozen=True)
class Taken:
    """One frame that came: where it was stored, or why it was not, and what is odd about it."""

    path: Path | None
    kept: int
    """Stored so far."""
    why_not: str
    hints: tuple[str, ...]
    sharpness: float
    """Mean squared difference of neighbouring pixels, as a share of the range; only to compare with others of this camera."""


class Album:
    """The folder that pictures go into; numbers go on where an earlier capture ended."""

    def __init__(self, folder: Path) -> None:
        """Raises InspectorError where the folder cannot be used."""
        self.folder, self.kept = folder, 0
        self._seen: deque[_Cells] = deque(maxlen=_REMEMBERED)
        self._sharpness: list[float] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
        except OSError as error:
            raise InspectorError(f"{folder}: {error.strerror}", hint="choose a folder that can be written") from error
        self._next = int(there[-1].stem) + 1 if there else 1
        self._seen += [_Cells.of(_shares(pictures.read(path))) for path in there[-_REMEMBERED:]]

    def take(self, frame: Frame) -> Taken:
        """Store a frame, unless it is broken or shows what an earlier one shows."""
        if frame.fault:
            return Taken(None, self.kept, frame.fault_detail or frame.fault, (), 0.0)
        shares = _shares(frame.image)
        cells, sharpness = _Cells.of(shares), _sharpness(shares)
        hints = tuple(self._hints(shares, sharpness))
        if any(cells.shows_the_same(seen) for seen in reversed(self._seen)):
            return Taken(None, self.kept, "shows the same as an earlier one", hints, sharpness)
        path = self.folder / f"{self._next:06d}.png"
        pictures.write(path, frame.image)
        self._seen.append(cells)
        self._sharpness.append(sharpness)
        self.kept, self._next = self.kept + 1, self._next + 1
        return Taken(path, self.kept, "", hints, sharpness)

    def _hints(self, shares: NDArray[np.float32], sharpness: float) -> Iterator[str]:
        clipped = float((shares >= _BRIGHTEST).mean())
        if clipped > _CLIPPED:
            yield f"{clipped:.0%} of its pixels are as bright as can be: shorten the exposure"
        if float(shares.mean()) < _DARK:
            yield "nearly dark: lengthen the exposure, or is the lamp on?"
        if len(self._sharpness) >= 3 and sharpness < _BLURRED * float(np.median(self._sharpness)):
            yield "less sharp than the others: out of focus, or moving?"


def capture(camera: Camera, album: Album, *, count: int, every_s: float, ended: Callable[[], bool]) -> Iterator[Taken]:
    """Take frames until `count` are stored, the recording ends, or `ended`. `camera` is entered already.

    Raises CameraError when the camera cannot be used.
    """
    due = time.monotonic()
    while album.kept < count and not ended():
        if camera.state is CameraState.FAULT:
            raise CameraError(camera.fault, hint=camera.hint or "edge-inspector cameras lists what answers")
        if camera.on_demand and time.monotonic() >= due:
            camera.trigger()
        try:
            frame = camera.next(_WAIT_S)
        except CameraEnded:
            return
        recorded = camera.info is not None and camera.info.pulled
        if frame is None or (time.monotonic() < due and not recorded):
            continue
        due = max(due + every_s, time.monotonic())
        yield album.take(frame)


def _shares(image: Pixels) -> NDArray[np.float32]:
    """Grey, 0 to 1; of 16 bits the range is what its brightest pixel needs: 10, 12 or 16."""
    grey = image if image.ndim == 2 else image.mean(2)
    levels = 255 if image.dtype == np.uint8 else next((1 << bits) - 1 for bits in (10, 12, 16) if image.max() < 1 << bits)
    return np.asarray(grey / levels, np.float32)


@dataclass(frozen=True)
class _Cells:
    """Means of a grid of cells of one frame, as shares of the range."""

    means: NDArray[np.float32]
    side_px: int

    @classmethod
    def of(cls, shares: NDArray[np.float32]) -> _Cells:
        side = max(_LEAST_CELL_PX, -(-max(shares.shape) // _CELLS))
        rows, columns = (np.arange(0, size, side) for size in shares.shape)
        sums = np.add.reduceat(np.add.reduceat(shares, rows, 0), columns, 1)
        heights, widths = np.diff([*rows, shares.shape[0]]), np.diff([*columns, shares.shape[1]])
        return cls(np.asarray(sums / np.outer(heights, widths), np.float32), side)

    def shows_the_same(self, seen: _Cells) -> bool:
        """Whether noise and a flickering lamp explain every difference from an earlier frame."""
        if self.means.shape != seen.means.shape:
            return False
        before, change = seen.means.ravel(), (self.means - seen.means).ravel()
        if float(np.abs(change - np.median(change)).max()) > _NEVER_NOISE:
            return False
        rest = _without_flicker(change, before)
        if float(np.abs(_coarse(rest.reshape(self.means.shape))).mean()) > _TEXTURE:  # it differs everywhere
            return False
        # By both frames: of one alone the darkest cells are also those whose noise was lowest.
        level = np.asarray(before + change / 2, np.float32)
        limit = np.maximum(_BEYOND_NOISE * _noise(rest, level, _MOST_NOISE / self.side_px), _FINEST)
        return bool((np.abs(rest) <= limit).all())


def _without_flicker(change: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of a change when a lamp's gain is taken out, as most cells tell it; saturated ones show none."""
    lit = (before > _FINEST) & (before < _BRIGHTEST)
    gain = float(np.median(change[lit] / before[lit])) if lit.any() else 0.0
    return np.asarray(change - gain * np.where(lit, before, 0.0), np.float32)


def _noise(rest: NDArray[np.float32], level: NDArray[np.float32], most: float) -> NDArray[np.float32]:
    """Standard deviation of each cell's mean, by how bright it is. Saturated cells have none, and tell nothing of others."""
    noisy = np.abs(rest) > _FINEST / 10
    overall = _spread(rest[noisy]) if noisy.any() else 0.0
    groups = np.array_split(np.argsort(level, kind="stable"), _GROUPS)
    spreads = [0.0, *(_spread(rest[group]) for group in groups), 0.0]
    found = np.empty_like(rest)
    for number, group in enumerate(groups):  # where one group ends is by chance
        found[group] = min(max(spreads[number : number + 3]), _SPREAD * overall, most)
    return np.maximum(found, min(overall, most))


def _coarse(cells: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of _COARSE x _COARSE groups of cells: noise averages out, the texture of another part does not."""
    rows, columns = (np.unique(np.linspace(0, size, _COARSE, endpoint=False).astype(int)) for size in cells.shape)
    sums = np.add.reduceat(np.add.reduceat(cells, rows, 0), columns, 1)
    counts = np.outer(np.diff([*rows, cells.shape[0]]), np.diff([*columns, cells.shape[1]]))
    return np.asarray(sums / counts, np.float32)


def _spread(values: NDArray[np.float32]) -> float:
    """Standard deviation, by the median: a few large values do not count."""
    return 1.4826 * float(np.median(np.abs(values))) if values.size else 0.0


def _sharpness(shares: NDArray[np.float32]) -> float:
    return float((np.diff(shares, axis=0) ** 2).mean() + (np.diff(shares, axis=1) ** 2).mean())
