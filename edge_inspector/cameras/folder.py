"""Recordings as cameras: `dir://FOLDER` (pictures, in name order) and `file://VIDEO`. Options: fps, loop."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np

from edge_inspector import pictures
from edge_inspector.cameras.ffmpeg import RECORDINGS, restricted
from edge_inspector.cameras.source import Info, check_format
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraEnded, CameraError, PictureError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now
from edge_inspector.results import Reason

_NOTHING: Pixels = frozen(np.zeros((0, 0), np.uint8))


def info_of(image: Pixels, fps: float) -> Info:
    """What a source of such pictures delivers."""
    return Info(
        width=image.shape[1], height=image.shape[0], channels=1 if image.ndim == 2 else 3,
        depth_bits=image.dtype.itemsize * 8, fps=fps or None, triggerable=True, pulled=not fps, simulated=True,
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
    """The pictures of a folder, in name order. An unreadable one is a broken frame, never left out."""

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
            self._paths = [self._admitted.refuse_outside(path) for path in pictures.listed(self._admitted.path)]
            first = next((image for image in map(_readable, self._paths) if image is not None), None)
        except PictureError as error:
            raise CameraError(f"{self.config.name}: {error.message}", hint=error.hint) from error
        if first is None:
            raise CameraError(f"{self.config.name}: none of its pictures can be read")
        info = info_of(first, fps)
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
        path = self._paths[self._at]
        self._at += 1
        self._seq += 1
        try:
            image = frozen(pictures.read(self._admitted.refuse_outside(path)))
        except PictureError as error:
            return broken_frame(self._seq - 1, path.stem, error.message)
        return Frame(image, self._seq - 1, time.monotonic(), utc_now(), source_id=path.stem)

    def trigger(self) -> None:
        """The next read is the next picture anyway."""

    def close(self) -> None:
        """Nothing is held open."""


def _readable(path: Path) -> Pixels | None:
    try:
        return pictures.read(path)
    except PictureError:
        return None


class VideoSource:
    """The frames of a video file."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._seq = 0
        self._capture: cv2.VideoCapture | None = None

    def open(self) -> Info:
        """Open the file and look at its first frame. Raises CameraError."""
        admitted = self._admit(self.config)
        address, self._path = admitted.address, admitted.path
        self._loop = address.number("loop", 0) > 0
        fps = address.number("fps", 0)
        self._pace = Pace(fps)
        if not self._path.is_file():
            raise CameraError(f"{self.config.name}: no such file", hint="file:// plays a video, dir:// a folder of pictures")
        with restricted(RECORDINGS):
            self._capture = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        done, first = self._capture.read()
        if not done:
            raise CameraError(f"{self.config.name}: not a video that OpenCV can read")
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        info = info_of(first, fps)
        check_format(self.config, info)
        return info

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame. Raises CameraEnded after the last, unless loop=1."""
        if self._capture is None or not self._pace.wait(timeout_s):
            return None
        done, image = self._capture.read()
        if not done and self._loop:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            done, image = self._capture.read()
        if not done:
            raise CameraEnded(f"{self.config.name}: no more frames")
        self._seq += 1
        name = f"{self._path.stem}-{self._seq:06d}"
        return Frame(frozen(image), self._seq - 1, time.monotonic(), utc_now(), source_id=name)

    def trigger(self) -> None:
        """The next read is the next frame anyway."""

    def close(self) -> None:
        """Close the file."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None
