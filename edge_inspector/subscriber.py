"""For users of results: every result once, in order, across broker restarts and outages.

PUBACK is not delivery: a broker may lose what it acknowledged. The subscriber therefore compares what arrives with
each station's retained head, asks the device to send again what is missing, and skips only what the device says was
dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_inspector import messages
from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.messages import Gap, Head, ReplayEnd, ReplayRequest, Tagged, Topics
from edge_inspector.mqtt import Connection, Message
from edge_inspector.results import Result

log = logging.getLogger(__name__)

HELD_BACK = 5000
"""Results that wait for an earlier one; more are let go, and replayed when their turn comes."""
_GRACE_S = 0.5
_ASK_AGAIN_S = 3.0
_SAVE_EVERY_S = 1.0


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
    """Results of one device. Iterate `results`; with a state file it goes on where it stopped."""

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
        self.connection, self.topics = connection, topics
        self.client = client or f"sub-{secrets.token_hex(4)}"
        self.duplicates = self.replayed = self.skipped = 0
        self._start, self._on_other, self._state = start, on_other, state
        self._streams: dict[str, _Stream] = {}
        self._saved_s = 0.0
        if state is not None and state.exists():
            try:
                known = json.loads(state.read_text())
                self._streams = {name: _Stream(stream, upcoming) for name, (stream, upcoming) in known.items()}
            except (OSError, ValueError) as error:
                raise InspectorError(f"{state}: not a subscriber's state: {error}", hint="delete it to start anew") from error

    @staticmethod
    def subscriptions(topics: Topics, client: str) -> tuple[str, ...]:
        """What the connection must subscribe to."""
        return topics.of("result", "+"), topics.of("head", "+"), topics.of("replay", "+", client)

    def results(self, timeout_s: float) -> Iterator[Result]:
        """Yield results, in order per station, until none came for `timeout_s`. A result counts as taken when the
        next one is asked for.
        """
        quiet_until = time.monotonic() + timeout_s
        while time.monotonic() < quiet_until:
            self._receive(min(0.2, timeout_s))
            for name, stream in self._streams.items():
                while stream.next in stream.waiting:
                    if stream.has_taken(stream.waiting[stream.next]):
                        self.duplicates += 1
                    else:
                        yield stream.waiting[stream.next]
                    del stream.waiting[stream.next]
                    stream.next += 1
                    quiet_until = time.monotonic() + timeout_s
                self._notice_gap(name, stream)
            self._save()

    def save(self) -> None:
        """Write the state file now."""
        self._saved_s = 0.0
        self._save()

    def _save(self) -> None:
        if self._state is None or time.monotonic() - self._saved_s < _SAVE_EVERY_S:
            return
        self._saved_s = time.monotonic()
        part = self._state.with_name(self._state.name + ".part")
        part.write_text(json.dumps({name: [s.stream, s.next] for name, s in self._streams.items() if s.stream}))
        os.replace(part, self._state)

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
            elif self._on_other is not None:
                self._on_other(levels, message.payload)
        except SchemaError as error:
            log.warning("ignored: %s", error)

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
            log.warning("station %s: results %d to %d were dropped by the device's quota", name, stream.next, gap.hi)
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
