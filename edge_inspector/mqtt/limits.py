"""What a broker allows one client (MQTT 5, 3.2.2.3); MQTT 3.1.1 tells nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_HEADER_BYTES = 16
"""Of a PUBLISH beside topic and payload: fixed header, lengths, packet id, expiry."""
NO_LIMIT = 1 << 28
"""The largest packet that MQTT has."""


@dataclass(frozen=True)
class Limits:
    """Each field as where the broker tells no limit."""

    packet_bytes: int = NO_LIMIT
    qos: int = 1
    """Of ours, which is at most 1."""
    retain: bool = True
    in_flight: int = 65535
    keepalive_s: int | None = None
    wildcards: bool = True

    @classmethod
    def of(cls, properties: Any) -> Limits:
        """The limits that a CONNACK's properties tell."""

        def told(name: str, otherwise: int) -> int:
            return int(getattr(properties, name, otherwise))

        keepalive_s = told("ServerKeepAlive", 0)
        return cls(
            packet_bytes=told("MaximumPacketSize", NO_LIMIT),
            qos=min(1, told("MaximumQoS", 1)),
            retain=bool(told("RetainAvailable", 1)),
            in_flight=told("ReceiveMaximum", 65535),
            keepalive_s=keepalive_s or None,
            wildcards=bool(told("WildcardSubscriptionAvailable", 1)),
        )

    def payload_bytes(self, topic: str) -> int:
        """The largest payload that may be published on a topic."""
        return self.packet_bytes - _HEADER_BYTES - len(topic.encode())

    def lacks(self) -> list[str]:
        """What the broker does not do and the daemon wants, each as a sentence."""
        lacks = []
        if self.qos < 1:
            lacks.append("it takes QoS 0 only: what is lost on the way comes by a replay, or never")
        if not self.retain:
            lacks.append("it keeps no retained messages: whoever connects waits for ready, state and head")
        if not self.wildcards:
            lacks.append("it knows no subscriptions with wildcards: no trigger and no command is heard")
        return lacks
