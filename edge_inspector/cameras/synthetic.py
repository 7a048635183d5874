"""`synthetic://`: drawn parts with and without defects, and camera faults on demand. For trials and tests.

Options: width, height, fps, seed, depth (8 or 16), grey=1, count, defect_rate, fault, after (frames before the fault).
Faults: silent, unplug, hang, crash, dark, freeze, corrupt, format.
"""

from __future__ import annotations

import os
import threading
import time

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_inspector.cameras.folder import Pace, broken_frame, info_of
from edge_inspector.cameras.source import Info, check_format
from edge_inspector.config import CameraConfig
from edge_inspector.door import Admit
from edge_inspector.errors import CameraEnded, CameraError
from edge_inspector.frames import Frame, Pixels, frozen, utc_now

FAULTS = ("silent", "unplug", "hang", "crash", "dark", "freeze", "corrupt", "format")
LETHAL = ("hang", "crash")
"""Faults that only a child process survives."""


def draw_part(rng: np.random.Generator, height: int, width: int, defect: bool) -> NDArray[np.uint8]:
    """A brushed disc on a dark ground, uint8 [H, W, 3] BGR; a defect is a scratch or a stain on it."""
    image = rng.normal(40, 3, (height, width, 3))
    cy, cx = height / 2 + rng.uniform(-2, 2), width / 2 + rng.uniform(-2, 2)
    rows, columns = np.mgrid[:height, :width]
    radius = np.hypot(rows - cy, columns - cx)
    disc = radius < 0.42 * min(height, width)
    rings = 150 + 12 * np.sin(radius / 2.5) + rng.normal(0, 4, (height, width))
    image[disc] = (rings[:, :, None] * np.array([0.95, 1.0, 1.02]))[disc]
    picture = np.clip(image, 0, 255).astype(np.uint8)
    if defect:
        angle, reach = rng.uniform(0, 2 * np.pi), 0.25 * min(height, width) * rng.uniform(0.2, 1)
        x, y = round(cx + reach * np.cos(angle)), round(cy + reach * np.sin(angle))
        size = max(2, min(height, width) // 24)
        if rng.random() < 0.5:  # one defect of two
            cv2.circle(picture, (x, y), size, (60, 70, 80), -1, cv2.LINE_AA)
        else:
            end = (x + rng.integers(-4 * size, 4 * size), y + rng.integers(-4 * size, 4 * size))
            cv2.line(picture, (x, y), (int(end[0]), int(end[1])), (225, 225, 225), max(1, size // 3), cv2.LINE_AA)
    return picture


class SyntheticSource:
    """Draws one part per frame; the source_id tells the truth: `000007-good`, `000008-defect`."""

    def __init__(self, config: CameraConfig, admit: Admit) -> None:
        self.config, self._admit = config, admit
        self._seq = 0

    def open(self) -> Info:
        """Read the options. Raises CameraError."""
        address = self._admit(self.config).address
        self._size = (int(address.number("height", 128)), int(address.number("width", 128)))
        self._depth, self._grey = int(address.number("depth", 8)), address.number("grey", 0) > 0
        self._count, self._defect_rate = address.number("count", float("inf")), address.number("defect_rate", 0.2)
        self._fault, self._after = address.options.get("fault", ""), int(address.number("after", 0))
        if self._fault and self._fault not in FAULTS:
            raise CameraError(f"{self.config.name}: unknown fault", hint=f"allowed: {', '.join(FAULTS)}")
        if min(self._size) < 16 or self._depth not in (8, 16):
            raise CameraError(f"{self.config.name}: width and height are at least 16, depth is 8 or 16")
        fps = address.number("fps", 0)
        self._pace = Pace(fps)
        self._seed = int(address.number("seed", 0))
        self._here = 0
        info = info_of(self._drawn(0, False), fps)
        check_format(self.config, info)
        return info

    def _drawn(self, number: int, defect: bool) -> Pixels:
        rng = np.random.default_rng((self._seed, number))
        image: Pixels = draw_part(rng, *self._size, defect)
        if self._grey:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        return frozen(image.astype(np.uint16) << 4 if self._depth == 16 else image)  # 12 bit in 16

    def read(self, timeout_s: float) -> Frame | None:
        """Draw the next part. Raises CameraEnded after `count`, CameraError as the fault demands."""
        if self._seq >= self._count:
            raise CameraEnded(f"{self.config.name}: no more parts")
        if not self._pace.wait(timeout_s):
            return None
        number = self._seq
        defect = bool(np.random.default_rng((self._seed, number, 1)).random() < self._defect_rate)
        name = f"{number:06d}-{'defect' if defect else 'good'}"
        faulty = bool(self._fault) and self._here >= self._after
        self._here += 1
        image = self._drawn(number, defect)
        if faulty:
            changed = self._faulty(timeout_s, image)
            if changed is None:
                return None
            image = changed
        self._seq += 1
        if faulty and self._fault == "corrupt":
            return broken_frame(number, name, "synthetic corruption")
        return Frame(image, number, time.monotonic(), utc_now(), source_id=name)

    def _faulty(self, timeout_s: float, image: Pixels) -> Pixels | None:
        if self._fault == "silent":
            time.sleep(timeout_s)
            return None
        if self._fault == "unplug":
            raise CameraError(f"{self.config.name}: unplugged")
        if self._fault == "hang":
            threading.Event().wait()
        if self._fault == "crash":
            os._exit(70)
        if self._fault == "dark":
            return frozen(image // 16)
        if self._fault == "freeze":
            return self._drawn(self._after, False)
        return frozen(image[: image.shape[0] // 2]) if self._fault == "format" else image

    def trigger(self) -> None:
        """The next read draws the next part anyway."""

    def close(self) -> None:
        """Nothing is held open."""
