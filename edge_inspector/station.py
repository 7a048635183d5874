"""One station: trigger -> frames -> inspector -> verdict -> outbox. States follow OPC 40100-1.

What must never be: a part that passes without a record on disk, a trigger without a result, a verdict after its expiry.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count, islice
from types import TracebackType

from edge_inspector.cameras import Camera, CameraState
from edge_inspector.config import StationConfig
from edge_inspector.errors import CameraEnded, EngineLost, InspectorError
from edge_inspector.frames import Coming, Frame, Trigger, utc_now
from edge_inspector.imaging import Imaging
from edge_inspector.inspector import Inspection, Inspectors
from edge_inspector.matching import Matcher, Part
from edge_inspector.messages import Cause, EngineState
from edge_inspector.readiness import Readiness
from edge_inspector.recorder import RecordCounts, Recorder, Voice
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.selftest import SelfTest
from edge_inspector.setting import Setting
from edge_inspector.shadow import Shadow
from edge_inspector.standing import DOUBT
from edge_inspector.threads import Thread
from edge_inspector.trends import Trends

log = logging.getLogger(__name__)

QUEUE = 256
"""Journalled triggers that wait; more are `undecided: overload` at once."""
LOST_TOLD = 64
"""Parts lost in one go of a free-running camera that get a result each."""
_WAIT_S = 0.25
_MATCH_WAIT_S = 0.01
"""An image that is missing becomes known by time, not by an event."""
_BUILDING_EVERY_S = 1.0
_PARKED_S = 60.0
"""The daemon has left long before."""


class Station:
    """Runs one station in a thread of its own. Use as a context manager."""

    def __init__(self, name: str, config: StationConfig, setting: Setting) -> None:
        """Nothing is opened before `__enter__`; verdicts go nowhere before `voice` is set."""
        self.name, self.config, self.setting = name, config, setting
        self.expires_ms = config.expires_ms
        self.failure: Exception | None = None
        self.ended = threading.Event()
        """Set once a recording has been judged to its end."""
        self.inspectors: Inspectors | None = None
        """What judges, once the station is ready."""
        self.shadow: Shadow | None = None
        """What judges each part a second time, for comparison."""
        self.is_stuck = False
        """Whether its thread did not end when it was left."""
        self.coming = Coming()
        """Triggers received for it and not offered yet."""
        self._imaging = Imaging(config, self._next_trigger_s, self._goes_on)
        self.cameras = self._imaging.cameras
        self._triggers: queue.Queue[Trigger] = queue.Queue(QUEUE)
        self._matcher = Matcher.of(config) if config.trigger == "hardware" else None
        self._orders = setting.orders
        self._self_test = SelfTest(name, config.self_test, self._orders.of(name).doubt)
        self._readiness = Readiness(
            name, config, setting, self.cameras, self._self_test, lambda: self._recorder.promise, lambda: self._recorder.finds
        )
        self._wake = threading.Event()
        self._wanted: Inspectors | None = None
        self._building_told_s = 0.0
        self._telling = threading.Lock()
        self._tick: Callable[[], None] = lambda: None
        self._free_ids = count(1)
        self._closing = threading.Event()
        self._recorder = Recorder(name, config, setting, simulated=lambda: self._imaging.simulated, held_up=self._held_up)
        self._stack = ExitStack()
        self._thread = Thread(target=self._run, name=f"station-{name}", daemon=True)

    def __enter__(self) -> Station:
        """Start cameras and the station's thread; returns at once. Networks are loaded in that thread."""
        on_demand = self.config.trigger == "software"
        for name, camera in self.config.cameras.items():
            make = partial(self.setting.make_source, name)
            self.cameras[name] = self._stack.enter_context(
                Camera(f"{self.name}-{name}", camera, make, on_demand=on_demand, on_frame=self._wake.set)
            )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the part at hand, then stop; triggers that still wait become undecided at the next start."""
        self._closing.set()
        self._thread.join(2.0)
        self.is_stuck = self._thread.is_alive()
        self._become("preoperational", "stopped")
        self.setting.forget(self._thread.name)
        self._stack.close()

    def stop_soon(self) -> None:
        """Begin to end, without waiting: stations and cameras then end side by side."""
        self._closing.set()
        for camera in self.cameras.values():
            camera.stop_soon()

    @property
    def voice(self) -> Voice | None:
        """Where verdicts and readiness go."""
        return self._recorder.voice

    @voice.setter
    def voice(self, voice: Voice) -> None:
        self._recorder.voice = voice

    @property
    def trends(self) -> Trends:
        """What its parts say together."""
        return self._recorder.trends

    @property
    def counts(self) -> RecordCounts:
        """Results since the start."""
        return self._recorder.counts

    # --- for the daemon

    def swap(self, inspectors: Inspectors) -> None:
        """Judge with these from the next part on; `inspectors` tells when that is so."""
        self._wanted = inspectors
        self._wake.set()

    @property
    def is_settled(self) -> bool:
        """Whether it judges with what it was given last."""
        return self._wanted is None and (self.inspectors is not None or self._readiness.state == "error")

    @property
    def engines(self) -> dict[str, EngineState]:
        """What runs each bundle, once the station is ready."""
        return self.inspectors.states if self.inspectors is not None else {}

    # --- for the broker

    def offer(self, trigger: Trigger) -> None:
        """Take a journalled trigger; never blocks."""
        if trigger.fault:
            self._undecided(trigger, Reason.INVALID_TRIGGER, trigger.fault)
        elif self.config.trigger == "free" or (self._matcher is not None and not self._matcher.announced):
            self._undecided(trigger, Reason.NOT_READY, "parts of this station are not told of: it finds them itself")
        elif self._readiness.is_building:  # for minutes: longer than any trigger is worth something
            self._undecided(trigger, Reason.NOT_READY, self.hindrance)
        else:
            self._queue(trigger)

    def _queue(self, trigger: Trigger) -> None:
        try:
            self._triggers.put_nowait(trigger)
            self._wake.set()
        except queue.Full:
            self._undecided(trigger, Reason.OVERLOAD, f"{QUEUE} triggers wait already")

    def reused(self, trigger: Trigger, result: Result) -> None:
        """A trigger came whose id is another part's: its record is stored already, its verdict is told here. Never blocks."""
        self._recorder.reused(trigger, result)

    def command(self, name: str, product: str | None) -> None:
        """`select-product`, `halt`, `start` or `self-test`; when this returns it outlives a restart. Raises InspectorError."""
        if name == "halt":
            self._orders.insist(self.name, halted=True)
        elif name == "start":
            self._orders.change(self.name, halted=False)
        elif name == "self-test":
            if self.inspectors is None:
                raise InspectorError(f"station {self.name}: its networks are not open: {self._readiness.why}")
            self._self_test.order()
        elif name == "select-product":
            if product not in self.config.products:
                raise InspectorError(
                    f"station {self.name}: no product {product!r}", hint=f"allowed: {', '.join(self.config.products)}"
                )
            self._orders.change(self.name, product=product, lost="")
        else:
            raise InspectorError(f"no command {name!r}", hint="allowed: select-product, halt, start, self-test")
        log.info("station %s: %s %s by command", self.name, name, product or "")
        self._tell_ready()

    @property
    def hindrance(self) -> str:
        """Why a part that comes now would not be judged; empty: it would be."""
        return self._readiness.hindrance

    def causes(self) -> list[Cause]:
        """What is wrong here."""
        causes = self._readiness.causes()
        for bundle, engine in self.engines.items():
            if engine.instead:
                text = f"runs on {engine.runtime}: {engine.instead}"
                causes.append(Cause(code="engine_fallback", severity="off_spec", thing=f"{self.name}/{bundle}", text=text))
        for name, camera in self.cameras.items():
            if camera.state is CameraState.FAULT:
                thing = f"{self.name}/{name}"
                causes.append(Cause(code="camera_fault", severity="failure", thing=thing, text=camera.fault))
            if camera.frozen:
                thing = f"{self.name}/{name}"
                causes.append(Cause(code="camera_frozen", severity="failure", thing=thing, text=camera.frozen))
        causes += [*self._recorder.causes(), *self._self_test.causes()]
        if self._matcher is not None:
            causes += self._matcher.causes(self.name, time.monotonic())
        if self.setting.output is not None:
            causes += self.setting.output.causes()
        return causes

    # --- the thread

    def _run(self) -> None:
        try:
            self._prepare()
            self._tick = self.setting.watch(self._thread.name)
            while self._goes_on():
                self._between_parts()
                if self._matcher is not None:
                    self._matched_parts(self._matcher)
                elif self.config.trigger == "free" and not self._readiness.standstill:
                    self._free_part()
                else:
                    self._triggered_part()
            if self._matcher is not None and not self._matcher.announced:  # the others are in the journal
                for part in self._matcher.due(float("inf"), float("inf")):
                    trigger = self._free_trigger(next(iter(part.frames.values()), None))
                    self._undecided(trigger, Reason.INTERRUPTED, "the station was stopped")
        except Exception as error:
            log.exception("station %s ended", self.name)
            self.failure = error
        if isinstance(self.failure, EngineLost):  # PyCUDA aborts the process when a thread ends whose context it could not pop
            threading.Event().wait(_PARKED_S)

    def _goes_on(self) -> bool:
        """Tell the watchdog, and whether parts are judged where that has changed; False: the station ends."""
        self._tick()
        if not self._readiness.is_told:
            self._tell_ready()
        return not self._closing.is_set()

    def _between_parts(self) -> None:
        if self._wanted is not None:
            self._swapped(self._wanted)
        if self.inspectors is not None and self._self_test.step(self.inspectors.engines):
            self._tested()

    def _prepare(self) -> None:
        """Open and warm every engine and judge its samples; a bundle that fails leaves the station not ready."""
        try:
            self._swapped(self.setting.inspectors(self._building))
        except EngineLost:
            raise
        except InspectorError as error:
            log.error("station %s is not ready: %s", self.name, error)
            self._become("error", error.message)
        finally:
            self._readiness.is_building = False

    def _swapped(self, inspectors: Inspectors) -> None:
        """Between two parts: judge with these from now on."""
        self.inspectors = inspectors
        self._recorder.begin(inspectors)
        if self._wanted is inspectors:
            self._wanted = None
        self._self_test.begin()
        self._become("ready" if self.config.trigger == "software" else "continuous_execution")

    def _tested(self) -> None:
        """Samples that failed stay in doubt until they are right, also through a restart."""
        doubt = self._self_test.fault[:DOUBT]
        if doubt != self._orders.of(self.name).doubt:
            try:
                self._orders.insist(self.name, doubt=doubt)
            except InspectorError as error:
                log.error("station %s: %s", self.name, error)
        self._tell_ready()

    def _building(self, bundle: str, phase: str, step: int, steps: int) -> None:
        """Tell how far the engine of a bundle is, once a second. Raises InspectorError, which ends the build, at the end."""
        if self._closing.is_set():
            raise InspectorError("stopped while an engine was built", hint="the next start builds it")
        self._readiness.is_building = True
        if time.monotonic() - self._building_told_s > _BUILDING_EVERY_S:
            self._building_told_s = time.monotonic()
            self._become("preoperational", f"building the engine of bundle {bundle}: {phase}, {step} of {steps}")

    def _become(self, state: str, why: str = "") -> None:
        self._readiness.become(state, why)
        self._tell_ready()

    def _tell_ready(self, *, busy: bool | None = None) -> None:
        """Any thread may tell: who tells last has looked last."""
        with self._telling:
            ready = self._readiness.ready(busy=busy)
            if self.voice is not None:
                self.voice.retain(ready, "ready", self.name)

    def announce(self) -> None:
        """Tell whether the station is ready; the daemon calls it once `voice` is set."""
        self._tell_ready()

    # --- parts

    def _triggered_part(self) -> None:
        try:
            trigger = self._triggers.get(timeout=_WAIT_S)
        except queue.Empty:
            return
        if why := self._readiness.standstill:
            self._undecided(trigger, Reason.NOT_READY, why)
        else:
            self._inspect(trigger, None)

    def _undecided(self, trigger: Trigger, reason: Reason, why: str) -> None:
        """The result of a part that is not inspected."""
        self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, reason, why))

    def _free_part(self) -> None:
        name, camera = next(iter(self.cameras.items()))
        try:
            frame = self._imaging.carried or camera.next(_WAIT_S)
            self._imaging.carried = None
        except CameraEnded:
            self.ended.set()
            self._closing.wait(_WAIT_S)
            return
        if frame is None:
            return
        for _ in range(min(frame.lost, LOST_TOLD)):
            detail = f"{frame.lost} frame(s) lost before {frame.source_id or frame.seq}"
            self._undecided(self._free_trigger(None), Reason.OVERLOAD, detail)
        trigger = self._free_trigger(frame)
        if why := self._readiness.standstill:  # ordered while the frame was awaited
            self._undecided(trigger, Reason.NOT_READY, why)
        else:
            self._inspect(trigger, {name: [frame]})

    def _matched_parts(self, matcher: Matcher) -> None:
        """Give images that a sensor fired, and announcements, to the matcher; judge what it has put together."""
        self._wake.wait(_MATCH_WAIT_S)
        self._wake.clear()
        heard_s, ended = self.coming.heard_s(), 0  # before the queue is emptied
        while not self._triggers.empty():
            matcher.announce(self._triggers.get_nowait())
        for name, camera in self.cameras.items():
            try:
                while (frame := camera.next(0.0)) is not None:
                    matcher.seen(name, frame)
            except CameraEnded:
                ended += 1
        for part in matcher.due(time.monotonic(), heard_s):
            self._matched_part(part)
        if ended == len(self.cameras):
            self.ended.set()

    def _matched_part(self, part: Part) -> None:
        first = min(part.frames.values(), key=lambda frame: frame.captured_s, default=None)
        trigger = part.trigger or self._free_trigger(first)
        if first is not None:  # the sensor says when the part was there, its announcement about when
            trigger = replace(trigger, received_s=first.captured_s)
        if why := self._readiness.standstill:
            self._undecided(trigger, Reason.NOT_READY, why)
        elif part.doubt:
            self._undecided(trigger, Reason.MISSING_IMAGE, part.doubt)
        elif not part.frames and part.trigger is None:
            self._undecided(trigger, Reason.OVERLOAD, "an image of every camera was lost on its way")
        else:
            self._inspect(trigger, {name: [frame] for name, frame in part.frames.items()})

    def _free_trigger(self, frame: Frame | None) -> Trigger:
        now_s, now = (frame.captured_s, frame.captured_at) if frame else (time.monotonic(), utc_now())
        # Waiting in our own queue is no lateness of the part: a recording is read ahead of its turn.
        if frame is not None and self._imaging.reads_ahead:
            now_s, now = time.monotonic(), utc_now()
        left_s = self.expires_ms / 1000
        return Trigger(
            f"{self.config.trigger}-{self.setting.session}-{next(self._free_ids)}", now_s, now, now_s + left_s,
            now + timedelta(seconds=left_s), (frame.source_id if frame else "") or None, self._readiness.product,
        )  # fmt: skip

    def _has_time(self) -> bool:
        """Whether nothing waits behind the part at hand."""
        return self._triggers.empty() and (self._imaging.reads_ahead or not self._imaging.waiting)

    def _next_trigger_s(self) -> float:
        with self._triggers.mutex:
            return next((trigger.received_s for trigger in islice(self._triggers.queue, 1)), float("inf"))

    def _inspect(self, trigger: Trigger, frames: dict[str, list[Frame]] | None) -> None:
        product = trigger.product or self._readiness.product
        recipe_id = self.config.products.get(product) if product else None
        if recipe_id is None:
            detail = f"product {product!r}; known here: {', '.join(self.config.products)}"
            self._undecided(trigger, Reason.UNKNOWN_PRODUCT, detail)
            return
        assert self.inspectors is not None
        inspector, reference = self.inspectors.by_recipe[recipe_id]
        trigger = replace(trigger, product=product)
        began = time.perf_counter()
        if frames is None and (lost := self._lost_camera(inspector.recipe.cameras)):
            self._undecided(trigger, Reason.MISSING_IMAGE, lost)
            return
        if frames is None:
            self._tell_ready(busy=True)
            frames = self._imaging.triggered(trigger, inspector.recipe)
        elif self.config.trigger == "free":
            self._imaging.complete(trigger, inspector.recipe, frames)
        captured_ms = (time.perf_counter() - began) * 1e3
        inspection = inspector.inspect(frames)
        self._recorder.finish(trigger, inspection, reference, frames, captured_ms)
        if inspection.lost is not None:
            raise inspection.lost
        if self.shadow is not None and self._has_time():
            self.shadow.judge(trigger, recipe_id, frames, inspection)
        if self.config.trigger == "software":
            self._tell_ready(busy=False)

    def _lost_camera(self, names: Iterable[str]) -> str:
        """Which of these cameras gives no image, and why."""
        for name in names:
            if self.cameras[name].state is CameraState.FAULT:
                return f"no image of camera {name}: {self.cameras[name].fault}"
        return ""

    def _held_up(self) -> bool:
        """The outbox is full: wait a little, in this station's own thread; False where that is over or would block others."""
        if self._closing.is_set() or threading.current_thread() is not self._thread:
            return False
        self._goes_on()
        self._closing.wait(_WAIT_S)
        return True
