"""The samples of a station's bundles, judged again: at the start, on command, on schedule."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import datetime

from edge_inspector.config import SelfTestConfig
from edge_inspector.errors import EngineLost, InspectorError
from edge_inspector.frames import utc_now
from edge_inspector.messages import Cause
from edge_inspector.runtime import Engine, judge_samples


class SelfTest:
    """When it is due, and how the last one ended. `order` from any thread, the rest from the station's."""

    def __init__(self, station: str, config: SelfTestConfig) -> None:
        """Not due before the networks are open, which takes one."""
        self._station, self._config = station, config
        self._ordered = threading.Event()
        self._next_s = float("inf")
        self.at: datetime | None = None
        self.fault = ""
        """Why the last one failed."""

    def order(self) -> None:
        """Run one between two parts."""
        self._ordered.set()

    @property
    def is_due(self) -> bool:
        """Whether one is ordered, or its time has come."""
        return self._ordered.is_set() or time.monotonic() >= self._next_s

    @property
    def blocks(self) -> bool:
        """Whether no part may be judged, since samples are not judged as they must be."""
        return bool(self.fault) and self._config.required

    def passed(self) -> None:
        """The networks were opened, and their samples judged."""
        self._ended("")

    def run(self, engines: Mapping[str, Engine]) -> None:
        """Judge the samples of all bundles. Raises EngineLost."""
        try:
            for engine in engines.values():
                judge_samples(engine)
        except EngineLost:
            raise
        except InspectorError as error:
            self._ended(error.message)
        else:
            self._ended("")

    def _ended(self, fault: str) -> None:
        self.at, self.fault = utc_now(), fault
        self._ordered.clear()
        every_h = self._config.every_h
        self._next_s = time.monotonic() + every_h * 3600 if every_h is not None else float("inf")

    def causes(self) -> list[Cause]:
        """What is wrong with the station's networks."""
        if not self.fault:
            return []
        return [Cause(code="self_test_failed", severity="failure", thing=self._station, text=self.fault)]
