"""The Source protocol: one way to get frames, without supervision. Camera adds the rest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, Protocol

from edge_inspector.config import CameraConfig
from edge_inspector.errors import CameraError
from edge_inspector.frames import Frame


@dataclass(frozen=True)
class Info:
    """What an open source really delivers, read back from it."""

    width: int
    height: int
    channels: int
    depth_bits: int
    fps: float | None = None
    triggerable: bool = False
    """Makes an image when told to; others deliver all the time."""
    waits: bool = False
    """Makes an image when a line of its own is pulsed: silence is no fault."""
    pulled: bool = False
    """Makes the next frame only when asked: waiting costs nothing and nothing overflows."""
    simulated: bool = False
    coding: Literal["single", "stream", "recorded"] = "single"
    """Each picture stands alone; or is coded by what differs from others, so that a still scene may give equal frames; or is
    a recording, which may show anything."""
    settings: dict[str, str] = field(default_factory=dict)
    """Read back from the camera, by the camera's names."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, for one what a folder of pictures leaves out."""

    def __str__(self) -> str:
        rate = f" at {self.fps:g}/s" if self.fps else ""
        told = "".join(f", {name} {value}" for name, value in self.settings.items())
        return f"{self.width}x{self.height}, {self.channels} channel(s), {self.depth_bits} bit{rate}{told}"


@dataclass(frozen=True)
class Found:
    """A camera that is there."""

    uri: str
    model: str
    serial: str
    details: str
    formats: tuple[str, ...] = ()
    """Pixel formats; none where it is in use."""


class Source(Protocol):
    """Frames from one place. Used from one thread."""

    def open(self) -> Info:
        """Open and read every setting back. Raises CameraError, also where a setting was not taken."""
        ...

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame, or None when there is none in time. Raises CameraEnded, CameraError."""
        ...

    def trigger(self) -> None:
        """Make an image now. Raises CameraError where the source cannot."""
        ...

    def close(self) -> None:
        """Let go of the device; may be called twice, never takes long."""
        ...


def check_format(config: CameraConfig, info: Info) -> None:
    """Raise CameraError where the camera did not take what the configuration sets."""
    for name, wanted, found in (("width", config.width, info.width), ("height", config.height, info.height)):
        if wanted is not None and wanted != found:
            raise CameraError(
                f"{config.name}: {name} {found}, the configuration sets {wanted}",
                hint="set a size that the camera offers, or none",
            )


class DeviceClock:
    """Brings a camera's own timestamps, or a stream's, to our monotonic clock.

    A frame arrives some time after its exposure, never before: the smallest difference between arrival and timestamp is
    the one with the least delay in it. The last minute counts, so that two clocks may drift apart.
    """

    WINDOW_S = 30.0
    SURE = 8
    """Frames after which one of them is taken to have come without delay."""

    def __init__(self) -> None:
        self._least: deque[tuple[float, float]] = deque(maxlen=2)
        """Least differences: of the window before, of this one; each with its beginning."""
        self._device_s = float("-inf")

    def captured_s(self, device_s: float, arrived_s: float) -> float:
        """time.monotonic() of a frame's timestamp; never later than its arrival."""
        if device_s < self._device_s:  # it was set anew
            self._least.clear()
        self._device_s = device_s
        difference = arrived_s - device_s
        while self._least and arrived_s - self._least[0][0] > 2 * self.WINDOW_S:  # after a pause nothing is known of it
            self._least.popleft()
        if not self._least or arrived_s - self._least[-1][0] > self.WINDOW_S:
            self._least.append((arrived_s, difference))
        elif difference < self._least[-1][1]:
            self._least[-1] = (self._least[-1][0], difference)
        return device_s + min(least for _, least in self._least)

    def known(self, device_s: float) -> dict[str, Any]:
        """Times of a broken frame, which teaches nothing; none where it has no timestamp, or nothing is known yet."""
        if not device_s or not self._least:
            return {}
        captured_s = device_s + min(least for _, least in self._least)
        return {"captured_s": captured_s, "captured_at": moment(captured_s), "clock": "device"}


def moment(captured_s: float) -> datetime:
    """The wall clock's time of a monotonic one."""
    return datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - captured_s)


def settle(read: Callable[[float], Frame | None], timeout_s: float) -> None:
    """Let the first frames of a camera that runs free go by: they teach us its clock, where it has one."""
    end = time.monotonic() + timeout_s
    for _ in range(DeviceClock.SURE):
        frame = read(max(0.0, end - time.monotonic()))
        if frame is None or frame.clock == "arrival":
            return
