"""One station: trigger -> frames -> inspector -> verdict -> outbox. States follow OPC 40100-1.

What must never be: a part that passes without a record on disk, a trigger without a result, a verdict after its expiry.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from types import TracebackType

from edge_inspector.cameras import Camera, CameraState
from edge_inspector.config import StationConfig
from edge_inspector.errors import CameraEnded, EngineLost, InspectorError
from edge_inspector.frames import Coming, Frame, Trigger, utc_now
from edge_inspector.inspector import Inspection, Inspectors
from edge_inspector.matching import Matcher, Part
from edge_inspector.messages import Cause, EngineState, Ready
from edge_inspector.recipes import Recipe
from edge_inspector.recorder import RecordCounts, Recorder, Voice
from edge_inspector.results import Reason, Verdict
from edge_inspector.selftest import SelfTest
from edge_inspector.setting import Setting
from edge_inspector.shadow import Shadow
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
        self.cameras: dict[str, Camera] = {}
        self._triggers: queue.Queue[Trigger] = queue.Queue(QUEUE)
        self._matcher = Matcher.of(config) if config.trigger == "hardware" else None
        self._self_test = SelfTest(name, config.self_test)
        self._wake = threading.Event()
        self._wanted: Inspectors | None = None
        self._ordered: str | None = None
        self._state, self._why = "preoperational", "starting"
        self._halted = False
        self._building_told_s, self._is_building = 0.0, False
        self._told_fault = self._told_promise = ""
        self._carried: Frame | None = None
        self._tick: Callable[[], None] = lambda: None
        self._free_ids = count(1)
        self._closing = threading.Event()
        self._recorder = Recorder(name, config, setting, simulated=lambda: self._simulated, held_up=self._held_up)
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
        return self._wanted is None and (self.inspectors is not None or self._state == "error")

    @property
    def engines(self) -> dict[str, EngineState]:
        """What runs each bundle, once the station is ready."""
        return self.inspectors.states if self.inspectors is not None else {}

    # --- for the broker

    def offer(self, trigger: Trigger) -> None:
        """Take a journalled trigger; never blocks."""
        try:
            if self.config.trigger == "free" or (self._matcher is not None and not self._matcher.announced):
                why = "parts of this station are not told of: it finds them itself"
                self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, why))
                return
            if self._is_building:  # for minutes: longer than any trigger is worth something
                self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, self._why))
                return
            self._triggers.put_nowait(trigger)
            self._wake.set()
        except queue.Full:
            self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.OVERLOAD, f"{QUEUE} triggers wait already"))

    def command(self, name: str, product: str | None) -> None:
        """`select-product`, `halt`, `start` or `self-test`. Raises InspectorError."""
        if name == "halt":
            self._halted = True
        elif name == "start":
            self._halted = False
        elif name == "self-test":
            if self.inspectors is None:
                raise InspectorError(f"station {self.name}: its networks are not open: {self._why}")
            self._self_test.order()
        elif name == "select-product":
            if product not in self.config.products:
                raise InspectorError(
                    f"station {self.name}: no product {product!r}", hint=f"allowed: {', '.join(self.config.products)}"
                )
            self._ordered = product
        else:
            raise InspectorError(f"no command {name!r}", hint="allowed: select-product, halt, start, self-test")
        log.info("station %s: %s %s by command", self.name, name, product or "")
        self._tell_ready()

    @property
    def orders(self) -> tuple[bool, str | None, str]:
        """What commands have set: halted, product; and why its networks are in doubt. It outlives a reload, not a restart."""
        return self._halted, self._ordered, self._self_test.fault

    def resume(self, halted: bool, product: str | None, doubt: str) -> None:
        """Take over what was so before a reload."""
        self._halted, self._ordered, self._self_test.fault = halted, product, doubt
        if doubt:
            self._self_test.order()
        self._tell_ready()

    @property
    def _product(self) -> str | None:
        return self._ordered if self._ordered in self.config.products else self.config.product

    def causes(self) -> list[Cause]:
        """What is wrong here."""
        causes = []
        if self._state == "error":
            causes.append(Cause(code="not_ready", severity="failure", thing=self.name, text=self._why))
        for bundle, engine in self.engines.items():
            if engine.instead:
                text = f"runs on {engine.runtime}: {engine.instead}"
                causes.append(Cause(code="engine_fallback", severity="off_spec", thing=f"{self.name}/{bundle}", text=text))
        for name, camera in self.cameras.items():
            if camera.state is CameraState.FAULT:
                thing = f"{self.name}/{name}"
                causes.append(Cause(code="camera_fault", severity="failure", thing=thing, text=camera.fault))
        causes += [*self._recorder.causes(), *self._self_test.causes()]
        if self._matcher is not None:
            causes += self._matcher.causes(self.name, time.monotonic())
        if self.setting.output is not None:
            causes += self.setting.output.causes()
        if self._halted:
            causes.append(Cause(code="halted", severity="check_function", thing=self.name, text="halted by command"))
        return causes

    # --- the thread

    def _run(self) -> None:
        try:
            self._prepare()
            self._tick = self.setting.watch(self._thread.name)
            while not self._closing.is_set():
                self._tick()
                self._between_parts()
                if self._matcher is not None:
                    self._matched_parts(self._matcher)
                elif self.config.trigger == "free" and self._judges:
                    self._free_part()
                else:
                    self._triggered_part()
            if self._matcher is not None and not self._matcher.announced:  # the others are in the journal
                for part in self._matcher.due(float("inf"), float("inf")):
                    trigger = self._free_trigger(next(iter(part.frames.values()), None))
                    self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.INTERRUPTED, "the station was stopped"))
        except Exception as error:
            log.exception("station %s ended", self.name)
            self.failure = error
        if isinstance(self.failure, EngineLost):  # PyCUDA aborts the process when a thread ends whose context it could not pop
            threading.Event().wait(_PARKED_S)

    def _between_parts(self) -> None:
        if self._wanted is not None:
            self._swapped(self._wanted)
        if self.inspectors is not None and self._self_test.step(self.inspectors.engines):
            self._tested()
        if self._camera_fault() != self._told_fault or self._recorder.promise != self._told_promise:
            self._tell_ready()

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
            self._is_building = False

    def _swapped(self, inspectors: Inspectors) -> None:
        """Between two parts: judge with these from now on."""
        self.inspectors = inspectors
        self._recorder.begin(inspectors)
        if self._wanted is inspectors:
            self._wanted = None
        self._self_test.begin()
        self._tested()

    def _tested(self) -> None:
        """While samples fail no part is judged, if that is required."""
        if self._self_test.blocks:
            self._become("error", f"self-test: {self._self_test.fault}")
        else:
            self._become("ready" if self.config.trigger == "software" else "continuous_execution")

    def _building(self, bundle: str, phase: str, step: int, steps: int) -> None:
        """Tell how far the engine of a bundle is, once a second. Raises InspectorError, which ends the build, at the end."""
        if self._closing.is_set():
            raise InspectorError("stopped while an engine was built", hint="the next start builds it")
        self._is_building = True
        if time.monotonic() - self._building_told_s > _BUILDING_EVERY_S:
            self._building_told_s = time.monotonic()
            self._become("preoperational", f"building the engine of bundle {bundle}: {phase}, {step} of {steps}")

    def _become(self, state: str, why: str = "") -> None:
        self._state, self._why = state, why
        self._tell_ready()

    def _tell_ready(self, *, busy: bool = False) -> None:
        if self.voice is None:
            return
        recipe = self.config.products.get(self._product) if self._product else None
        state = "halted" if self._halted else "single_execution" if busy else self._state
        why = "halted by command" if self._halted else self._why or self._camera_fault()
        self._told_fault, self._told_promise = self._camera_fault(), self._recorder.promise
        ready = Ready.model_validate({
            "schema": "ei.ready.v1", "station": self.name, "state": state, "busy": busy,
            "ready": state in ("ready", "continuous_execution") and not why, "product": self._product, "recipe": recipe,
            "reason": why, "session": self.setting.session, "tested_at": self._self_test.at, "promise": self._recorder.promise,
        })  # fmt: skip
        self.voice.retain(ready, "ready", self.name)

    def _camera_fault(self) -> str:
        return next((f"camera {n}: {c.fault}" for n, c in self.cameras.items() if c.state is CameraState.FAULT), "")

    def announce(self) -> None:
        """Tell whether the station is ready; the daemon calls it once `voice` is set."""
        self._tell_ready()

    # --- parts

    def _triggered_part(self) -> None:
        try:
            trigger = self._triggers.get(timeout=_WAIT_S)
        except queue.Empty:
            return
        if self._judges:
            self._inspect(trigger, None)
        else:
            self._not_ready(trigger)

    def _not_ready(self, trigger: Trigger) -> None:
        why = "halted by command" if self._halted else self._why or self._self_test.fault
        self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, why))

    @property
    def _judges(self) -> bool:
        return not self._halted and self._state != "error" and not self._self_test.blocks

    @property
    def operational(self) -> bool:
        """Whether parts that come now are judged; what the heartbeat tells."""
        return self._judges and self._state != "preoperational" and not self._camera_fault()

    def _free_part(self) -> None:
        name, camera = next(iter(self.cameras.items()))
        try:
            frame = self._carried or camera.next(_WAIT_S)
            self._carried = None
        except CameraEnded:
            self.ended.set()
            self._closing.wait(_WAIT_S)
            return
        if frame is None:
            return
        for _ in range(min(frame.lost, LOST_TOLD)):
            detail = f"{frame.lost} frame(s) lost before {frame.source_id or frame.seq}"
            self._recorder.finish(self._free_trigger(None), Inspection(Verdict.UNDECIDED, Reason.OVERLOAD, detail))
        self._inspect(self._free_trigger(frame), {name: [frame]})

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
        if not self._judges:
            self._not_ready(trigger)
        elif part.doubt:
            self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.MISSING_IMAGE, part.doubt))
        elif not part.frames and part.trigger is None:
            self._recorder.finish(
                trigger, Inspection(Verdict.UNDECIDED, Reason.OVERLOAD, "an image of every camera was lost on its way")
            )
        else:
            self._inspect(trigger, {name: [frame] for name, frame in part.frames.items()})

    def _free_trigger(self, frame: Frame | None) -> Trigger:
        now_s, now = (frame.captured_s, frame.captured_at) if frame else (time.monotonic(), utc_now())
        # Waiting in our own queue is no lateness of the part: a recording is read ahead of its turn.
        if frame is not None and self._reads_ahead():
            now_s, now = time.monotonic(), utc_now()
        left_s = self.expires_ms / 1000
        return Trigger(
            f"{self.config.trigger}-{self.setting.session}-{next(self._free_ids)}", now_s, now, now_s + left_s,
            now + timedelta(seconds=left_s), (frame.source_id if frame else "") or None, self._product,
        )  # fmt: skip

    def _has_time(self) -> bool:
        """Whether nothing waits behind the part at hand."""
        return self._triggers.empty() and (self._reads_ahead() or not any(c.waiting for c in self.cameras.values()))

    def _reads_ahead(self) -> bool:
        info = next(iter(self.cameras.values())).info
        return info is not None and info.pulled

    def _inspect(self, trigger: Trigger, frames: dict[str, list[Frame]] | None) -> None:
        product = trigger.product or self._product
        recipe_id = self.config.products.get(product) if product else None
        if recipe_id is None:
            detail = f"product {product!r}; known here: {', '.join(self.config.products)}"
            self._recorder.finish(trigger, Inspection(Verdict.UNDECIDED, Reason.UNKNOWN_PRODUCT, detail))
            return
        assert self.inspectors is not None
        inspector, reference = self.inspectors.by_recipe[recipe_id]
        trigger = replace(trigger, product=product)
        began = time.perf_counter()
        if frames is None:
            self._tell_ready(busy=True)
            frames = self._triggered_frames(trigger, inspector.recipe)
        elif self.config.trigger == "free":
            self._more_frames(trigger, inspector.recipe, frames)
        captured_ms = (time.perf_counter() - began) * 1e3
        inspection = inspector.inspect(frames)
        self._recorder.finish(trigger, inspection, reference, frames, captured_ms)
        if inspection.lost is not None:
            raise inspection.lost
        if self.shadow is not None and self._has_time():
            self.shadow.judge(trigger, recipe_id, frames, inspection)
        if self.config.trigger == "software":
            self._tell_ready()

    def _triggered_frames(self, trigger: Trigger, recipe: Recipe) -> dict[str, list[Frame]]:
        """Fire all cameras of the recipe together, once for each frame that its decision needs, while the part is in view."""
        frames: dict[str, list[Frame]] = {name: [] for name in recipe.cameras}
        since_s = trigger.received_s
        for _ in range(recipe.decision.frames):
            if self._left_s(trigger) <= time.monotonic() and not self._simulated:
                return frames
            for name in recipe.cameras:
                self.cameras[name].trigger(since_s)
            for name, got in frames.items():
                frame = self._awaited(name, trigger)
                if frame is None or (frame.captured_s >= self._left_s(trigger) and not self._simulated):
                    return frames
                got.append(frame)
            since_s = time.monotonic()
        return frames

    def _left_s(self, trigger: Trigger) -> float:
        """When the part was, or will be, out of view: when the next one was triggered, and by what the configuration says."""
        with self._triggers.mutex:
            after = self._triggers.queue[0].received_s if self._triggers.queue else float("inf")
        in_view_ms = self.config.in_view_ms
        return min(after, trigger.received_s + in_view_ms / 1e3 if in_view_ms is not None else trigger.expires_s)

    @property
    def _simulated(self) -> bool:
        """Recordings wait for their triggers."""
        return any(camera.info is not None and camera.info.simulated for camera in self.cameras.values())

    def _more_frames(self, trigger: Trigger, recipe: Recipe, frames: dict[str, list[Frame]]) -> None:
        for name, got in frames.items():
            while len(got) < recipe.decision.frames and (frame := self._awaited(name, trigger)) is not None:
                if frame.lost:  # it may show another part: this one stays short of frames, the next begins with it
                    self._carried = frame
                    return
                got.append(frame)

    def _awaited(self, name: str, trigger: Trigger) -> Frame | None:
        patience_s = min(trigger.expires_s - time.monotonic(), self.config.cameras[name].timeout_ms / 1000)
        end = time.monotonic() + patience_s
        try:
            while (left := end - time.monotonic()) > 0 and not self._closing.is_set():
                self._tick()  # a camera may be given a minute, the watchdog gives seconds
                frame = self.cameras[name].next(min(left, _WAIT_S))
                if frame is not None:
                    return frame
        except CameraEnded:
            return None
        return None

    def _held_up(self) -> bool:
        """The outbox is full: wait a little, in this station's own thread; False where that is over or would block others."""
        if self._closing.is_set() or threading.current_thread() is not self._thread:
            return False
        self._tick()
        self._closing.wait(_WAIT_S)
        return True
