"""Gets the images of one part from the cameras of its station, while the part is in view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_inspector.cameras import Camera
from edge_inspector.config import StationConfig
from edge_inspector.errors import CameraEnded
from edge_inspector.frames import Frame, Trigger
from edge_inspector.recipes import Recipe

_WAIT_S = 0.25


@dataclass
class Imaging:
    """The cameras of one station, as its own thread uses them."""

    config: StationConfig
    next_trigger_s: Callable[[], float]
    """When the part behind this one was triggered (time.monotonic()); infinity where none waits."""
    goes_on: Callable[[], bool]
    """Called several times a second while an image is awaited; False: wait no longer."""
    cameras: dict[str, Camera] = field(default_factory=dict)
    carried: Frame | None = None
    """Came while more frames of a part were awaited, and may show the next one."""

    @property
    def simulated(self) -> bool:
        """Whether its images are drawn or recorded: recordings wait for their triggers."""
        return any(camera.info is not None and camera.info.simulated for camera in self.cameras.values())

    @property
    def reads_ahead(self) -> bool:
        """Whether frames that wait are no sign of being late: a recording is read before its turn."""
        info = next(iter(self.cameras.values())).info
        return info is not None and info.pulled

    @property
    def waiting(self) -> bool:
        """Whether frames wait that nobody has taken yet."""
        return any(camera.waiting for camera in self.cameras.values())

    def triggered(self, trigger: Trigger, recipe: Recipe) -> dict[str, list[Frame]]:
        """Fire all cameras of the recipe together, once for each frame that its decision needs, while the part is in view."""
        frames: dict[str, list[Frame]] = {name: [] for name in recipe.cameras}
        since_s = trigger.received_s
        for _ in range(recipe.decision.frames):
            if self._left_s(trigger) <= time.monotonic() and not self.simulated:
                return frames
            for name in recipe.cameras:
                self.cameras[name].trigger(since_s)
            for name, got in frames.items():
                frame = self._awaited(name, trigger)
                if frame is None or (frame.captured_s >= self._left_s(trigger) and not self.simulated):
                    return frames
                got.append(frame)
            since_s = time.monotonic()
        return frames

    def _left_s(self, trigger: Trigger) -> float:
        """When the part was, or will be, out of view: when the next one was triggered, and by what the configuration says."""
        in_view_ms = self.config.in_view_ms
        until_s = trigger.received_s + in_view_ms / 1e3 if in_view_ms is not None else trigger.expires_s
        return min(self.next_trigger_s(), until_s)

    def complete(self, trigger: Trigger, recipe: Recipe, frames: Mapping[str, list[Frame]]) -> None:
        """Wait for the further frames of a part whose first one has come by itself."""
        for name, got in frames.items():
            while len(got) < recipe.decision.frames and (frame := self._awaited(name, trigger)) is not None:
                if frame.lost:  # it may show another part: this one stays short of frames, the next begins with it
                    self.carried = frame
                    return
                got.append(frame)

    def _awaited(self, name: str, trigger: Trigger) -> Frame | None:
        patience_s = min(trigger.expires_s - time.monotonic(), self.config.cameras[name].timeout_ms / 1000)
        end = time.monotonic() + patience_s
        try:
            while (left := end - time.monotonic()) > 0 and self.goes_on():
                frame = self.cameras[name].next(min(left, _WAIT_S))
                if frame is not None:
                    return frame
        except CameraEnded:
            return None
        return None
