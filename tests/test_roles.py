"""Each role may do what SECURITY.md says and nothing else, with the access list that ships, at a real Mosquitto."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_inspector.config import BrokerConfig
from edge_inspector.mqtt import Connection
from edge_inspector.subscriber import Subscriber
from tests.line import RECORDING, TOPICS, DaemonProcess, Listener, Mosquitto, collected, device_folder, line_yaml, needed, until

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("edge", "controller", "mes", "people", "administrator")
WORD = "secret"
ASKED = "replay/sheet/request"


def table() -> Iterator[tuple[str, set[str], set[str]]]:
    """Of each row: an example of its topic, who publishes and who reads."""
    for row in re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE):
        topic = re.sub("{(.*?)}", lambda found: {"station": "sheet", "client": "mes", "name": "halt"}[found[1]], row[0])
        publishers, readers = ({"edge" if word == "device" else word for word in cell.split(", ")} for cell in row[1:])
        yield topic, publishers, readers


@dataclass
class User:
    """Somebody at the broker, who reads all that it gives."""

    client: paho.Client
    granted: dict[int, bool] = field(default_factory=dict)
    heard: set[tuple[str, bytes]] = field(default_factory=set)

    @classmethod
    def connected(cls, name: str, port: int) -> User:
        client = paho.Client(CallbackAPIVersion.VERSION2, f"test-{name}", protocol=MQTTProtocolVersion.MQTTv5)
        it = cls(client)
        client.username_pw_set(name, WORD)
        client.on_message = lambda _c, _u, message: it.heard.add((message.topic, bytes(message.payload)))
        client.on_publish = lambda _c, _u, mid, reason, _p: it.granted.update({mid: not reason.is_failure})
        subscribed: list[int] = []
        client.on_subscribe = lambda _c, _u, mid, _r, _p: subscribed.append(mid)
        client.connect("127.0.0.1", port)
        client.loop_start()
        until(lambda: client.subscribe("#", 1)[1] is not None, what=f"{name} connected")
        until(lambda: subscribed, what=f"{name} subscribed")
        return it

    def may(self, topic: str, payload: str) -> bool:
        mid = self.client.publish(TOPICS.of(*topic.split("/")), payload, 1).mid
        return bool(until(lambda: mid in self.granted, what="an answer")) and self.granted[mid]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker with the configuration and the access list that ship, but for certificates, for the device of the tests."""
    needed(Path("/usr/bin/mosquitto_passwd").exists(), "apt install mosquitto")
    broker = Mosquitto(tmp_path / "mosquitto")
    conf = re.sub(r"(?m)^(cafile|certfile|keyfile) .*\n", "", (ROOT / "systemd" / "mosquitto.conf").read_text())
    conf = conf.replace("listener 8883", f"user root\nlistener {broker.port} 127.0.0.1")
    conf = conf.replace("/etc/mosquitto/edge-inspector", str(broker.folder / "edge-inspector"))
    (broker.folder / "mosquitto.conf").write_text(conf)
    acl = (ROOT / "systemd" / "mosquitto.acl").read_text()
    acl = re.sub("plant-1/line-1/edge-1", TOPICS.device_path, acl).replace("user edge-1", "user edge")
    access = broker.folder / "edge-inspector.acl"
    access.write_text(f"{acl}\nuser all\ntopic readwrite #\n")
    passwords = broker.folder / "edge-inspector.passwords"
    passwords.touch()
    for name in (*ROLES, "all", "stranger"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), name, WORD], check=True, capture_output=True)
    for path in (access, passwords):
        path.chmod(0o600)
    yield broker.start()
    broker.stop()


def test_each_role_may_do_its_topics_and_nothing_else(guarded: Mosquitto) -> None:
    rows = list(table())
    assert len(rows) == 18
    users = {name: User.connected(name, guarded.port) for name in (*ROLES, "stranger", "all")}
    try:
        for topic, publishers, _ in rows:
            may = {name for name in (*ROLES, "stranger") if users[name].may(topic, name)}
            # A pattern for replays to any client cannot leave out the one who would be called `request`.
            assert may == publishers | ({"edge"} if topic == ASKED else set()), topic
        assert not users["edge"].may("../other/state", "x"), "nothing of another device"
        for topic, _, _ in rows:
            assert users["all"].may(topic, "read me")
        others = TOPICS.root.replace("edge", "other")
        users["all"].client.publish(f"{others}/state", "read me", 1)
        wanted = {(TOPICS.of(*topic.split("/")), b"read me"): readers for topic, _, readers in rows}
        until(lambda: set(wanted) <= users["all"].heard, what="all of it")
        time.sleep(0.3)
        for topic, _, readers in rows:
            read = {name for name in (*ROLES, "stranger") if (TOPICS.of(*topic.split("/")), b"read me") in users[name].heard}
            assert read == readers | ({"mes", "people", "administrator"} if topic == ASKED else set()), topic
        assert not any(topic.startswith(others) for name in ROLES for topic, _ in users[name].heard)
    finally:
        for user in users.values():
            user.close()


@contextmanager
def reached(name: str, port: int, *topics: str) -> Iterator[Connection]:
    config = BrokerConfig(host="127.0.0.1", port=port, username=name)
    with Connection(config, f"{name}-1", subscriptions=topics, password=WORD) as connection:
        assert connection.connected.wait(10)
        yield connection


def test_the_daemon_works_under_the_access_list_that_ships(guarded: Mosquitto, tmp_path: Path) -> None:
    folder = device_folder(tmp_path / "device", guarded.port, line_yaml(f"{RECORDING}?loop=1"))
    (folder / "password").write_text(WORD)
    text = (folder / "device.yaml").read_text()
    text = text.replace("keepalive_s: 5", "keepalive_s: 5, username: edge, password_file: password")
    (folder / "device.yaml").write_text(text)
    with ExitStack() as stack:
        said = (TOPICS.of("verdict", "+"), TOPICS.of("ready", "+"), TOPICS.of("state"), TOPICS.of("reply", "+"))
        controller = Listener(stack.enter_context(reached("controller", guarded.port, *said)))
        asked = (TOPICS.of("config", "reported"), TOPICS.of("health"), TOPICS.of("alert", "+"))
        administrator = Listener(stack.enter_context(reached("administrator", guarded.port, *asked)))
        mes = stack.enter_context(reached("mes", guarded.port, *Subscriber.subscriptions(TOPICS, "mes")))
        daemon = stack.enter_context(DaemonProcess(folder))
        until(lambda: any(told["ready"] for told in controller.of("ready", "sheet")), 30, "ready")
        for n in range(5):
            controller.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
        until(lambda: len(controller.of("verdict", "sheet")) == 5, what="verdicts")
        subscriber = Subscriber(mes, TOPICS, client="mes", start="all")
        assert [result.trigger_id for result in collected(subscriber, 5)] == [f"T-{n}" for n in range(5)]
        controller.say({"request_id": "1", "client": "panel", "station": "sheet"}, "command", "halt")
        assert until(lambda: controller.of("reply", "panel"), what="a reply")[0]["ok"]
        administrator.say({"by": "anna", "version": 3, "action": "confirm"}, "config", "confirm")
        until(lambda: "not on trial" in str(administrator.of("config", "reported")[-1:]), what="an answer to an order")
        assert administrator.of("health")
        assert daemon.stop() == 0
        until(lambda: controller.of("state")[-1]["online"] is False, what="offline")
