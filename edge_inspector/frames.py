"""What a camera delivers and what asked for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
"""uint8 or uint16, [H, W] grey or [H, W, 3] BGR."""


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True, slots=True)
class Frame:
    """One image with number and times. The pixels are read-only and belong to the frame."""

    image: Pixels
    seq: int
    """Counts delivered frames of a camera from 0; goes on across reconnects."""
    captured_s: float
    """time.monotonic() of exposure or arrival."""
    captured_at: datetime
    clock: Literal["device", "kernel", "arrival"] = "arrival"
    """Who told the time of capture."""
    source_id: str = ""
    """What the source calls this frame: a file name, a device's block id."""
    lost: int = 0
    """Frames known lost just before this one."""
    epoch: int = 0
    """Counts (re)openings of the camera."""
    key: bool | None = None
    """Of a coded stream: whether it was coded without the frames before it; None where that is not known."""
    fault: str = ""
    """Why this frame cannot be judged (a Reason's value); empty for a good one."""
    fault_detail: str = ""


@dataclass(frozen=True, slots=True)
class Trigger:
    """What starts one inspection. The id never repeats at a station."""

    trigger_id: str
    received_s: float
    """time.monotonic() of arrival."""
    triggered_at: datetime
    expires_s: float
    """time.monotonic() after which a verdict is worth nothing."""
    expires_at: datetime
    part_id: str | None = None
    product: str | None = None
    journalled: bool = False
    """Whether the outbox holds it already, so that a crash cannot lose it."""
    fault: str = ""
    """Why it asks for nothing that can be done; empty for a good one."""


class Coming:
    """Triggers that were received and are still on their way, by the disk, to their station. For any thread."""

    def __init__(self) -> None:
        self._numbers = count()
        self._since_s: dict[int, float] = {}

    def begin(self) -> int:
        """One is received, from now on; returns what `end` needs."""
        number = next(self._numbers)
        self._since_s[number] = time.monotonic()
        return number

    def end(self, number: int) -> None:
        """It was offered to its station, or will not be."""
        del self._since_s[number]

    def heard_s(self) -> float:
        """Of what was received before this (time.monotonic()), nothing is still on its way."""
        now_s = time.monotonic()
        return min(list(self._since_s.values()), default=now_s)


def frozen(image: Pixels) -> Pixels:
    """The same pixels, made read-only and contiguous."""
    image = np.ascontiguousarray(image)
    image.flags.writeable = False
    return image
