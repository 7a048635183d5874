"""mqtt and subscriber against real brokers: versions, credentials, TLS, order, replay."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from paho.mqtt.client import MQTTMessage

from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.demo import EmbeddedBroker
from edge_inspector.errors import BrokerError
from edge_inspector.messages import BundleReported
from edge_inspector.mqtt import Connection, Message, probe, read_password, tls_context
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result, Verdict
from tests.line import TOPICS, Mosquitto, collected, free_port, listening, subscribing, until

NOW = datetime.now(timezone.utc)


def result(number: int, verdict: Verdict = Verdict.PASS) -> Result:
    return Result(
        station="sheet", trigger_id=f"T-{number}", verdict=verdict, reason=Reason.BELOW_THRESHOLD, detail="x" * 200,
        triggered_at=NOW, decided_at=NOW, expires_at=NOW,
    )  # fmt: skip


def config(port: int, **more: object) -> BrokerConfig:
    return BrokerConfig.model_validate({"host": "127.0.0.1", "port": port, "keepalive_s": 2, **more})


# amqtt leaves the sockets of clients that it refuses (MQTT 5) to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_mqtt_5_where_the_broker_knows_it_and_3_1_1_where_not(mosquitto: Mosquitto) -> None:
    assert probe(config(mosquitto.port), password=None, tls=None) == "MQTT 5"
    assert probe(config(mosquitto.port, protocol="3.1.1"), password=None, tls=None) == "MQTT 3.1.1"
    with EmbeddedBroker() as broker:
        assert probe(config(broker.port), password=None, tls=None) == "MQTT 3.1.1"
    gc.collect()  # what amqtt leaves unclosed ends here, in the test that made it


def test_no_broker_is_one_clear_error() -> None:
    with pytest.raises(BrokerError, match=r"127\.0\.0\.1:\d+.*refused") as caught:
        probe(config(free_port()), password=None, tls=None)
    assert "is the broker running" in caught.value.hint


def test_a_refused_password_is_said_in_the_brokers_words(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "edge", "right"], check=True, capture_output=True)
    passwords.chmod(0o644)
    broker = Mosquitto(tmp_path / "m", f"password_file {passwords}\n")
    text = (broker.folder / "mosquitto.conf").read_text().replace("allow_anonymous true", "allow_anonymous false")
    (broker.folder / "mosquitto.conf").write_text(text)
    broker.start()
    (tmp_path / "secret").write_text("right\n")
    try:
        good = read_password(tmp_path / "secret")
        assert probe(config(broker.port, username="edge"), password=good, tls=None) == "MQTT 5"
        with pytest.raises(BrokerError, match="Not authorized|Bad user name"):
            probe(config(broker.port, username="edge"), password="wrong", tls=None)
    finally:
        broker.stop()
    with pytest.raises(BrokerError, match="no password to read"):
        read_password(tmp_path / "nowhere")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=tmp_path)

    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2"
    )
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "s.key", "-out", "s.csr", "-subj", "/CN=127.0.0.1")
    (tmp_path / "ext").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        "x509", "-req", "-in", "s.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out", "s.pem", "-extfile", "ext", "-days", "2"
    )
    for name in ("s.key", "s.pem", "ca.pem"):
        (tmp_path / name).chmod(0o644)
    return tmp_path


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_is_verified(certificates: Path, tmp_path: Path) -> None:
    c = certificates
    broker = Mosquitto(tmp_path / "m", f"cafile {c / 'ca.pem'}\ncertfile {c / 's.pem'}\nkeyfile {c / 's.key'}\n").start()
    try:
        assert probe(config(broker.port), password=None, tls=tls_context(c / "ca.pem", None, None)) == "MQTT 5"
        with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED"):
            probe(config(broker.port), password=None, tls=tls_context(None, None, None))
    finally:
        broker.stop()
    with pytest.raises(BrokerError, match="TLS files"):
        tls_context(tmp_path / "none.pem", None, None)


def test_what_was_not_acknowledged_comes_again(mosquitto: Mosquitto) -> None:
    def first(connection: Connection) -> Message:
        def message() -> Message | None:
            while not connection.events.empty():
                event = connection.events.get()
                if isinstance(event, Message):
                    return event
            return None

        found = until(message, what="message")
        assert isinstance(found, Message)
        return found

    with Connection(config(mosquitto.port), "taker", subscriptions=["t"]) as connection:
        assert connection.connected.wait(5)
        until(lambda: connection.publish("t", b"1") is not None)
        assert first(connection).payload == b"1"
    with Connection(config(mosquitto.port), "taker", subscriptions=["t"]) as connection:
        again = first(connection)
        assert again.payload == b"1"
        connection.acknowledge(again.ack)
        connection.redeliver()
        until(lambda: connection.reconnects >= 1, what="reconnect")


def test_what_was_not_asked_for_is_not_taken() -> None:
    connection = Connection(config(free_port()), "taker", subscriptions=["a/+"])
    client = connection._made(1)
    assert client.on_message is not None
    for topic in (b"a/b/c", b"b", b"a/b"):  # amqtt 0.12 delivers what is retained on others, at times
        client.on_message(client, None, MQTTMessage(topic=topic))
    event = connection.events.get_nowait()
    assert isinstance(event, Message)
    assert event.topic == "a/b"
    assert connection.events.empty()


@pytest.fixture
def sending(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[tuple[Outbox, Broker]]:
    """Outbox and broker thread, connected."""
    with (
        Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
        Connection(config(mosquitto.port), "device", subscriptions=Broker.subscriptions(TOPICS)) as connection,
        Broker(connection, TOPICS, outbox, {"sheet": _NoTriggers()}) as broker,
    ):
        yield outbox, broker


class _NoTriggers:
    """A station that only lends its name: these tests send no triggers."""

    expires_ms = 1000

    def offer(self, trigger: object) -> None:
        raise AssertionError(trigger)

    def command(self, name: str, product: str | None) -> None:
        raise AssertionError(name)


def test_results_arrive_once_in_order_though_the_broker_dies(sending: tuple[Outbox, Broker], mosquitto: Mosquitto) -> None:
    outbox, _ = sending
    with subscribing(mosquitto.port) as subscriber:
        for n in range(1, 301):
            outbox.append(result(n))
            if n == 150:
                mosquitto.kill()
                mosquitto.start()
        found = collected(subscriber, 300, 60)
    assert [r.seq for r in found] == list(range(1, 301))


def test_a_subscriber_goes_on_where_it_stopped(sending: tuple[Outbox, Broker], mosquitto: Mosquitto, tmp_path: Path) -> None:
    outbox, _ = sending
    state = tmp_path / "subscriber.json"
    for n in range(1, 31):
        outbox.append(result(n))
    with subscribing(mosquitto.port, state=state) as subscriber:
        first = collected(subscriber, 10)
        list(subscriber.results(0.0))
        subscriber.save()
    mosquitto.kill()
    mosquitto.start()
    with subscribing(mosquitto.port, state=state) as subscriber:
        rest = collected(subscriber, 30 - subscriber._streams["sheet"].next + 1, 60)
    assert [r.seq for r in first] == list(range(1, 11))
    assert rest[-1].seq == 30
    assert len(rest) in (20, 21), "at most the result in hand comes again"


def test_a_subscriber_skips_only_what_the_quota_dropped(sending: tuple[Outbox, Broker], mosquitto: Mosquitto) -> None:
    outbox, _ = sending
    for n in range(1, 8001):
        outbox.submit(result(n, Verdict.FAIL if n % 100 == 0 else Verdict.PASS))
        if n % 500 == 0:
            until(outbox._work.empty)
    last = outbox.append(result(8001)).seq
    time.sleep(1.0)  # the last drops follow the last commit
    kept = last - outbox.counts.dropped
    assert outbox.counts.dropped > 0
    with subscribing(mosquitto.port) as subscriber:
        found = collected(subscriber, kept, 120)
    seqs = [r.seq for r in found]
    assert seqs == sorted(set(seqs))
    assert set(range(100, 8001, 100)) <= set(seqs)
    assert subscriber.skipped > 0


def test_what_is_taken_back_is_gone_from_the_broker_and_from_memory(
    sending: tuple[Outbox, Broker], mosquitto: Mosquitto
) -> None:
    _, broker = sending
    levels = ("bundle", "glass", "reported")
    broker.retain(BundleReported(bundle="glass", source="local", release=1, good_release=1, seen=1), *levels)
    topic = TOPICS.of(*levels)
    with listening(mosquitto.port) as before:
        until(lambda: before.of(*levels), what="told")
        broker.forget(*levels)
        until(lambda: {} in before.of(*levels), what="taken back")
    assert topic not in broker._retained
    with listening(mosquitto.port, client="later") as later:
        until(lambda: later.of("head"), what="what is retained")
        assert not later.of("bundle")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_what_the_broker_holds_of_us_is_heard_before_anything_else(tmp_path: Path, any_broker_port: int) -> None:
    with listening(any_broker_port) as listener:
        for name in ("config", "bundle/paper", *(f"bundle/forged-{n}" for n in range(300))):
            listener.say({"seen": 7, "more": 1}, *name.split("/"), "reported", retain=True)
        listener.say(b"{", "bundle", "broken", "reported", retain=True)
        time.sleep(0.3)
    connection = Connection(config(any_broker_port), "device", subscriptions=Broker.subscriptions(TOPICS))
    with Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox, connection, Broker(connection, TOPICS, outbox, {}) as broker:
        assert not broker.has_listened
        until(lambda: broker.has_listened, what="time to listen")
        assert broker.reported["config", "reported"] == 7
        assert len(broker.reported) <= 256, "whoever may publish fills no memory"
        with listening(any_broker_port) as listener:
            listener.say({"seen": 99}, "config", "reported")
            time.sleep(0.3)
        assert broker.reported["config", "reported"] == 7, "what is said now is no memory of ours"
