"""Why a broker ends, refuses or hides something is told in its own words, and nobody is told ready who hears nothing."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from edge_inspector import checks, health
from edge_inspector.broker import Broker
from edge_inspector.config import BrokerConfig
from edge_inspector.errors import BrokerError
from edge_inspector.messages import Cause, Ready, StateMessage, TriggerRequest, decode, encode
from edge_inspector.mqtt import Connection, Message, probe, read_password
from edge_inspector.mqtt.trouble import TAKEN_OVER, Ending, Pause
from edge_inspector.outbox import Outbox
from edge_inspector.subscriber import Subscriber
from edge_inspector.wiring import client_id
from tests.line import TOPICS, DaemonProcess, Mosquitto, device_folder, line_yaml, listening, loaded, needed, until
from tests.test_broker import result


def config(port: int, **more: object) -> BrokerConfig:
    return BrokerConfig.model_validate({"host": "127.0.0.1", "port": port, **more})


def test_two_devices_of_one_identity_are_told_and_try_again_ever_less_often(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """Mosquitto 2.0 throws one of them out without a word."""

    def twin(name: str, stack: ExitStack) -> Connection:
        known = config(mosquitto.port)
        outbox = stack.enter_context(Outbox(tmp_path / name, ["sheet"], quota_mb=4))
        one = stack.enter_context(Connection(known, "ei-p-l-edge-1", subscriptions=Broker.subscriptions(TOPICS)))
        broker = stack.enter_context(Broker(one, TOPICS, outbox, {}))
        broker.retain(StateMessage(online=True, session=name), "state")
        return one

    def told(connection: Connection) -> Cause | None:
        found = health.broker_causes(connection, "device")
        return next((cause for cause in found if cause.code == "session_taken_over"), None)

    with ExitStack() as stack:
        twins = [twin(name, stack) for name in ("one", "two")]
        for connection in twins:
            cause = until(partial(told, connection), 20, "thrown out")
            assert cause.severity == "failure"
            assert cause.text.startswith("another client uses ei-p-l-edge-1: ")
        before, began_s = sum(connection.reconnects for connection in twins), time.monotonic()
        time.sleep(3.0)
        again = sum(connection.reconnects for connection in twins) - before
        assert again / (time.monotonic() - began_s) < 2.5


def test_the_pause_grows_to_a_minute_and_not_beyond() -> None:
    pause, waits = Pause(), list[float]()
    for _ in range(12):
        waits.append(pause._wait_s(Ending(2.0, ours=False, code=TAKEN_OVER)))
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == 60.0
    assert pause._wait_s(Ending(59.0, ours=False, code=TAKEN_OVER)) == 60.0, "while the other one waits"
    assert pause._wait_s(Ending(200.0, ours=False, code=TAKEN_OVER)) == 1.0, "it is alone again"
    assert pause._wait_s(Ending(10.0, ours=False)) == 0.2, "a good connection that broke"
    assert [pause._wait_s(Ending(None, ours=False)) for _ in range(9)][-1] == 5.0, "a broker that is away comes back soon"


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker that refuses every subscription of the user `edge`."""
    plugin = next(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"), None)
    needed(plugin and shutil.which("mosquitto_ctrl"), "apt install mosquitto")
    rules = tmp_path / "rules.json"
    subprocess.run(["mosquitto_ctrl", "dynsec", "init", str(rules), "admin", "secret"], check=True, capture_output=True)
    rules.chmod(0o666)
    broker = Mosquitto(tmp_path / "m", f"plugin {plugin}\nplugin_opt_config_file {rules}\n").start()

    def ask(*words: str) -> None:
        known = ["mosquitto_ctrl", "-p", str(broker.port), "-u", "admin", "-P", "secret", "dynsec", *words]
        subprocess.run(known, check=True, capture_output=True, input=b"secret\nsecret\n")

    ask("createRole", "talks")
    ask("addRoleACL", "talks", "publishClientSend", "ei/#", "allow")
    ask("createClient", "edge", "-p", "secret")
    ask("addClientRole", "edge", "talks", "1")
    ask("addRoleACL", "talks", "subscribePattern", "ei/#", "deny")
    ask("createRole", "hears")
    ask("addRoleACL", "hears", "subscribePattern", "#", "allow")
    ask("createClient", "ear", "-p", "secret")
    ask("addClientRole", "ear", "hears", "1")
    yield broker
    broker.stop()


def test_a_station_whose_triggers_are_not_heard_is_not_ready_and_check_says_so(deaf: Mosquitto, tmp_path: Path) -> None:
    folder = device_folder(tmp_path / "device", deaf.port, line_yaml())
    device = folder / "device.yaml"
    device.write_text(device.read_text().replace("keepalive_s: 5", "keepalive_s: 5, username: edge, password_file: password"))
    (folder / "password").write_bytes(b"\xef\xbb\xbfsecret\r\n")  # as Notepad writes it
    heard: dict[str, dict[str, object]] = {}
    with Connection(
        config(deaf.port, username="ear"), "ear", subscriptions=[TOPICS.of("#")], password="secret"
    ) as ear, DaemonProcess(folder) as daemon:  # fmt: skip

        def told() -> bool:
            while not ear.events.empty():
                event = ear.events.get()
                if isinstance(event, Message):
                    heard["/".join(TOPICS.within(event.topic))] = json.loads(event.payload)
                    ear.acknowledge(event.ack)
            codes = {reason["code"] for reason in heard.get("health", {}).get("reasons", ())}  # type: ignore[attr-defined]
            reason = str(heard.get("ready/sheet", {}).get("reason"))
            return "subscription_refused" in codes and "trigger/+" in reason

        until(told, 30, "what is not heard")
        assert heard["ready/sheet"]["ready"] is False
        assert "Not authorized (0x87)" in str(heard["ready/sheet"]["reason"])
        assert "refuses to deliver" in daemon.log
        findings = checks.check_device(device)
    (broker,) = [finding for finding in findings if finding.thing.startswith("broker") and not finding.ok]
    assert "trigger/+: Not authorized (0x87)" in broker.text
    (folder / "password").write_text("secret ")
    (blank,) = [finding for finding in checks.check_device(device) if finding.thing.startswith("password")]
    assert "ends with a blank" in blank.text


def test_what_the_broker_refuses_to_take_is_told_and_holds_up_nothing_else(tmp_path: Path) -> None:
    rights = "\n".join(f"topic {what}" for what in ("readwrite ei/v1/plant/line/edge/state", "write ei/v1/plant/line/edge/result/b",
                       "read ei/v1/plant/line/edge/result/+"))  # fmt: skip
    (tmp_path / "acl").write_text(f"{rights}\n")
    (tmp_path / "acl").chmod(0o644)
    broker = Mosquitto(tmp_path / "m", f"acl_file {tmp_path / 'acl'}\n").start()
    try:
        with (
            Outbox(tmp_path / "state", ["a", "b"], quota_mb=4) as outbox,
            Connection(config(broker.port), "ear", subscriptions=[TOPICS.of("result", "+")]) as ear,
            Connection(config(broker.port), "edge", subscriptions=Broker.subscriptions(TOPICS)) as connection,
            Broker(connection, TOPICS, outbox, {}),
        ):
            until(lambda: ear.connected.is_set() and connection.connected.is_set(), what="connections")
            for number in range(10):
                for station in "ab":
                    outbox.append(result(number).model_copy(update={"station": station}))
            until(lambda: outbox.head("b").acked == 10, what="what the broker takes")
            assert outbox.head("a").acked == 0, "refused, not lost"
            (cause,) = health.broker_causes(connection, "device")
            assert cause.code == "publication_refused"
            assert "result/a: Not authorized (0x87)" in cause.text
            assert connection.reconnects == 0
    finally:
        broker.stop()


def test_a_byte_order_mark_is_no_part_of_what_follows_it(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_bytes(b"\xef\xbb\xbfgeheim\r\nsecond\r\n")
    assert read_password(password) == "geheim"
    password.write_bytes(b" geheim \n")
    assert read_password(password) == " geheim ", "a blank may be meant"
    request = decode(TriggerRequest, b'\xef\xbb\xbf{"trigger_id": "T-1"} \r\n', "trigger/press")
    assert request.trigger_id == "T-1"
    for data, words in ((b"\xff\xfeg\x00", "UTF-16"), (b"\xe9\n", "not UTF-8"), (b"\n", "empty"), (b"", "empty")):
        password.write_bytes(data)
        with pytest.raises(BrokerError, match=words):
            read_password(password)


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_hints_of_tls_faults_name_tls(tmp_path: Path, mosquitto: Mosquitto) -> None:
    def hint(port: int, tls: ssl.SSLContext | None) -> str:
        files: dict[str, object] = {"tls": {}} if tls else {}
        with pytest.raises(BrokerError) as caught:
            probe(config(port, protocol="5", **files), password=None, tls=tls, timeout_s=4)
        return caught.value.hint

    assert "TLS" in hint(mosquitto.port, ssl.create_default_context()), "TLS to a port without"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-out", "c", "-subj", "/CN=x", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    for name in ("k", "c"):
        (tmp_path / name).chmod(0o644)
    files = f"cafile {tmp_path / 'c'}\ncertfile {tmp_path / 'c'}\nkeyfile {tmp_path / 'k'}\nrequire_certificate true\n"
    broker = Mosquitto(tmp_path / "m", files).start()
    try:
        assert "without TLS" in hint(broker.port, None), "no TLS to a port with"
        assert "signed by broker.tls.ca_file" in hint(broker.port, ssl.create_default_context())
        trusting = ssl.create_default_context(cafile=str(tmp_path / "c"))
        assert "client certificate" in hint(broker.port, trusting)
    finally:
        broker.stop()


def test_names_of_clients_never_collide_and_an_installation_keeps_its_own(tmp_path: Path) -> None:
    def named(site: str, line: str, device: str, folder: str) -> str:
        path = device_folder(tmp_path / folder, 1883, line_yaml())
        text = (path / "device.yaml").read_text()
        text = text.replace("site: plant, line: line, device: edge", f"site: {site}, line: {line}, device: {device}")
        (path / "device.yaml").write_text(text)
        return client_id(loaded(path))

    assert named("p", "l", "edge-1", "a") == "ei-p-l-edge-1"
    assert named("plant-1", "a", "x", "b") == "ei-plant-1.a.x"
    assert named("plant", "1-a", "x", "c") == "ei-plant.1-a.x"
    assert not (tmp_path / "a" / "state").exists(), "nothing to remember"
    (tmp_path / "d" / "state").mkdir(parents=True)
    (tmp_path / "d" / "state" / "outbox.db").touch()
    assert named("plant-1", "a", "x", "d") == "ei-plant-1-a-x", "the broker holds its session"
    (tmp_path / "d" / "state" / "outbox.db").unlink()
    assert named("plant-1", "a", "x", "d") == "ei-plant-1-a-x", "from now on"
    assert named("plant-2", "a", "x", "d") == "ei-plant-2.a.x", "another device"


def test_a_station_is_ready_only_while_its_device_is_there_in_the_session_that_said_so(mosquitto: Mosquitto) -> None:
    topics = Subscriber.subscriptions(TOPICS, "mes")
    with (
        listening(mosquitto.port) as device,
        Connection(config(mosquitto.port), "mes", subscriptions=topics) as connection,
    ):
        subscriber = Subscriber(connection, TOPICS, client="mes")

        def becomes(*, ready: bool) -> None:
            until(lambda: [list(subscriber.results(0.05)), subscriber.is_ready("a") == ready][1], 5, f"ready: {ready}")

        def says(*, online: bool, session: str) -> None:
            device.say(encode(StateMessage(online=online, session=session)), "state", retain=True)

        device.say(encode(Ready(station="a", ready=True, state="ready", session="s1")), "ready", "a", retain=True)
        list(subscriber.results(0.3))
        assert not subscriber.is_ready("a"), "nobody knows whether its device is there"
        says(online=True, session="s1")
        becomes(ready=True)
        assert not subscriber.is_ready("b")
        says(online=False, session="s1")
        becomes(ready=False)
        says(online=True, session="s2")
        list(subscriber.results(0.3))
        assert not subscriber.is_ready("a"), "what it said before it died"
        says(online=True, session="s1")
        becomes(ready=True)
        mosquitto.kill()
        becomes(ready=False)
