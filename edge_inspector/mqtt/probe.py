"""Try a broker once, for people."""

from __future__ import annotations

import queue
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edge_inspector.config import BrokerConfig
from edge_inspector.errors import BrokerError
from edge_inspector.mqtt.connection import Acknowledged, Connection, Refused
from edge_inspector.mqtt.limits import NO_LIMIT, Limits
from edge_inspector.mqtt.trouble import hint_of

_WAIT_S = 0.1
_ANSWER_S = 2.0


@dataclass(frozen=True)
class Probed:
    """What a broker answered."""

    protocol: str
    limits: Limits
    unheard: dict[str, str]
    """Subscriptions that it refuses, and why."""
    refused: str = ""
    """Why it does not take a publication; empty: it does, or was not asked."""

    @property
    def told(self) -> str:
        """Protocol and limits, in words."""
        words = [self.protocol]
        if self.limits.packet_bytes < NO_LIMIT:
            words.append(f"packets of at most {self.limits.packet_bytes} bytes")
        if self.limits.keepalive_s is not None:
            words.append(f"a sign of life every {self.limits.keepalive_s} s")
        return ", ".join(words)


def probe(config: BrokerConfig, *, password: str | None, tls: ssl.SSLContext | None, timeout_s: float = 6.0) -> str:
    """Connect once; returns the protocol spoken. Raises BrokerError with the broker's own words."""
    return tried(config, password=password, tls=tls, timeout_s=timeout_s).protocol


def tried(
    config: BrokerConfig, *, password: str | None, tls: ssl.SSLContext | None, subscriptions: Sequence[str] = (),
    publication: tuple[str, bytes] | None = None, timeout_s: float = 6.0,
) -> Probed:  # fmt: skip
    """Connect, subscribe and publish as asked, once, by a name of its own. Raises BrokerError with the broker's own words."""
    client = f"ei-check-{random.getrandbits(32):08x}"
    connection = Connection(
        config, client, subscriptions=subscriptions, password=password, tls=tls, durable=False
    )  # fmt: skip
    with connection:
        _await(connection, timeout_s)
        protocol = "MQTT 5" if connection.version == 5 else "MQTT 3.1.1"
        refused = _published(connection, *publication) if publication else ""
        return Probed(protocol, connection.limits, dict(connection.unheard), refused)


def _await(connection: Connection, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if connection.connected.wait(_WAIT_S):
            return
        if connection.refusal and not _may_be_the_protocol(connection):
            break
    words = connection.refusal or f"{connection.endpoint}: no answer"
    raise BrokerError(words, hint=hint_of(words, tls=connection.config.tls is not None))


def _may_be_the_protocol(connection: Connection) -> bool:
    """A broker that knows MQTT 3.1.1 only says nothing, closes, or refuses the version."""
    low = connection.refusal.lower()
    return any(mark in low for mark in ("no answer", "closed the connection", "protocol version"))


def _published(connection: Connection, topic: str, payload: bytes) -> str:
    """Why the broker does not take a publication."""
    token, end = connection.publish(topic, payload), time.monotonic() + _ANSWER_S
    while (left_s := end - time.monotonic()) > 0:
        try:
            event = connection.events.get(timeout=left_s)
        except queue.Empty:
            break
        if isinstance(event, Refused) and event.token == token:
            return event.words
        if isinstance(event, Acknowledged) and event.token == token:
            return ""
        if not connection.connected.is_set():
            return connection.ending.words
    return "no answer"
