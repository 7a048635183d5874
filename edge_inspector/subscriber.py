"""For users of results: every result once, in order, across broker restarts and outages.

PUBACK is not delivery: a broker may lose what it acknowledged. The subscriber therefore compares what arrives with
each station's retained head, asks the device to send again what is missing, and skips only what the device says will
never come.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_inspector import durable, messages
from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.messages import Gap, Head, Ready, ReplayEnd, ReplayRequest, StateMessage, Tagged, Topics
from edge_inspector.mqtt import Connection, Message
from edge_inspector.results import Result

log = logging.getLogger(__name__)

HELD_BACK = 5000
"""Results that wait for an earlier one; more are let go, and replayed when their turn comes."""
_GRACE_S = 0.5
_ASK_AGAIN_S = 3.0
_SAVE_EVERY_S = 1.0
_WAIT_S = 0.2
_BY_NAME_S = 1.0
"""What a station retains is asked for by name if it was not heard for so long: RabbitMQ finds nothing by a wildcard."""
_WHY_DROPPED = {"quota": "were dropped by the device's quota", "too_large": "are too large for the broker"}


@dataclass
class _Stream:
    """Where one station's stream stands."""

    stream: str = ""
    next: int = 1
    known: int = 0
    """Highest seq that is known to exist."""
    waiting: dict[int, Result] = field(default_factory=dict)
    missing_since: float | None = None
    asked_s: float = 0.0
    before: tuple[str, int] = ("", 1)
    """The stream that ended, and what was next in it."""

    def has_taken(self, result: Result) -> bool:
        """Whether a result that moved into this stream came in the one before."""
        stream, _, seq = (result.former_id or "").rpartition("-")
        return stream == self.before[0] and seq.isdecimal() and int(seq) < self.before[1]


class Subscriber:
    """Results of one device. Iterate `results`; with a state file it goes on where it stopped.

    While it is iterated it also knows whether the device is there (`online`) and which stations are ready (`is_ready`).
    """

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        *,
        client: str | None = None,
        state: Path | None = None,
        start: Literal["all", "new"] = "new",
        on_other: Callable[[tuple[str, ...], bytes], None] | None = None,
    ) -> None:
        """`client` names the replay topic; `start` says where a station begins that `state` does not know.

        `on_other` gets the levels and payload of everything else that is subscribed. Raises InspectorError for a
        state file that cannot be read.
        """
        self.online: bool | None = None
        """Whether the device is there; None: nobody has said so yet."""
        self.connection, self.topics = connection, topics
        self.client = client or f"sub-{secrets.token_hex(4)}"
        self.duplicates = self.replayed = self.skipped = 0
        self._start, self._on_other, self._state = start, on_other, state
        self._streams: dict[str, _Stream] = {}
        self._saved: dict[str, tuple[str, int]] = {}
        self._saved_s = 0.0
        self._device: StateMessage | None = None
        self._ready: dict[str, Ready] = {}
        self._standing: int | None = None
        self._nameless: dict[str, float] = {}
        """Stations, and when they are asked for by name, unless what they retain was heard."""
        if state is not None and state.exists():
            try:
                known = json.loads(state.read_text())
                self._streams = {name: _Stream(stream, upcoming) for name, (stream, upcoming) in known.items()}
            except (OSError, ValueError) as error:
                raise InspectorError(f"{state}: not a subscriber's state: {error}", hint="delete it to start anew") from error

    @staticmethod
    def subscriptions(topics: Topics, client: str) -> tuple[str, ...]:
        """What the connection must subscribe to."""
        told = (topics.of(name, "+") for name in ("result", "head", "ready"))
        return *told, topics.of("state"), topics.of("replay", "+", client)

    def results(self, timeout_s: float | None = None) -> Iterator[Result]:
        """Yield results, in order per station, until none came for `timeout_s`; None: for ever.

        A result counts as taken when the next one is asked for. Whoever leaves the loop gets the one in hand again next
        time, and after a power cut or kill what was taken in the last second.
        """
        patience_s = float("inf") if timeout_s is None else timeout_s
        quiet_until = time.monotonic() + patience_s
        try:
            while time.monotonic() < quiet_until:
                self._receive(min(_WAIT_S, patience_s))
                for name, stream in list(self._streams.items()):
                    while stream.next in stream.waiting:
                        if stream.has_taken(stream.waiting[stream.next]):
                            self.duplicates += 1
                        else:
                            yield stream.waiting[stream.next]
                        del stream.waiting[stream.next]
                        stream.next += 1
                        quiet_until = time.monotonic() + patience_s
                    self._notice_gap(name, stream)
                self._ask_by_name()
                self._save()
        finally:  # also where its user leaves the loop
            self.save()

    def is_ready(self, station: str) -> bool:
        """Whether a station would judge a part now, as of the last messages that `results` has read.

        What is retained outlives a device that dies: it counts only while the device is online, in the session that
        said so, and while this subscriber is connected itself.
        """
        ready, device = self._ready.get(station), self._device
        if ready is None or device is None or self._standing is None or self._standing != self.connection.standing:
            return False
        return device.online and ready.ready and ready.session == device.session

    def save(self) -> None:
        """Write the state file now; when this returns it survives a power cut."""
        self._saved_s = 0.0
        self._save()

    def _save(self) -> None:
        if self._state is None or time.monotonic() - self._saved_s < _SAVE_EVERY_S:
            return
        self._saved_s = time.monotonic()
        known = {name: (s.stream, s.next) for name, s in self._streams.items() if s.stream}
        if known != self._saved:
            durable.write(self._state, json.dumps(known).encode())
            self._saved = known

    # --- messages in

    def _receive(self, wait_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            event = self.connection.events.get(timeout=wait_s)
            while True:
                if isinstance(event, Message):
                    self._take(event)
                    self.connection.acknowledge(event.ack)
                event = self.connection.events.get_nowait()

    def _take(self, message: Message) -> None:
        levels = self.topics.within(message.topic)
        try:
            if levels[0] == "result":
                self._take_result(levels[1], messages.decode(Result, message.payload, message.topic))
            elif levels[0] == "head":
                self._take_head(levels[1], messages.decode(Head, message.payload, message.topic))
            elif levels[0] == "replay":
                self._take_replay(levels[1], message)
            else:
                self._take_presence(levels, message)
                if self._on_other is not None:
                    self._on_other(levels, message.payload)
        except SchemaError as error:
            log.warning("ignored: %s", error)

    def _take_presence(self, levels: tuple[str, ...], message: Message) -> None:
        if self._standing != message.ack[0]:  # another connection: what is retained comes again
            self._standing = message.ack[0]
            self._device, self._ready, self.online = None, {}, None
        if levels[0] == "ready":
            self._ready[levels[1]] = messages.decode(Ready, message.payload, message.topic)
        elif levels == ("state",):
            self._device = messages.decode(StateMessage, message.payload, message.topic)
            self.online = self._device.online
            for name in self._device.stations:
                self._nameless.setdefault(name, time.monotonic() + _BY_NAME_S)

    def _ask_by_name(self) -> None:
        """Subscribe to what a station retains, where it has not come by wildcard."""
        for name, at_s in self._nameless.items():
            stream = self._streams.get(name)
            if at_s < time.monotonic() and not (stream and stream.stream and name in self._ready):
                self._nameless[name] = float("inf")
                self.connection.subscribe(self.topics.of("head", name), self.topics.of("ready", name))

    def _take_replay(self, name: str, message: Message) -> None:
        kind = messages.decode(Tagged, message.payload, message.topic).schema_
        stream = self._streams.setdefault(name, _Stream())
        if kind == "ei.gap.v1":
            self._skip(name, messages.decode(Gap, message.payload, message.topic))
        elif kind == "ei.replay-end.v1":
            messages.decode(ReplayEnd, message.payload, message.topic)
            stream.asked_s = 0.0
        else:
            self.replayed += 1
            self._take_result(name, messages.decode(Result, message.payload, message.topic))

    def _take_result(self, name: str, result: Result) -> None:
        stream = self._streams.setdefault(name, _Stream())
        if not stream.stream:
            self._begin(stream, result.stream, result.seq if self._start == "new" else 1)
        elif stream.stream != result.stream:
            log.warning("station %s: stream %s ended, %s begins", name, stream.stream, result.stream)
            self._begin(stream, result.stream, 1)
        stream.known = max(stream.known, result.seq)
        if result.seq < stream.next or result.seq in stream.waiting:
            self.duplicates += 1
        elif len(stream.waiting) < HELD_BACK or result.seq == stream.next:
            stream.waiting[result.seq] = result

    def _begin(self, stream: _Stream, identity: str, first: int) -> None:
        stream.before = stream.stream, stream.next
        stream.stream, stream.next, stream.known, stream.waiting = identity, first, 0, {}
        stream.missing_since = None

    def _take_head(self, name: str, head: Head) -> None:
        stream = self._streams.setdefault(name, _Stream())
        if not stream.stream:
            self._begin(stream, head.stream, head.hi + 1 if self._start == "new" else head.lo)
        elif stream.stream != head.stream:
            return  # a retained head may be an old one; a new stream shows by its results
        stream.known = max(stream.known, head.hi)
        for lo, hi in ((1, head.lo - 1), *head.gaps):
            self._skip(name, Gap(station=name, stream=head.stream, lo=lo, hi=hi))

    def _skip(self, name: str, gap: Gap) -> None:
        stream = self._streams.setdefault(name, _Stream())
        if stream.stream == gap.stream and gap.lo <= stream.next <= gap.hi:
            log.warning("station %s: results %d to %d %s", name, stream.next, gap.hi, _WHY_DROPPED[gap.reason])
            self.skipped += gap.hi + 1 - stream.next
            stream.next = gap.hi + 1
            for seq in [seq for seq in stream.waiting if seq < stream.next]:
                del stream.waiting[seq]

    # --- gaps

    def _notice_gap(self, name: str, stream: _Stream) -> None:
        now = time.monotonic()
        if not stream.stream or stream.next > stream.known:
            stream.missing_since = None
            return
        stream.missing_since = stream.missing_since or now
        if now - stream.missing_since < _GRACE_S or now - stream.asked_s < _ASK_AGAIN_S:
            return
        hi = min(stream.waiting, default=stream.known + 1) - 1
        request = ReplayRequest(
            request_id=secrets.token_hex(4), client=self.client, stream=stream.stream, lo=stream.next, hi=hi
        )
        if self.connection.publish(self.topics.of("replay", name, "request"), messages.encode(request)) is not None:
            stream.asked_s = now
