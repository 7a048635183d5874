"""Between the daemon and the broker's topics: commands, replay requests and orders in; results, state, replays, alerts out.

Results leave the outbox in order, a window of them unacknowledged (`outgoing`); a new connection starts again after the
last acknowledged one. Everything retained is remembered here and published anew on every connection. What does not fit into
what the broker takes is shortened, and says so; a result that fits in no form becomes a gap.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Protocol

from pydantic import BaseModel

from edge_inspector import messages
from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.flood import Flood, besides
from edge_inspector.frames import utc_now
from edge_inspector.messages import (
    MAX_REPORT_BYTES,
    Alert,
    Command,
    Head,
    Ready,
    ReplayRequest,
    Reply,
    ReplyError,
    StateMessage,
    Topics,
)  # fmt: skip
from edge_inspector.mqtt import Acknowledged, Connection, Message, Refused, Trouble
from edge_inspector.outbox import Outbox
from edge_inspector.outgoing import turns
from edge_inspector.resending import REPLAY_RANGE, Resending
from edge_inspector.schema import MAX_BYTES, Field, TolerantModel
from edge_inspector.sender import Sender
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

ORDERS = 128
"""Remote orders that wait for the daemon; more are not acknowledged, so that the broker delivers them again."""
ALERTS = 256
"""That wait to be sent."""
ALERT_EXPIRES_S = 3600
REPORTS = 256
"""Of bundles that are listened to."""
LISTEN_S = 1.0
_WAIT_S = 0.25
_PACE_S = 0.005
"""A backlog is sent a batch at a time: its acknowledgements gather meanwhile, and parts have the processor."""
_HEAD_EVERY_S = 1.0
_MAX_GAPS = 16
_REPLAYED = ""
"""Whose turn it is, where it is that of a replay."""
_UNRETAINED_S = 10.0
"""Where the broker retains nothing, what is true is said this often."""


class _Asked(TolerantModel):
    """What a command that is wrong elsewhere needs, to be answered."""

    request_id: messages.PlainId
    client: messages.TopicLevel


class _Seen(TolerantModel):
    """config/reported and bundle/{name}/reported, as far as the device reads them itself: what the broker holds of them."""

    seen: int = Field(0, ge=0, le=messages.MAX_VERSION)


class Commanded(Protocol):
    """A station, as far as the broker knows it."""

    def command(self, name: str, product: str | None) -> None:
        """Carry out a command. Raises InspectorError."""
        ...


class Door(Protocol):
    """Decides whose commands are carried out."""

    def answered(self, name: str, payload: bytes, topic: str, act: Callable[[Command], None]) -> tuple[Command, Reply]:
        """Carry a command out by `act`, unless it was; returns it with its answer. Raises InspectorError."""
        ...


@dataclass(frozen=True)
class _Retained:
    message: BaseModel
    payload: bytes
    unheard: tuple[BaseModel, bytes] | None = None
    """What is told instead while no trigger is heard."""


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
        commands: Door | None = None,
        *,
        tick: Callable[[], None] = lambda: None,
        hears: Callable[[], int | None] = lambda: 0,
        proven: Callable[[], bool] = lambda: True,
    ) -> None:
        """`commands` lets commands in; None: there are none. `tick` is called at least once a second while the thread is alive.

        `hears`: the number of the connection on which triggers are heard; while it is None no station is told ready.
        No result leaves before it is `proven` that the numbers of the outbox are nobody else's.
        """
        self.connection, self.topics, self.outbox, self.stations = connection, topics, outbox, stations
        self.orders: queue.Queue[Message] = queue.Queue(ORDERS)
        """Of configurations and bundles, for the daemon: it acknowledges them."""
        self.reported: dict[tuple[str, ...], int] = {}
        """Up to which version orders are taken, as the broker holds it in our own reports, by topic."""
        self.refused = 0
        self.failure: Exception | None = None
        self._tick, self._hears, self._proven, self._commands = tick, hears, proven, commands
        self._generation = 0
        """Of the outbox: what was sent in an earlier one is not acknowledged in this."""
        self._stands_s: float | None = None
        self._heard = hears()
        self._retained: dict[str, _Retained] = {}
        self._taken_back: dict[str, None] = {}
        """Topics that are to hold nothing any more."""
        self._said: set[str] = set()
        """Topics of what is retained that the broker has had from us."""
        self._told: dict[str, bytes] = {}
        """Of what is retained, what this connection has been told."""
        self._alerts: queue.SimpleQueue[Alert] = queue.SimpleQueue()
        self._standing: int | None = None
        self._sent: dict[str, int] = {}
        self._sender = Sender(connection, topics)
        self._resending = Resending(outbox, topics, self._sender)
        self._turn = 0
        self._refusing = threading.Lock()
        self._head_at = self._unretained_s = 0.0
        self._redeliver_s: float | None = None
        self._refusals = Flood()
        self._closing = threading.Event()
        self._thread = Thread(target=self._run, name="broker", daemon=True)

    @staticmethod
    def subscriptions(topics: Topics) -> tuple[str, ...]:
        """What the daemon listens to; first to what it has reported itself, so that this comes before old orders."""
        return (
            topics.of("config", "reported"), topics.of("bundle", "+", "reported"),
            topics.of("state"), topics.of("replay", "+", "request"), topics.of("command", "+"),
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
        unheard = None
        if isinstance(message, Ready) and message.ready:  # a trigger that it asks for must not be lost
            deaf = message.model_copy(update={"ready": False, "reason": "no trigger is heard: see health"})
            unheard = deaf, messages.encode(deaf)
        self._retained[self.topics.of(*levels)] = _Retained(message, messages.encode(message), unheard)
        self.connection.wake()

    def alert(self, alert: Alert) -> None:
        """Tell people, as soon as there is a connection; of many that wait the latest are let go."""
        if self._alerts.qsize() < ALERTS:
            self._alerts.put(alert)
            self.connection.wake()

    def forget(self, *levels: str) -> None:
        """Take a retained message back: what it is about is gone."""
        topic = self.topics.of(*levels)
        if self._retained.pop(topic, None) is not None:
            self._taken_back[topic] = None
            self.connection.wake()

    @property
    def has_listened(self) -> bool:
        """Whether what the broker holds of our own reports has come, if there is anything: within a second, in order."""
        return self._stands_s is not None and time.monotonic() - self._stands_s > LISTEN_S

    # --- the thread

    def _run(self) -> None:
        try:
            end = None
            while end is None or (time.monotonic() < end and self._pending()):
                self._tick()
                self._take_events(0.02 if end else _WAIT_S)
                self._notice_connection()
                if self._standing is not None:
                    self._send_alerts()
                    self._send_retained()
                    if self._send_results():
                        time.sleep(_PACE_S)
                self._redeliver()
                if self._closing.is_set() and end is None:
                    end = time.monotonic() + 1.0
        except Exception as error:
            log.exception("broker thread ended")
            self.failure = error

    def _pending(self) -> bool:
        return self._standing is not None and (bool(len(self._sender.out)) or bool(self._unsent()) or not self._alerts.empty())

    def _take_events(self, wait_s: float) -> None:
        try:
            event = self.connection.events.get(timeout=wait_s)
            while True:
                if isinstance(event, Message):
                    self._take(event)
                elif isinstance(event, Acknowledged):
                    self._acknowledged(event.token)
                elif isinstance(event, Refused):
                    self._was_refused(event)
                event = self.connection.events.get_nowait()
        except queue.Empty:
            return

    def _notice_connection(self) -> None:
        heard, standing = self._hears(), self.connection.standing
        if heard != self._heard:  # what the will may have said meanwhile is out of date
            self._heard = heard
            ready = self.topics.of("ready", "")
            self._told = {topic: told for topic, told in self._told.items() if not topic.startswith(ready)}
        generation = self.outbox.generation
        if (standing, generation) == (self._standing, self._generation):
            return
        if standing != self._standing:
            self._sender.begin()
        else:  # numbered anew: no answer to what was sent says anything of it
            self._sender.out.forget()
        self._standing, self._generation = standing, generation
        self._stands_s = self._stands_s or (time.monotonic() if standing is not None else None)
        self._resending.clear()
        self._head_at = 0.0
        for station in self.outbox.stations:
            self._sent[station] = self.outbox.head(station).acked
        self._told = {}

    def _send_alerts(self) -> None:
        while not self._alerts.empty() and self._sender.may_send:
            alert = self._alerts.get()
            left_s = (alert.expires_at - utc_now()).total_seconds()
            sent = self._sender.publish(self.topics.of("alert", alert.station), alert, expires_s=max(1.0, left_s))
            if not sent:
                self._alerts.put(alert)
                return

    def _unsent(self) -> dict[str, tuple[BaseModel, bytes]]:
        """What is retained and not told yet."""
        unsent = {}
        for topic, kept in self._retained.copy().items():  # at once, beside whoever adds to it
            message, payload = kept.message, kept.payload
            if self._heard is None and kept.unheard is not None:
                message, payload = kept.unheard
            if self._told.get(topic) != payload and not self._sender.is_held(topic):
                unsent[topic] = message, payload
        return unsent

    def _send_retained(self) -> None:
        now_s = time.monotonic()
        if self._proven() and now_s - self._head_at > _HEAD_EVERY_S:
            self._head_at = now_s
            for station in self.outbox.stations:
                self.retain(self._head(station), "head", station)
        if not self.connection.limits.retain and now_s - self._unretained_s > _UNRETAINED_S:
            self._unretained_s = now_s
            self._told = {}
        for topic in self._taken_back.copy():
            if topic in self._retained or self.connection.publish(topic, b"", retain=True) is not None:
                del self._taken_back[topic]
        for topic, (message, payload) in self._unsent().items():
            if not self._sender.may_send:
                return
            if self._sender.publish(topic, message, retain=True):
                self._told[topic] = payload

    def _head(self, station: str) -> Head:
        head = self.outbox.head(station)
        gaps = self.outbox.gaps(station, head.lo, head.hi, _MAX_GAPS)
        omitted = self.outbox.gap_count(station, head.lo, head.hi) - len(gaps) if len(gaps) == _MAX_GAPS else 0
        return Head(
            station=station, stream=head.stream, lo=head.lo, hi=head.hi, gaps=tuple(gaps), gaps_omitted=max(0, omitted),
            life=self.outbox.origin.life,
        )  # fmt: skip

    # --- results out

    def _send_results(self) -> bool:
        """Send what the window has room for, every station and the replays in turn; returns whether more waits."""
        if not self._proven():
            return False
        waiting = {
            station: self.outbox.head(station).hi - self._sent[station]
            for station in self.outbox.stations
            if not self._sender.is_held(self.topics.of("result", station))
        }
        if self._resending:
            waiting[_REPLAYED] = REPLAY_RANGE
        given = turns(waiting, self._sender.out.room, self._turn)
        self._turn += bool(given)
        for station, count in given.items():
            if station == _REPLAYED:
                self._resending.serve(count)
            elif not self._send_station(station, count):
                return False
        return sum(waiting.values()) > sum(given.values())

    def _send_station(self, station: str, count: int) -> bool:
        """The next results of a station; returns whether the connection stands."""
        topic, lo = self.topics.of("result", station), self._sent[station] + 1
        for seq, payload in self.outbox.results(station, lo, self.outbox.head(station).hi, count):
            fits = self._sender.fitted(topic, payload)
            if fits is None:
                self._left_out(station, seq)
            elif self._sender.result(topic, fits, station, seq):
                self._sent[station] = seq
            else:
                return False
        return True

    def _left_out(self, station: str, seq: int) -> None:
        """A result that fits in no form: a replay tells the gap, those behind it go on."""
        self._sent[station] = seq
        if not self._sender.out.waiting(station):
            self.outbox.acknowledged(station, seq, self._generation)

    def _acknowledged(self, token: int) -> None:
        sent = self._sender.acknowledged(token)
        if sent is not None and sent.topic in self._retained:
            self._said.add(sent.topic)
        if sent is not None and sent.station is not None:
            waiting = self._sender.out.waiting(sent.station)
            reached = self._sent[sent.station]  # or less, where one before was refused
            upto = min([reached, *(seq - 1 for seq in waiting)])
            self.outbox.acknowledged(sent.station, upto, self._generation)

    def _was_refused(self, refused: Refused) -> None:
        """The broker does not take a message: shorter at once, where it says that it is too large; else later again."""
        sent = self._sender.refused(refused)
        if sent is None:
            return
        self._told.pop(sent.topic, None)
        if sent.station is not None:  # from this one on again, in order
            self._sent[sent.station] = min(self._sent[sent.station], sent.seq - 1)

    # --- messages in

    def _take(self, message: Message) -> None:
        levels = self.topics.within(message.topic)
        if levels == ("state",):
            self._notice_another(message)
            return
        try:
            if levels[0] in ("config", "bundle") and levels[-1] != "reported":
                self._take_order(levels, message)
                return  # acknowledged once it is carried out
            self._take_other(levels, message)
        except InspectorError as error:
            self.refuse(levels[1], error)
        except (ArithmeticError, TypeError, ValueError) as error:  # never die of a message: it would come again for ever
            log.exception("message on %s", message.topic)
            self.refuse(levels[1], InspectorError(f"{message.topic}: {error}"))
        self.connection.acknowledge(message.ack)

    def _take_other(self, levels: tuple[str, ...], message: Message) -> None:
        if levels[0] in ("config", "bundle"):
            self._take_report(levels, message)
            return
        message.check(messages.MAX_REQUEST_BYTES)
        if levels[0] == "replay":
            self._take_replay(levels[1], message)
        else:
            self._take_command(levels[1], message)

    def _notice_another(self, message: Message) -> None:
        """What our own state says: after we have said it, nobody else may. Mosquitto throws out one of two clients of the same
        name without a word.
        """
        self.connection.acknowledge(message.ack)
        own = self._retained.get(message.topic)
        if message.topic not in self._said or own is None or message.payload == own.payload:
            return
        with contextlib.suppress(SchemaError):
            told, mine = messages.decode(StateMessage, message.payload, message.topic), own.message
            if isinstance(mine, StateMessage) and told.session != mine.session:
                what = f"another client uses {self.connection.client_id}: it says {message.topic} in session {told.session}"
                self.connection.note(Trouble("session_taken_over", what))

    def refuse(self, station: str, error: InspectorError) -> None:
        """Count a message that is not taken, and tell people; of several within a second one."""
        with self._refusing:  # several threads refuse
            self.refused += 1
            untold = self._refusals.told()
        if untold is None:
            return
        log.warning("message refused%s: %s", besides(untold), error)
        at = utc_now()
        self.alert(
            Alert(
                station=station if station in self.stations else "device",
                change="raised",
                code="bad_message",
                severity="off_spec",
                text=f"{str(error)[:1000]}{besides(untold)}",
                at=at,
                expires_at=at + timedelta(seconds=ALERT_EXPIRES_S),
            )  # fmt: skip
        )

    def _take_order(self, levels: tuple[str, ...], message: Message) -> None:
        is_desired = levels[-1] == "desired"
        message.check(MAX_BYTES if is_desired else messages.MAX_REQUEST_BYTES, retained=is_desired)
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
        self._resending.ask(name, messages.decode(ReplayRequest, message.payload, message.topic), proven=self._proven())

    def _take_report(self, levels: tuple[str, ...], message: Message) -> None:
        """What the broker holds of us; what comes as we say it is no news."""
        known = levels in self.reported or len(self.reported) < REPORTS
        if message.retain and message.payload and known:
            self.reported[levels] = messages.decode(_Seen, message.payload, message.topic, MAX_REPORT_BYTES).seen

    def _take_command(self, name: str, message: Message) -> None:
        try:
            if self._commands is None:
                raise InspectorError("no commands are taken here")
            command, reply = self._commands.answered(name, message.payload, message.topic, partial(self._carry_out, name))
        except InspectorError as error:
            asked = messages.decode(_Asked, message.payload, message.topic)
            refused = ReplyError(code="refused", message=error.message, hint=error.hint)
            answer = Reply(request_id=asked.request_id, ok=False, error=refused)
            self._sender.publish(self.topics.of("reply", asked.client), answer)
            raise
        self._sender.publish(self.topics.of("reply", command.client), reply)

    def _carry_out(self, name: str, command: Command) -> None:
        messages.named(self.stations, command.station).command(name, command.product)
