"""The connection to the broker: paho, made to keep promises.

* Every connection is a fresh paho client with the same client id, so that nothing old is resent from memory: what must
  not be lost lies in the outbox, which sends it again.
* paho's callbacks only put an Event on a bounded queue; a message that finds it full is not acknowledged, and the
  connection is made anew so that the broker delivers it again.
* Messages are acknowledged by hand, after whoever takes them has them safe.
* MQTT 5, or 3.1.1 where the broker knows no better.
* What the broker allows is obeyed (`Limits`), and why it ends or refuses anything is told (`Trouble`).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_inspector.config import BrokerConfig
from edge_inspector.errors import BrokerError
from edge_inspector.mqtt.limits import Limits
from edge_inspector.mqtt.trouble import STEADY_S, TAKEN_OVER, Ending, Pause, Trouble, is_closed, words_of
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

IN_FLIGHT = 20
EVENTS = 4096
WILL_DELAY_S = 5
SESSION_EXPIRY_S = 24 * 3600
TOLD_S = 180.0
"""What ended a connection is told for so long: longer than the longest pause, so that it does not come and go."""
_CONNECT_TIMEOUT_S = 5.0
_FIRST_TIMEOUT_S = 1.5
"""The same while it is not known whether the broker speaks MQTT 5: some do not even refuse it."""
_ASK_AGAIN_S = 30.0
_UNSUPPORTED_VERSION = 0x84


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
class Refused:
    """The broker does not take the publication with this token: its code (MQTT 5, 3.4.2.1), in words."""

    token: int
    code: int
    words: str


@dataclass(frozen=True)
class Woken:
    """Nothing from the broker: somebody called `wake`."""


Event = Message | Acknowledged | Refused | Woken


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when this client vanishes."""

    topic: str
    payload: bytes


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
        self.limits = Limits()
        """Of the broker, as its last CONNACK told them."""
        self.ending = Ending(None, ours=True)
        """How the last connection ended."""
        self.unheard: dict[str, str] = {}
        """Subscriptions that the broker refuses, and why."""
        self._subscriptions, self._will, self._password, self._tls = tuple(subscriptions), will, password, tls
        self._asked: dict[int, tuple[str, ...]] = {}
        self._asking = threading.Lock()
        self._troubles: dict[str, tuple[float, Trouble]] = {}
        self._client: paho.Client | None = None
        self._generation = 0
        self._proven = False
        self._will_fits = Limits()
        self._stood_s: float | None = None
        self._last_error = ""
        self._pause = Pause()
        self._gone, self._answered, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._thread = Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)

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
        """Send with QoS 1, or what the broker takes; returns the token that `Acknowledged` or `Refused` will carry.

        None while there is no connection. Raises BrokerError for what the broker cannot take: see `limits`.
        """
        client = self._client
        if client is None or not self.connected.is_set():
            return None
        most = self.limits.payload_bytes(topic)
        if len(payload) > most:
            raise BrokerError(
                f"{topic}: {len(payload)} bytes do not fit, the broker takes {most} here",
                hint="raise the broker's limit of a packet (Mosquitto: max_packet_size)",
            )
        properties = None
        if self.version == 5 and expires_s is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = max(1, round(expires_s))
        retain = retain and self.limits.retain
        info = client.publish(topic, payload, qos=self.limits.qos, retain=retain, properties=properties)
        return None if info.rc != paho.MQTT_ERR_SUCCESS else self._generation << 16 | info.mid

    def subscribe(self, *topics: str) -> None:
        """Listen to more, now and on every new connection."""
        new = tuple(topic for topic in topics if topic not in self._subscriptions)
        self._subscriptions += new
        client = self._client
        if new and client is not None and self.connected.is_set():
            self._ask(client, new)

    def acknowledge(self, ack: tuple[int, int, int]) -> None:
        """Tell the broker that a message is safe. Void when the connection it came over is gone."""
        generation, mid, qos = ack
        client = self._client
        if client is not None and generation == self._generation and qos:
            client.ack(mid, qos)

    def redeliver(self) -> None:
        """Make the connection anew, so that the broker delivers again what was not acknowledged."""
        self._end(ours=True)

    def hurry(self) -> None:
        """Forget earlier failures: the next attempts come quickly."""
        self._pause.reset()

    def wake(self) -> None:
        """Make whoever waits for an event look around."""
        if self.events.empty():
            self.events.put(Woken())

    @property
    def standing(self) -> int | None:
        """A number that is another one for each connection; None while there is none."""
        return self._generation if self.connected.is_set() else None

    @property
    def hearing(self) -> int | None:
        """The same, but None also while the broker refuses to deliver what is subscribed to."""
        return None if self.unheard else self.standing

    @property
    def deafness(self) -> str:
        """What the broker refuses to deliver, and why; empty where it delivers everything."""
        return "; ".join(f"the broker refuses to deliver {topic}: {why}" for topic, why in self.unheard.items())

    def note(self, trouble: Trouble) -> None:
        """Something is wrong: health tells it for the next minutes."""
        if trouble.code not in self._troubles or self._troubles[trouble.code][1] != trouble:
            log.warning("broker %s, client %s: %s", self.endpoint, self.client_id, trouble.text)
        self._troubles[trouble.code] = time.monotonic(), trouble

    def troubles(self) -> list[Trouble]:
        """What has been wrong lately, and what is wrong as long as the connection stands."""
        since_s = time.monotonic() - TOLD_S
        found = [trouble for at_s, trouble in list(self._troubles.values()) if at_s > since_s]
        if self.unheard:
            found.append(Trouble("subscription_refused", self.deafness))
        if lacks := self.limits.lacks():
            found.append(Trouble("broker_lacks", "; ".join(lacks)))
        return found

    # --- the supervising thread

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._connected_once()
            except Exception as error:
                log.exception("broker connection")
                self._note(f"{self.endpoint}: {error}")
            ending = self.ending
            self.reconnects += ending.stood_s is not None
            self._closing.wait(self._pause.after(ending))

    def _connected_once(self) -> None:
        """One connection from first to last byte; `ending` then says what became of it."""
        self._generation = (self._generation + 1) & 0x7FFF
        client = self._made(self._generation)
        self._gone.clear()
        self._answered.clear()
        self.ending, self._stood_s, self._last_error = Ending(None, ours=False), None, ""
        try:
            self._connect(client)
        except (OSError, ValueError) as error:  # ValueError: a host name that is none
            self._note(f"{self.endpoint}: {error}")
            return
        self._client = client
        client.loop_start()
        self._stay(client)
        if not self._answered.is_set() and not self.ending.ours:
            self._fall_back()
        self.connected.clear()
        self._client = None
        client.disconnect()
        client.loop_stop()
        self.unheard = {}
        self.wake()

    def _stay(self, client: paho.Client) -> None:
        """Wait until the connection is gone; ask again for what was refused."""
        patience_s = _CONNECT_TIMEOUT_S if self._proven or self.version == 4 else _FIRST_TIMEOUT_S
        end, asked_s = time.monotonic() + patience_s, time.monotonic()
        while not self._gone.is_set() and (self._answered.is_set() or time.monotonic() < end):
            self._gone.wait(0.5 if self._answered.is_set() else 0.02)
            if self.unheard and time.monotonic() - asked_s > _ASK_AGAIN_S:
                asked_s = time.monotonic()
                self._ask(client, tuple(self.unheard))

    def _connect(self, client: paho.Client) -> None:
        properties = None
        if self.version == 5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._durable else 0
            properties.ReceiveMaximum = 100
        arguments: dict[str, Any] = {"clean_start": not self._durable, "properties": properties} if properties else {}
        keepalive_s = min(self.config.keepalive_s, self.limits.keepalive_s or self.config.keepalive_s)
        client.connect(self.config.host, self.config.port, keepalive=keepalive_s, **arguments)

    def _fall_back(self) -> None:
        """A broker that never spoke MQTT 5 may know 3.1.1 only: take turns."""
        if self.config.protocol == "auto" and not self._proven:
            self.version = 4 if self.version == 5 else 5
        if not self.refusal or self._last_error:
            what = self._last_error or ("closed the connection" if self._gone.is_set() else "no answer")
            self._note(f"{self.endpoint}: {what}")

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
        client.max_inflight_messages_set(min(IN_FLIGHT, self.limits.in_flight))
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
        fits = self._will_fits
        client.will_set(self._will.topic, self._will.payload, qos=fits.qos, retain=fits.retain, properties=properties)

    # --- paho's thread

    def _listen(self, client: paho.Client, generation: int) -> None:
        def on_connect(_c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, properties: Any) -> None:
            if reason.is_failure:
                self._refused(reason)
            else:
                self._accepted(client, Limits.of(properties))

        def on_message(_c: paho.Client, _u: Any, message: paho.MQTTMessage) -> None:
            ack = (generation, message.mid, message.qos)
            if not any(paho.topic_matches_sub(asked, message.topic) for asked in self._subscriptions):
                self.acknowledge(ack)  # there are brokers that deliver what was not asked for
                return
            self._put(Message(message.topic, bytes(message.payload), message.retain, ack))

        def on_publish(_c: paho.Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
            token = generation << 16 | mid
            self._put(Refused(token, reason.value, words_of(reason)) if reason.is_failure else Acknowledged(token))

        client.on_connect = on_connect
        client.on_socket_open = _without_delay
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._subscribed(mid, reasons)
        client.on_message = on_message
        client.on_publish = on_publish
        client.on_disconnect = lambda _c, _u, flags, reason, _p: self._ended(reason, flags.is_disconnect_packet_from_server)
        client.on_log = self._overhear

    def _overhear(self, _c: paho.Client, _u: Any, level: int, text: str) -> None:
        """Of a connection that ends before it stands, paho tells the cause in its log alone."""
        if level == paho.MQTT_LOG_ERR and ": " in text:
            self._last_error = text.rpartition(": ")[2] if "[" not in text else text[text.index("[") :]

    def _refused(self, reason: ReasonCode) -> None:
        self._note(f"{self.endpoint} refuses {self.client_id}: {words_of(reason)}")
        if "Retain" in reason.getName():
            self._will_fits = replace(self._will_fits, retain=False)
        if "QoS" in reason.getName():
            self._will_fits = replace(self._will_fits, qos=0)
        self._last_error = ""
        self._proven = self._proven or reason.value != _UNSUPPORTED_VERSION
        self._gone.set()

    def _accepted(self, client: paho.Client, limits: Limits) -> None:
        self.refusal = ""
        self._proven = True
        before, self.limits = self.limits, limits
        if limits.in_flight < min(IN_FLIGHT, before.in_flight):  # paho wants to know it before it connects
            self._end(ours=True)
        elif self._subscriptions:
            self._ask(client, self._subscriptions)
        else:
            self._stand()

    def _ask(self, client: paho.Client, topics: tuple[str, ...]) -> None:
        with self._asking:  # the answer may be quicker than the note of what was asked
            _, mid = client.subscribe([(topic, 1) for topic in topics])
            if mid is not None:
                self._asked[mid] = topics

    def _subscribed(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._asking:
            topics = self._asked.pop(mid, ())
        refused = {topic: words_of(reason) for topic, reason in zip(topics, reasons, strict=False) if reason.is_failure}
        heard = {topic: why for topic, why in self.unheard.items() if topic not in topics}
        if refused and self.unheard != heard | refused:
            log.warning("broker %s refuses to deliver to %s: %s", self.endpoint, self.client_id, refused)
        self.unheard = heard | refused
        if not self._answered.is_set():
            self._stand()
        self.wake()

    def _stand(self) -> None:
        self._answered.set()
        self._stood_s = time.monotonic()
        log.info("broker %s: connected, MQTT %s", self.endpoint, "5" if self.version == 5 else "3.1.1")
        self.connected.set()
        self.wake()

    def _ended(self, reason: ReasonCode, told: bool) -> None:
        """The connection is gone: the broker said why, or paho what it knows."""
        if self._gone.is_set():  # we ended it
            return
        words = words_of(reason) if told or not is_closed(reason) else "it was closed without a word"
        self._end(ours=False, code=reason.value if told else None, words=words)
        stood_s = self.ending.stood_s
        if reason.value == TAKEN_OVER and told:
            self.note(Trouble("session_taken_over", f"another client uses {self.client_id}: {words}"))
        elif stood_s is not None and (told or stood_s < STEADY_S):
            text = f"the connection of {self.client_id} ended: {words}"
            if not told:
                text += "; another client may use that name, or a message be too large for the broker"
            self.note(Trouble("connection_ended", text))
        elif stood_s is not None:
            log.warning("broker %s: the connection of %s ended: %s", self.endpoint, self.client_id, words)

    def _end(self, *, ours: bool, code: int | None = None, words: str = "") -> None:
        stood_s = None if self._stood_s is None else time.monotonic() - self._stood_s
        self.ending = Ending(stood_s, ours=ours, code=code, words=words)
        self._gone.set()

    def _put(self, event: Event) -> None:
        if self.events.qsize() < EVENTS:
            self.events.put(event)
        else:  # not acknowledged, so it comes again on a new connection
            self.dropped += 1
            self._end(ours=True)


def _without_delay(_c: paho.Client, _u: Any, sock: Any) -> None:
    """Send at once: with Nagle's algorithm a verdict waits for the acknowledgement of what was sent before, 40 ms at worst."""
    with contextlib.suppress(OSError, AttributeError):  # a transport that has no such option
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
