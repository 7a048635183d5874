"""For people: see a device's line configuration, what would change, and order it, over MQTT."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from edge_inspector import messages, signatures
from edge_inspector.errors import BrokerError, SchemaError
from edge_inspector.messages import ConfigDesired, ConfigReported, Confirm, StateMessage, Topics
from edge_inspector.mqtt import Acknowledged, Connection, Message
from edge_inspector.signatures import Ed25519PrivateKey

MAX_REPORT_BYTES = 1 << 18
_WAIT_S = 0.2


@dataclass(frozen=True)
class Difference:
    """One place where two documents differ; `old` or `new` is None where there is nothing."""

    path: str
    old: object
    new: object


def differences(old: object, new: object, path: str = "") -> Iterator[Difference]:
    """Where two documents of plain values differ, by path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield Difference(path, old, new)


class Remote:
    """One device, as far as its line configuration goes. Needs a connection with `subscriptions`."""

    def __init__(self, connection: Connection, topics: Topics, *, by: str, key: Ed25519PrivateKey | None = None) -> None:
        """`key` signs orders; `by` stands in the device's audit trail."""
        self.connection, self.topics, self.by, self._key = connection, topics, by, key
        self.online: bool | None = None
        """Whether the device is there; None: it was never heard of."""
        self._reported: ConfigReported | None = None

    @staticmethod
    def subscriptions(topics: Topics) -> tuple[str, ...]:
        """What the connection must subscribe to."""
        return topics.of("config", "reported"), topics.of("state")

    def reported(self, timeout_s: float) -> ConfigReported:
        """What the device says of its configuration. Raises BrokerError when it says nothing."""
        return self.awaited(lambda _: True, timeout_s)

    def awaited(
        self,
        is_it: Callable[[ConfigReported], bool],
        timeout_s: float,
        tell: Callable[[ConfigReported], None] = lambda _: None,
    ) -> ConfigReported:
        """Wait until the device reports something; `tell` gets each report on the way. Raises BrokerError after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self._receive()
            if self._reported is not None:
                tell(self._reported)
                if is_it(self._reported):
                    return self._reported
        told = "says nothing of its configuration" if self._reported is None else "has not answered"
        told = "is offline, and " + told if self.online is False else told
        raise BrokerError(
            f"{self.topics.device_path} {told} within {timeout_s:g} s (broker {self.connection.endpoint}"
            f"{': ' + self.connection.refusal if self.connection.refusal else ''})",
            hint="does it run, and are site, line and device right? edge-inspector watch shows what it says",
        )

    def desire(self, document: dict[str, Any], version: int, confirm_s: int) -> None:
        """Order a line configuration, retained, under this version. Raises BrokerError."""
        order = ConfigDesired(
            by=self.by, device=self.topics.device_path, line={**document, "version": version}, confirm_s=confirm_s
        )
        self._send(order, "desired", retain=True)

    def decide(self, version: int, action: Literal["confirm", "cancel", "reset"]) -> None:
        """Confirm or cancel the configuration on trial, or reset to the device's own file. Raises BrokerError."""
        order = Confirm(by=self.by, device=self.topics.device_path, subject="configuration", version=version, action=action)
        self._send(order, "confirm", retain=False)

    def _send(self, order: ConfigDesired | Confirm, level: str, *, retain: bool) -> None:
        if self._key is not None:
            values = order.model_dump(mode="json", by_alias=True, exclude_none=True)
            order = order.model_copy(update={"signature": signatures.sign(messages.signed_bytes(values), self._key)})
        token = self.connection.publish(self.topics.of("config", level), messages.encode(order), retain=retain)
        end = time.monotonic() + 10.0
        while token is not None and time.monotonic() < end:
            if token in self._receive():
                return
        raise BrokerError(f"broker {self.connection.endpoint}: the order could not be sent", hint="is the connection up?")

    def _receive(self) -> set[int]:
        """Take what has arrived; returns the tokens of what the broker has acknowledged."""
        done: set[int] = set()
        try:
            event = self.connection.events.get(timeout=_WAIT_S)
            while True:
                if isinstance(event, Acknowledged):
                    done.add(event.token)
                elif isinstance(event, Message):
                    self.connection.acknowledge(event.ack)
                    self._take(event)
                event = self.connection.events.get_nowait()
        except queue.Empty:
            return done

    def _take(self, message: Message) -> None:
        try:
            if self.topics.within(message.topic) == ("state",):
                self.online = messages.decode(StateMessage, message.payload, message.topic).online
            else:
                self._reported = messages.decode(ConfigReported, message.payload, message.topic, MAX_REPORT_BYTES)
        except SchemaError as error:
            raise BrokerError(
                f"{message.topic}: {error.message}", hint="is the device of another version than this program?"
            ) from error
