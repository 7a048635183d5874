"""Videos as cameras: `file://VIDEO`. Options: fps, loop.

FFmpeg conceals what is missing or damaged, and OpenCV passes over what FFmpeg cannot decode. So the packets of the file are
looked at first: what is missing between them, what depends on it, and where a recording ends too early is known and told.
Motion JPEG is decoded strictly, picture by picture. Damage inside a packet of another codec that FFmpeg conceals is not seen.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, replace

import cv2
import numpy as np

from edge_inspector import pictures
from edge_inspector.cameras.ffmpeg import RECORDINGS, restricted
from edge_inspector.cameras.folder import Pace, broken_frame, info_of
from edge_inspector.cameras.source import Info, check_format
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraEnded, CameraError, PictureError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now

log = logging.getLogger(__name__)
_MJPEG = ("MJPG", "mjpg", "jpeg")
_REGULAR = 0.9
"""Share of equal steps from which on a longer one means that frames are missing."""
_JITTER = 0.1
_COUNTED = 0.02
"""Some containers estimate how many frames they hold: a difference below this share, and of one frame, means nothing."""


@dataclass(frozen=True)
class _Slot:
    """One packet of the file, in the order of showing."""

    at_ms: float
    lost: int
    """Frames that are missing just before it."""
    refers: bool
    """Whether it is decoded with the help of earlier ones."""


class VideoSource:
    """The frames of a video file. What cannot be decoded is a broken frame; what is missing is counted and told."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._seq = self._number = 0
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
        self._rewind()
        first = next((frame for frame in iter(self._next, None) if not frame.fault), None)
        if first is None:
            raise CameraError(f"{self.config.name}: not a video that OpenCV can read")
        self._rewind()
        self._seq = 0
        info = info_of(first.image, fps)
        check_format(self.config, info)
        return info

    def _rewind(self) -> None:
        """Begin anew: look at the packets, then open what decodes them."""
        self.close()
        with restricted(RECORDINGS):
            packets = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
        if not packets.isOpened():
            raise CameraError(f"{self.config.name}: not a video that OpenCV can read")
        codec = int(packets.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=False).decode("latin-1")
        self._strict, self._count = codec in _MJPEG, round(packets.get(cv2.CAP_PROP_FRAME_COUNT))
        self._pending: tuple[float, Pixels] | None = None
        self._in_doubt, self._number, self._told_end = "", 0, False
        if self._strict:
            self._capture, self._slots = packets, deque[_Slot]()
            return
        self._slots = deque(_slots(packets))
        packets.release()
        with restricted(RECORDINGS):
            self._capture = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame. Raises CameraEnded after the last, unless loop=1."""
        if self._capture is None or not self._pace.wait(timeout_s):
            return None
        frame = self._next()
        if frame is None and self._loop:
            self._rewind()
            frame = self._next()
        if frame is None:
            raise CameraEnded(f"{self.config.name}: no more frames")
        return frame

    def _next(self) -> Frame | None:
        frame = self._jpeg() if self._strict else self._decoded()
        return self._end() if frame is None else frame

    def _named(self) -> str:
        """What the next frame is called; a missing one has a number as well."""
        self._number += 1
        self._seq += 1
        return f"{pictures.printable(self._path.stem)}-{self._number:06d}"

    def _frame(self, image: Pixels, name: str) -> Frame:
        return Frame(frozen(image), self._seq - 1, time.monotonic(), utc_now(), source_id=name)

    def _jpeg(self) -> Frame | None:
        """The next packet of Motion JPEG: a picture of its own."""
        assert self._capture is not None
        done, packet = self._capture.read()
        if not done:
            return None
        name = self._named()
        try:
            return self._frame(pictures.decode(np.asarray(packet, np.uint8).tobytes(), name), name)
        except PictureError as error:
            return broken_frame(self._seq - 1, name, error.message)

    def _decoded(self) -> Frame | None:
        """The frame of the next packet, or a broken one where FFmpeg gives none for it."""
        if not self._slots:
            return None
        slot = self._slots.popleft()
        self._number += slot.lost
        name = self._named()
        if not slot.refers:
            self._in_doubt = ""
        if slot.lost:
            self._in_doubt = f"{slot.lost} frame(s) before {name} are missing: what follows cannot be decoded whole"
        image = self._image_of(slot)
        if image is None:
            self._in_doubt = f"{name} cannot be decoded, nor what follows up to the next key frame"
        if image is None or (self._in_doubt and slot.refers):
            return replace(broken_frame(self._seq - 1, name, self._in_doubt), lost=slot.lost)
        if self._slots and not self._slots[0].lost and not self._is_next(self._slots[0], 1):
            return broken_frame(self._seq - 1, name, "what follows it cannot be decoded: FFmpeg may have filled in a part")
        return replace(self._frame(image, name), lost=slot.lost)

    def _image_of(self, slot: _Slot) -> Pixels | None:
        """What is decoded for a packet; a later one's is kept for it."""
        if not self._is_next(slot, 0) or self._pending is None:
            return None
        image, self._pending = self._pending[1], None
        return image

    def _is_next(self, slot: _Slot, following: int) -> bool:
        """Whether the next frame that is decoded is that of a packet; `following`: where the packet after it lies."""
        assert self._capture is not None
        if self._pending is None:
            done, image = self._capture.read()
            self._pending = (self._capture.get(cv2.CAP_PROP_POS_MSEC), image) if done else None
        after_ms = self._slots[following].at_ms if following < len(self._slots) else float("inf")
        return self._pending is not None and self._pending[0] <= (slot.at_ms + after_ms) / 2

    def _end(self) -> Frame | None:
        """A last, broken frame where the file holds fewer frames than it says; else None."""
        missing = self._count - self._number
        if self._told_end or missing <= 0 or (missing == 1 and missing < _COUNTED * self._count):
            return None
        text = f"the recording ends after {self._number} of {self._count} frames: it is cut off, or a part of it is damaged"
        self._told_end = True
        log.warning("%s: %s", self.config.name, text)
        return replace(broken_frame(self._seq, self._named(), text), lost=missing - 1)

    def trigger(self) -> None:
        """The next read is the next frame anyway."""

    def close(self) -> None:
        """Close the file."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None


def _slots(packets: cv2.VideoCapture) -> list[_Slot]:
    """The packets of a file in the order of showing, and what is missing between them."""
    found: list[tuple[float, bool]] = []
    while packets.grab():
        found.append((packets.get(cv2.CAP_PROP_POS_MSEC), packets.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME) > 0))
    found.sort()
    steps = np.diff([at_ms for at_ms, _ in found])
    step_ms = float(np.median(steps)) if len(steps) else 0.0
    regular = step_ms > 0 and float((np.abs(steps - step_ms) <= _JITTER * step_ms).mean()) >= _REGULAR
    lost = [0, *(max(0, round(step / step_ms) - 1) if regular else 0 for step in steps)]
    return [_Slot(at_ms, gap, not key) for (at_ms, key), gap in zip(found, lost, strict=False)]
