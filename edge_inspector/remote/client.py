"""For people: see what a device judges by, what would change, and order it, over MQTT."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

from edge_inspector import messages, signatures
from edge_inspector.errors import BrokerError, SchemaError
from edge_inspector.messages import (
    MAX_REPORT_BYTES,
    BundleDesired,
    BundleReported,
    ConfigDesired,
    ConfigReported,
    Confirm,
    Order,
    StateMessage,
    Topics,
)
from edge_inspector.mqtt import Acknowledged, Connection, Message, Refused
from edge_inspector.schema import MAX_BYTES
from edge_inspector.signatures import Ed25519PrivateKey

CONFIGURATION = "configuration"
_WAIT_S, _CONNECT_S = 0.2, 8.0
_CONFIRM_EXPIRES_S = 60.0
"""A confirmation must not wait for a device that comes back: what it was about may have changed."""


R = TypeVar("R", ConfigReported, BundleReported)
S = TypeVar("S", bound=BaseModel)


def signed(order: S, key: Ed25519PrivateKey | None) -> S:
    """An order or command with its signature; as it is without a key."""
    if key is None:
        return order
    values = order.model_dump(mode="json", by_alias=True, exclude_none=True)
    return order.model_copy(update={"signature": signatures.sign(messages.signed_bytes(values), key)})


def refuse_unconnected(connection: Connection, timeout_s: float) -> None:
    """Wait for the broker. Raises BrokerError."""
    if not connection.connected.wait(min(timeout_s, _CONNECT_S)):
        refusal = connection.refusal or connection.endpoint
        raise BrokerError(f"no broker: {refusal}", hint="--broker, or broker: in device.yaml, says where it is")


def _levels(subject: str) -> tuple[str, ...]:
    return ("config",) if subject == CONFIGURATION else tuple(subject.split("/"))


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


class Remote(Generic[R]):
    """One device, as far as one thing goes that may be changed. Needs a connection with `subscriptions`."""

    def __init__(
        self, connection: Connection, topics: Topics, model: type[R], subject: str, *, by: str,
        key: Ed25519PrivateKey | None = None,
    ) -> None:  # fmt: skip
        """`subject`: configuration, or bundle/NAME. `key` signs orders; `by` stands in the device's audit trail."""
        self.connection, self.topics, self.subject, self.by = connection, topics, subject, by
        self.online: bool | None = None
        """Whether the device is there; None: it was never heard of."""
        self._model: type[R] = model
        self._key = key
        self._reported: R | None = None

    @staticmethod
    def subscriptions(topics: Topics, subject: str) -> tuple[str, ...]:
        """What the connection must subscribe to."""
        return topics.of(*_levels(subject), "reported"), topics.of("state")

    def reported(self, timeout_s: float) -> R:
        """What the device says of it, and whether it is there. Raises BrokerError when it says nothing."""
        return self.awaited(lambda _: self.online is not None, timeout_s)

    def awaited(
        self,
        is_it: Callable[[R], bool],
        timeout_s: float,
        tell: Callable[[R], None] = lambda _: None,
        hint: str = "does it run, and are site, line and device right? edge-inspector watch shows what it says",
    ) -> R:
        """Wait until the device reports something; `tell` gets each report on the way. Raises BrokerError after `timeout_s`."""
        refuse_unconnected(self.connection, timeout_s)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self._receive()
            if self._reported is not None:
                tell(self._reported)
                if is_it(self._reported):
                    return self._reported
        deafness = self.connection.deafness
        if deafness:
            raise BrokerError(
                f"broker {self.connection.endpoint}: {deafness}", hint="may this user subscribe? See its access list"
            )
        told = f"says nothing of {self.subject}" if self._reported is None else "has not answered"
        told = "is offline, and " + told if self.online is False else told
        raise BrokerError(f"{self.topics.device_path} {told} within {timeout_s:g} s", hint=hint)

    def desire(self, order: ConfigDesired | BundleDesired) -> None:
        """Order something, retained. Raises BrokerError."""
        self._send(order, "desired", retain=True)

    def decide(self, version: int, action: Literal["confirm", "cancel", "reset"]) -> None:
        """Confirm or cancel what is on trial, or reset to what the device has of its own. Raises BrokerError."""
        trial = self._reported.trial if self._reported is not None else None
        named = trial.id if trial is not None and trial.version == version else ""
        order = Confirm(by=self.by, subject=self.subject, version=version, action=action, trial=named)
        self._send(order, "confirm", retain=False)

    def _send(self, order: Order, level: str, *, retain: bool) -> None:
        order = order.model_copy(update={"by": self.by, "device": self.topics.device_path})
        payload = messages.encode(signed(order, self._key))
        if len(payload) > MAX_BYTES:
            raise BrokerError(f"the order has {len(payload)} bytes, {MAX_BYTES} may be sent", hint="shorten the document")
        topic, expires_s = self.topics.of(*_levels(self.subject), level), None if retain else _CONFIRM_EXPIRES_S
        token = self.connection.publish(topic, payload, retain=retain, expires_s=expires_s)
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
                elif isinstance(event, Refused):
                    raise BrokerError(
                        f"broker {self.connection.endpoint} refuses the order: {event.words}",
                        hint="may this user publish it? The broker's access list says it",
                    )
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
                self._reported = messages.decode(self._model, message.payload, message.topic, MAX_REPORT_BYTES)
        except SchemaError as error:
            raise BrokerError(
                f"{message.topic}: {error.message}", hint="is the device of another version than this program?"
            ) from error
