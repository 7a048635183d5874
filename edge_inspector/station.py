"""One station: trigger -> frames -> inspector -> verdict -> outbox. States follow OPC 40100-1.

What must never be: a part that passes without a record on disk, a trigger without a result, a verdict after its expiry.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from types import TracebackType
from typing import Protocol

from edge_inspector.broker import verdict_of
from edge_inspector.cameras import Camera, CameraState, Source
from edge_inspector.config import StationConfig
from edge_inspector.errors import CameraEnded, EngineLost, InspectorError, OutboxError
from edge_inspector.evidence import EvidenceStore
from edge_inspector.frames import Frame, Trigger, utc_now
from edge_inspector.inspector import Inspection, Inspector
from edge_inspector.matching import Matcher, Part
from edge_inspector.messages import Cause, EngineState, Ready, VerdictMessage
from edge_inspector.outbox import Outbox
from edge_inspector.outputs import Outputs
from edge_inspector.recipes import Recipe
from edge_inspector.results import ConfigurationRef, Reason, RecipeRef, Result, Times, Verdict
from edge_inspector.runtime import Engine, Tell, judge_samples

log = logging.getLogger(__name__)

QUEUE = 256
"""Journalled triggers that wait; more are `undecided: overload` at once."""
LOST_TOLD = 64
"""Parts lost in one go of a free-running camera that get a result each."""
_WAIT_S = 0.25
_MATCH_WAIT_S = 0.01
"""An image that is missing becomes known by time, not by an event."""
_LATELY_S = 60.0
_BUILDING_EVERY_S = 1.0
_PARKED_S = 60.0
"""The daemon has left long before."""


class Voice(Protocol):
    """Where verdicts and readiness go."""

    def verdict(self, verdict: VerdictMessage) -> bool:
        """Tell the diverter."""
        ...

    def retain(self, message: Ready, *levels: str) -> None:
        """Publish a retained message."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a station shares with the rest of the device."""

    outbox: Outbox
    evidence: EvidenceStore
    recipes: Mapping[str, Recipe]
    configuration: ConfigurationRef
    session: str
    make_source: Callable[[str], Source]
    """Camera name -> fresh source."""
    open_engine: Callable[[str, Tell], AbstractContextManager[Engine]]
    """Bundle name, whom to tell of a build -> engine, not entered yet. Raises InspectorError."""
    clock_ok: Callable[[], bool]
    watch: Callable[[str], Callable[[], None]]
    """Loop name -> its tick."""
    forget: Callable[[str], None]
    output: Outputs | None = None
    """Its wires to the line."""


@dataclass
class StationCounts:
    """Results since the start."""

    passed: int = 0
    failed: int = 0
    undecided: int = 0


class Station:
    """Runs one station in a thread of its own. Use as a context manager."""

    def __init__(self, name: str, config: StationConfig, setting: Setting) -> None:
        """Nothing is opened before `__enter__`; verdicts go nowhere before `voice` is set."""
        self.name, self.config, self.setting = name, config, setting
        self.expires_ms = config.expires_ms
        self.voice: Voice | None = None
        self.counts = StationCounts()
        self.failure: Exception | None = None
        self.ended = threading.Event()
        """Set once a recording has been judged to its end."""
        self.engines: dict[str, EngineState] = {}
        """By bundle, once the station is ready."""
        self.cameras: dict[str, Camera] = {}
        self._triggers: queue.Queue[Trigger] = queue.Queue(QUEUE)
        self._matcher = Matcher.of(config) if config.trigger == "hardware" else None
        self._unfitting, self._unfitting_s = 0, float("-inf")
        self._wake = threading.Event()
        self._inspectors: dict[str, tuple[Inspector, RecipeRef]] = {}
        self._product = config.product
        self._state, self._why = "preoperational", "starting"
        self._halted = False
        self._building_told_s, self._is_building = 0.0, False
        self._carried: Frame | None = None
        self._tick: Callable[[], None] = lambda: None
        self._free_ids = count(1)
        self._closing = threading.Event()
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._run, name=f"station-{name}", daemon=True)

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
        self.setting.forget(self._thread.name)
        self._stack.close()

    def stop_soon(self) -> None:
        """Begin to end, without waiting: stations and cameras then end side by side."""
        self._closing.set()
        for camera in self.cameras.values():
            camera.stop_soon()

    # --- for the broker

    def offer(self, trigger: Trigger) -> None:
        """Take a journalled trigger; never blocks."""
        try:
            if self.config.trigger == "free" or (self._matcher is not None and not self._matcher.announced):
                why = "parts of this station are not told of: it finds them itself"
                self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, why))
                return
            if self._is_building:  # for minutes: longer than any trigger is worth something
                self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, self._why))
                return
            self._triggers.put_nowait(trigger)
            self._wake.set()
        except queue.Full:
            self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.OVERLOAD, f"{QUEUE} triggers wait already"))

    def command(self, name: str, product: str | None) -> None:
        """`select-product`, `halt` or `start`. Raises InspectorError."""
        if name == "halt":
            self._halted = True
        elif name == "start":
            self._halted = False
        elif name == "select-product":
            if product not in self.config.products:
                raise InspectorError(
                    f"station {self.name}: no product {product!r}", hint=f"allowed: {', '.join(self.config.products)}"
                )
            self._product = product
        else:
            raise InspectorError(f"no command {name!r}", hint="allowed: select-product, halt, start")
        self._tell_ready()

    @property
    def orders(self) -> tuple[bool, str | None]:
        """What commands have set: halted, product. It outlives a reload, not a restart."""
        return self._halted, self._product

    def resume(self, halted: bool, product: str | None) -> None:
        """Take over what commands had set before a reload."""
        self._halted = halted
        self._product = product if product in self.config.products else self.config.product
        self._tell_ready()

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
        if self._matcher is not None and time.monotonic() - self._unfitting_s < _LATELY_S:
            counts = self._matcher.counts
            text = f"since the start: {counts.extra} images without a part, {counts.bounced} too soon after another"
            causes.append(Cause(code="images_unfitting", severity="off_spec", thing=self.name, text=text))
        output = self.setting.output
        if output is not None and time.monotonic() - output.missed_s < _LATELY_S:
            text = f"{output.counts.missed} verdicts since the start came when their part had passed the diverter"
            causes.append(Cause(code="output_missed", severity="failure", thing=self.name, text=text))
        if self._halted:
            causes.append(Cause(code="halted", severity="check_function", thing=self.name, text="halted by command"))
        return causes

    # --- the thread

    def _run(self) -> None:
        engines = ExitStack()
        try:
            self._prepare(engines)
            self._tick = self.setting.watch(self._thread.name)
            while not self._closing.is_set():
                self._tick()
                if self._halted or self._state == "error":
                    self._triggered_part()
                elif self.config.trigger == "free":
                    self._free_part()
                elif self._matcher is not None:
                    self._matched_parts(self._matcher)
                else:
                    self._triggered_part()
        except Exception as error:
            log.exception("station %s ended", self.name)
            self.failure = error
        finally:
            engines.close()
        if isinstance(self.failure, EngineLost):  # PyCUDA aborts the process when a thread ends whose context it could not pop
            threading.Event().wait(_PARKED_S)

    def _prepare(self, stack: ExitStack) -> None:
        """Open and warm every engine and judge its samples; a bundle that fails leaves the station not ready."""
        try:
            engines: dict[str, Engine] = {}
            for recipe_id in dict.fromkeys(self.config.products.values()):
                recipe = self.setting.recipes[recipe_id]
                for bundle in sorted(recipe.bundles - set(engines)):
                    engines[bundle] = stack.enter_context(self.setting.open_engine(bundle, partial(self._building, bundle)))
                    judge_samples(engines[bundle])
                self._inspectors[recipe_id] = (Inspector(recipe, engines), recipe.reference(recipe_id))
        except EngineLost:
            raise
        except InspectorError as error:
            log.error("station %s is not ready: %s", self.name, error)
            self._become("error", error.message)
            return
        finally:
            self._is_building = False
        self.engines = {
            name: EngineState(runtime=engine.runtime, precision=engine.precision, instead=engine.instead)
            for name, engine in engines.items()
        }
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
        ready = Ready.model_validate({
            "schema": "ei.ready.v1", "station": self.name, "state": state, "busy": busy,
            "ready": state in ("ready", "continuous_execution"), "product": self._product, "recipe": recipe,
            "reason": "halted by command" if self._halted else self._why, "session": self.setting.session,
        })  # fmt: skip
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
        if self._halted or self._state == "error":
            why = "halted by command" if self._halted else self._why
            self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.NOT_READY, why))
            return
        self._inspect(trigger, None)

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
            self._finish(self._free_trigger(None), Inspection(Verdict.UNDECIDED, Reason.OVERLOAD, detail))
        self._inspect(self._free_trigger(frame), {name: [frame]})

    def _matched_parts(self, matcher: Matcher) -> None:
        """Give images that a sensor fired, and announcements, to the matcher; judge what it has put together."""
        self._wake.wait(_MATCH_WAIT_S)
        self._wake.clear()
        ended = 0
        while not self._triggers.empty():
            matcher.announce(self._triggers.get_nowait())
        for name, camera in self.cameras.items():
            try:
                while (frame := camera.next(0.0)) is not None:
                    matcher.seen(name, frame)
            except CameraEnded:
                ended += 1
        for part in matcher.due(time.monotonic()):
            self._matched_part(part)
        unfitting = matcher.counts.extra + matcher.counts.bounced
        if unfitting != self._unfitting:
            self._unfitting, self._unfitting_s = unfitting, time.monotonic()
        if ended == len(self.cameras):
            self.ended.set()

    def _matched_part(self, part: Part) -> None:
        trigger = part.trigger or self._free_trigger(min(part.frames.values(), key=lambda f: f.captured_s, default=None))
        if part.doubt:
            self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.MISSING_IMAGE, part.doubt))
        elif not part.frames and part.trigger is None:
            self._finish(
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

    def _reads_ahead(self) -> bool:
        info = next(iter(self.cameras.values())).info
        return info is not None and info.pulled

    def _inspect(self, trigger: Trigger, frames: dict[str, list[Frame]] | None) -> None:
        product = trigger.product or self._product
        recipe_id = self.config.products.get(product) if product else None
        if recipe_id is None:
            detail = f"product {product!r}; known here: {', '.join(self.config.products)}"
            self._finish(trigger, Inspection(Verdict.UNDECIDED, Reason.UNKNOWN_PRODUCT, detail))
            return
        inspector, reference = self._inspectors[recipe_id]
        trigger = replace(trigger, product=product)
        began = time.perf_counter()
        if frames is None:
            self._tell_ready(busy=True)
            frames = self._triggered_frames(trigger, inspector.recipe)
        elif self.config.trigger == "free":
            self._more_frames(trigger, inspector.recipe, frames)
        captured_ms = (time.perf_counter() - began) * 1e3
        inspection = inspector.inspect(frames)
        self._finish(trigger, inspection, reference, frames, captured_ms)
        if inspection.lost is not None:
            raise inspection.lost
        if self.config.trigger == "software":
            self._tell_ready()

    def _triggered_frames(self, trigger: Trigger, recipe: Recipe) -> dict[str, list[Frame]]:
        """Fire all cameras of the recipe together, once for each frame that its decision needs."""
        frames: dict[str, list[Frame]] = {name: [] for name in recipe.cameras}
        for _ in range(recipe.decision.frames):
            for name in recipe.cameras:
                self.cameras[name].trigger()
            for name, got in frames.items():
                frame = self._awaited(name, trigger)
                if frame is None:
                    return frames
                got.append(frame)
        return frames

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

    # --- results

    def _finish(
        self,
        trigger: Trigger,
        inspection: Inspection,
        recipe: RecipeRef | None = None,
        frames: Mapping[str, list[Frame]] | None = None,
        captured_ms: float = 0.0,
    ) -> None:
        """Tell a fail at once, a pass when its record is on disk; store the record of either."""
        shown = [frame for got in (frames or {}).values() for frame in got]
        verdict, reason, detail = inspection.verdict, inspection.reason, inspection.detail
        decided_s = time.monotonic()
        if decided_s > trigger.expires_s:
            over_ms = (decided_s - trigger.expires_s) * 1e3
            detail = f"{over_ms:.0f} ms late; would have been {verdict.value} ({reason.value})"
            verdict, reason = Verdict.UNDECIDED, Reason.LATE
        total_ms = (decided_s - trigger.received_s) * 1e3
        times = inspection.times_ms.model_copy(update={"capture": round(captured_ms, 2), "total": round(total_ms, 2)})
        result = Result(
            station=self.name, trigger_id=trigger.trigger_id, part_id=trigger.part_id, product=trigger.product,
            verdict=verdict, reason=reason, detail=detail[:256],
            state="completed" if recipe is not None else "failed",
            simulated=any(c.info is not None and c.info.simulated for c in self.cameras.values()),
            clock_ok=self.setting.clock_ok(), triggered_at=trigger.triggered_at,
            captured_at=shown[0].captured_at if shown else None, decided_at=utc_now(), expires_at=trigger.expires_at,
            recipe=recipe, configuration=self.setting.configuration, findings=inspection.findings,
            times_ms=times if recipe is not None else Times(total=round(total_ms, 2)),
        )  # fmt: skip
        if verdict is not Verdict.PASS:
            self._tell(result, trigger)
        if inspection.views:
            title = f"{self.name}  part {trigger.part_id or trigger.trigger_id}  {verdict.value}"
            result = result.model_copy(update={"evidence": self.setting.evidence.keep(inspection.views, title)})
        self._store(result, trigger)

    def _store(self, result: Result, trigger: Trigger) -> None:
        """Hand over to the outbox; while that is full, hold everything up: what is not accepted must not be forgotten."""
        while True:
            try:
                future = self.setting.outbox.submit(result, expires_s=trigger.expires_s)
                future.add_done_callback(partial(self._stored, result.verdict, trigger))
                break
            except OutboxError as error:
                if self._closing.is_set() or threading.current_thread() is not self._thread:
                    log.error("no record of trigger %s: %s", trigger.trigger_id, error)
                    break
                self._tick()
                self._closing.wait(_WAIT_S)

    def _stored(self, told: Verdict, trigger: Trigger, future: Future[Result]) -> None:
        """The record is on disk (this is the committer's thread)."""
        if future.exception() is not None:
            return
        result = future.result()
        counts = self.counts
        counts.passed += result.verdict is Verdict.PASS
        counts.failed += result.verdict is Verdict.FAIL
        counts.undecided += result.verdict is Verdict.UNDECIDED
        if told is Verdict.PASS and time.monotonic() <= trigger.expires_s:
            self._tell(result, trigger)

    def _tell(self, result: Result, trigger: Trigger) -> None:
        if self.setting.output is not None:
            self.setting.output.verdict(result.verdict, trigger.received_s)
        if self.voice is not None:
            self.voice.verdict(verdict_of(result))
