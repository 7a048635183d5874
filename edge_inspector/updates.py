"""Between remote orders and the line that runs: what is wanted is tried beside it, then swapped in, or swapped back."""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from edge_inspector import health
from edge_inspector.attempts import Attempt, Preparation
from edge_inspector.broker import Broker
from edge_inspector.cameras import CameraState
from edge_inspector.config import Device, LineConfig
from edge_inspector.errors import EngineError, InspectorError
from edge_inspector.evidence import EvidenceStore
from edge_inspector.inspector import Inspectors
from edge_inspector.messages import Cause, PhaseFacts
from edge_inspector.mqtt import Message
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.configuration import Candidate, Configuration
from edge_inspector.remote.fetch import PATIENCE
from edge_inspector.remote.rollout import RATE_PARTS, Rollout, Wanted
from edge_inspector.runtime import Engine, Pool
from edge_inspector.shadow import Comparison, Shadow
from edge_inspector.station import Station
from edge_inspector.wiring import Setup, door_of, inspectors_of

log = logging.getLogger(__name__)

ABANDONED = 4
"""Attempts that nobody waits for any more, and that have not ended: with more nothing new is begun."""
_TIMED = 5
_ORDERS = 16
"""Taken at a time: the thread that takes them has to look after the line, too."""
_TIMEOUT_S = 120.0
"""A fetch may end so much later than its deadline."""


class RunningLine(Protocol):
    """The line as far as updates know it."""

    setup: Setup
    broker: Broker
    evidence: EvidenceStore
    stations: dict[str, Station]

    def swap(self, setup: Setup, inspectors: Mapping[str, Inspectors]) -> None:
        """Judge by other recipes or bundles from the next part on."""
        ...


class Updates:
    """Takes orders and puts them in force; outlives the lines it changes. Used from one thread at a time, but for `causes`."""

    def __init__(
        self, device: Device, configuration: Configuration, authority: Authority, pools: dict[str, Pool], stop: threading.Event
    ) -> None:
        """`pools`: engines by station, shared with the lines; `stop` ends what takes long."""
        self._device, self._configuration, self._authority = device, configuration, authority
        self._pools, self._stop = pools, stop
        self._rollouts: dict[str, Rollout] = {}
        self._fetches: dict[str, Attempt[None]] = {}
        """By bundle. What is fetched holds nobody up: it touches nothing that runs."""
        self._fetched: dict[str, Wanted] = {}
        """Releases that are here and verified, by bundle."""
        self._preparation: Preparation | None = None
        self._abandoned: list[Attempt[Any]] = []
        self._comparison: Comparison | None = None
        self._ready: dict[object, Mapping[str, Inspectors]] = {}
        """What judges, by its setup: of the one in force, one that is tried, and the one that a rollback leads to."""
        self._began: tuple[RunningLine | None, dict[str, tuple[int, int]]] = None, {}
        """Parts passed and failed by each station when the trial of a bundle began on this line."""
        self._listened = False
        self._heard: dict[str, int] = {}
        """By bundle: up to which release orders are taken, as the broker holds it."""
        self._unswept = False
        self._refused: list[Cause] = []

    @property
    def setup(self) -> Setup:
        """What must be in force."""
        return self._setup(self._configuration.line)

    def _setup(self, line: LineConfig, *, good: bool = False) -> Setup:
        rollouts = {name: self._rollout(name) for name in sorted(line.bundles)}
        found = {name: one.good_folder if good else one.folder for name, one in rollouts.items()}
        return Setup(line, {name: folder for name, folder in found.items() if folder is not None})

    def causes(self) -> list[Cause]:
        """What people should know of updates."""
        told = [cause for rollout in list(self._rollouts.values()) for cause in rollout.trials.causes()]
        return [*self._refused, *self._configuration.causes(), *told, *_open_to_all(self._device)]

    def failed(self, error: InspectorError) -> bool:
        """The line could not be started; returns whether there is another setup now."""
        return self._configuration.failed(error)

    def read_file(self) -> bool:
        """Take line.yaml again; returns whether it is in force then."""
        if self._configuration.is_remote:
            log.warning("line.yaml is not read: a remote configuration is in force (edge-inspector remote reset)")
            return False
        try:
            self._configuration.read_file()
        except InspectorError as error:
            log.error("configuration refused, the old one stays in force: %s", error)
            self._refused = [
                Cause(code="configuration_refused", severity="maintenance_required", thing="line.yaml", text=str(error)[:500])
            ]
            return False
        self._refused, self._unswept, self._comparison = [], True, None  # whose stations end; it begins anew
        return True

    def step(self, current: RunningLine, failures: set[str]) -> bool:
        """Do what is due; returns whether the line must be made anew to have the setup that is to be in force."""
        self._tick(current, failures)
        has_listened = self._listen(current)
        if has_listened:
            self._take_orders(current)
        self._prepare(current)
        self._compare(current)
        wanted = self.setup
        anew = not wanted.is_same(current.setup) and not self._swapped(current, wanted)
        if has_listened:
            self._report(current.broker)
        self._sweep(current)
        return anew

    def _listen(self, current: RunningLine) -> bool:
        """Take over what the broker holds of our own reports: our state folder may be an older copy, put back.

        Returns whether it was listened to long enough: no order is taken before, and no report of ours replaces it.
        """
        for levels, seen in current.broker.reported.copy().items():
            if levels[0] == "config":
                self._configuration.hear(seen)
            else:
                self._heard[levels[1]] = seen
        for name, rollout in self._rollouts.items():
            rollout.hear(self._heard.get(name, 0))
        self._listened = self._listened or current.broker.has_listened
        return self._listened

    def _report(self, broker: Broker) -> None:
        broker.retain(self._configuration.report(), "config", "reported")
        for name, rollout in list(self._rollouts.items()):
            if self._is_here(name) or not rollout.is_untouched:
                broker.retain(rollout.report(), "bundle", name, "reported")
            elif not self._is_wanted(name):
                broker.forget("bundle", name, "reported")
                del self._rollouts[name]

    def _is_here(self, bundle: str) -> bool:
        """Whether what is in force, or what a rollback leads to, judges with a bundle."""
        return bundle in self._configuration.line.bundles or bundle in self._configuration.good_line.bundles

    def _is_wanted(self, bundle: str) -> bool:
        candidate = self._configuration.candidate
        return candidate is not None and bundle in candidate.line.bundles

    # --- orders

    def _take_orders(self, current: RunningLine) -> None:
        for _ in range(_ORDERS):
            try:
                order = current.broker.orders.get_nowait()
            except queue.Empty:
                return
            try:
                self._take(current, order)
            except (ArithmeticError, TypeError, ValueError) as error:  # never die of a message: it would come again for ever
                log.exception("order on %s", order.topic)
                current.broker.refuse("", InspectorError(f"{order.topic}: {error}"))
            current.broker.connection.acknowledge(order.ack)

    def _take(self, current: RunningLine, order: Message) -> None:
        levels = current.broker.topics.within(order.topic)
        if levels[0] == "config":
            self._configuration.take(levels[1], order.payload, again=order.retain, busy=self._busy(self._configuration))
        elif self._is_here(levels[1]) or levels[1] in self._rollouts:
            rollout = self._rollout(levels[1])
            rollout.take(levels[2], order.payload, again=order.retain, busy=self._busy(rollout))
        else:
            known = ", ".join(sorted(current.setup.line.bundles))
            current.broker.refuse("", InspectorError(f"{order.topic}: no station judges with it; bundles here: {known}"))

    def _busy(self, me: Configuration | Rollout | None) -> str:
        """One thing is tried at a time: what fails is then known to be its fault."""
        others: list[Configuration | Rollout] = [self._configuration, *self._rollouts.values()]
        for other in others:
            if other is not me and self._is_tried(other):
                return f"{other.trials.what} is being tried: confirm or cancel that first"
        if len(self._abandoned) > ABANDONED:
            return f"{len(self._abandoned)} earlier attempts hang: restart the daemon, and look at its disks"
        return ""

    def _is_tried(self, one: Configuration | Rollout) -> bool:
        """Whether it could make something fail, which what is only being fetched cannot."""
        if one.trials.trial is not None or isinstance(one.candidate, Candidate):
            return True
        tried = [attempt.what for attempt in (self._preparation,) if attempt is not None]
        tried += [comparison.wanted for comparison in (self._comparison,) if comparison is not None]
        return any(one.candidate is what for what in tried)

    def _rollout(self, name: str) -> Rollout:
        if name not in self._rollouts:
            device, remote = self._device, self._device.config.remote
            self._rollouts[name] = Rollout(
                name, device.state / "bundles" / name, device.bundles / name, self._authority, trust=device.trust,
                ca_file=device.path(remote.ca_file), judge=door_of(device).judge_bundle,
            )  # fmt: skip
        return self._rollouts[name]

    # --- what is wanted, tried beside

    def _prepare(self, current: RunningLine) -> None:
        ended = [attempt for attempt in self._abandoned if attempt.is_over]
        if ended:  # what they left behind goes, too
            self._abandoned = [one for one in self._abandoned if one not in ended]
            self._unswept = True
        for rollout in list(self._rollouts.values()):
            self._fetch(rollout)
        done = self._preparation
        if done is None:
            self._begin(current)
        elif done.is_over or done.hangs or not self._is_wanted_still(done.what):
            self._preparation, self._unswept = None, True
            self._left(done)
            self._prepared(current, done)

    def _is_wanted_still(self, what: Candidate | Wanted) -> bool:
        if isinstance(what, Candidate):
            return self._configuration.candidate is what
        return self._rollout(what.order.bundle).candidate is what

    def _left(self, attempt: Attempt[Any]) -> None:
        """Wait no longer for what has not ended: one order never holds up another."""
        if not attempt.is_over:
            attempt.error = InspectorError("it did not end in time: something hangs", hint="see the log")
            self._abandoned.append(attempt)

    def _fetch(self, rollout: Rollout) -> None:
        """Bring a release here, beside everything else."""
        wanted, name, fetch = rollout.candidate, rollout.name, self._fetches.get(rollout.name)
        if fetch is not None and (fetch.is_over or fetch.hangs or fetch.what is not wanted):
            del self._fetches[name]
            self._left(fetch)
            self._arrived(rollout, fetch)
            return
        if fetch is not None or wanted is None or self._fetched.get(name) is wanted:
            return
        if not any(isinstance(o.what, Wanted) and o.what.folder == wanted.folder for o in self._abandoned):
            work = partial(self._brought, rollout, wanted)
            self._fetches[name] = Attempt(wanted, work, PATIENCE.total_s + _TIMEOUT_S)

    def _arrived(self, rollout: Rollout, fetch: Attempt[None]) -> None:
        if rollout.candidate is not fetch.what or not isinstance(fetch.what, Wanted):
            return  # cancelled meanwhile
        if fetch.error is None:
            self._fetched[rollout.name] = fetch.what
        else:
            self._unswept = True
            rollout.prepared(fetch.what, fetch.error)

    def _begin(self, current: RunningLine) -> None:
        candidate = self._configuration.candidate
        if candidate is not None:
            setup = self._setup(candidate.line)
            tell = partial(self._tell_stop, candidate)
            self._preparation = Preparation(candidate, setup, partial(self._opened, setup, tell))
            return
        for rollout in self._rollouts.values():
            wanted = rollout.candidate
            if wanted is None or self._fetched.get(rollout.name) is not wanted or self._comparison is not None:
                continue
            busy = self._busy(rollout)
            if busy:
                rollout.wait(busy)
                continue
            setup = current.setup.with_release(rollout.name, wanted.folder)
            self._preparation = Preparation(wanted, setup, partial(self._rolled_out, rollout, wanted, setup))
            return

    def _opened(self, setup: Setup, tell: Callable[[str, int, int], None]) -> dict[str, Inspectors]:
        """What each station would judge with; in the thread that prepares."""
        made = {}
        for name in setup.line.stations:
            try:
                pool = self._pools.setdefault(name, Pool())
                made[name] = inspectors_of(self._device, setup, name, pool, lambda _, *phase: tell(*phase))
            except InspectorError as error:
                raise InspectorError(f"station {name}: {error.message}", hint=error.hint) from error
        return made

    def _brought(self, rollout: Rollout, wanted: Wanted) -> None:
        """A release fetched and verified; in a thread of its own."""
        rollout.fetched(wanted, partial(self._tell, rollout, wanted), clock_ok=health.clock().ok)

    def _tell(self, rollout: Rollout, wanted: Wanted, phase: str, done: int, total: int) -> None:
        if self._stop.is_set() or rollout.candidate is not wanted:
            raise InspectorError("ended while it was tried")
        rollout.phase = PhaseFacts(name=phase, done=done, total=total)

    def _rolled_out(self, rollout: Rollout, wanted: Wanted, setup: Setup) -> dict[str, Inspectors]:
        """A release that is here: built, its samples judged and timed; in the thread that prepares."""
        tell = partial(self._tell, rollout, wanted)
        tell("build", 0, 1)
        made = self._opened(setup, tell)
        tell("samples", 1, 1)
        for name, station in setup.line.stations.items():
            if rollout.name in made[name].engines:
                _refuse_late(made[name].engines[rollout.name], name, station.expires_ms)
        return made

    def _tell_stop(self, candidate: Candidate, phase: str, step: int, steps: int) -> None:
        if self._stop.is_set() or self._configuration.candidate is not candidate:
            raise InspectorError(f"stopped during {phase}, {step} of {steps}")

    def _prepared(self, current: RunningLine, done: Preparation) -> None:
        if done.made is not None:
            self._ready[done.setup.key] = done.made
        if isinstance(done.what, Candidate):
            broken = {name: made.promise for name, made in (done.made or {}).items() if made.promise}
            promise = "; ".join(f"station {name}: {why}" for name, why in broken.items())
            self._configuration.prepared(done.what, done.error, promise)
            return
        rollout = self._rollout(done.what.order.bundle)
        if rollout.candidate is not done.what:
            return  # cancelled meanwhile
        if done.error is not None:
            rollout.prepared(done.what, done.error)
            return
        if not done.setup.is_same(current.setup.with_release(rollout.name, done.what.folder)):
            return  # line.yaml was read anew meanwhile: it begins again
        if not done.what.order.shadow_parts:
            rollout.prepared(done.what, None)
            return
        judging = {name: made for name, made in (done.made or {}).items() if rollout.name in made.engines}
        shadows = {name: Shadow(made, current.evidence) for name, made in judging.items()}
        for name, shadow in shadows.items():
            current.stations[name].shadow = shadow
        self._comparison = Comparison(rollout, done.what, shadows)

    def _compare(self, current: RunningLine) -> None:
        """Look at what judges beside the release in force."""
        comparison = self._comparison
        if comparison is None:
            return
        rollout, wanted = comparison.rollout, comparison.wanted
        cancelled = rollout.candidate is not wanted
        if not cancelled:
            rollout.shadow, rollout.phase = comparison.facts(), comparison.phase()
        if cancelled or comparison.is_over:
            self._comparison, self._unswept = None, True
            for station in current.stations.values():
                station.shadow = None
            rollout.prepared(wanted, comparison.fault())

    # --- on trial

    def _tick(self, current: RunningLine, failures: set[str]) -> None:
        """Tell all trials what fails, and confirm a bundle by itself where that was asked for."""
        connected = current.broker.connection.connected.is_set()
        starting = _starting(current) if self.setup.is_same(current.setup) else {"the new setup"}
        self._configuration.trials.tick(failures, connected=connected, starting=starting)
        for rollout in self._rollouts.values():
            order = rollout.order
            passed, failed = self._judged(current, rollout.name)
            parts, own = passed + failed, set[str]()
            if order is not None and parts >= RATE_PARTS and failed > order.max_fails * parts:
                own = {f"{failed} of {parts} parts fail"}
            rollout.trials.tick(failures | own, connected=connected, starting=starting)
            trial = rollout.trials.trial
            if order is None or trial is None:
                continue
            if order.confirm_parts and parts >= order.confirm_parts and rollout.trials.is_sound:
                with suppress(InspectorError):  # no room to write it down: again at the next look
                    rollout.trials.commit("device", trial, f"by itself, after {parts} parts of which {failed} failed")

    def _judged(self, current: RunningLine, bundle: str) -> tuple[int, int]:
        """Parts passed and failed by stations that judge with a bundle, since its trial began or the line was made anew."""
        line, before = self._began
        sums = [0, 0]
        for name, station in current.stations.items():
            if station.inspectors is not None and bundle in station.inspectors.engines:
                passed, failed = before.get(name, (0, 0)) if line is current else (0, 0)
                sums[0] += station.counts.passed - passed
                sums[1] += station.counts.failed - failed
        return sums[0], sums[1]

    # --- in force

    def _swapped(self, current: RunningLine, wanted: Setup) -> bool:
        """Put a setup in force between two parts, where stations stay as they are; returns whether that could be done."""
        self._unswept = True
        if all(station.is_settled for station in current.stations.values()):
            judging = {name: station.inspectors for name, station in current.stations.items()}
            self._ready[current.setup.key] = {name: made for name, made in judging.items() if made is not None}
        ready = self._ready.get(wanted.key, {})
        if wanted.line.stations != current.setup.line.stations or set(ready) != set(wanted.line.stations):
            return False
        self._began = current, {name: (s.counts.passed, s.counts.failed) for name, s in current.stations.items()}
        current.swap(wanted, ready)
        return True

    def _sweep(self, current: RunningLine) -> None:
        """Close engines, and remove releases, that nothing can come back to."""
        trying = self._preparation is not None or self._comparison is not None
        if trying or not self._unswept or not all(station.is_settled for station in current.stations.values()):
            return
        self._unswept = False
        good = self._setup(self._configuration.good_line, good=True)
        self._ready = {key: made for key, made in self._ready.items() if key in (good.key, self.setup.key)}
        for name, pool in list(self._pools.items()):
            station = current.stations.get(name)
            judging = [*(made[name] for made in self._ready.values() if name in made)]
            judging += [station.inspectors] if station is not None and station.inspectors is not None else []
            pool.keep([engine for made in judging for engine in made.engines.values()])
            if station is None and not judging:
                del self._pools[name]
        for rollout in self._rollouts.values():
            rollout.tidy()

    def forget(self) -> None:
        """An engine is stuck: none of those that are open is to be swapped in."""
        self._ready.clear()


def _starting(current: RunningLine) -> set[str]:
    """Stations and cameras that are not there yet: nobody can say whether they work."""
    stations = {name for name, station in current.stations.items() if not station.is_settled}
    return stations | {
        f"{name}/{camera}"
        for name, station in current.stations.items()
        for camera, opened in station.cameras.items()
        if opened.state is CameraState.CONNECTING or (station.config.trigger == "free" and not opened.has_delivered)
    }


def _refuse_late(engine: Engine, station: str, expires_ms: int) -> None:
    """A network that takes half of the time that a verdict has would make parts late. Raises EngineError."""
    times = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        engine()
        times.append((time.perf_counter() - began) * 1e3)
    needed_ms = statistics.median(times)
    if needed_ms > expires_ms / 2:
        raise EngineError(
            f"its network takes {needed_ms:.0f} ms here; at station {station} a verdict may take {expires_ms} ms in all",
            hint="train a smaller one: train --latency-ms",
        )


def _open_to_all(device: Device) -> list[Cause]:
    if device.config.remote.require_signature:
        return []
    text = "remote.require_signature is false: whoever may publish at the broker changes this line and commands it"
    return [Cause(code="unsigned_orders", severity="maintenance_required", thing="device.yaml", text=text)]
