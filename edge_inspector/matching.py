"""Which images belong to which part, where a sensor on the line fires the cameras; parts may be announced over MQTT.

Images are matched by the time of their exposure, never by counting: one that is missing, or two, or an extra one, must not
shift all that follow. An image and an announcement belong together only where neither could belong to another. What
cannot be told: an extra image that comes when a part's own is due, and the part's own is missing or bounced.
No threads and no clock here: times are time.monotonic() seconds that the caller gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_inspector.config import StationConfig
from edge_inspector.frames import Frame, Trigger
from edge_inspector.messages import Cause

_NEAR_S = 10.0
_LATELY_S = 60.0
MOST = 256
"""Announcements and exposures that wait; beyond it the oldest are given up."""


@dataclass(eq=False)
class Exposure:
    """Images of one edge of the sensor, by camera."""

    at_s: float
    frames: dict[str, Frame] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One part: its announcement (None where parts are not announced) and its images; why it has none it may judge."""

    trigger: Trigger | None
    frames: dict[str, Frame]
    doubt: str = ""


@dataclass
class MatchCounts:
    """What did not fit, since the start."""

    extra: int = 0
    """Images that no announced part explains."""
    bounced: int = 0
    """Images too soon after another one of the same camera."""
    missing: int = 0
    """Parts without all of their images."""


class Matcher:
    """Groups images of one edge, and gives each group to its part."""

    def __init__(
        self, cameras: Iterable[str], *, announced: bool, delay_s: float, tolerance_s: float, sync_s: float, debounce_s: float,
        patience_s: float,
    ) -> None:  # fmt: skip
        """`delay_s`: from announcement to exposure, +- `tolerance_s`. `patience_s`: how long an image may take to arrive."""
        self.cameras = frozenset(cameras)
        self.announced, self.delay_s, self.tolerance_s = announced, delay_s, tolerance_s
        self.sync_s, self.debounce_s, self.patience_s = sync_s, debounce_s, patience_s
        self.counts = MatchCounts()
        self._unfitting_s = float("-inf")
        self._exposures: list[Exposure] = []
        self._triggers: list[Trigger] = []
        self._given_up: deque[Exposure] = deque(maxlen=MOST)
        self._last_s: dict[str, float] = {}
        self._seen_s: deque[float] = deque(maxlen=64)
        self._unseen = 0
        """Edges of a single camera whose images were lost on their way. Of several cameras, a group misses what one of them
        has lost; an edge that all of them lost is not known."""

    @classmethod
    def of(cls, station: StationConfig) -> Matcher:
        """The matcher that a station's configuration describes."""
        given = station.hardware
        patience_ms = min(station.expires_ms, max(camera.timeout_ms for camera in station.cameras.values()))
        return cls(
            station.cameras, announced=given.announced, delay_s=given.delay_ms / 1e3, tolerance_s=given.tolerance_ms / 1e3,
            sync_s=given.sync_ms / 1e3, debounce_s=given.debounce_ms / 1e3, patience_s=patience_ms / 1e3,
        )  # fmt: skip

    def causes(self, station: str, now_s: float) -> list[Cause]:
        """What is wrong with the images that come."""
        if now_s - self._unfitting_s > _LATELY_S:
            return []
        text = f"since the start: {self.counts.extra} images without a part, {self.counts.bounced} too soon after another"
        return [Cause(code="images_unfitting", severity="off_spec", thing=station, text=text)]

    def announce(self, trigger: Trigger) -> None:
        """A part is coming."""
        self._triggers.append(trigger)

    def seen(self, camera: str, frame: Frame) -> None:
        """An image has arrived."""
        at_s = frame.captured_s
        self._seen_s.append(at_s)
        if len(self.cameras) == 1:
            self._unseen += min(frame.lost, MOST)
        if at_s - self._last_s.get(camera, float("-inf")) < self.debounce_s:
            self.counts.bounced += 1
            self._unfitting_s = at_s
            return
        if not (frame.fault and frame.clock == "arrival"):  # else when it was exposed is not known
            self._last_s[camera] = at_s
        near = [e for e in (*self._exposures, *self._given_up) if camera not in e.frames and abs(e.at_s - at_s) <= self.sync_s]
        if near:  # of one that was given up it is too late, and no part of its own
            min(near, key=lambda exposure: abs(exposure.at_s - at_s)).frames[camera] = frame
        else:
            self._exposures.append(Exposure(at_s, {camera: frame}))
            self._exposures.sort(key=lambda exposure: exposure.at_s)

    def due(self, now_s: float, heard_s: float) -> list[Part]:
        """Parts that can be judged, or given up, now; all that was announced before `heard_s` is known."""
        parts = self._announced_parts(now_s, heard_s) if self.announced else self._plain_parts(now_s)
        self.counts.missing += sum(part.frames.keys() != self.cameras for part in parts)
        return parts

    def _settled(self, exposure: Exposure, now_s: float) -> bool:
        """Whether all its images are here, or will not come."""
        return exposure.frames.keys() == self.cameras or now_s > exposure.at_s + self.patience_s

    def _plain_parts(self, now_s: float) -> list[Part]:
        closed = [e for e in self._exposures if self._settled(e, now_s)] or self._exposures[:-MOST]
        self._exposures = [e for e in self._exposures if e not in closed]
        self._given_up.extend(exposure for exposure in closed if exposure.frames.keys() != self.cameras)
        lost, self._unseen = self._unseen, 0
        return [Part(None, {})] * lost + [Part(None, dict(exposure.frames)) for exposure in closed]

    def _announced_parts(self, now_s: float, heard_s: float) -> list[Part]:
        parts: list[Part] = []
        for trigger in list(self._triggers):
            if trigger not in self._triggers:  # given up with a rival
                continue
            due_s = trigger.received_s + self.delay_s
            mine = min(self._exposures, key=lambda e: abs(e.at_s - due_s), default=None)
            if mine is not None and self._may_be(mine, trigger):
                if not self._settled(mine, now_s) or heard_s < self._known_s(mine):
                    continue
                rivals = [t for t in self._triggers if self._may_be(mine, t)]
                self._exposures.remove(mine)
                doubt = "" if len(rivals) == 1 else "its image may be another part's: they were announced too close together"
                parts += [Part(t, {} if doubt else dict(mine.frames), doubt) for t in rivals]
                self._triggers = [t for t in self._triggers if t not in rivals]
            elif now_s > due_s + self.tolerance_s + self.patience_s or len(self._triggers) > MOST:
                self._triggers.remove(trigger)
                parts.append(Part(trigger, {}, self._nearest(due_s)))
        waits = [e for e in self._exposures if heard_s <= self._known_s(e) or any(self._may_be(e, t) for t in self._triggers)]
        extra = len(self._exposures) - len(waits[-MOST:])
        self.counts.extra += extra
        self._unfitting_s = now_s if extra else self._unfitting_s
        self._exposures = waits[-MOST:]
        return parts

    def _nearest(self, due_s: float) -> str:
        """Why a part has no image, with what helps to set delay and tolerance."""
        offsets = [at_s - due_s for at_s in self._seen_s]
        nearest = min(offsets, key=abs, default=float("inf"))
        words = f"no image within {self.tolerance_s * 1e3:.0f} ms of its time"
        if abs(nearest) > _NEAR_S:
            return words
        return f"{words}; the nearest came {abs(nearest) * 1e3:.0f} ms {'after' if nearest > 0 else 'before'} it (delay_ms)"

    def _known_s(self, exposure: Exposure) -> float:
        """The last moment at which an announcement could come that claims it."""
        return exposure.at_s + self.tolerance_s - self.delay_s

    def _may_be(self, exposure: Exposure, trigger: Trigger) -> bool:
        return abs(exposure.at_s - trigger.received_s - self.delay_s) <= self.tolerance_s
