"""For people: one trigger with its verdict, one command with its answer, over MQTT."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

from pydantic import BaseModel

from edge_inspector import messages
from edge_inspector.errors import BrokerError, SchemaError
from edge_inspector.frames import utc_now
from edge_inspector.messages import Command, Reply, StateMessage, Topics, TriggerRequest, VerdictMessage
from edge_inspector.mqtt import Connection, Message
from edge_inspector.remote.client import refuse_unconnected, signed
from edge_inspector.signatures import Ed25519PrivateKey

_WAIT_S, _STATE_S = 0.2, 5.0
COMMAND_EXPIRES_S = 30
M = TypeVar("M", bound=BaseModel)


class Asking:
    """One device, for one question. Needs a connection with `subscriptions`."""

    def __init__(self, connection: Connection, topics: Topics) -> None:
        self._connection, self._topics = connection, topics

    @staticmethod
    def subscriptions(topics: Topics, client: str) -> tuple[str, ...]:
        """What the connection must subscribe to; `client` gets the replies."""
        return topics.of("state"), topics.of("verdict", "+"), topics.of("reply", client)

    def trigger(self, station: str, request: TriggerRequest, wait_s: float) -> VerdictMessage | None:
        """Have a part inspected; its verdict, or None where there is none within `wait_s`. Raises BrokerError."""
        self._session()
        self._send(request, "trigger", station, expires_s=wait_s)
        for verdict in self._heard(VerdictMessage, ("verdict", station), wait_s):
            if verdict.trigger_id == request.trigger_id:
                return verdict
        return None

    def command(self, command: Command, key: Ed25519PrivateKey | None, wait_s: float) -> Reply:
        """Give a command, signed for this device and session where there is a key. Raises BrokerError without an answer."""
        expires_at = utc_now() + timedelta(seconds=COMMAND_EXPIRES_S)
        bound = {"device": self._topics.device_path, "session": self._session(), "expires_at": expires_at}
        self._send(signed(command.model_copy(update=bound), key), "command", command.command, expires_s=COMMAND_EXPIRES_S)
        for reply in self._heard(Reply, ("reply", command.client), wait_s):
            if reply.request_id == command.request_id:
                return reply
        raise BrokerError(
            f"{self._topics.device_path} has not answered within {wait_s:g} s",
            hint="may this user publish and read these topics at the broker? edge-inspector watch shows what the device says",
        )

    def _session(self) -> str:
        """Of the device, as it is there: what it shall do later is not asked for. Raises BrokerError."""
        refuse_unconnected(self._connection, _STATE_S)
        state = next(self._heard(StateMessage, ("state",), _STATE_S), None)
        if state is None or not state.online:
            told = "says nothing" if state is None else "is offline"
            raise BrokerError(
                f"{self._topics.device_path} {told}: nothing was sent",
                hint="does it run, and are site, line and device right? edge-inspector watch shows what it says",
            )
        return state.session

    def _send(self, message: BaseModel, *levels: str, expires_s: float) -> None:
        if self._connection.publish(self._topics.of(*levels), messages.encode(message), expires_s=expires_s) is None:
            raise BrokerError(f"broker {self._connection.endpoint}: it could not be sent", hint="is the connection up?")

    def _heard(self, model: type[M], levels: tuple[str, ...], wait_s: float) -> Iterator[M]:
        """What comes on one topic, until `wait_s` is over."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            try:
                event = self._connection.events.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
            if not isinstance(event, Message):
                continue
            self._connection.acknowledge(event.ack)
            if self._topics.within(event.topic) == levels:
                yield _decoded(model, event)


def _decoded(model: type[M], message: Message) -> M:
    try:
        return messages.decode(model, message.payload, message.topic)
    except SchemaError as error:
        raise BrokerError(
            f"{message.topic}: {error.message}", hint="is the device of another version than this program?"
        ) from error


def fresh_id() -> str:
    """For one question."""
    return f"cli-{secrets.token_hex(6)}"
