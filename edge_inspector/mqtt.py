"""The connection to the broker: paho, made to keep promises.

* Every connection is a fresh paho client with the same client id, so that nothing old is resent from memory: what must
  not be lost lies in the outbox, which sends it again.
* paho's callbacks only put an Event on a bounded queue; a message that finds it full is not acknowledged, and the
  connection is made anew so that the broker delivers it again.
* Messages are acknowledged by hand, after whoever takes them has them safe.
* MQTT 5, or 3.1.1 where the broker knows no better.
"""

from __future__ import annotations

import logging
import queue
import random
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_inspector.config import BrokerConfig
from edge_inspector.errors import BrokerError
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

IN_FLIGHT = 20
EVENTS = 4096
WILL_DELAY_S = 5
SESSION_EXPIRY_S = 24 * 3600
_CONNECT_TIMEOUT_S = 5.0
_BACKOFF_S = (0.2, 5.0)


@dataclass(frozen=True)
class Message:
    """A message arrived; hand `ack` to `Connection.acknowledge` once it is safe."""

    topic: str
    payload: bytes
    retain: bool
    ack: tuple[int, int, int]

    def check(self, most_bytes: int, *, retained: bool = False) -> None:
        """Refuse a message that is too large, or retained where that may not be. Raises BrokerError."""
        if len(self.payload) > most_bytes:
            raise BrokerError(f"{self.topic}: {len(self.payload)} bytes, too large")
        if self.retain and not retained:
            raise BrokerError(f"{self.topic}: retained messages are refused", hint="publish it without the retain flag")


@dataclass(frozen=True)
class Acknowledged:
    """The broker has the publication with this token."""

    token: int


@dataclass(frozen=True)
class Woken:
    """Nothing from the broker: somebody called `wake`."""


Event = Message | Acknowledged | Woken


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when this client vanishes."""

    topic: str
    payload: bytes


def read_password(path: Path | None) -> str | None:
    """The first line of a password file. Raises BrokerError."""
    if path is None:
        return None
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise BrokerError(
            f"{path}: no password to read: {error}", hint="put the broker's password in its first line"
        ) from error


def tls_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """TLS as the configuration says. Raises BrokerError."""
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if cert:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise BrokerError(f"TLS files {ca}, {cert}, {key}: {error}", hint="check the paths under broker.tls") from error
    return context


class Connection:
    """A broker connection that stands again by itself. Use as a context manager; take `events` from one thread."""

    def __init__(
        self,
        config: BrokerConfig,
        client_id: str,
        *,
        subscriptions: Sequence[str] = (),
        will: Will | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        durable: bool = True,
    ) -> None:
        """Nothing is connected before `with`. `durable`: the broker keeps for a day what comes while it is away."""
        self._durable = durable
        self.config, self.client_id = config, client_id
        self.endpoint = f"{config.host}:{config.port}"
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()  # its `put` waits for nobody who hangs in `get`
        self.connected = threading.Event()
        self.dropped = 0
        self.reconnects = 0
        self.refusal = ""
        self.version = {"5": 5, "3.1.1": 4, "auto": 5}[config.protocol]
        self._subscriptions, self._will, self._password, self._tls = subscriptions, will, password, tls
        self._client: paho.Client | None = None
        self._generation = 0
        self._proven = False
        self._refused = False
        self._gone, self._answered, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._thread = Thread(target=self._run, name="mqtt-supervisor", daemon=True)

    def __enter__(self) -> Connection:
        """Start connecting; returns at once."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Disconnect and end within two seconds."""
        self._closing.set()
        self._gone.set()
        self._thread.join(2.0)

    # --- for the owner

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: float | None = None) -> int | None:
        """Send with QoS 1; returns the token that `Acknowledged` will carry, or None while there is no connection."""
        client = self._client
        if client is None or not self.connected.is_set():
            return None
        properties = None
        if self.version == 5 and expires_s is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = max(1, round(expires_s))
        info = client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        return None if info.rc != paho.MQTT_ERR_SUCCESS else self._generation << 16 | info.mid

    def acknowledge(self, ack: tuple[int, int, int]) -> None:
        """Tell the broker that a message is safe. Void when the connection it came over is gone."""
        generation, mid, qos = ack
        client = self._client
        if client is not None and generation == self._generation and qos:
            client.ack(mid, qos)

    def redeliver(self) -> None:
        """Make the connection anew, so that the broker delivers again what was not acknowledged."""
        self._gone.set()

    def wake(self) -> None:
        """Make whoever waits for an event look around."""
        if self.events.empty():
            self.events.put(Woken())

    @property
    def standing(self) -> int | None:
        """A number that is another one for each connection; None while there is none."""
        return self._generation if self.connected.is_set() else None

    # --- the supervising thread

    def _run(self) -> None:
        wait_s = _BACKOFF_S[0]
        while not self._closing.is_set():
            try:
                stood = self._connected_once()
            except Exception as error:
                log.exception("broker connection")
                self._note(f"{self.endpoint}: {error}")
                stood = False
            if stood:
                wait_s = _BACKOFF_S[1] if self._refused else _BACKOFF_S[0]
                self._refused = False
                self.reconnects += 1
            self._closing.wait(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            wait_s = min(wait_s * 2, _BACKOFF_S[1])

    def _connected_once(self) -> bool:
        """One connection from first to last byte; returns whether it ever stood."""
        self._generation = (self._generation + 1) & 0x7FFF
        client = self._made(self._generation)
        self._gone.clear()
        self._answered.clear()
        try:
            self._connect(client)
        except (OSError, ValueError) as error:  # ValueError: a host name that is none
            self._note(f"{self.endpoint}: {error}")
            return False
        self._client = client
        client.loop_start()
        end = time.monotonic() + _CONNECT_TIMEOUT_S
        while not self._gone.is_set() and (self._answered.is_set() or time.monotonic() < end):
            self._gone.wait(0.5 if self._answered.is_set() else 0.02)
        stood = self._answered.is_set()
        if not stood:
            self._fall_back()
        self.connected.clear()
        self._client = None
        client.disconnect()
        client.loop_stop()
        self.wake()
        return stood

    def _connect(self, client: paho.Client) -> None:
        properties = None
        if self.version == 5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._durable else 0
            properties.ReceiveMaximum = 100
        arguments: dict[str, Any] = {"clean_start": not self._durable, "properties": properties} if properties else {}
        client.connect(self.config.host, self.config.port, keepalive=self.config.keepalive_s, **arguments)

    def _fall_back(self) -> None:
        """A broker that never spoke MQTT 5 may know 3.1.1 only: take turns."""
        if self.config.protocol == "auto" and not self._proven:
            self.version = 4 if self.version == 5 else 5
        if not self.refusal:
            self._note(f"{self.endpoint}: no answer")

    def _note(self, refusal: str) -> None:
        if refusal != self.refusal:
            log.warning("broker %s", refusal)
        self.refusal = refusal

    def _made(self, generation: int) -> paho.Client:
        version = MQTTProtocolVersion(self.version)
        options: dict[str, Any] = {} if self.version == 5 else {"clean_session": not self._durable}
        client = paho.Client(
            CallbackAPIVersion.VERSION2, self.client_id, protocol=version, manual_ack=True,
            reconnect_on_failure=False, **options,
        )  # fmt: skip
        client.connect_timeout = _CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(IN_FLIGHT)
        client.max_queued_messages_set(10 * IN_FLIGHT)
        if self.config.username is not None:
            client.username_pw_set(self.config.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        self._leave_will(client)
        self._listen(client, generation)
        return client

    def _leave_will(self, client: paho.Client) -> None:
        if self._will is None:
            return
        properties = None
        if self.version == 5:
            properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
            properties.WillDelayInterval = WILL_DELAY_S
        client.will_set(self._will.topic, self._will.payload, qos=1, retain=True, properties=properties)

    def _listen(self, client: paho.Client, generation: int) -> None:
        def on_connect(_c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
            if reason.is_failure:
                self._note(f"{self.endpoint} refuses: {reason}")
                self._gone.set()
                return
            self.refusal = ""
            self._proven = True
            if self._subscriptions:
                client.subscribe([(topic, 1) for topic in self._subscriptions])
            else:
                self._stand()

        def on_message(_c: paho.Client, _u: Any, message: paho.MQTTMessage) -> None:
            ack = (generation, message.mid, message.qos)
            if not any(paho.topic_matches_sub(asked, message.topic) for asked in self._subscriptions):
                self.acknowledge(ack)  # there are brokers that deliver what was not asked for
                return
            self._put(Message(message.topic, bytes(message.payload), message.retain, ack))

        def on_publish(_c: paho.Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
            if reason.is_failure:  # the broker did not take it: send it again on a new connection
                self._note(f"{self.endpoint} refuses a message: {reason}")
                self._refused = True
                self._gone.set()
            else:
                self._put(Acknowledged(generation << 16 | mid))

        client.on_connect = on_connect
        client.on_subscribe = lambda _c, _u, _m, reasons, _p: self._subscribed(reasons)
        client.on_message = on_message
        client.on_publish = on_publish
        client.on_disconnect = lambda _c, _u, _f, _r, _p: self._gone.set()

    def _subscribed(self, reasons: list[ReasonCode]) -> None:
        for topic, reason in zip(self._subscriptions, reasons, strict=False):
            if reason.is_failure:
                self._note(f"{self.endpoint} refuses to deliver {topic}: {reason}")
        self._stand()

    def _stand(self) -> None:
        self._answered.set()
        log.info("broker %s: connected, MQTT %s", self.endpoint, "5" if self.version == 5 else "3.1.1")
        self.connected.set()
        self.wake()

    def _put(self, event: Event) -> None:
        if self.events.qsize() < EVENTS:
            self.events.put(event)
        else:  # not acknowledged, so it comes again on a new connection
            self.dropped += 1
            self._gone.set()


def probe(config: BrokerConfig, *, password: str | None, tls: ssl.SSLContext | None, timeout_s: float = 6.0) -> str:
    """Connect once; returns the protocol spoken. Raises BrokerError with the broker's own words."""
    connection = Connection(config, f"ei-check-{random.getrandbits(32):08x}", password=password, tls=tls)
    with connection:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if connection.connected.wait(0.1):
                return "MQTT 5" if connection.version == 5 else "MQTT 3.1.1"
            if connection.refusal and "no answer" not in connection.refusal:
                break
    raise BrokerError(
        connection.refusal or f"{connection.endpoint}: no answer",
        hint="is the broker running there, and are user and password right? broker: in device.yaml",
    )
