"""Between remote orders and the line that runs: what is wanted is tried beside it, then swapped in, or swapped back."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from typing import Protocol

from edge_inspector.broker import Broker
from edge_inspector.cameras import CameraState
from edge_inspector.config import Device, LineConfig
from edge_inspector.errors import InspectorError
from edge_inspector.inspector import Inspectors
from edge_inspector.messages import Cause
from edge_inspector.remote.configuration import Candidate, Configuration
from edge_inspector.runtime import Pool
from edge_inspector.station import Station
from edge_inspector.wiring import inspectors_of

log = logging.getLogger(__name__)


class RunningLine(Protocol):
    """The line as far as updates know it."""

    line: LineConfig
    broker: Broker
    stations: dict[str, Station]

    def swap(self, line: LineConfig, inspectors: Mapping[str, Inspectors]) -> None:
        """Judge by other recipes from the next part on."""
        ...


class Preparation:
    """Opens everything that a wanted configuration judges with, in a thread of its own, beside what runs."""

    def __init__(self, device: Device, candidate: Candidate, pools: dict[str, Pool], stop: threading.Event) -> None:
        """Begins at once. `stop` ends a build of engines."""
        self.candidate = candidate
        self.error: InspectorError | None = None
        self.inspectors: dict[str, Inspectors] = {}
        self._device, self._stop = device, stop
        self._pools = {name: pools.setdefault(name, Pool()) for name in candidate.line.stations}
        self._thread = threading.Thread(target=self._run, name="configuration-preparing", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether `error` or `inspectors` say how it ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        line = self.candidate.line
        try:
            for name, pool in self._pools.items():
                self.inspectors[name] = inspectors_of(self._device, line, name, pool, self._tell)
        except InspectorError as error:
            self.error = InspectorError(f"station {name}: {error.message}", hint=error.hint)
        except Exception as error:
            log.exception("preparing configuration version %d", line.version)
            self.error = InspectorError(f"{type(error).__name__}: {error}")

    def _tell(self, bundle: str, phase: str, step: int, steps: int) -> None:
        if self._stop.is_set():
            raise InspectorError(f"stopped while the engine of {bundle} was built ({phase}, {step} of {steps})")


class Updates:
    """Takes orders and puts them in force; outlives the lines it changes. Used from the daemon's main thread."""

    def __init__(self, device: Device, configuration: Configuration, pools: dict[str, Pool], stop: threading.Event) -> None:
        """`pools`: engines by station, shared with the lines."""
        self._device, self._configuration, self._pools, self._stop = device, configuration, pools, stop
        self._preparation: Preparation | None = None
        self._ready: dict[str, Mapping[str, Inspectors]] = {}
        """What judges, by hash of its configuration: of the one in force and the one that a rollback leads to."""
        self._unswept = False
        self._refused: list[Cause] = []

    def causes(self) -> list[Cause]:
        """What people should know of configurations."""
        return [*self._refused, *self._configuration.causes()]

    def read_file(self) -> bool:
        """Take line.yaml again; returns whether it is good."""
        try:
            self._configuration.read_file()
        except InspectorError as error:
            log.error("configuration refused, the old one stays in force: %s", error)
            self._refused = [
                Cause(code="configuration_refused", severity="maintenance_required", thing="line.yaml", text=str(error)[:500])
            ]
            return False
        self._refused, self._unswept = [], True
        return True

    def step(self, current: RunningLine, failures: set[str]) -> bool:
        """Do what is due; returns whether the line must be made anew to have the configuration that is to be in force."""
        configuration, connection = self._configuration, current.broker.connection
        while True:
            try:
                order = current.broker.orders.get_nowait()
            except queue.Empty:
                break
            configuration.take(current.broker.topics.within(order.topic)[1], order.payload)
            connection.acknowledge(order.ack)
        starting = _starting(current) if configuration.line is current.line else {"the configuration"}
        configuration.trials.tick(failures, connected=connection.connected.is_set(), starting=starting)
        self._prepare()
        anew = configuration.line is not current.line and not self._swapped(current, configuration.line)
        current.broker.retain(configuration.report(), "config", "reported")
        self._sweep(current)
        return anew

    def _prepare(self) -> None:
        done, wanted = self._preparation, self._configuration.candidate
        if done is None and wanted is not None:
            self._preparation = Preparation(self._device, wanted, self._pools, self._stop)
        elif done is not None and done.is_over:
            self._preparation, self._unswept = None, True
            self._ready[done.candidate.line.reference().hash] = done.inspectors
            self._configuration.prepared(done.candidate, done.error)

    def _swapped(self, current: RunningLine, line: LineConfig) -> bool:
        """Put a configuration in force between two parts, where only recipes differ; returns whether that could be done."""
        self._unswept = True
        judging = {name: station.inspectors for name, station in current.stations.items() if station.inspectors is not None}
        self._ready[current.line.reference().hash] = judging
        ready = self._ready.get(line.reference().hash, {})
        if line.stations != current.line.stations or set(ready) != set(line.stations):
            return False
        current.swap(line, ready)
        return True

    def _sweep(self, current: RunningLine) -> None:
        """Close engines that nothing can come back to."""
        settled = all(station.is_settled for station in current.stations.values())
        if not self._unswept or not settled or self._preparation is not None or self._configuration.trials.trial is not None:
            return
        self._unswept = False
        self._ready.clear()
        for name, pool in list(self._pools.items()):
            station = current.stations.get(name)
            if station is None or station.inspectors is None:
                del self._pools[name]
                pool.close()
            else:
                pool.keep(tuple(station.inspectors.engines.values()))


def _starting(current: RunningLine) -> set[str]:
    """Stations and cameras that are not there yet: nobody can say whether they work."""
    stations = {name for name, station in current.stations.items() if not station.is_settled}
    return stations | {
        f"{name}/{camera}"
        for name, station in current.stations.items()
        for camera, opened in station.cameras.items()
        if opened.state is CameraState.CONNECTING
    }
