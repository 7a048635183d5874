"""Triggers and verdicts do not depend on what sends results, and no station is told ready whose triggers would be lost."""

from __future__ import annotations

import json
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.frames import Coming, Trigger, utc_now
from edge_inspector.handshake import Handshake
from edge_inspector.messages import VerdictMessage
from edge_inspector.mqtt import Connection
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result, Verdict
from tests.faults.proxy import Proxy
from tests.line import TOPICS, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until
from tests.test_broker import result


class _Answering:
    """A station that fails every part at once."""

    expires_ms = 5000

    def __init__(self) -> None:
        self.coming = Coming()
        self.handshake: Handshake | None = None

    def offer(self, trigger: Trigger) -> None:
        assert self.handshake is not None
        at = utc_now() + timedelta(seconds=5)
        failed = VerdictMessage(
            station="sheet", trigger_id=trigger.trigger_id, verdict=Verdict.FAIL, reason=Reason.ABOVE_THRESHOLD, expires_at=at
        )
        assert self.handshake.verdict(failed)

    def reused(self, trigger: Trigger, result: Result) -> None:
        raise AssertionError(trigger)

    def command(self, name: str, product: str | None) -> None:
        raise AssertionError(name)


def test_a_hung_publisher_holds_up_no_verdict(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config, station = BrokerConfig(host="127.0.0.1", port=mosquitto.port), _Answering()
    with (
        Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
        Connection(config, "edge", subscriptions=Broker.subscriptions(TOPICS)) as connection,
        Connection(config, "edge-handshake", subscriptions=Handshake.subscriptions(TOPICS)) as heard,
        Broker(connection, TOPICS, outbox, {"sheet": station}) as broker,
        Handshake(heard, TOPICS, outbox, {"sheet": station}, broker.refuse) as station.handshake,
        listening(mosquitto.port) as listener,
    ):
        until(lambda: connection.connected.is_set() and heard.connected.is_set(), what="connections")
        outbox.append(result(1))
        until(lambda: listener.of("result", "sheet"), what="a result while nothing hangs")
        client = connection._client
        assert client is not None
        with client._out_message_mutex:  # the publisher hangs in the midst of a publication, as long as this lasts
            outbox.append(result(2))
            for n in range(50):
                listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
            listener.say({"nonsense": 1}, "trigger", "sheet")  # a refusal is told by who hangs, and holds up nothing
            listener.say({"trigger_id": "T-50"}, "trigger", "sheet")
            until(lambda: len(listener.of("verdict", "sheet")) == 51, what="verdicts beside a publisher that hangs")
            assert len(listener.of("result", "sheet")) == 1, "it does not hang"
            assert not listener.of("alert", "sheet")
        until(lambda: len(listener.of("result", "sheet")) == 2 and listener.of("alert", "sheet"), what="what was held up")


def test_what_waits_for_the_disk_counts_as_not_heard(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config, station = BrokerConfig(host="127.0.0.1", port=mosquitto.port), _Answering()
    stuck, free = threading.Event(), threading.Event()

    def disk() -> None:
        stuck.set()
        assert free.wait(30)

    with (
        Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
        Connection(config, "edge-handshake", subscriptions=Handshake.subscriptions(TOPICS)) as heard,
        Handshake(heard, TOPICS, outbox, {"sheet": station}, lambda *_: None) as station.handshake,
        listening(mosquitto.port) as listener,
    ):
        until(heard.connected.is_set, what="connection")
        outbox.on_commit(disk)
        outbox.submit(result(1))
        assert stuck.wait(10)
        sent_s = time.monotonic()
        assert station.coming.heard_s() >= sent_s
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        until(lambda: station.coming.heard_s() < time.monotonic() - 0.5, what="a trigger that waits")
        assert station.coming.heard_s() > sent_s
        free.set()
        until(lambda: listener.of("verdict", "sheet"), what="verdict")
        until(lambda: station.coming.heard_s() > time.monotonic() - 0.1, what="nothing that waits")
        for wrong in (
            {"trigger_id": "T-1"},
            {"trigger_id": "T-2", "expires_at": "0001-01-01T00:00:00+14:00"},
            {"trigger_id": 3},
        ):
            listener.say(wrong, "trigger", "sheet")
        listener.say({"trigger_id": "T-3"}, "trigger", "sheet")
        until(lambda: "T-3" in [told["trigger_id"] for told in listener.of("verdict", "sheet")], what="the last one")
        until(lambda: station.coming.heard_s() > time.monotonic() - 0.1, what="nothing that waits, after those refused")


def test_a_trigger_that_is_refused_is_answered(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config, station = BrokerConfig(host="127.0.0.1", port=mosquitto.port), _Answering()
    refused: list[str] = []
    with listening(mosquitto.port) as listener:
        listener.say({"trigger_id": "T-old"}, "trigger", "nowhere", retain=True)
        with (
            Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
            Connection(config, "edge-handshake", subscriptions=Handshake.subscriptions(TOPICS)) as heard,
            Handshake(heard, TOPICS, outbox, {"sheet": station}, lambda *told: refused.append(str(told))) as station.handshake,
        ):
            until(heard.connected.is_set, what="connection")
            listener.say({"trigger_id": "T-1"}, "trigger", "nowhere")
            for silent in ({"trigger_id": "\u00fc"}, {"trigger_id": 3}, {"trigger_id": "T-3", "more": "x" * 9000}, ["T-4"]):
                listener.say(json.dumps(silent).encode(), "trigger", "nowhere")
            listener.say({"trigger_id": "T-5"}, "trigger", "sheet")
            until(lambda: len(listener.of("verdict")) == 2, what="verdicts")
            until(lambda: len(refused) == 6, what="refusals")
        told = {verdict["trigger_id"]: verdict for verdict in listener.of("verdict")}
        assert set(told) == {"T-1", "T-5"}, "one that the broker had kept is no trigger of anybody now"
        assert (told["T-1"]["station"], told["T-1"]["verdict"], told["T-1"]["reason"]) == ("nowhere", "undecided", "refused")
        assert "stations here: sheet" in told["T-1"]["detail"]
        assert told["T-5"]["reason"] == "above_threshold"


class _Doorkeeper(Proxy):
    """Lets no handshake through while `closed`."""

    closed = True

    def _join(self, client: socket.socket) -> None:
        if self.closed and b".handshake" in client.recv(4096, socket.MSG_PEEK):
            client.close()
        else:
            super()._join(client)


def test_nothing_is_ready_before_triggers_are_heard(tmp_path: Path, mosquitto: Mosquitto) -> None:
    proxy = _Doorkeeper(mosquitto.port)
    with listening(mosquitto.port) as listener, proxy:
        folder = device_folder(tmp_path / "device", proxy.port, line_yaml())

        def reasons() -> list[str]:
            return [reason["code"] for health in listener.of("health")[-1:] for reason in health["reasons"]]

        with DaemonProcess(folder):
            until(lambda: "no_handshake" in reasons(), 30, what="health says so")
            listener.say({"request_id": "1", "client": "hmi", "station": "sheet"}, "command", "halt")
            until(
                lambda: "halted by command" in [ready["reason"] for ready in listener.of("ready", "sheet")],
                what="not ready, told",
            )
            listener.say({"request_id": "2", "client": "hmi", "station": "sheet"}, "command", "start")
            until(lambda: len(listener.of("reply", "hmi")) == 2, what="started again")
            assert not any(ready["ready"] for ready in listener.of("ready", "sheet"))
            proxy.closed = False
            until(lambda: any(ready["ready"] for ready in listener.of("ready", "sheet")), what="ready")
            listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
            until(lambda: listener.of("verdict", "sheet"), what="verdict")
            until(lambda: "no_handshake" not in reasons(), what="health says no more")
