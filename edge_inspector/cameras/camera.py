"""Camera: a source with supervision. Reconnects, guards what it delivers, and never makes its user wait beyond a deadline."""

from __future__ import annotations

import ctypes
import logging
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from types import TracebackType

from edge_inspector.addresses import STREAMS, scheme_of
from edge_inspector.cameras.source import Info, Source
from edge_inspector.config import CameraConfig, Guards
from edge_inspector.errors import CameraEnded, CameraError
from edge_inspector.frames import Frame, Pixels
from edge_inspector.results import Reason
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

QUEUE = 8
"""Frames that wait under the policy `every`; more are lost, counted, and told with the next frame."""
_WAIT_S = 0.25
_ASKED_WAIT_S = 0.02
"""While a triggered image is awaited: for so long may the next trigger wait to be passed on."""
_BACKOFF_S = (0.2, 1.5)
_DRIFT_S = 0.01
"""By which a camera's own clock may run behind what we know of it."""
_STREAM_LATENCY_S = 0.3
"""Encoding and buffers of network cameras; config's latency_ms is the measured one."""
_GRID = 16
"""The guard against darkness looks at every 16th row and column."""
_MEMCMP = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_FROZEN_FRAMES = 10
"""Equal frames in a row that no working sensor gives: its noise differs."""
_STILL_S, _STILL_KEYS, _STILL_UNKNOWN_S = 10.0, 2, 60.0
"""A stream that is equal for so long, over so many key frames, is frozen; one whose key frames are not known, for longer."""
_BLACK = {1: 5, 2: 20}
"""By bytes of a pixel: at most this is black."""
_WHITE = 250
"""Of 8 bit, at least this is saturated."""


class CameraState(str, Enum):
    """Where a camera stands."""

    CONNECTING = "connecting"
    STREAMING = "streaming"
    FAULT = "fault"
    ENDED = "ended"


@dataclass
class CameraCounts:
    """What happened since the start."""

    frames: int = 0
    lost: int = 0
    skipped: int = 0
    broken: int = 0
    missing: int = 0
    """Images that a trigger asked for and that never came."""
    reopened: int = 0


class _Guard:
    """Finds frames that came but must not be judged: dark, frozen, of another format. It remembers across reopenings."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self._last: Pixels | None = None
        self._same, self._keys, self._since_s = 0, 0, 0.0

    def fault(self, frame: Frame, info: Info) -> tuple[Reason, str] | None:
        """What is wrong with a frame; each is to be shown once, in order."""
        image = frame.image
        found = (image.shape[1], image.shape[0], 1 if image.ndim == 2 else 3, image.dtype.itemsize * 8)
        wanted = (info.width, info.height, info.channels, info.depth_bits)
        if not info.simulated and found != wanted:
            return Reason.WRONG_FORMAT, f"frame {found}, opened as {wanted}"
        grid = image[::_GRID, ::_GRID]
        if self.guards.dark_below and (mean := float(grid.mean())) < self.guards.dark_below:
            return Reason.DARK_IMAGE, f"mean intensity {mean:.1f}, at least {self.guards.dark_below:g} expected"
        if self._is_frozen(frame, info):
            return Reason.FROZEN_IMAGE, f"{self._same + 1} identical frames in a row"
        return None

    def _is_frozen(self, frame: Frame, info: Info) -> bool:
        most = self.guards.frozen_frames
        if most == 0 or (most is None and (info.simulated or info.coding == "recorded")):
            return False
        last, self._last = self._last, frame.image
        if last is None or not _are_equal(last, frame.image):
            self._same, self._keys, self._since_s = 0, 0, frame.captured_s
            return False
        self._same += 1
        self._keys += bool(frame.key)
        if most is not None:
            return self._same >= most
        if self._same + 1 < _FROZEN_FRAMES or _says_nothing(frame.image):
            return False
        return info.coding == "single" or self._is_still(frame)

    def _is_still(self, frame: Frame) -> bool:
        """Of a stream, where a scene without noise gives equal frames between two key frames."""
        for_s = frame.captured_s - self._since_s
        if frame.key is None:
            return for_s >= _STILL_UNKNOWN_S
        return for_s >= _STILL_S and self._keys >= _STILL_KEYS


def _are_equal(one: Pixels, other: Pixels) -> bool:
    """Byte for byte. Frames are contiguous; of different ones few bytes are looked at."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one is other or not _MEMCMP(one.ctypes.data, other.ctypes.data, one.nbytes)


def _says_nothing(image: Pixels) -> bool:
    """Whether a frame is black or saturated all over: of such a working sensor may give the same for ever."""
    least, most = int(image.min()), int(image.max())
    is_white = least >= _WHITE if image.itemsize == 1 else least == most
    return is_white or most <= _BLACK[image.itemsize]


class Camera:
    """Frames of one camera, by deadline. Use as a context manager; `next` is called from one thread."""

    def __init__(
        self,
        name: str,
        config: CameraConfig,
        make: Callable[[], Source],
        *,
        on_demand: bool = False,
        on_frame: Callable[[], None] = lambda: None,
    ) -> None:
        """`make` gives a fresh Source. `on_demand`: frames are wanted only after `trigger`, the first one since then.

        `on_frame` is called in the camera's thread when a frame waits; it must not block.
        """
        self.name, self.config, self._make, self.on_demand = name, config, make, on_demand
        self._on_frame = on_frame
        self.state, self.fault, self.hint = CameraState.CONNECTING, "", ""
        self.frozen = ""
        """Why its frames are taken for the same one again and again; empty where they are not."""
        self._guard = _Guard(config.guards)
        self.info: Info | None = None
        self.has_delivered = False
        """Whether a frame has come since it was opened."""
        self.counts = CameraCounts()
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._wanted = 0
        self._fence = 0.0
        self._seq = 0
        self._times: deque[float] = deque(maxlen=9)
        """When the last frames were captured."""
        self._lost = 0
        self._closing = threading.Event()
        self._closed_s = 0.0
        self._thread = Thread(target=self._run, name=f"camera-{name}", daemon=True)

    def __enter__(self) -> Camera:
        """Start capturing; returns at once."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End within two seconds, whatever the driver does."""
        self.stop_soon()
        self._thread.join(max(0.0, self._closed_s + 2.0 - time.monotonic()))

    def stop_soon(self) -> None:
        """Begin to end, without waiting."""
        if not self._closing.is_set():
            self._closed_s = time.monotonic()
            self._closing.set()
        with self._changed:
            self._changed.notify_all()

    # --- for the station

    def trigger(self, since_s: float | None = None) -> None:
        """Ask for one image: `next` gives the first frame captured since (time.monotonic(); none: from now on)."""
        with self._changed:
            self._fence = time.monotonic() if since_s is None else since_s
            fresh = [frame for frame in self._frames if self._is_fresh(frame)]
            self._frames.clear()
            self._frames += fresh
            self._wanted = 1
            self._changed.notify_all()

    def next(self, timeout_s: float) -> Frame | None:
        """The next frame, or None when there is none in time. Raises CameraEnded after the last of a recording."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while True:
                while self._frames:
                    frame = self._frames.popleft()
                    self._changed.notify_all()
                    if not self.on_demand or self._is_fresh(frame):
                        return frame
                if self.state is CameraState.ENDED:
                    raise CameraEnded(f"camera {self.name}: {self.fault}")
                left = end - time.monotonic()
                if left <= 0 or self._closing.is_set():
                    return None
                self._changed.wait(min(left, _WAIT_S))

    @property
    def hindrance(self) -> str:
        """Why it gives no image now that can be judged; empty where it does, and where only a part's own image can show it."""
        if self.state is CameraState.CONNECTING:
            return "connecting"
        if self.state is CameraState.FAULT:
            return self.fault
        info = self.info
        waits = info is not None and (info.waits or (info.triggerable and self.on_demand))
        return "" if waits else self.frozen

    @property
    def waiting(self) -> int:
        """Frames that nobody has taken yet."""
        return len(self._frames)

    def _is_fresh(self, frame: Frame) -> bool:
        """Whether it was exposed since the trigger, as far as its clock can tell.

        An image that the trigger itself made cannot be older, whatever a drifting clock says. One of a camera that runs free
        looks younger than it is by what its quickest frame needs from exposure to arrival.
        """
        info = self.info
        if info is None or info.simulated:
            return frame.captured_s >= self._fence
        if info.triggerable:
            return frame.captured_s >= self._fence - _DRIFT_S
        return frame.captured_s >= self._fence + self._latency_s(info)

    def _latency_s(self, info: Info) -> float:
        """Exposure, read-out and transfer of a free-running camera: as configured, else a period, which they rarely exceed."""
        if self.config.latency_ms is not None:
            return self.config.latency_ms / 1e3
        if scheme_of(self.config.uri) in STREAMS:
            return _STREAM_LATENCY_S
        times = self._times.copy()  # the camera's thread adds to them
        measured_s = (
            statistics.median(b - a for a, b in zip(times, islice(times, 1, None), strict=False)) if len(times) > 1 else 0
        )
        return max(measured_s, 1 / info.fps if info.fps else 0.0)

    # --- the supervising thread

    def _run(self) -> None:
        wait_s = _BACKOFF_S[0]
        while not self._closing.is_set():
            source, delivered = self._make(), self.counts.frames
            try:
                with closing(source):
                    self._supervise(source)
            except CameraEnded as error:
                self._become(CameraState.ENDED, error.message)
            except CameraError as error:
                if self.fault != error.message:
                    log.warning("camera %s: %s", self.name, error.message)
                self._become(CameraState.FAULT, error.message, error.hint)
            except Exception as error:  # root of a thread: a driver's surprise is a fault of this camera only
                log.exception("camera %s", self.name)
                self._become(CameraState.FAULT, f"{self.config.name}: {error}")
            if self.state is CameraState.ENDED:
                break
            if self.counts.frames > delivered:
                wait_s = _BACKOFF_S[0]
            self._closing.wait(wait_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            wait_s = min(wait_s * 2, _BACKOFF_S[1])
            self.counts.reopened += 1

    def _become(self, state: CameraState, fault: str = "", hint: str = "") -> None:
        with self._changed:
            self.state, self.fault, self.hint = state, fault, hint
            self._changed.notify_all()

    def _supervise(self, source: Source) -> None:
        """Open it and take its images. It is in fault, or connecting, until the first one has come."""
        info = source.open()
        self.info, self.has_delivered = info, False
        if info.triggerable and self.on_demand:
            if self.state is CameraState.FAULT and not info.simulated:
                self._probe(source)
            self._works()
            self._ask(source, info)
        else:
            if info.waits or (info.triggerable and not info.simulated):  # as long as nothing triggers them they give none
                self._works()
            self._flow(source, info)

    def _works(self) -> None:
        """Whatever was wrong is over."""
        if self.state is not CameraState.STREAMING:
            self._become(CameraState.STREAMING)

    def _probe(self, source: Source) -> None:
        """Ask a camera that was in fault for an image that is no part's, before anybody relies on it. Raises CameraError."""
        asked_s = time.monotonic()
        source.trigger()
        while not self._closing.is_set() and source.read(_ASKED_WAIT_S) is None:
            if not self._patient(asked_s):
                raise self._silent()

    def _flow(self, source: Source, info: Info) -> None:
        """Frames as they come. Raises CameraError when none does."""
        heard_s = time.monotonic()
        while not self._closing.is_set():
            frame = source.read(_WAIT_S)
            if frame is not None:
                self._deliver(frame, info)
            elif not info.waits and not self._patient(heard_s):
                raise self._silent()
            if frame is not None or info.waits:  # a line may stand still; a source that hangs says so itself
                heard_s = time.monotonic()

    def _ask(self, source: Source, info: Info) -> None:
        """One image for each trigger. Raises CameraError when two in a row do not come: one is its part's trouble."""
        heard_s, missing = time.monotonic(), False
        while not self._closing.is_set():
            if not self._asked(source):
                heard_s = time.monotonic()
                if not info.simulated:
                    source.read(0.0)  # one that is gone says so; an image that nobody wanted does not wait
                continue
            frame = source.read(_ASKED_WAIT_S)
            if frame is not None and self._is_fresh(frame):
                self._answered()
                self._deliver(frame, info)
                heard_s, missing = time.monotonic(), False
            elif frame is not None:
                self.counts.skipped += 1
            elif not self._patient(heard_s):
                if missing:
                    raise self._silent()
                self._answered()
                self.counts.missing += 1
                heard_s, missing = time.monotonic(), True

    def _patient(self, heard_s: float) -> bool:
        return time.monotonic() - heard_s <= self.config.timeout_ms / 1000

    def _silent(self) -> CameraError:
        return CameraError(
            f"{self.config.name}: silent for {self.config.timeout_ms} ms", hint="cable, power, or a busy network"
        )

    def _asked(self, source: Source) -> bool:
        """Wait for a trigger and pass it on; False when none came in a while."""
        with self._changed:
            if not self._wanted:
                self._changed.wait(_WAIT_S)
            if not self._wanted:
                return False
            fire, self._wanted = self._wanted == 1, 2
        if fire:
            source.trigger()
        return True

    def _answered(self) -> None:
        """The trigger that was passed on has its image, or gets none; one that came since then still waits."""
        with self._changed:
            self._wanted = 0 if self._wanted == 2 else self._wanted

    def _guarded(self, frame: Frame, info: Info) -> Frame:
        """The frame, broken where it must not be judged."""
        if frame.fault:
            return frame
        found = self._guard.fault(frame, info)
        frozen = found[1] if found and found[0] is Reason.FROZEN_IMAGE else ""
        if bool(frozen) != bool(self.frozen):
            log.warning("camera %s: %s", self.name, frozen or "its images differ again")
            self.frozen = frozen
        return replace(frame, fault=found[0].value, fault_detail=found[1]) if found else frame

    def _deliver(self, frame: Frame, info: Info) -> None:
        self._works()
        frame = self._guarded(frame, info)
        self.has_delivered = True
        self.counts.frames += 1
        self.counts.lost += frame.lost
        self.counts.broken += bool(frame.fault)
        latest = self.on_demand or self.config.policy == "latest"
        with self._changed:
            self._times.append(frame.captured_s)
            if self.on_demand and self._frames and self._is_fresh(self._frames[0]):
                self.counts.skipped += 1  # the first frame since the trigger waits already: later ones show another part
                return
            if latest and not info.pulled:
                self.counts.skipped += len(self._frames)
                self._frames.clear()
            while len(self._frames) >= QUEUE and info.pulled and not self._closing.is_set():
                self._changed.wait(_WAIT_S)
            if len(self._frames) >= QUEUE:
                self._lost += 1 + frame.lost
                self.counts.lost += 1
                return
            number, self._seq = self._seq, self._seq + 1
            lost, self._lost = self._lost + frame.lost, 0
            self._frames.append(replace(frame, seq=number, lost=lost, epoch=self.counts.reopened))
            self._changed.notify_all()
        self._on_frame()
