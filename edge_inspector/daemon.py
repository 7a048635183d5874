"""The daemon: everything wired on one ExitStack, entered in order, left in reverse."""

from __future__ import annotations

import fcntl
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from types import TracebackType

from pydantic import BaseModel

from edge_inspector import confinement, health, messages, systemd
from edge_inspector.access import EVIDENCE, access_of, private
from edge_inspector.broker import ALERT_EXPIRES_S, Broker
from edge_inspector.cameras import Camera, is_isolated, open_source
from edge_inspector.config import Device, LineConfig, StationConfig, load_line
from edge_inspector.errors import EngineLost, InspectorError
from edge_inspector.evidence import EvidenceStore
from edge_inspector.frames import utc_now
from edge_inspector.handshake import Handshake
from edge_inspector.inspector import Inspectors
from edge_inspector.messages import Alert, CameraFacts, Cause, HealthMessage, Ready, StateMessage
from edge_inspector.metrics import Metrics, Reading
from edge_inspector.mqtt import Will
from edge_inspector.outbox import Outbox
from edge_inspector.outputs import Outputs
from edge_inspector.recorder import Voice
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.commands import Commands
from edge_inspector.remote.configuration import Configuration
from edge_inspector.runtime import Pool
from edge_inspector.setting import Setting
from edge_inspector.standing import Orders
from edge_inspector.station import Station
from edge_inspector.threads import Thread
from edge_inspector.updates import Updates
from edge_inspector.wiring import (
    Setup,
    client_id,
    connection_of,
    door_of,
    inspectors_of,
    provenance_of,
    refusals,
    topics_of,
)  # fmt: skip

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""A critical loop that has not ticked for so long hangs; systemd's WatchdogSec must be longer."""
HEALTH_EVERY_S = 10.0
"""Health is published when its reasons change, and this often for its counters."""
_LOOK_S = 0.5
_WAKE_S = 0.05
_STEP_S = 10.0
"""A step of updates that takes longer is told; at the end it is not waited for any longer."""
_APART_S = 10.0
"""One connection to the broker may stand so much earlier than the other: their attempts are up to 7.5 s apart."""


def _facts(camera: Camera) -> CameraFacts:
    return CameraFacts.model_validate({"state": camera.state.value, **asdict(camera.counts)})


@dataclass
class _Alarms:
    """Turns causes that come and go into alerts raised and cleared."""

    broker: Broker
    stations: Mapping[str, Station]
    open: dict[tuple[str, str], Cause] = field(default_factory=dict)

    def update(self, causes: list[Cause]) -> None:
        now = {(cause.thing, cause.code): cause for cause in causes}
        for key in now.keys() - self.open.keys():
            self._tell(now[key], "raised")
        for key in self.open.keys() - now.keys():
            self._tell(self.open[key], "cleared")
        self.open = now

    def _tell(self, cause: Cause, change: str) -> None:
        station = cause.thing.split("/")[0]
        at = utc_now()
        self.broker.alert(
            Alert.model_validate({
                "schema": "ei.alert.v1", "station": station if station in self.stations else "device", "change": change,
                "code": cause.code, "severity": cause.severity, "text": f"{cause.thing}: {cause.text}", "at": at,
                "expires_at": at + timedelta(seconds=ALERT_EXPIRES_S),
            })
        )  # fmt: skip


class _Line:
    """One line configuration in force: its stations, broker and outbox, from start to stop or reload."""

    def __init__(
        self, device: Device, setup: Setup, stack: ExitStack, pools: dict[str, Pool], orders: Orders, authority: Authority
    ) -> None:
        self.device, self.setup, self._orders = device, setup, orders
        line = setup.line
        orders.use(line.stations)
        self._door = door_of(device)
        shutil.rmtree(device.camera_folders, ignore_errors=True)  # what a crash left of cameras' processes
        self._pools = pools
        self.session = secrets.token_hex(4)
        self.watchdog = systemd.Watchdog(PATIENCE_S)
        self._clock = health.clock()
        self._told: object = None
        self._ready: set[str] = set()
        """Stations that are, as was logged."""
        self._health: HealthMessage | None = None
        self._told_s = 0.0
        self._together_s = time.monotonic()
        topics = topics_of(device)
        runtimes = dict.fromkeys(("onnxruntime", device.config.engine.runtime))
        self._state = StateMessage(
            online=True, session=self.session, at=utc_now(), version=version("edge-inspector"),
            capabilities=tuple(runtimes), configuration_version=line.version, stations=tuple(line.stations),
        )  # fmt: skip
        offline = StateMessage(online=False, session=self.session)
        storage = device.config.storage
        self.outbox = Outbox(device.state, line.stations, quota_mb=storage.results_mb, tick=self.watchdog.loop("outbox"))
        self.evidence = EvidenceStore(
            device.state / EVIDENCE, storage.evidence_mb, storage.evidence_passed, access_of(storage.evidence_group)
        )
        client = client_id(device)
        will = Will(topics.of("state"), messages.encode(offline))
        self.connection = connection_of(device, client, Broker.subscriptions(topics), will)
        gone = self._gone(list(line.stations))
        heard = connection_of(device, f"{client}.handshake", Handshake.subscriptions(topics), gone)
        self._heard = heard
        self.provenance = provenance_of(device, f"{client}.heads", self.outbox, self.connection)
        metrics = device.config.metrics
        self.metrics = Metrics(metrics, self._reading) if metrics is not None else None
        self.outputs = {name: Outputs(name, config) for name, config in device.config.outputs.items() if name in line.stations}
        self.stations = {name: Station(name, config, self._setting(name, config)) for name, config in line.stations.items()}
        self.broker = Broker(
            self.connection, topics, self.outbox, self.stations, Commands(authority, self.session),
            tick=self.watchdog.loop("broker"), hears=lambda: heard.hearing, proven=self.provenance.proven,
        )  # fmt: skip
        self.handshake = Handshake(
            heard, topics, self.outbox, self.stations, self.broker.refuse, tick=self.watchdog.loop("handshake")
        )
        self.alarms = _Alarms(self.broker, self.stations)
        self._begin(stack, offline)
        self._warn_of_early_pulses()

    def _begin(self, stack: ExitStack, offline: StateMessage) -> None:
        """Start everything; what is started last ends first."""
        for output in self.outputs.values():
            stack.enter_context(output)
        parts = (
            self.outbox, self.evidence, self._heard, self.connection, self.provenance, self.handshake, self.broker,
            self.metrics,
        )  # fmt: skip
        for part in parts:
            if part is not None:
                stack.enter_context(part)
        stack.callback(self.broker.retain, offline, "state")
        self.broker.retain(self._state, "state")
        for station in self.stations.values():
            station.voice = Voice(self.handshake.verdict, self._retain)
            station.announce()
            stack.enter_context(station)
        for station in self.stations.values():
            stack.callback(station.stop_soon)

    def _gone(self, stations: list[str]) -> Will | None:
        """What the broker tells of readiness when the device vanishes. A connection has one will: of several stations
        their users read `state` too.
        """
        if len(stations) != 1:
            return None
        ready = Ready(
            station=stations[0], ready=False, state="preoperational", reason="the device is gone", session=self.session
        )
        return Will(topics_of(self.device).of("ready", stations[0]), messages.encode(ready))

    def _hindrance(self, config: StationConfig) -> str:
        """Why parts of a station would not be told of: what it needs of the broker and is refused."""
        needs_triggers = config.trigger == "software" or (config.trigger == "hardware" and config.hardware.announced)
        deafness = self._heard.deafness
        return f"triggers are not heard: {deafness}" if needs_triggers and deafness else ""

    def _retain(self, message: BaseModel, *levels: str) -> None:
        """Tell what a station says, and log when it becomes ready, or no longer is."""
        if isinstance(message, Ready):
            self._log_ready(levels[-1], message)
        self.broker.retain(message, *levels)

    def _log_ready(self, station: str, told: Ready) -> None:
        is_ready = not told.reason  # one that is busy is ready for the next part, unless something hinders it
        if is_ready and station not in self._ready:
            self._ready.add(station)
            log.info("ready: %s", station)
        elif not is_ready and station in self._ready:
            self._ready.discard(station)
            log.info("no longer ready: %s: %s", station, told.reason)

    def _setting(self, name: str, config: StationConfig) -> Setting:
        return Setting(
            outbox=self.outbox, evidence=self.evidence, configuration=self.setup.line.reference(), session=self.session,
            make_source=lambda camera: open_source(
                config.cameras[camera], self._door.admit, self.device.camera_folders / f"{name}-{camera}", self.device.cache
            ),
            inspectors=partial(inspectors_of, self.device, self.setup, name, self._pools.setdefault(name, Pool())),
            clock_ok=lambda: self._clock.ok, numbers_stay=self.provenance.proven,
            watch=self.watchdog.loop, forget=self.watchdog.forget, orders=self._orders,
            hindrance=partial(self._hindrance, config), output=self.outputs.get(name), metrics=self.metrics,
        )  # fmt: skip

    def swap(self, setup: Setup, inspectors: Mapping[str, Inspectors]) -> None:
        """Judge by other recipes or bundles from the next part on; stations and cameras stay as they are."""
        self.setup = setup
        for name, station in self.stations.items():
            station.swap(inspectors[name])

    def look(self, extra: list[Cause]) -> set[str]:
        """Ping systemd, tell health and alarms; returns what fails. Raises the failure of any thread that ended."""
        outputs, stations = self.outputs.values(), self.stations.values()
        for failure in (
            self.outbox.failure,
            self.broker.failure,
            self.handshake.failure,
            *(o.failure for o in outputs),
            *(s.failure for s in stations),
        ):
            if isinstance(failure, EngineLost):
                raise failure
            if failure is not None:
                raise InspectorError(f"a thread ended: {failure}", hint="see the log above") from failure
        hanging = self.watchdog.ping()
        for name, output in self.outputs.items():
            if not hanging and not self.stations[name].hindrance:
                output.alive()
        self._orders.retry()
        causes = [
            *extra,
            *self._orders.causes(),
            *(self.metrics.causes() if self.metrics else ()),
            *health.storage_causes(self.outbox.counts, self.device.state),
            *self.provenance.causes(),
            *self.evidence.causes(),
        ]
        causes += [cause for station in stations for cause in station.causes()]
        causes += [
            Cause(
                code="output_unused",
                severity="failure",
                thing=name,
                text="device.yaml has outputs for it, line.yaml no station",
            )
            for name in sorted(set(self.device.config.outputs) - set(self.stations))
        ]
        causes += self._handshake_causes()
        causes += _unconfined(self.setup.line)
        causes += [Cause(code="hanging", severity="failure", thing=name, text="does not answer") for name in hanging]
        failing = {f"{cause.thing}: {cause.code}" for cause in causes if cause.severity == "failure"}
        causes += health.broker_causes(self.connection, "device")
        causes += health.broker_causes(self.handshake.connection, "device/handshake")
        self._clock = health.clock()
        self.alarms.update(causes)
        cameras = {f"{s.name}/{name}": _facts(camera) for s in stations for name, camera in s.cameras.items()}
        dropped = self.broker.refused + self.connection.dropped + self.handshake.connection.dropped
        told = self._health = health.assess(causes, self.outbox.counts, self._clock, dropped, cameras)
        news = (told.status, [(cause.severity, cause.code, cause.thing) for cause in told.reasons])  # texts hold figures
        if news != self._told or time.monotonic() - self._told_s > HEALTH_EVERY_S:
            self._told, self._told_s = news, time.monotonic()
            self.broker.retain(told, "health")
        engines = {name: told for station in self.stations.values() for name, told in station.engines.items()}
        news_of_state = {"engines": engines, "configuration_version": self.setup.line.version}
        if any(getattr(self._state, key) != value for key, value in news_of_state.items()):
            self._state = self._state.model_copy(update=news_of_state)
            self.broker.retain(self._state, "state")
        systemd.notify(f"STATUS={self.summary()}")
        return failing

    def _handshake_causes(self) -> list[Cause]:
        """What is wrong where one connection to the broker stands, and the other does not."""
        if not (self.connection.connected.is_set() and self._heard.refusal):
            self._together_s = time.monotonic()
        elif time.monotonic() - self._together_s > _APART_S:
            text = f"no trigger is heard and no verdict told: {self._heard.refusal}"
            return [Cause(code="no_handshake", severity="failure", thing="device", text=text)]
        return []

    def _reading(self) -> Reading | None:
        """For whoever scrapes (its thread)."""
        if self._health is None:
            return None
        return Reading(
            self._health, self._state, {name: station.trends for name, station in self.stations.items()},
            dict(self.evidence.used), self.evidence.dropped, self.evidence.lost,
            self._refusal() is None, self.connection.reconnects,
            shutil.disk_usage(self.device.state).free, self.watchdog.silent_s(),
        )  # fmt: skip

    def _refusal(self) -> str | None:
        """Why not both connections to the broker stand; None where they do."""
        connections = (self.connection, self.handshake.connection)
        return next((connection.refusal for connection in connections if not connection.connected.is_set()), None)

    def _warn_of_early_pulses(self) -> None:
        for name in self.outputs:
            for pulse in self.device.config.outputs[name].early(self.setup.line.stations[name].expires_ms):
                log.warning(
                    "outputs %s: verdicts may take longer than the delay of line %d: their part has passed", name, pulse.line
                )

    def summary(self) -> str:
        """One line for `systemctl status`."""
        parts = [
            f"{name}: {s.counts.passed} pass, {s.counts.failed} fail, {s.counts.undecided} undecided"
            for name, s in self.stations.items()
        ]
        refusal = self._refusal()
        broker = "connected" if refusal is None else f"no broker ({refusal})"
        return "; ".join([*parts, broker, f"{self.outbox.counts.pending} results to send"])


def _unconfined(line: LineConfig) -> Iterator[Cause]:
    """Where the kernel puts no walls around cameras' processes."""
    isolated = [camera for station in line.stations.values() for camera in station.cameras.values() if is_isolated(camera)]
    if isolated and not confinement.version():
        text = f"{confinement.MISSING}: the processes of {len(isolated)} cameras may write whatever the daemon may"
        yield Cause(code="cameras_unconfined", severity="maintenance_required", thing="device", text=text)


@contextmanager
def _alone(device: Device) -> Iterator[None]:
    """Hold the state folder's lock. Raises InspectorError while another daemon holds it."""
    with ExitStack() as stack:
        try:
            device.state.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((device.state / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InspectorError(
                f"{device.state}: another edge-inspector runs on this state folder", hint="stop it first: systemctl status"
            ) from error
        except OSError as error:
            hint = "check the state folder's permissions"
            raise InspectorError(f"{device.state}: {error.strerror}", hint=hint) from error
        yield


def run(
    device: Device,
    stop: threading.Event,
    reload: threading.Event,
    *,
    on_ready: Callable[[LineConfig], None] = lambda _: None,
    until_ended: bool = False,
) -> None:
    """Run the line until `stop` is set; `reload` makes it read line.yaml again. Blocks.

    `until_ended`: stop by itself once every station has judged its recording. Raises InspectorError.
    """
    access = access_of(device.config.storage.evidence_group)
    with private(device.state, access), _alone(device), _pools() as pools:
        authority = Authority.of(device)
        configuration = Configuration(
            device.state / "configuration.json", partial(load_line, device.line_file), authority,
            refusals=partial(refusals, door_of(device)),
        )  # fmt: skip
        updates = Updates(device, configuration, authority, pools, stop)
        orders = Orders(device.state / "orders.json")
        while not stop.is_set():
            with ExitStack() as stack:
                try:
                    current = _Line(device, updates.setup, stack, pools, orders, authority)
                except InspectorError as error:
                    if updates.failed(error):
                        continue
                    raise
                systemd.notify("READY=1")
                on_ready(current.setup.line)
                goes_on = _serve(current, updates, stop, reload, until_ended=until_ended)
                systemd.notify("RELOADING=1" if goes_on else "STOPPING=1")
            for name, station in current.stations.items():
                if station.is_stuck:  # in an engine: that one is not used again, nor closed
                    del pools[name]
                    updates.forget()
            if not goes_on:
                return


@contextmanager
def _pools() -> Iterator[dict[str, Pool]]:
    pools: dict[str, Pool] = {}
    try:
        yield pools
    finally:
        for pool in pools.values():
            pool.close()


class _Updating:
    """Looks after remote orders beside the line: their slow file work keeps no heartbeat waiting."""

    def __init__(self, updates: Updates, current: _Line, reload: threading.Event) -> None:
        """Works between `__enter__` and `__exit__`, one step for each `look`."""
        self.failure: Exception | None = None
        self._updates, self._current, self._reload = updates, current, reload
        self._failures: set[str] = set()
        self._due, self._closing = threading.Event(), threading.Event()
        self._began_s: float | None = None
        self._thread = Thread(target=self._run, name="updates", daemon=True)

    def __enter__(self) -> _Updating:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End; a step that hangs is not waited for."""
        self._closing.set()
        self._due.set()
        end = time.monotonic() + _STEP_S
        while self._thread.is_alive() and time.monotonic() < end:
            self._current.watchdog.ping()
            self._thread.join(_LOOK_S)

    @property
    def is_over(self) -> bool:
        """Whether the line must be made anew, or `failure` says why updates have ended."""
        return not self._thread.is_alive()

    def waited(self, stop: threading.Event) -> bool:
        """Until the next look, or the end of updates: what is in force has changed then. True: it is to stop."""
        end = time.monotonic() + _LOOK_S
        while not stop.wait(_WAKE_S):
            if self.is_over or time.monotonic() > end:
                return False
        return True

    def raise_failure(self) -> None:
        """Raise what has ended updates."""
        if self.failure is not None:
            raise self.failure

    def look(self, failures: set[str]) -> None:
        """Make a step, knowing what fails now."""
        self._failures = failures
        self._due.set()

    def causes(self) -> list[Cause]:
        """What people should know of updates."""
        causes, began_s = self._updates.causes(), self._began_s
        if began_s is not None and time.monotonic() - began_s > _STEP_S:
            text = f"remote orders wait for {self._current.device.state}: its disk does not answer"
            causes.append(Cause(code="updates_hang", severity="failure", thing="device", text=text))
        return causes

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._due.wait()
                self._due.clear()
                self._began_s = time.monotonic()
                if not self._closing.is_set() and self._step():
                    return
                self._began_s = None
        except Exception as error:
            log.exception("remote orders")
            self.failure = error

    def _step(self) -> bool:
        if self._reload.is_set():
            self._reload.clear()
            if self._updates.read_file():
                return True
        return self._updates.step(self._current, self._failures)


def _serve(current: _Line, updates: Updates, stop: threading.Event, reload: threading.Event, *, until_ended: bool) -> bool:
    """Look after a line until it ends; returns whether to go on with another configuration."""
    with _Updating(updates, current, reload) as updating:
        while not updating.waited(stop):
            if updating.is_over:
                updating.raise_failure()
                return True
            updating.look(current.look(updating.causes()))
            if until_ended and all(station.ended.is_set() for station in current.stations.values()):
                return False
    return False
