"""What a controller and the stations say to each other: triggers in, verdicts out.

It has a connection and a thread of its own, and shares no lock with the thread that sends results: one that hangs, or a
connection full of them, holds up no verdict.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Protocol

from edge_inspector import messages
from edge_inspector.errors import BrokerError, InspectorError, OutboxError, SchemaError
from edge_inspector.frames import Coming, Trigger, utc_now
from edge_inspector.journal import Journalled
from edge_inspector.messages import Topics, TriggerRequest, VerdictMessage
from edge_inspector.mqtt import Connection, Message, Refused, Trouble
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.schema import TolerantModel, read_json, validate
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

_WAIT_S = 0.25
_REDELIVER_S = 2.0
_TOLD = 1024
"""Verdicts of which it is remembered how long they are of use, for when they are asked for again."""
_REFUSED_S, _DETAIL = 1.0, 300
_TRIGGERS_FAULT = (Reason.INVALID_TRIGGER, Reason.TRIGGER_ID_REUSED)


class _Asked(TolerantModel):
    """What a trigger that is wrong elsewhere needs, to be answered."""

    trigger_id: messages.PlainId


class TriggerTaker(Protocol):
    """A station, as far as its controller knows it."""

    expires_ms: int
    coming: Coming

    def offer(self, trigger: Trigger) -> None:
        """Take a journalled trigger; must not block."""
        ...

    def reused(self, trigger: Trigger, result: Result) -> None:
        """Tell the result of a trigger whose id is another part's; must not block."""
        ...


class Handshake:
    """Use as a context manager. One thread; `verdict` may be called from any."""

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        outbox: Outbox,
        stations: Mapping[str, TriggerTaker],
        refuse: Callable[[str, InspectorError], None],
        *,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`refuse` hears of triggers that are not taken; `tick` is called at least once a second while the thread is alive."""
        self.connection, self.topics, self.outbox, self.stations = connection, topics, outbox, stations
        self.failure: Exception | None = None
        self._refuse, self._tick = refuse, tick
        self._redeliver_s: float | None = None
        self._useful_until_s: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._telling = threading.Lock()
        self._closing = threading.Event()
        self._thread = Thread(target=self._run, name="handshake", daemon=True)

    @staticmethod
    def subscriptions(topics: Topics) -> tuple[str, ...]:
        """What it listens to."""
        return (topics.of("trigger", "+"),)

    def __enter__(self) -> Handshake:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take no more triggers."""
        self._closing.set()
        self.connection.wake()
        self._thread.join(1.0)

    def verdict(self, verdict: VerdictMessage) -> bool:
        """Tell the diverter, at once or never; returns whether there was a connection."""
        left_s = self._left_s(verdict)
        told = verdict.model_copy(update={"expires_in_ms": int(left_s * 1e3)})
        topic = self.topics.of("verdict", verdict.station)
        try:
            return self.connection.publish(topic, messages.encode(told), expires_s=left_s) is not None
        except BrokerError as error:
            self.connection.note(Trouble("verdict_too_large", error.message))
            return False

    def _left_s(self, verdict: VerdictMessage) -> float:
        """How long a verdict is of use. When it is told again that is what is left of the first time, whatever the clock
        has done since; of one that is not remembered (from before a start, or long ago) nothing is.
        """
        key, now_s = (verdict.station, verdict.trigger_id), time.monotonic()
        with self._telling:
            if verdict.repeated:
                return max(0.0, self._useful_until_s.get(key, 0.0) - now_s)
            left_s = (verdict.expires_at - utc_now()).total_seconds()
            left_s = max(0.0, min(left_s, self.stations[verdict.station].expires_ms / 1000))
            self._useful_until_s[key] = now_s + left_s
            self._useful_until_s.move_to_end(key)
            if len(self._useful_until_s) > _TOLD:
                self._useful_until_s.popitem(last=False)
        return left_s

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._tick()
                try:
                    event = self.connection.events.get(timeout=_WAIT_S)
                except queue.Empty:
                    event = None
                if isinstance(event, Message):
                    self._take(event)
                elif isinstance(event, Refused):
                    self.connection.note(Trouble("verdict_refused", f"the broker refuses verdicts: {event.words}"))
                if self._redeliver_s is not None and time.monotonic() > self._redeliver_s:
                    self._redeliver_s = None
                    self.connection.redeliver()
        except Exception as error:
            log.exception("handshake thread ended")
            self.failure = error

    def _take(self, message: Message) -> None:
        name = self.topics.within(message.topic)[1]
        try:
            message.check(messages.MAX_REQUEST_BYTES)
            station = messages.named(self.stations, name)
            request, fault = self._requested(name, message)
            coming = station.coming.begin()  # before its own time
            try:
                trigger = _trigger(request, station.expires_ms / 1000, fault)
                future = self.outbox.journal(name, trigger)
            except Exception:
                station.coming.end(coming)
                raise
            future.add_done_callback(partial(self._journalled, name, trigger, coming, message))
        except OutboxError:  # not acknowledged: it comes again when the disk has caught up
            if message.ack[2]:  # one of QoS 0 cannot come again
                self._redeliver_s = time.monotonic() + _REDELIVER_S
        except InspectorError as error:
            self._refused(name, error, message)
        except (ArithmeticError, TypeError, ValueError) as error:  # never die of a message: it would come again for ever
            log.exception("message on %s", message.topic)
            self._refused(name, InspectorError(f"{message.topic}: {error}"), message)

    def _requested(self, station: str, message: Message) -> tuple[TriggerRequest, str]:
        """What is asked for, and what is wrong with it: whoever can be answered is. Raises SchemaError where nobody can."""
        data = read_json(message.payload, message.topic)
        try:
            return validate(TriggerRequest, data, message.topic), ""
        except SchemaError as error:
            if not isinstance(data, dict) or any(fault.path in ("", "trigger_id") for fault in error.faults):
                raise
            self._refuse(station, error)
            named = validate(TriggerRequest, {"trigger_id": data["trigger_id"]}, message.topic)
            return named, "; ".join(str(fault) for fault in error.faults)

    def _refused(self, station: str, error: InspectorError, message: Message) -> None:
        self._refuse(station, error)
        if not message.retain:  # who kept a trigger for later is not asked for it every time
            self._answer(station, error, message)
        self.connection.acknowledge(message.ack)

    def _answer(self, station: str, error: InspectorError, message: Message) -> None:
        """Tell a controller that no part is inspected for its trigger: undecided, where the verdict would come."""
        with suppress(InspectorError):  # nobody can be answered
            asked = messages.decode(_Asked, message.payload, message.topic, messages.MAX_REQUEST_BYTES)
            refused = VerdictMessage(
                station=station, trigger_id=asked.trigger_id, verdict=Verdict.UNDECIDED, reason=Reason.REFUSED,
                detail=str(error)[:_DETAIL], expires_at=utc_now() + timedelta(seconds=_REFUSED_S),
                expires_in_ms=int(_REFUSED_S * 1e3),
            )  # fmt: skip
            self.connection.publish(self.topics.of("verdict", station), messages.encode(refused), expires_s=_REFUSED_S)

    def _journalled(self, name: str, trigger: Trigger, coming: int, message: Message, future: Future[Journalled]) -> None:
        """On disk (this is the committer's thread): now it may be acknowledged and acted on."""
        try:
            if future.exception() is not None:
                return
            self.connection.acknowledge(message.ack)
            answer = future.result()
            if answer.new:
                self.stations[name].offer(trigger)
            elif answer.result is not None:
                known = messages.decode(Result, answer.result, name)
                if answer.reused:
                    self.stations[name].reused(trigger, known)
                else:
                    self.verdict(_repeated(known))
        finally:
            self.stations[name].coming.end(coming)


def _trigger(request: TriggerRequest, left_s: float, fault: str) -> Trigger:
    """What is asked for, as of now; it expires in `left_s` at the latest."""
    now_s, now = time.monotonic(), utc_now()
    if request.expires_at is not None:
        left_s = max(0.0, min(left_s, request.expires_at.timestamp() - now.timestamp()))
    return Trigger(
        request.trigger_id, now_s, now, now_s + left_s, now + timedelta(seconds=left_s),
        request.part_id, request.product, journalled=True, fault=fault,
    )  # fmt: skip


def _repeated(known: Result) -> VerdictMessage:
    """The answer to a trigger that came before. A pass that has expired is none: another part may be at the diverter."""
    told = verdict_of(known, repeated=True)
    if known.verdict is Verdict.PASS and known.expires_at <= utc_now():
        return told.model_copy(update={"verdict": Verdict.UNDECIDED, "reason": Reason.LATE})
    return told


def verdict_of(result: Result, *, repeated: bool = False) -> VerdictMessage:
    """What the diverter is told of a result."""
    return VerdictMessage(
        station=result.station, trigger_id=result.trigger_id, part_id=result.part_id, verdict=result.verdict,
        reason=result.reason, repeated=repeated, expires_at=result.expires_at,
        detail=result.detail if result.reason in _TRIGGERS_FAULT else None,
    )  # fmt: skip
