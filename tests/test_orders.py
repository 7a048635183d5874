"""Orders and commands as people give them, signed without being asked, to a daemon whose folder `init` has made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

from edge_inspector import signatures
from edge_inspector.cli import app
from edge_inspector.config import BrokerConfig, parse_line
from edge_inspector.errors import InspectorError
from edge_inspector.mqtt import Connection, Message
from edge_inspector.schema import read_yaml
from tests.line import ENGINES, RECORDING, TOPICS, DaemonProcess, Listener, Mosquitto, line_yaml, listening, loaded, until

LOOPING = f"{RECORDING}?loop=1"


def verb(*arguments: str | Path, code: int = 0) -> str:
    """Run a verb in this process; returns what it says, its error included."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(done.exception, InspectorError):
        assert code == 2, done.exception
        return str(done.exception)
    assert done.exit_code == code, f"{done.output}{done.exception!r}"
    return done.output


def made(folder: Path, port: int) -> Path:
    """What `init` makes, with the shipped bundle and its key, for the device that tests listen to."""
    verb("init", folder)
    text = (folder / "device.yaml").read_text()
    for pattern, value in (
        ("site", "plant"), ("line", "line"), ("device", "edge"), ("port", port), ("host", "127.0.0.1"), ("bundles", ENGINES),
    ):  # fmt: skip
        text = re.sub(rf"(?m)^( *{pattern}:) \S+", rf"\g<1> {value}", text, count=1)
    (folder / "device.yaml").write_text(f"{text}\nsources: {{folders: ['{ENGINES / 'recording'}']}}\n")
    (folder / "line.yaml").write_text(line_yaml(LOOPING))
    for key in (ENGINES / "trust").glob("*.pub"):
        shutil.copy(key, folder / "trust")
    return folder


@contextmanager
def recording(port: int, *topics: str) -> Iterator[Connection]:
    """What an attacker may record."""
    config = BrokerConfig(host="127.0.0.1", port=port)
    asked = [TOPICS.of(*topic.split("/")) for topic in topics]
    with Connection(config, "recorder", subscriptions=asked) as connection:
        assert connection.connected.wait(10)
        yield connection


def recorded(connection: Connection) -> list[Message]:
    found = []
    while not connection.events.empty():
        event = connection.events.get()
        if isinstance(event, Message):
            connection.acknowledge(event.ack)
            found.append(event)
    return found


def ready(listener: Listener) -> None:
    until(lambda: any(told["ready"] for told in listener.of("ready", "sheet")), 30, "ready")


def state(listener: Listener) -> str:
    return str(listener.of("ready", "sheet")[-1]["state"])


def refusals(listener: Listener) -> list[str]:
    return [reply["error"]["message"] for reply in listener.of("reply") if not reply["ok"]]


def test_init_gives_each_device_an_identity_of_its_own_and_two_keys(tmp_path: Path) -> None:
    names = set()
    for name in ("one", "two"):
        verb("init", tmp_path / name)
        device = loaded(tmp_path / name)
        names.add(device.config.identity.device)
        keys = signatures.trusted_keys(device.trust)
        assert sorted(sorted(key.purposes) for key in keys.values()) == [["bundle"], sorted(signatures.ORDERS)]
        assert all((device.folder / "keys" / f"{key}.key").stat().st_mode & 0o777 == 0o600 for key in ("signing", "orders"))
    assert len(names) == 2
    told = verb("keygen", tmp_path / "k", "--trust", tmp_path / "t", "--purposes", "confirm, label")
    assert "for confirm, label" in told
    assert "there are: bundle" in verb("keygen", tmp_path / "l", "--trust", tmp_path / "t", "--purposes", "confrm", code=2)


def test_people_give_triggers_and_commands_that_are_signed_by_themselves(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = made(tmp_path / "device", mosquitto.port)
    here = ("--config", folder / "device.yaml")
    there = ("--device", "plant/line/edge", "--broker", f"127.0.0.1:{mosquitto.port}", "--config", tmp_path / "none.yaml")
    assert "nothing was sent" in verb("trigger", "sheet", *here, code=2)
    with (
        listening(mosquitto.port) as listener,
        recording(mosquitto.port, "command/+") as attacker,
        DaemonProcess(folder) as daemon,
    ):
        ready(listener)
        done = CliRunner().invoke(app, ["trigger", "sheet", *map(str, here), "--id", "T-1", "--part-id", "A-1", "--json"])
        first = json.loads(done.stdout)
        assert (first["trigger_id"], first["part_id"]) == ("T-1", "A-1")
        assert done.exit_code == {"pass": 0, "fail": 1}[first["verdict"]]
        assert "judged before" in verb("trigger", "sheet", *here, "--id", "T-1", "--part-id", "A-1", code=done.exit_code)
        assert "refused" in verb("trigger", "nowhere", *here, code=2)
        assert "no station 'nowhere'" in verb("trigger", "nowhere", *there, code=2)
        assert "no verdict within" in verb("trigger", "a/b", *here, "--wait-s", "1", code=2)
        assert "unknown product" in verb("trigger", "sheet", *here, "--product", "glass", code=2)

        assert "sheet: halt" in verb("command", "halt", "sheet", *here)
        until(lambda: state(listener) == "halted", what="halted")
        (halt,) = recorded(attacker)
        assert json.loads(halt.payload)["session"] == listener.of("state")[-1]["session"]
        verb("command", "start", "sheet", *here)
        assert "no product 'glass'" in verb("command", "select-product", "sheet", "--product", "glass", *here, code=1)
        until(lambda: state(listener) != "halted", what="started")
        replies = len(listener.of("reply"))
        for topic in ("halt", "self-test", "select-product"):
            listener.say(halt.payload, "command", topic)
        for changed in ({"by": "eve"}, {"request_id": "other"}, {"signature": None}, {"session": "", "signature": None}):
            listener.say({**json.loads(halt.payload), **changed}, "command", "halt")
        until(lambda: len(listener.of("reply")) == replies + 7, what="an answer to each")
        assert [reply["ok"] for reply in listener.of("reply")[-7:]] == [True, *[False] * 6], "the first answer, again"
        assert state(listener) != "halted"

        told = verb("command", "halt", "sheet", *there, code=1)
        assert "not signed" in told
        assert "remote: {open_commands: [halt]}" in told
        assert "not trusted for command" in verb(
            "command", "halt", "sheet", *here, "--key", folder / "keys" / "signing.key", code=1
        )
        before = daemon.log.count("\n")
        for n in range(400):
            listener.say({"request_id": f"{n}", "client": "flood", "station": "sheet"}, "command", "halt")
        until(lambda: len(listener.of("reply", "flood")) > 100, what="answers")
        assert "sheet: start" in verb("command", "start", "sheet", *here)
        assert daemon.log.count("\n") - before < 25
        assert state(listener) != "halted"
        daemon.stop()
        daemon.start()
        until(lambda: listener.of("state")[-1]["session"] != json.loads(halt.payload)["session"], what="another session")
        ready(listener)
        listener.say(halt.payload, "command", "halt")
        until(lambda: any("for session" in told for told in refusals(listener)), what="a refusal")
        assert state(listener) != "halted"


def test_orders_are_signed_by_themselves_and_stay_void_after_a_rollback_of_the_state(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    folder = made(tmp_path / "device", mosquitto.port)
    here = ("--config", folder / "device.yaml")
    there = ("--device", "plant/line/edge", "--broker", f"127.0.0.1:{mosquitto.port}", "--config", tmp_path / "none.yaml")
    new = tmp_path / "new.yaml"
    new.write_text(line_yaml(LOOPING).replace("bundle: paper", "bundle: paper, threshold: 2.5"))

    def reported() -> dict[str, object]:
        return dict((listener.of("config", "reported") or [{}])[-1])

    with (
        listening(mosquitto.port) as listener,
        recording(mosquitto.port, "config/+") as attacker,
        DaemonProcess(folder) as daemon,
    ):
        ready(listener)
        told = verb("remote", "set", new, *there, "--yes", code=1)
        assert "not signed" in told
        assert "--key" in told
        daemon.stop()
        shutil.copytree(folder / "state", tmp_path / "copy")
        daemon.start()
        until(lambda: listener.of("state")[-1]["online"], what="online")
        ready(listener)
        verb("remote", "set", new, *here, "--yes")
        assert "committed" in verb("remote", "confirm", *here)
        assert "unsigned_orders" not in json.dumps(listener.of("health"))
        said = [message for message in recorded(attacker) if not message.topic.endswith("reported")]
        daemon.stop()
        shutil.rmtree(folder / "state")
        shutil.copytree(tmp_path / "copy", folder / "state")
        heard = len(listener.of("config", "reported"))
        daemon.start()
        until(lambda: len(listener.of("config", "reported")) > heard, 30, "a report")
        assert (reported()["version"], reported()["seen"]) == (3, 4)
        for message in said:
            listener.connection.publish(message.topic, message.payload)
        until(lambda: "not on trial" in json.dumps(reported()["last"]), what="an answer")
        assert (reported()["version"], reported()["source"], reported().get("trial")) == (3, "local", None)
        assert "goes as version 5" in verb("remote", "set", new, *here, "--yes")
        verb("remote", "cancel", *here)
    checked = CliRunner().invoke(app, ["check", "--config", str(folder / "device.yaml")]).output
    assert re.search(r"remote orders: key [0-9a-f]{16}: configuration, confirm, command, label", checked)


def test_what_is_open_to_all_is_said(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = made(tmp_path / "device", mosquitto.port)
    with (folder / "device.yaml").open("a") as file:
        file.write("remote: {require_signature: false}\n")
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        until(lambda: "unsigned_orders" in json.dumps(listener.of("health")), 30, "health says so")
        listener.say({"request_id": "1", "client": "panel", "station": "sheet"}, "command", "halt")
        until(lambda: listener.of("reply", "panel"), what="a reply")
        assert listener.of("reply", "panel")[0]["ok"]
    here = ["check", "--config", str(folder / "device.yaml")]
    assert "whoever may publish at the broker changes this line" in CliRunner().invoke(app, here).output
    text = (folder / "device.yaml").read_text().replace("require_signature: false", "require_signature: true")
    (folder / "device.yaml").write_text(text)
    for key in (folder / "trust").glob("*.pub"):
        key.write_text("\n".join(line for line in key.read_text().splitlines() if not line.startswith("purposes:")))
    told = CliRunner().invoke(app, here).output
    assert "signs bundles and orders, as it always has" in told
    assert "purposes: bundle, configuration, confirm" in told


def test_an_installation_of_before_goes_on_and_says_what_it_needs(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = made(tmp_path / "device", mosquitto.port)
    for key in (folder / "trust").glob("orders-*.pub"):
        key.unlink()
    for key in (folder / "trust").glob("signing-*.pub"):
        key.write_text("\n".join(row for row in key.read_text().splitlines() if not row.startswith("purposes:")))
    shutil.move(folder / "keys" / "orders.key", tmp_path / "away.key")
    line = parse_line(read_yaml(line_yaml(LOOPING).replace("version: 3", "version: 4").encode(), "x"), "x")
    kept = {"document": line.document(), "version": 4, "hash": line.reference().hash, "source": "remote", "by": "anna"}
    entry = {"at": "2026-11-01T08:00:00.000Z", "by": "anna", "version": 4, "hash": kept["hash"], "outcome": "committed"}
    state = {"schema": "ei.trials.v1", "seen": 4, "attempt": [0, 0], "good": kept, "trial": None, "history": [entry]}
    (folder / "state").mkdir()
    (folder / "state" / "configuration.json").write_text(json.dumps(state))
    with listening(mosquitto.port) as listener:
        listener.say({"by": "anna", "line": line.document()}, "config", "desired", retain=True)
        with DaemonProcess(folder) as daemon:
            ready(listener)
            told = until(lambda: listener.of("config", "reported"), what="a report")[-1]
            assert (told["version"], told["source"], told["last"]["outcome"]) == (4, "remote", "committed")
            listener.say({"request_id": "1", "client": "panel", "station": "sheet"}, "command", "halt")
            reply = until(lambda: listener.of("reply", "panel"), what="a reply")[0]
            assert "remote: {open_commands: [halt]}" in reply["error"]["hint"]
            listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
            assert until(lambda: listener.of("result", "sheet"), what="a result")[0]["configuration"]["version"] == 4
            said = verb("remote", "reset", "--yes", "--config", folder / "device.yaml", code=1)
            assert "not signed" in said
            made_one = verb("keygen", folder / "keys" / "orders.key", "--trust", folder / "trust", "--purposes",
                            "configuration,confirm")  # fmt: skip
            assert "for configuration, confirm" in made_one
            assert "line.yaml is in force again" in verb("remote", "reset", "--yes", "--config", folder / "device.yaml")
            assert "Traceback" not in daemon.log
    assert (
        "nothing is changed from afar" not in CliRunner().invoke(app, ["check", "--config", str(folder / "device.yaml")]).output
    )
