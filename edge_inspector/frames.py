"""What a camera delivers and what asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
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


def frozen(image: Pixels) -> Pixels:
    """The same pixels, made read-only and contiguous."""
    image = np.ascontiguousarray(image)
    image.flags.writeable = False
    return image
