"""Between the daemon and the broker's topics: commands, replay requests and orders in; results, state, replays, alerts out.

Results leave the outbox in order, at most RESULTS_IN_FLIGHT unacknowledged; a new connection starts again after the
last acknowledged one. Everything retained is remembered here and published anew on every connection.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from pydantic import BaseModel

from edge_inspector import messages
from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.frames import utc_now
from edge_inspector.messages import (
    Alert,
    Command,
    Gap,
    Head,
    Ready,
    ReplayEnd,
    ReplayRequest,
    Reply,
    ReplyError,
    Topics,
)  # fmt: skip
from edge_inspector.mqtt import Acknowledged, Connection, Message
from edge_inspector.outbox import Outbox
from edge_inspector.schema import MAX_BYTES
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

RESULTS_IN_FLIGHT = 15
"""Below what brokers allow one client; 20 is common."""
REPLAY_RANGE = 500
REPLAYS = 32
ORDERS = 128
"""Remote orders that wait for the daemon; more are not acknowledged, so that the broker delivers them again."""
ALERTS = 256
"""That wait to be sent."""
ALERT_EXPIRES_S = 3600
_WAIT_S = 0.25
_PACE_S = 0.005
"""A backlog is sent a batch at a time: its acknowledgements gather meanwhile, and parts have the processor."""
_HEAD_EVERY_S = 1.0
_MAX_GAPS = 16


class Commanded(Protocol):
    """A station, as far as the broker knows it."""

    def command(self, name: str, product: str | None) -> None:
        """Carry out a command. Raises InspectorError."""
        ...


@dataclass
class _Replay:
    request: ReplayRequest
    station: str
    at: int
    hi: int
    error: str = ""
    gaps: list[tuple[int, int]] = field(default_factory=list)


class Broker:
    """The daemon's voice and ears, but for its stations' (`handshake`). One thread, which alone uses the connection;
    `retain` and `alert` may be called from any, and wait for nobody.
    """

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        outbox: Outbox,
        stations: Mapping[str, Commanded],
        *,
        tick: Callable[[], None] = lambda: None,
        hears: Callable[[], bool] = lambda: True,
        proven: Callable[[], bool] = lambda: True,
    ) -> None:
        """`tick` is called at least once a second while the thread is alive; no station is told ready before `hears`, and
        no result leaves before it is `proven` that the numbers of the outbox are nobody else's.
        """
        self.connection, self.topics, self.outbox, self.stations = connection, topics, outbox, stations
        self.orders: queue.Queue[Message] = queue.Queue(ORDERS)
        """Of configurations and bundles, for the daemon: it acknowledges them."""
        self.refused = 0
        self.failure: Exception | None = None
        self._tick, self._hears, self._proven = tick, hears, proven
        self._generation = 0
        """Of the outbox: what was sent in an earlier one is not acknowledged in this."""
        self._retained: dict[str, tuple[bytes, bool]] = {}
        """Of each topic: payload, whether it waits until triggers are heard."""
        self._told: dict[str, bytes] = {}
        """Of what is retained, what this connection has been told."""
        self._alerts: queue.SimpleQueue[Alert] = queue.SimpleQueue()
        self._standing: int | None = None
        self._sent: dict[str, int] = {}
        self._in_flight: dict[int, tuple[str, int] | None] = {}
        self._head_at = 0.0
        self._replays: deque[_Replay] = deque()
        self._redeliver_s: float | None = None
        self._alerted_s = 0.0
        self._closing = threading.Event()
        self._thread = Thread(target=self._run, name="broker", daemon=True)

    @staticmethod
    def subscriptions(topics: Topics) -> tuple[str, ...]:
        """What the daemon listens to."""
        return (
            topics.of("replay", "+", "request"), topics.of("command", "+"),
            topics.of("config", "desired"), topics.of("config", "confirm"),
            topics.of("bundle", "+", "desired"), topics.of("bundle", "+", "confirm"),
        )  # fmt: skip

    def __enter__(self) -> Broker:
        """Start; results flow as soon as the connection stands."""
        self.outbox.on_commit(self.connection.wake)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Send what is committed and what is retained until the broker has it (a second at most), then stop."""
        self._closing.set()
        self.connection.wake()
        self._thread.join(1.5)

    # --- for the daemon

    def retain(self, message: BaseModel, *levels: str) -> None:
        """Publish a retained message, now and on every new connection."""
        waits = isinstance(message, Ready) and message.ready  # a trigger that it asks for must not be lost
        self._retained[self.topics.of(*levels)] = messages.encode(message), waits
        self.connection.wake()

    def alert(self, alert: Alert) -> None:
        """Tell people, if there is a connection."""
        if self._alerts.qsize() < ALERTS:
            self._alerts.put(alert)
            self.connection.wake()

    # --- the thread

    def _run(self) -> None:
        try:
            end = None
            while end is None or (time.monotonic() < end and self._pending()):
                self._tick()
                self._take_events(0.02 if end else _WAIT_S)
                self._notice_connection()
                self._send_alerts()
                if self._standing is not None:
                    self._send_retained()
                    self._send_results()
                    if len(self._in_flight) >= RESULTS_IN_FLIGHT:
                        time.sleep(_PACE_S)
                    self._serve_replays()
                self._redeliver()
                if self._closing.is_set() and end is None:
                    end = time.monotonic() + 1.0
        except Exception as error:
            log.exception("broker thread ended")
            self.failure = error

    def _pending(self) -> bool:
        return self._standing is not None and (bool(self._in_flight) or bool(self._unsent()) or not self._alerts.empty())

    def _take_events(self, wait_s: float) -> None:
        try:
            event = self.connection.events.get(timeout=wait_s)
            while True:
                if isinstance(event, Message):
                    self._take(event)
                elif isinstance(event, Acknowledged):
                    self._acknowledged(event.token)
                event = self.connection.events.get_nowait()
        except queue.Empty:
            return

    def _notice_connection(self) -> None:
        standing, generation = self.connection.standing, self.outbox.generation
        if (standing, generation) == (self._standing, self._generation):
            return
        self._standing, self._generation = standing, generation
        self._in_flight.clear()
        self._replays.clear()
        self._head_at = 0.0
        for station in self.outbox.stations:
            self._sent[station] = self.outbox.head(station).acked
        self._told = {}

    def _send_alerts(self) -> None:
        while not self._alerts.empty():
            alert = self._alerts.get()
            self.connection.publish(self.topics.of("alert", alert.station), messages.encode(alert), expires_s=ALERT_EXPIRES_S)

    def _unsent(self) -> dict[str, bytes]:
        """What is retained and not told yet."""
        retained, hears = self._retained.copy(), self._hears()  # at once, beside whoever adds to it
        return {t: p for t, (p, waits) in retained.items() if self._told.get(t) != p and (hears or not waits)}

    def _send_retained(self) -> None:
        if self._proven() and time.monotonic() - self._head_at > _HEAD_EVERY_S:
            self._head_at = time.monotonic()
            for station in self.outbox.stations:
                self.retain(self._head(station), "head", station)
        for topic, payload in self._unsent().items():
            token = self.connection.publish(topic, payload, retain=True)
            if token is not None:  # known until acknowledged: who stops waits for "offline" to arrive, not to have been written
                self._told[topic] = payload
                self._in_flight[token] = None

    def _head(self, station: str) -> Head:
        head = self.outbox.head(station)
        gaps = self.outbox.gaps(station, head.lo, head.hi, _MAX_GAPS)
        omitted = self.outbox.gap_count(station, head.lo, head.hi) - len(gaps) if len(gaps) == _MAX_GAPS else 0
        return Head(
            station=station, stream=head.stream, lo=head.lo, hi=head.hi, gaps=tuple(gaps), gaps_omitted=max(0, omitted),
            life=self.outbox.origin.life,
        )  # fmt: skip

    # --- results out

    def _send_results(self) -> None:
        if not self._proven():
            return
        for station in self.outbox.stations:
            room = RESULTS_IN_FLIGHT - len(self._in_flight)
            head = self.outbox.head(station)
            if room <= 0 or self._sent[station] >= head.hi:
                continue
            topic = self.topics.of("result", station)
            for seq, payload in self.outbox.results(station, self._sent[station] + 1, head.hi, room):
                token = self.connection.publish(topic, payload)
                if token is None:
                    return
                self._in_flight[token] = (station, seq)
                self._sent[station] = seq

    def _acknowledged(self, token: int) -> None:
        sent = self._in_flight.pop(token, None)
        if sent is None:
            return
        station = sent[0]
        waiting = [other[1] for other in self._in_flight.values() if other is not None and other[0] == station]
        upto = min(waiting) - 1 if waiting else self._sent[station]
        self.outbox.acknowledged(station, upto, self._generation)

    def _serve_replays(self) -> None:
        while self._replays and len(self._in_flight) < RESULTS_IN_FLIGHT:
            replay = self._replays[0]
            room = RESULTS_IN_FLIGHT - len(self._in_flight)
            topic = self.topics.of("replay", replay.station, replay.request.client)
            for lo, hi in replay.gaps[:room]:
                gap = Gap(station=replay.station, stream=replay.request.stream, lo=lo, hi=hi)
                self._sent_aside(topic, messages.encode(gap))
            if replay.gaps:
                replay.gaps = replay.gaps[room:]
                continue
            rows = self.outbox.results(replay.station, replay.at, replay.hi, room) if not replay.error else []
            for seq, payload in rows:
                self._sent_aside(topic, payload)
                replay.at = seq + 1
            if len(rows) < room:
                self._replays.popleft()
                self._sent_aside(topic, messages.encode(self._replay_end(replay)))

    def _replay_end(self, replay: _Replay) -> ReplayEnd:
        request = replay.request
        hi = replay.hi if not replay.error else request.lo - 1
        return ReplayEnd(
            request_id=request.request_id, station=replay.station, stream=request.stream, lo=request.lo, hi=hi,
            error=replay.error,
        )  # fmt: skip

    def _sent_aside(self, topic: str, payload: bytes) -> None:
        token = self.connection.publish(topic, payload)
        if token is not None:
            self._in_flight[token] = None

    # --- messages in

    def _take(self, message: Message) -> None:
        levels = self.topics.within(message.topic)
        try:
            is_desired = levels[0] in ("config", "bundle") and levels[-1] == "desired"
            message.check(MAX_BYTES if is_desired else messages.MAX_REQUEST_BYTES, retained=is_desired)
            if levels[0] in ("config", "bundle"):
                self._take_order(message)
                return  # acknowledged once it is carried out
            if levels[0] == "replay":
                self._take_replay(levels[1], message)
            else:
                self._take_command(levels[1], message)
        except InspectorError as error:
            self.refuse(levels[1], error)
        except (ArithmeticError, TypeError, ValueError) as error:  # never die of a message: it would come again for ever
            log.exception("message on %s", message.topic)
            self.refuse(levels[1], InspectorError(f"{message.topic}: {error}"))
        self.connection.acknowledge(message.ack)

    def refuse(self, station: str, error: InspectorError) -> None:
        """Count a message that is not taken, and tell people; of several within a second one."""
        self.refused += 1
        now = time.monotonic()
        if now - self._alerted_s < 1.0:
            return
        self._alerted_s = now
        log.warning("message refused: %s", error)
        at = utc_now()
        self.alert(
            Alert(
                station=station if station in self.stations else "device",
                change="raised",
                code="bad_message",
                severity="off_spec",
                text=str(error)[:1000],
                at=at,
                expires_at=at + timedelta(seconds=ALERT_EXPIRES_S),
            )  # fmt: skip
        )

    def _take_order(self, message: Message) -> None:
        try:
            self.orders.put_nowait(message)
        except queue.Full:
            if message.ack[2]:  # one of QoS 0 cannot come again
                self._redeliver_s = time.monotonic() + 2.0

    def _redeliver(self) -> None:
        if self._redeliver_s is not None and time.monotonic() > self._redeliver_s:
            self._redeliver_s = None
            self.connection.redeliver()

    def _take_replay(self, name: str, message: Message) -> None:
        if name not in self.outbox.stations:
            messages.named(self.stations, name)
        request = messages.decode(ReplayRequest, message.payload, message.topic)
        if request.client == "request":
            raise InspectorError(f"{message.topic}: a client cannot be named 'request'")
        head = self.outbox.head(name)
        replay = _Replay(request, name, request.lo, min(request.hi, request.lo + REPLAY_RANGE - 1, head.hi))
        if not self._proven():
            replay.error = "not known yet whether this stream goes on, ask again later"
        elif request.stream != head.stream:
            replay.error = f"unknown stream {request.stream!r}, this is {head.stream!r}"
        elif len(self._replays) >= REPLAYS:
            replay.error = "busy, ask again later"
        else:
            replay.gaps = self.outbox.gaps(name, replay.at, replay.hi, REPLAY_RANGE)
        if len(self._replays) < 2 * REPLAYS:
            self._replays.append(replay)

    def _take_command(self, name: str, message: Message) -> None:
        command = messages.decode(Command, message.payload, message.topic)
        error = None
        try:
            messages.named(self.stations, command.station).command(name, command.product)
        except SchemaError:
            raise
        except InspectorError as refusal:
            error = ReplyError(code="refused", message=refusal.message, hint=refusal.hint)
        reply = Reply(request_id=command.request_id, ok=error is None, error=error)
        self._sent_aside(self.topics.of("reply", command.client), messages.encode(reply))
