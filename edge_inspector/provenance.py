"""Whether the outbox is the newest copy of itself: a state folder that was put back would number other parts the same.

Nothing on the device can know that, but the broker holds the head that it was told last. So at each start every stream
that was there before is asked for, on a connection of its own that ends once the answer is known: a head of our own
stream that is above ours, or that was told in a later life of the file, says that this one is an older copy. Then new
streams begin, and what the broker does not have yet is numbered in them.

Anybody who may publish on `head/` can bring that about: once per start at most, and it costs new streams, no result.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from types import TracebackType

from edge_inspector import messages
from edge_inspector.errors import InspectorError, OutboxError
from edge_inspector.messages import Cause, Head, Topics
from edge_inspector.mqtt import Connection, Message
from edge_inspector.outbox import Outbox
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""For so long the broker is asked while it is there; then results go out as they are numbered, and health says so."""
_WAIT_S = 0.1


class Provenance:
    """Use as a context manager, within the outbox's. `proven` may be asked from any thread."""

    def __init__(
        self,
        outbox: Outbox,
        topics: Topics,
        connect: Callable[[Sequence[str]], Connection],
        is_connected: Callable[[], bool],
        *,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`connect` makes a connection with these subscriptions; `is_connected`: whether the daemon's own one stands;
        `wake` is called once the answer is known.
        """
        self._outbox, self._topics, self._connect = outbox, topics, connect
        self._is_connected, self._wake = is_connected, wake
        self._known = threading.Event()
        self._put_back = self._unasked = ""
        self._missing: set[str] = set()
        """Stations whose head has not been asked for to the end."""
        self._closing = threading.Event()
        self._thread = Thread(target=self._run, name="provenance", daemon=True)

    def __enter__(self) -> Provenance:
        """Begin to ask; an outbox whose streams are all new needs no answer."""
        self._missing = set(self._outbox.origin.streams)
        if self._missing:
            self._thread.start()
        else:
            self._known.set()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ask no more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def proven(self) -> bool:
        """Whether results may leave under the numbers that they have."""
        return self._known.is_set()

    def causes(self) -> list[Cause]:
        """What people should know."""
        texts = {"state_put_back": self._put_back, "state_unproven": self._unasked}
        return [
            Cause(code=code, severity="maintenance_required", thing="outbox", text=text) for code, text in texts.items() if text
        ]

    # --- the thread

    def _run(self) -> None:
        try:
            with self._connect([self._topics.of("head", station) for station in self._missing]) as connection:
                self._ask(connection)
        except Exception as error:  # root of a thread: results must not wait for ever
            log.exception("provenance")
            self._give_up(str(error))
        if not self._missing:
            self._known.set()
            self._wake()

    def _ask(self, connection: Connection) -> None:
        """Until it is known, the broker does not answer, or nobody wants to know."""
        asked, waited_s, at = None, 0.0, time.monotonic()
        while self._missing and not self._closing.is_set():
            if connection.standing != asked:
                asked = connection.standing
                self._send_own(connection)
            self._take_heads(connection)
            passed_s, at = time.monotonic() - at, time.monotonic()
            waited_s += passed_s if self._is_connected() else 0.0
            if waited_s > PATIENCE_S:
                self._give_up(connection.refusal or "it does not tell this device its own heads")
                return

    def _send_own(self, connection: Connection) -> None:
        """Tell our own heads, not to be retained: when one comes back, what is retained on its topic has come before."""
        for station, head in self._outbox.origin.streams.items():
            own = Head(station=station, stream=head.stream, lo=head.lo, hi=head.hi, life=self._outbox.origin.life)
            connection.publish(self._topics.of("head", station), messages.encode(own))

    def _take_heads(self, connection: Connection) -> None:
        try:
            event = connection.events.get(timeout=_WAIT_S)
        except queue.Empty:
            return
        if isinstance(event, Message):
            self._take(event)
            connection.acknowledge(event.ack)

    def _take(self, message: Message) -> None:
        station = self._topics.within(message.topic)[-1]
        told, origin = _head_of(message), self._outbox.origin
        mine = origin.streams.get(station)
        if told is None or mine is None or told.stream != mine.stream or station not in self._missing:
            return
        if told.life == origin.life:
            self._missing.discard(station)
        elif told.hi > mine.hi:
            why = f"the broker knows result {told.hi} of stream {mine.stream} ({station}), this file ends at {mine.hi}"
            self._begin_anew(why)
        elif told.life > origin.life_before:
            self._begin_anew(f"the broker knows a later life of stream {mine.stream} ({station}) than this file remembers")

    def _begin_anew(self, why: str) -> None:
        log.error("the state folder is an older copy of itself: %s", why)
        begun = self._begun()
        if begun is None:
            return
        self._missing.clear()
        named = ", ".join(f"{stream} ({station})" for station, stream in begun.items())
        self._put_back = f"the state folder is an older copy of itself: {why}; results go on in new streams: {named}"
        log.error("new streams begin: %s", named)

    def _begun(self) -> dict[str, str] | None:
        """The new streams once they are on the disk; None: it came to its end before that, the next start asks again."""
        try:
            done = self._outbox.begin_anew()
            while not self._closing.is_set():
                with contextlib.suppress(FutureTimeout):
                    return done.result(_WAIT_S)
        except OutboxError as error:
            log.error("new streams do not begin: %s", error)
        return None

    def _give_up(self, why: str) -> None:
        self._missing.clear()
        self._unasked = f"a state folder that was put back to an older copy would not be noticed: {why}"
        log.warning("%s", self._unasked)


def _head_of(message: Message) -> Head | None:
    """A head as it was told; None for what this device never told."""
    try:
        told = messages.decode(Head, message.payload, message.topic)
        return told if max(told.hi, told.life) <= messages.MAX_VERSION else None
    except (InspectorError, ArithmeticError, TypeError, ValueError) as error:
        log.warning("a head that this device never told: %s", error)
        return None
