"""From an inspection to its record and its verdict: a fail is told at once, a pass when its record is on disk.

What must never be: a pass without a record, a trigger without a result, a verdict after its expiry.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from edge_inspector.config import StationConfig
from edge_inspector.errors import OutboxError
from edge_inspector.frames import Frame, Trigger, utc_now
from edge_inspector.handshake import verdict_of
from edge_inspector.inspector import Inspection, Inspectors
from edge_inspector.messages import Cause, VerdictMessage
from edge_inspector.results import Reason, RecipeRef, Result, Times, Verdict
from edge_inspector.setting import Setting
from edge_inspector.trends import Trends

log = logging.getLogger(__name__)

_LATELY_S = 60.0
UNJUDGED_TOLD = 5
"""Parts in a row that could not be judged although all was ready, at which health says so."""


_NOT_ITS_OWN = (Reason.NOT_READY, Reason.INTERRUPTED, Reason.INVALID_TRIGGER)
"""Reasons that say nothing about cameras and networks."""


@dataclass(frozen=True)
class Voice:
    """Where verdicts and readiness go."""

    verdict: Callable[[VerdictMessage], bool]
    """Tells the diverter."""
    retain: Callable[..., None]
    """Publishes a retained message: message, topic levels."""


@dataclass
class RecordCounts:
    """Results since the start."""

    passed: int = 0
    failed: int = 0
    undecided: int = 0


class Recorder:
    """Tells and stores the outcomes of one station. Used by its thread and by the committer's."""

    def __init__(
        self,
        station: str,
        config: StationConfig,
        setting: Setting,
        *,
        simulated: Callable[[], bool],
        held_up: Callable[[], bool],
    ) -> None:
        """`held_up` waits while the outbox is full; False: give up. Verdicts go nowhere before `voice` is set."""
        self.voice: Voice | None = None
        self.counts = RecordCounts()
        self.configuration = setting.configuration
        self.trends = Trends(station, config.limits)
        self._adding = threading.Lock()
        self._unjudged, self._unjudged_why = 0, ""
        self._reused, self._reused_s, self._reused_last = 0, float("-inf"), ""
        self._inspectors: Inspectors | None = None
        self._station, self._setting, self._output = station, setting, setting.output
        self._simulated, self._held_up = simulated, held_up

    def begin(self, inspectors: Inspectors) -> None:
        """From now on parts are judged by these."""
        self.configuration, self._inspectors = inspectors.configuration, inspectors
        manifests = {name: engine.bundle.manifest for name, engine in inspectors.engines.items()}
        self.trends.begin({name: manifest.calibration.scores for name, manifest in manifests.items()})

    def finish(
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
            station=self._station, trigger_id=trigger.trigger_id, part_id=trigger.part_id, product=trigger.product,
            verdict=verdict, reason=reason, detail=detail[:256], state="completed" if recipe is not None else "failed",
            simulated=self._simulated(), clock_ok=self._setting.clock_ok(), triggered_at=trigger.triggered_at,
            captured_at=shown[0].captured_at if shown else None, decided_at=utc_now(), expires_at=trigger.expires_at,
            recipe=recipe, configuration=self.configuration, findings=inspection.findings,
            times_ms=times if recipe is not None else Times(total=round(total_ms, 2)),
        )  # fmt: skip
        if verdict is not Verdict.PASS:
            self._tell(result, trigger)
        with self._adding:
            self._note_judged(verdict, reason, detail)
            self.trends.add(inspection.verdict, inspection.findings)
        named: Future[str] | None = Future() if inspection.views else None
        evidence = self._setting.evidence.offer(result, frames or {}, inspection.views, named)
        self._store(result if evidence is None else result.model_copy(update={"evidence": evidence}), trigger, named)

    def _note_judged(self, verdict: Verdict, reason: Reason, detail: str) -> None:
        if verdict is not Verdict.UNDECIDED:
            self._unjudged = 0
        elif reason not in _NOT_ITS_OWN:
            self._unjudged, self._unjudged_why = self._unjudged + 1, f"{reason.value}: {detail}"

    def reused(self, trigger: Trigger, result: Result) -> None:
        """Tell what is stored already: the trigger has the id of another part (this is the committer's thread)."""
        self._reused, self._reused_s, self._reused_last = self._reused + 1, time.monotonic(), trigger.trigger_id
        self._tell(result, trigger)
        self._count(result, trigger.received_s)

    @property
    def finds(self) -> float | None:
        """The smallest share of drawn defects that one of its bundles finds at its threshold; None: not known."""
        return self._inspectors.finds if self._inspectors is not None else None

    @property
    def promise(self) -> str:
        """Why the promised rates do not hold; the size of a whole frame is known from the first part on."""
        return self._inspectors.promise if self._inspectors is not None else ""

    def causes(self) -> list[Cause]:
        """What is wrong with what was found lately."""
        causes = self.trends.causes()
        if self._unjudged >= UNJUDGED_TOLD:
            text = f"the last {self._unjudged} parts could not be judged: {self._unjudged_why}"
            causes.append(Cause(code="nothing_judged", severity="failure", thing=self._station, text=text))
        if time.monotonic() - self._reused_s < _LATELY_S:
            text = (
                f"{self._reused} parts since the start came with the trigger id of another part, the last one with "
                f"{self._reused_last!r}: none was judged. A controller that starts again must not count from 1 again"
            )
            causes.append(Cause(code="trigger_id_reused", severity="off_spec", thing=self._station, text=text))
        if self.promise:
            text = f"promise: {self.promise}"
            causes.append(Cause(code="promise_not_valid", severity="off_spec", thing=self._station, text=text))
        return causes

    def _store(self, result: Result, trigger: Trigger, named: Future[str] | None) -> None:
        """Hand over to the outbox; while that is full, hold everything up: what is not accepted must not be forgotten."""
        while True:
            try:
                future = self._setting.outbox.submit(result, expires_s=trigger.expires_s)
                future.add_done_callback(partial(self._stored, result.verdict, trigger, time.monotonic()))
                if named is not None:
                    future.add_done_callback(partial(self._name, named))
                break
            except OutboxError as error:
                if not self._held_up():
                    log.error("no record of trigger %s: %s", trigger.trigger_id, error)
                    break

    def _stored(self, told: Verdict, trigger: Trigger, decided_s: float, future: Future[Result]) -> None:
        """The record is on disk (this is the committer's thread)."""
        if future.exception() is not None:
            return
        result = future.result()
        if told is Verdict.PASS and time.monotonic() <= trigger.expires_s:
            self._tell(result, trigger)
        self._count(result, decided_s)

    def _count(self, result: Result, decided_s: float) -> None:
        counts = self.counts
        counts.passed += result.verdict is Verdict.PASS
        counts.failed += result.verdict is Verdict.FAIL
        counts.undecided += result.verdict is Verdict.UNDECIDED
        if self._setting.metrics is not None:
            self._setting.metrics.count(result, (time.monotonic() - decided_s) * 1e3)
        level = logging.DEBUG if result.verdict is Verdict.PASS else logging.INFO
        if log.isEnabledFor(level):
            about = {name: getattr(result, name) for name in ("station", "trigger_id", "part_id", "seq")}
            log.log(
                level, "part %s: %s, %s %s", result.part_id or result.trigger_id, result.verdict.value, result.reason.value,
                result.detail, extra={**about, "verdict": result.verdict.value},
            )  # fmt: skip

    def _name(self, named: Future[str], future: Future[Result]) -> None:
        """Tell the result's id where it stays as it is: it may be numbered anew until the broker was heard."""
        is_final = future.exception() is None and self._setting.numbers_stay()
        named.set_result(future.result().result_id if is_final else "")

    def _tell(self, result: Result, trigger: Trigger) -> None:
        if self._output is not None:
            self._output.verdict(result.verdict, trigger.received_s, trigger.expires_s)
        if self.voice is not None:  # the clock may have jumped since the trigger: until when is told by what it shows now
            expires_at = utc_now() + timedelta(seconds=trigger.expires_s - time.monotonic())
            self.voice.verdict(verdict_of(result).model_copy(update={"expires_at": expires_at}))
