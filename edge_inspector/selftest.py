"""The samples of a station's bundles, judged again: at the start, on command, on schedule."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime

from edge_inspector.bundles import Sample
from edge_inspector.config import SelfTestConfig
from edge_inspector.errors import EngineLost, InspectorError
from edge_inspector.frames import utc_now
from edge_inspector.messages import Cause
from edge_inspector.runtime import Engine, judge_sample


class SelfTest:
    """When it is due, and how the last one ended. `order` from any thread, the rest from the station's."""

    def __init__(self, station: str, config: SelfTestConfig, doubt: str = "") -> None:
        """Not due before the networks are open, which takes one. `doubt`: why the last one failed, before a restart."""
        self._station, self._config = station, config
        self._ordered = threading.Event()
        self._next_s = float("inf")
        self._left: deque[tuple[Engine, Sample]] = deque()
        self.at: datetime | None = None
        self.fault = doubt
        """Why the last one failed."""
        if doubt:
            self._ordered.set()

    def order(self) -> None:
        """Run one between two parts."""
        self._ordered.set()

    @property
    def blocks(self) -> bool:
        """Whether no part may be judged, since samples are not judged as they must be."""
        return self._config.required and (bool(self.fault) or self.at is None)

    @property
    def hindrance(self) -> str:
        """Why no part may be judged; empty where one may."""
        return f"self-test: {self.fault or 'its samples are not judged yet'}" if self.blocks else ""

    def begin(self) -> None:
        """Other networks judge from now on, opened with their samples judged. What was in doubt stays so until it is tested."""
        if self.fault or self._left:
            self._ordered.set()
        self._left.clear()
        if not self._ordered.is_set():
            self._end("")

    def step(self, engines: Mapping[str, Engine]) -> bool:
        """When it is due judge one more sample: parts wait for no more. True: it has just ended. Raises EngineLost."""
        if not self._left:
            if not self._ordered.is_set() and time.monotonic() < self._next_s:
                return False
            self._ordered.clear()
            self._left.extend((engine, sample) for engine in engines.values() for sample in engine.bundle.manifest.samples)
        engine, sample = self._left.popleft()
        try:
            judge_sample(engine, sample)
        except EngineLost:
            raise
        except InspectorError as error:
            self._left.clear()
            self._end(error.message)
            return True
        if not self._left:
            self._end("")
        return not self._left

    def _end(self, fault: str) -> None:
        self.at, self.fault = utc_now(), fault
        every_h = self._config.every_h
        self._next_s = time.monotonic() + every_h * 3600 if every_h is not None else float("inf")

    def causes(self) -> list[Cause]:
        """What is wrong with the station's networks."""
        if not self.fault:
            return []
        severity = "failure" if self._config.required else "off_spec"
        return [Cause.model_validate({
            "code": "self_test_failed", "severity": severity, "thing": self._station, "text": self.fault
        })]  # fmt: skip
