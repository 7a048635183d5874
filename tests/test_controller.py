"""The shipped example of a controller acts on a verdict in time, and on no other."""

from __future__ import annotations

import importlib.util
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from edge_inspector.config import BrokerConfig
from edge_inspector.frames import Coming, Trigger, utc_now
from edge_inspector.handshake import Handshake
from edge_inspector.messages import VerdictMessage
from edge_inspector.mqtt import Connection
from edge_inspector.outbox import Outbox
from edge_inspector.results import Reason, Result, Verdict
from tests.line import TOPICS, Mosquitto, listening, until

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "controller.py"
HELD_S = 5.0


def example() -> Any:
    spec = importlib.util.spec_from_file_location("controller", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Passing:
    """A station whose parts all pass; `before` is called between decision and verdict."""

    expires_ms = 2000

    def __init__(self, outbox: Outbox) -> None:
        self.coming, self.outbox = Coming(), outbox
        self.handshake: Handshake | None = None
        self.before: Callable[[], None] = lambda: None

    def offer(self, trigger: Trigger) -> None:
        threading.Thread(target=self._pass, args=(trigger,)).start()

    def reused(self, trigger: Trigger, result: Result) -> None:
        raise AssertionError(f"{trigger.trigger_id} belongs to one part here, {result.part_id}")

    def _pass(self, trigger: Trigger) -> None:
        assert self.handshake is not None
        self.outbox.append(
            Result(
                station="sheet",
                trigger_id=trigger.trigger_id,
                verdict=Verdict.PASS,
                reason=Reason.BELOW_THRESHOLD,
                triggered_at=trigger.triggered_at,
                decided_at=utc_now(),
                expires_at=trigger.expires_at,
            )  # fmt: skip
        )
        self.before()
        at = utc_now() + timedelta(seconds=trigger.expires_s - time.monotonic())
        self.handshake.verdict(
            VerdictMessage(
                station="sheet",
                trigger_id=trigger.trigger_id,
                verdict=Verdict.PASS,
                reason=Reason.BELOW_THRESHOLD,
                expires_at=at,
            )  # fmt: skip
        )


def test_a_verdict_that_the_broker_held_back_is_never_acted_on(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config, opened = BrokerConfig(host="127.0.0.1", port=mosquitto.port), list[str]()
    assert mosquitto.process is not None
    broker = mosquitto.process
    with (
        Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
        Connection(config, "edge.handshake", subscriptions=Handshake.subscriptions(TOPICS)) as heard,
        listening(mosquitto.port) as listener,
        example().Controller("127.0.0.1", mosquitto.port, "plant/line/edge", "sheet", 2000, opened.append) as controller,
    ):
        station = Passing(outbox)
        with Handshake(heard, TOPICS, outbox, {"sheet": station}, lambda *_: None) as station.handshake:
            until(lambda: heard.connected.is_set() and controller.is_connected, what="connections")
            time.sleep(0.2)  # its subscription
            first = controller.trigger("A-1")
            until(lambda: opened == [first], 5, what="a pass in time")

            station.before = lambda: broker.send_signal(signal.SIGSTOP)
            held = controller.trigger("A-2")
            time.sleep(HELD_S)
            assert len(listener.of("verdict")) == 1, "the broker holds the second one back"
            broker.send_signal(signal.SIGCONT)
            until(lambda: held in [told["trigger_id"] for told in listener.of("verdict")] or None, 10, what="the late verdict")
            time.sleep(0.3)
            assert opened == [first]

            station.before = lambda: None
            third = controller.trigger()
            until(lambda: opened == [first, third], 5, what="in time again")


def test_a_verdict_tells_what_is_left_of_it_in_repeats_too(tmp_path: Path, mosquitto: Mosquitto) -> None:
    config = BrokerConfig(host="127.0.0.1", port=mosquitto.port)
    with (
        Outbox(tmp_path, ["sheet"], quota_mb=4) as outbox,
        Connection(config, "edge.handshake", subscriptions=Handshake.subscriptions(TOPICS)) as heard,
        listening(mosquitto.port) as listener,
    ):
        station = Passing(outbox)
        with Handshake(heard, TOPICS, outbox, {"sheet": station}, lambda *_: None) as station.handshake:
            until(heard.connected.is_set, what="connection")

            def left_ms(count: int) -> int:
                listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
                told = until(lambda: listener.of("verdict")[count - 1 : count], what="verdict")[0]
                assert told["repeated"] == (count > 1)
                return int(told["expires_in_ms"])

            first = left_ms(1)
            assert 1500 < first <= 2000
            time.sleep(0.5)
            assert 0 < left_ms(2) < first - 400
            time.sleep(2.0)
            assert left_ms(3) == 0
            station.handshake._useful_until_s.clear()  # as after a start
            assert left_ms(4) == 0
