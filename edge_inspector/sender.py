"""Publishes what fits: shortened where the broker takes no more, again later where it refuses, and every cause told."""

from __future__ import annotations

import logging
import time

from pydantic import BaseModel

from edge_inspector import messages
from edge_inspector.errors import BrokerError
from edge_inspector.fitting import shortened, shortened_result
from edge_inspector.messages import Topics
from edge_inspector.mqtt import TOO_LARGE, Connection, Refused, Trouble
from edge_inspector.outgoing import WINDOW, Outgoing, Sent

log = logging.getLogger(__name__)

_RESULT = "result"
_REFUSED_S = 5.0
"""What the broker refuses is tried again after so long."""


class Sender:
    """The one who uses a connection to publish; for one thread."""

    def __init__(self, connection: Connection, topics: Topics) -> None:
        self.connection, self.topics = connection, topics
        self.out = Outgoing()
        self._held: dict[str, tuple[float, str]] = {}
        """Topics that the broker refuses: when they are tried again, and why they are refused."""
        self._too_large: dict[str, str] = {}
        """Topics of what did not fit, and what became of it."""

    @property
    def may_send(self) -> bool:
        """Whether what is no result may be sent now."""
        return bool(self.out.room) or not self.out.is_careful

    def is_held(self, topic: str) -> bool:
        """Whether the broker has just refused something there."""
        return self._held.get(topic, (0.0, ""))[0] > time.monotonic()

    def begin(self) -> None:
        """The connection is another one, or gone: nothing that was sent will be answered any more."""
        contested = any(trouble.code == "session_taken_over" for trouble in self.connection.troubles())
        culprit = self.out.lost(may_be_a_message=self.connection.ending.may_be_a_message and not contested)
        if culprit is not None:
            log.warning("%s: the broker closes the connection on %d bytes", culprit.topic, culprit.size)
            self.connection.hurry()
        self.out.most = min(WINDOW, self.connection.limits.in_flight)

    def publish(self, topic: str, message: BaseModel, *, retain: bool = False, expires_s: float | None = None) -> bool:
        """Publish a message in the form that fits; returns whether that is done with, sent or given up."""
        most = self._most_bytes(topic)
        payload = shortened(message, most)
        if payload is None:
            size = len(messages.encode(message))
            self._note_too_large(topic, f"is not sent: {size} bytes, the broker takes {most}")
            return True
        return self._sent(Sent(topic, len(payload)), payload, retain=retain, expires_s=expires_s)

    def fitted(self, topic: str, payload: bytes, most_bytes: int | None = None) -> bytes | None:
        """A result in the form that the broker takes; None where there is none."""
        most = min(self._most_bytes(topic, _RESULT), most_bytes or len(payload))
        fits = shortened_result(payload, most)
        if fits is None:
            self._note_too_large(topic, f"has gaps: results of {len(payload)} bytes, the broker takes {most}")
        elif fits is not payload:
            self._note_too_large(topic, f"is shortened: results of {len(payload)} bytes, the broker takes {most}")
        return fits

    def result(self, topic: str, payload: bytes, station: str | None = None, seq: int = 0) -> bool:
        """Publish a result that fits; returns whether there is a connection."""
        return self._sent(Sent(topic, len(payload), station, seq, _RESULT), payload)

    def acknowledged(self, token: int) -> Sent | None:
        """The broker has it; returns what it was."""
        sent = self.out.take(token)
        if sent is not None:
            self.out.acknowledged(sent)
            self._held.pop(sent.topic, None)
        return sent

    def refused(self, refused: Refused) -> Sent | None:
        """The broker does not take it: it is to be shortened where it is too large, else to be tried later."""
        sent = self.out.take(refused.token)
        if sent is None:
            return None
        if refused.code == TOO_LARGE:
            self.out.learn(sent)
            return sent
        self._held[sent.topic] = time.monotonic() + _REFUSED_S, refused.words
        told = "; ".join(f"{self._named(topic)}: {words}" for topic, (_, words) in sorted(self._held.items()))
        self.connection.note(Trouble("publication_refused", f"the broker refuses {told}"))
        return sent

    def _sent(self, sent: Sent, payload: bytes, *, retain: bool = False, expires_s: float | None = None) -> bool:
        try:
            token = self.connection.publish(sent.topic, payload, retain=retain, expires_s=expires_s)
        except BrokerError:  # a new connection with a smaller limit, this very moment: the next round knows it
            return False
        if token is not None:  # known until acknowledged: who stops waits for "offline" to arrive, not to have been written
            self.out.add(token, sent)
        return token is not None

    def _most_bytes(self, topic: str, kind: str = "") -> int:
        return self.out.payload_bytes(topic, self.connection.limits.payload_bytes(topic), kind)

    def _note_too_large(self, topic: str, what: str) -> None:
        known = self._too_large.get(topic, "").partition(":")[0]
        if known != what.partition(":")[0]:  # figures differ from message to message
            self._too_large[topic] = what
        told = "; ".join(f"{self._named(name)} {words}" for name, words in sorted(self._too_large.items()))
        self.connection.note(Trouble("message_too_large", told))

    def _named(self, topic: str) -> str:
        return "/".join(self.topics.within(topic))
