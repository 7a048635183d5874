"""Remote configuration: the daemon as a process, a real Mosquitto, and the verbs that people use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge_inspector import messages, signatures
from edge_inspector.config import parse_line
from edge_inspector.schema import read_yaml
from tests.line import (
    RECORDING,
    DaemonProcess,
    Listener,
    Mosquitto,
    collected,
    device_folder,
    line_yaml,
    listening,
    subscribing,
    until,
)  # fmt: skip

LOOPING = f"{RECORDING}?loop=1"
HARMLESS = 1e6


def document(version: int, threshold: float | None = None, **changes: Any) -> dict[str, Any]:
    made = parse_line(read_yaml(line_yaml(LOOPING).encode(), "line.yaml"), "line.yaml").document()
    made["version"] = version
    if threshold is not None:
        made["recipes"]["whole"]["cameras"]["top"]["rois"]["all"]["threshold"] = threshold
    made["stations"]["sheet"].update(changes)
    return made


def want(listener: Listener, line: dict[str, Any], confirm_s: int = 600) -> None:
    listener.say({"by": "anna", "line": line, "confirm_s": confirm_s}, "config", "desired", retain=True)


def decide(listener: Listener, version: int, action: str) -> None:
    listener.say({"by": "ben", "version": version, "action": action}, "config", "confirm")


def reported(listener: Listener) -> dict[str, Any]:
    return (listener.of("config", "reported") or [{}])[-1]


def outcome(listener: Listener, wanted: str, timeout_s: float = 15.0) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        told = reported(listener)
        return told if (told.get("last") or {}).get("outcome") == wanted else None

    return until(found, timeout_s, f"{wanted}, not {reported(listener).get('last')}")  # type: ignore[no-any-return]


def confirmed(listener: Listener, version: int) -> None:
    """Confirm as often as it is too early."""
    for _ in range(30):
        decide(listener, version, "confirm")
        time.sleep(0.7)
        if (reported(listener).get("last") or {}).get("outcome") == "committed":
            return
    raise AssertionError(f"not committed: {reported(listener)['last']}")


def ready(listener: Listener) -> None:
    until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), what="ready")


def test_recipes_change_between_two_parts_and_not_one_trigger_is_lost(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon, subscribing(mosquitto.port) as subscriber:
        ready(listener)
        for n in range(300):
            listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
            if n == 60:
                want(listener, document(4, HARMLESS))
            if n == 220:
                decide(listener, 4, "confirm")
            time.sleep(0.03)
            # A busy machine judges slower than that: parts that wait for too long would be late, and undecided.
            until(lambda n=n: n - len(listener.of("verdict", "sheet")) < 20, 30, "verdicts")  # type: ignore[misc]
        results = collected(subscriber, 300)
        outcome(listener, "committed")
        assert [r.trigger_id for r in results] == [f"T-{n}" for n in range(300)]
        assert {r.reason.value for r in results} == {"above_threshold", "below_threshold"}, "none was interrupted or not ready"
        versions = [r.configuration.version for r in results if r.configuration]
        assert versions == sorted(versions)
        assert set(versions) == {3, 4}
        judged = {(r.configuration.version, r.findings[0].threshold) for r in results if r.configuration}
        assert len(judged) == 2, "each part by the recipe of the configuration that its record names"
        assert listener.of("state")[-1]["configuration_version"] == 4
        session = listener.of("state")[-1]["session"]
        assert {s["session"] for s in listener.of("state") if s["online"]} == {session}, "the line was not started again"
        daemon.kill()
        (folder / "line.yaml").write_text("not: good")  # the remote one is in force: the file does not matter
        daemon.start()
        until(lambda: listener.of("state")[-1]["session"] != session, what="a start")
        assert reported(listener)["version"] == 4
        daemon.stop()


def test_what_nobody_confirms_is_rolled_back(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder), subscribing(mosquitto.port) as subscriber:
        ready(listener)
        want(listener, document(4, HARMLESS), confirm_s=2)
        told = outcome(listener, "trial")
        assert (told["version"], told["good_version"], told["trial"]["by"]) == (4, 3, "anna")
        until(
            lambda: any(c["code"] == "configuration_trial" for h in listener.of("health") for c in h["reasons"]), what="health"
        )
        told = outcome(listener, "rolled_back")
        assert (told["version"], told["seen"], told["source"]) == (3, 4, "local")
        assert "not confirmed within 2 s" in told["last"]["reason"]
        until(lambda: listener.of("health")[-1]["reasons"][0]["code"] == "configuration_rolled_back", what="health")
        listener.say({"trigger_id": "T"}, "trigger", "sheet")
        (result,) = collected(subscriber, 1)
        assert result.configuration is not None
        assert result.configuration.version == 3
        assert result.findings[0].threshold != HARMLESS
        want(listener, document(4, HARMLESS))
        time.sleep(1.5)
        assert reported(listener)["version"] == 3, "a version that was rolled back is never tried again"


def test_what_is_wrong_is_told_with_its_place_and_changes_nothing(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        want(listener, document(4, expires_ms="soon", triger="free"))
        told = outcome(listener, "rejected")
        assert {f["path"] for f in told["last"]["faults"]} == {"stations.sheet.expires_ms", "stations.sheet.triger"}
        assert any("did you mean 'trigger'" in f["suggestion"] for f in told["last"]["faults"])
        changed = document(5)
        changed["recipes"]["whole"]["cameras"]["top"]["rois"]["all"]["bundle"] = "glass"
        want(listener, changed)
        until(lambda: "no such bundle" in (reported(listener)["last"] or {}).get("reason", ""), what="the bundle's fault")
        want(listener, document(6, expires_ms=4000), confirm_s=0)
        until(lambda: (reported(listener)["last"]["faults"] or [{}])[0].get("path") == "confirm_s", what="confirm_s")
        want(listener, document(2, HARMLESS))
        assert outcome(listener, "stale")["last"]["version"] == 2
        masked = document(7)
        masked["stations"]["sheet"]["cameras"]["top"]["uri"] = "rtsp://10.0.0.5/stream?token=***"
        want(listener, masked)
        until(lambda: "holds ***" in json.dumps(reported(listener)["last"]["faults"]), what="the mask")
        decide(listener, 3, "confirm")
        assert "not on trial" in outcome(listener, "refused")["last"]["reason"]
        told = reported(listener)
        assert (told["version"], told["source"]) == (3, "local")
        assert listener.of("state")[-1]["configuration_version"] == 3
        assert not listener.of("bundle", "glass"), "what was rejected leaves nothing at the broker"


def test_stations_may_change_too_and_what_fails_on_trial_is_rolled_back(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon, subscribing(mosquitto.port) as subscriber:
        ready(listener)
        want(listener, document(4, expires_ms=4000))
        outcome(listener, "trial")
        until(lambda: listener.of("state")[-1].get("configuration_version") == 4, what="version 4")
        confirmed(listener, 4)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "line.yaml is not read" in daemon.log, what="refusal of SIGHUP")
        want(listener, document(5, cameras={"top": {"uri": "dir:///nowhere"}}))
        outcome(listener, "trial")
        decide(listener, 5, "confirm")
        until(
            lambda: reported(listener)["last"]["outcome"] in ("too_early", "refused"),
            what="a confirmation that comes too early",
        )
        until(lambda: any(c["code"] == "camera_fault" for c in listener.of("health")[-1]["reasons"]), what="the fault")
        decide(listener, 5, "confirm")
        until(lambda: "camera_fault" in reported(listener)["last"]["reason"], what="a refused confirmation")
        told = outcome(listener, "rolled_back", 40)
        assert "sheet/top: camera_fault" in told["last"]["reason"]
        assert told["version"] == told["good_version"] == 4
        until(lambda: listener.of("ready", "sheet")[-1]["ready"], what="ready again")
        listener.say({"trigger_id": "T"}, "trigger", "sheet")
        assert collected(subscriber, 1)[0].verdict.value != "undecided"
        decide(listener, 4, "reset")
        told = outcome(listener, "reset")
        assert (told["source"], told["version"], told["seen"]) == ("local", 3, 5)
        until(lambda: listener.of("state")[-1].get("configuration_version") == 3, what="line.yaml")


def test_a_configuration_that_ends_the_daemon_is_rolled_back_at_its_third_start(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        ready(listener)
        want(listener, document(4, HARMLESS))
        outcome(listener, "trial")
        for start in (1, 2):
            daemon.kill()
            daemon.start()
            until(lambda n=start: (reported(listener).get("trial") or {}).get("starts") == n, what=f"start {start}")  # type: ignore[misc]
        daemon.kill()
        daemon.start()
        assert "started 3 times" in outcome(listener, "rolled_back")["last"]["reason"]


def test_a_device_may_require_signatures(tmp_path: Path, mosquitto: Mosquitto) -> None:
    signatures.create_key(tmp_path / "boss.key", tmp_path / "fleet", signatures.ORDERS)
    signatures.create_key(tmp_path / "other.key", tmp_path / "nowhere")
    remote = f"remote: {{require_signature: true, trust: {tmp_path / 'fleet'}}}\n"
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING), extra=remote)

    def order(version: int, key: str, device: str = "plant/line/edge") -> dict[str, Any]:
        values: dict[str, Any] = {"by": "anna", "line": document(version, HARMLESS), "confirm_s": 600, "device": device}
        signature = signatures.sign(messages.signed_bytes(values), signatures.read_private_key(tmp_path / key))
        return {**values, "signature": signature.model_dump()}

    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        changed = order(4, "boss.key")
        changed["line"]["version"] = 5
        for wrong, why in (
            (want, "not signed"), (order(4, "other.key"), "not trusted"), (order(4, "boss.key", "plant/line/other"), "for plant/line/other"),
            (changed, "does not fit"),
        ):  # fmt: skip
            if callable(wrong):
                wrong(listener, document(4, HARMLESS))
            else:
                listener.say(wrong, "config", "desired", retain=True)
            until(lambda w=why: w in ((reported(listener).get("last") or {}).get("reason", "")), what=why)  # type: ignore[misc]
        listener.say(order(4, "boss.key"), "config", "desired", retain=True)
        outcome(listener, "trial")
        decide(listener, 4, "confirm")
        until(lambda: "not signed" in reported(listener)["last"]["reason"], what="an unsigned confirmation")
        assert reported(listener)["trial"]["version"] == 4


def edge(*arguments: str | Path, code: int = 0) -> str:
    """Run a verb; returns what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_inspector.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def edge_json(*arguments: str | Path) -> dict[str, Any]:
    """What a verb prints for programs, without what it says to people."""
    return json.JSONDecoder().raw_decode(edge(*arguments))[0]  # type: ignore[no-any-return]


def test_people_see_the_difference_send_it_and_confirm(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    there = ("--device", "plant/line/edge", "--broker", f"127.0.0.1:{mosquitto.port}", "--config", tmp_path / "none.yaml")
    new = tmp_path / "new.yaml"
    new.write_text(line_yaml(LOOPING).replace("bundle: paper", "bundle: paper, threshold: 2.5"))
    assert "says nothing of configuration" in edge("remote", "show", *there, code=2)
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        assert "version 3" in edge("remote", "show", "--config", folder / "device.yaml")
        told = edge("remote", "diff", new, *there, code=1)
        assert "recipes.whole.cameras.top.rois.all.threshold:  + 2.5" in told
        assert "nobody is there to answer" in edge("remote", "set", new, *there, code=2)
        assert "nothing is on trial" in edge("remote", "confirm", *there, code=2)
        told = edge("remote", "set", new, *there, "--yes", "--by", "anna@office")
        assert "goes as version 4" in told
        assert "edge-inspector remote confirm" in told
        assert "committed" in edge("remote", "confirm", *there)
        assert "nothing would change" in edge("remote", "set", new, *there, "--yes")
        shown = edge_json("remote", "show", "--document", *there)
        assert shown["recipes"]["whole"]["cameras"]["top"]["rois"]["all"]["threshold"] == 2.5
        again = tmp_path / "again.json"
        again.write_text(json.dumps(shown).replace("2.5", "2.75"))
        assert edge_json("remote", "set", again, *there, "--yes", "--confirm-s", "0", "--json")["version"] == 5
        bad = tmp_path / "bad.yaml"
        bad.write_text(line_yaml(LOOPING).replace("expires_ms", "expire_ms"))
        assert "did you mean 'expires_ms'" in edge("remote", "set", bad, *there, code=2)
        missing = tmp_path / "missing.yaml"
        missing.write_text(line_yaml(LOOPING, bundle="glass"))
        assert "no such bundle" in edge("remote", "set", missing, *there, "--yes", code=1)
        assert "version 3 of" in edge("remote", "reset", *there, "--yes")
        assert "in force already" in edge("remote", "reset", *there, "--yes", code=2)
        history = edge("remote", "show", *there)
        assert "anna@office" in history
        assert "rejected" in history


HOSTILE = (
    b'{"by":"\\ud800"}', b'{"by":"a\\u001b[2Jb","line":{}}', b'{"by":"x","line":{"schema":"\\udfff"}}', b'{"by":{},"line":[]}',
    b"[" * 30_000, b'{"by":"x","line":{"version":1e999}}', b"null", b'{"by":"x","confirm_s":-1,"line":{}}',
)  # fmt: skip


def test_a_hostile_order_that_the_broker_keeps_never_ends_the_daemon(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        ready(listener)
        for payload in HOSTILE:
            for levels in (
                ("config", "desired"),
                ("config", "confirm"),
                ("bundle", "paper", "desired"),
                ("bundle", "paper", "confirm"),
            ):
                listener.connection.publish(
                    "/".join(("ei/v1/plant/line/edge", *levels)), payload, retain=levels[-1] == "desired"
                )
            daemon.stop()
            told = len(listener.of("config", "reported"))
            daemon.start()
            until(lambda before=told: len(listener.of("config", "reported")) > before, what="a report")  # type: ignore[misc]
        until(lambda: listener.of("ready", "sheet")[-1]["ready"], what="ready again")
        assert (reported(listener)["version"], reported(listener)["source"], reported(listener)["seen"]) == (3, "local", 3)
        assert all(c.isprintable() for c in json.dumps(reported(listener), ensure_ascii=False))
        assert "Traceback" not in daemon.log


def test_a_halt_and_a_product_outlive_a_trial_without_their_station(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(LOOPING))
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        listener.say({"request_id": "1", "client": "hmi", "station": "sheet"}, "command", "halt")
        until(lambda: listener.of("ready", "sheet")[-1]["state"] == "halted", what="halted")
        other = document(4)
        other["stations"]["renamed"] = other["stations"].pop("sheet")
        want(listener, other)
        until(lambda: any(r["ready"] for r in listener.of("ready", "renamed")), what="the other station")
        decide(listener, 4, "cancel")
        outcome(listener, "cancelled")
        until(lambda: listener.of("ready", "sheet")[-1]["reason"] != "stopped", what="the station is back")
        time.sleep(1.0)
        assert listener.of("ready", "sheet")[-1]["state"] == "halted"


def test_a_report_that_the_broker_made_shorter_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "mosquitto", extra="max_packet_size 400\n").start()
    try:
        device = device_folder(tmp_path / "device", broker.port, line_yaml(LOOPING))
        with listening(broker.port) as listener, DaemonProcess(device):
            until(lambda: reported(listener).get("shortened"), 15, "a shortened report")
            config = ("--config", device / "device.yaml")
            shown = edge("remote", "show", *config)
            document = edge("remote", "show", "--document", *config, code=2)
            compared = edge("remote", "diff", device / "line.yaml", *config, code=2)
    finally:
        broker.stop()
    assert "no message as long as the device's report" in shown
    for refusal in (document, compared):
        assert "the line document is missing" in refusal
        assert "max_packet_size" in refusal
