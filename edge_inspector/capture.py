"""Pictures for training, taken with the camera that will inspect: numbered PNGs in a folder, near copies left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_inspector import pictures
from edge_inspector.cameras import Camera, CameraState
from edge_inspector.errors import CameraEnded, CameraError, InspectorError
from edge_inspector.frames import Frame, Pixels

_SIDE = 24
_REMEMBERED = 200
"""Pictures of earlier captures, the last ones, that new ones are compared with."""
_COPY = 0.001
"""Mean difference of two thumbnails, as a share of the range, below which they show the same part lying still.

A quarter of a grey level: noise averages out of the cells, and of five sets of real good parts no two are nearer than 0.0018.
"""
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
        self._seen: list[NDArray[np.float32]] = []
        self._sharpness: list[float] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
        except OSError as error:
            raise InspectorError(f"{folder}: {error.strerror}", hint="choose a folder that can be written") from error
        self._next = int(there[-1].stem) + 1 if there else 1
        self._seen += [_thumbnail(_shares(pictures.read(path))) for path in there[-_REMEMBERED:]]

    def take(self, frame: Frame) -> Taken:
        """Store a frame, unless it is broken or shows what an earlier one shows."""
        if frame.fault:
            return Taken(None, self.kept, frame.fault_detail or frame.fault, (), 0.0)
        shares = _shares(frame.image)
        small, sharpness = _thumbnail(shares), _sharpness(shares)
        hints = tuple(self._hints(shares, sharpness))
        if any(float(np.abs(small - seen).mean()) < _COPY for seen in self._seen):
            return Taken(None, self.kept, "shows the same as an earlier one", hints, sharpness)
        path = self.folder / f"{self._next:06d}.png"
        pictures.write(path, frame.image)
        self._seen.append(small)
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


def _thumbnail(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of a grid of cells [_SIDE, _SIDE]."""
    rows, columns = (np.linspace(0, size, _SIDE, endpoint=False).astype(int) for size in shares.shape)
    cells = np.add.reduceat(np.add.reduceat(shares, rows, 0), columns, 1)
    heights, widths = np.diff([*rows, shares.shape[0]]), np.diff([*columns, shares.shape[1]])
    return np.asarray(cells / np.maximum(1, np.outer(heights, widths)), np.float32)


def _sharpness(shares: NDArray[np.float32]) -> float:
    return float((np.diff(shares, axis=0) ** 2).mean() + (np.diff(shares, axis=1) ** 2).mean())
