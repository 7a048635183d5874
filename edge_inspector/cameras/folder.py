"""Pictures of a folder as a camera: `dir://FOLDER`, in name order. Options: fps, loop."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_inspector import pictures
from edge_inspector.cameras.source import Info, check_format
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraEnded, CameraError, PictureError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now
from edge_inspector.results import Reason

log = logging.getLogger(__name__)
_NOTHING: Pixels = frozen(np.zeros((0, 0), np.uint8))


def info_of(image: Pixels, fps: float) -> Info:
    """What a source of such pictures delivers."""
    return Info(
        width=image.shape[1], height=image.shape[0], channels=1 if image.ndim == 2 else 3,
        depth_bits=image.dtype.itemsize * 8, fps=fps or None, triggerable=True, pulled=not fps, simulated=True,
        coding="recorded",
    )  # fmt: skip


def broken_frame(seq: int, source_id: str, detail: str, reason: Reason = Reason.CORRUPT_IMAGE) -> Frame:
    """A frame that came but cannot be judged: its part still gets a result."""
    return Frame(_NOTHING, seq, time.monotonic(), utc_now(), source_id=source_id, fault=reason.value, fault_detail=detail)


class Pace:
    """Holds a recording to its frame rate."""

    def __init__(self, fps: float) -> None:
        self.period_s = 1.0 / fps if fps > 0 else 0.0
        self._next = 0.0

    def wait(self, timeout_s: float) -> bool:
        """Wait for the next frame's time, at most `timeout_s`; returns whether it has come."""
        if not self.period_s:
            return True
        now = time.monotonic()
        self._next = max(self._next, now - self.period_s)
        if self._next - now > timeout_s:
            time.sleep(timeout_s)
            return False
        time.sleep(max(0.0, self._next - now))
        self._next += self.period_s
        return True


class FolderSource:
    """The pictures of a folder, in name order. An unreadable one is a broken frame; what is left out is told."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._seq = 0
        self._at = 0

    def open(self) -> Info:
        """List the pictures; the first readable one tells size and depth. Raises CameraError."""
        self._admitted = self._admit(self.config)
        address = self._admitted.address
        self._loop = address.number("loop", 0) > 0
        fps = address.number("fps", 0)
        self._pace = Pace(fps)
        try:
            found = pictures.listed(self._admitted.path, self._admitted.refuse_outside)
        except PictureError as error:
            raise CameraError(f"{self.config.name}: {error.message}", hint=error.hint) from error
        if found.told:
            log.log(logging.WARNING if found.doubtful else logging.INFO, "%s: %s", self.config.name, "; ".join(found.told))
        self._paths = [self._admitted.refuse_outside(path) for path in found.taken]
        self._names = pictures.part_names(found.taken, found.folder)
        first = next((image for image in map(_readable, self._paths) if image is not None), None)
        if first is None:
            raise CameraError(f"{self.config.name}: none of its pictures can be read")
        info = replace(info_of(first, fps), notes=found.told)
        check_format(self.config, info)
        return info

    def read(self, timeout_s: float) -> Frame | None:
        """The next picture. Raises CameraEnded after the last, unless loop=1."""
        if self._at >= len(self._paths):
            if not self._loop:
                raise CameraEnded(f"{self.config.name}: no more pictures")
            self._at = 0
        if not self._pace.wait(timeout_s):
            return None
        path, name = self._paths[self._at], self._names[self._at]
        self._at += 1
        self._seq += 1
        try:
            image = frozen(pictures.read(self._admitted.refuse_outside(path)))
        except PictureError as error:
            return broken_frame(self._seq - 1, name, error.message)
        return Frame(image, self._seq - 1, time.monotonic(), utc_now(), source_id=name)

    def trigger(self) -> None:
        """The next read is the next picture anyway."""

    def close(self) -> None:
        """Nothing is held open."""


def _readable(path: Path) -> Pixels | None:
    try:
        return pictures.read(path)
    except PictureError:
        return None
