"""The daemon as a process, with a real Mosquitto, real pictures and the shipped bundle: DESIGN's promises 1 to 3."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_inspector.results import Reason, Verdict
from tests.line import (
    ENGINES,
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

SCHEMAS = Path(__file__).resolve().parents[1] / "edge_inspector" / "schemas"


def kind(message: tuple[tuple[str, ...], dict[str, Any]]) -> tuple[str, str]:
    """Topic and schema name of a message that the daemon published: ei.NAME.v1."""
    return message[0][0], message[1]["schema"].split(".")[1]


EXTREME = b'{"request_id":"r","client":"c","stream":"s","lo":100000000000000000000000000,"hi":1}'
LONG_AGO = b'{"trigger_id":"a","expires_at":"0001-01-01T00:00:00+14:00"}'
FAR = b'{"trigger_id":"b","expires_at":"2026-01-01T00:00:00"}'


def ready(listener: Listener, station: str = "sheet") -> None:
    until(lambda: any(r["ready"] for r in listener.of("ready", station)), what="ready")


# amqtt leaves the sockets of clients that it refuses (MQTT 5) to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_every_trigger_gets_a_verdict_and_a_record_that_agree(tmp_path: Path, any_broker_port: int) -> None:
    folder = device_folder(tmp_path / "device", any_broker_port, line_yaml())
    with listening(any_broker_port) as listener, DaemonProcess(folder), subscribing(any_broker_port) as subscriber:
        ready(listener)
        for n in range(20):
            listener.say({"trigger_id": f"T-{n}", "part_id": f"P-{n}"}, "trigger", "sheet")
        results = collected(subscriber, 20)
        until(lambda: len(listener.of("verdict", "sheet")) >= 20, what="verdicts")
        verdicts = {v["trigger_id"]: v["verdict"] for v in listener.of("verdict", "sheet")}
        until(lambda: listener.of("health") and listener.of("head", "sheet"), what="health and head")
        heard = list(listener.heard)
    assert [r.trigger_id for r in results] == [f"T-{n}" for n in range(20)]
    assert [r.seq for r in results] == list(range(1, 21))
    assert {r.trigger_id: r.verdict.value for r in results} == verdicts
    schemas = {name: json.loads((SCHEMAS / f"{name}.json").read_text()) for _, name in map(kind, heard)}
    for message in heard:
        jsonschema.validate(message[1], schemas[kind(message)[1]])
    assert {"result", "verdict", "head", "state", "ready", "health"} <= set(schemas)
    assert {Verdict.PASS, Verdict.FAIL} == {r.verdict for r in results}
    assert all(r.simulated and r.configuration and r.configuration.version == 3 for r in results)


def test_the_same_trigger_id_twice_is_answered_not_inspected_twice(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        until(lambda: listener.of("result", "sheet"), what="result")
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        until(lambda: len(listener.of("verdict", "sheet")) == 2, what="second answer")
        first, second = listener.of("verdict", "sheet")
        time.sleep(0.5)
        assert len(listener.of("result", "sheet")) == 1
    assert (first["repeated"], second["repeated"]) == (False, True)
    assert first["verdict"] == second["verdict"]


def test_what_cannot_be_judged_is_undecided_with_its_reason(tmp_path: Path, mosquitto: Mosquitto) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes((ENGINES / "recording" / "paper-001.png").read_bytes())
    (pictures / "b.png").write_bytes(b"not a picture")
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(f"dir://{pictures}"))
    past = "2020-01-01T00:00:00.000Z"
    with listening(mosquitto.port) as listener, DaemonProcess(folder), subscribing(mosquitto.port) as subscriber:
        ready(listener)
        for trigger in (
            {"trigger_id": "good"}, {"trigger_id": "corrupt"}, {"trigger_id": "product", "product": "glass"},
            {"trigger_id": "late", "expires_at": past}, {"trigger_id": "no-more"},
        ):  # fmt: skip
            listener.say(trigger, "trigger", "sheet")
        found = {r.trigger_id: (r.verdict, r.reason) for r in collected(subscriber, 5)}
    assert found == {
        "good": (Verdict.PASS, Reason.BELOW_THRESHOLD),
        "corrupt": (Verdict.UNDECIDED, Reason.CORRUPT_IMAGE),
        "product": (Verdict.UNDECIDED, Reason.UNKNOWN_PRODUCT),
        "late": (Verdict.UNDECIDED, Reason.LATE),
        "no-more": (Verdict.UNDECIDED, Reason.MISSING_IMAGE),
    }


def test_garbage_on_every_subscribed_topic_changes_nothing(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        ready(listener)
        for payload in (
            b"",
            b"\xff\xfe",
            b"{",
            b"[]",
            b'{"trigger_id": 5}',
            b"x" * 9000,
            EXTREME,
            LONG_AGO,
            FAR,
            b'{"trigger_id":"\xc3\xa9"}',
        ):
            for levels in (("trigger", "sheet"), ("trigger", "nowhere"), ("replay", "sheet", "request"), ("command", "halt")):
                listener.connection.publish("ei/v1/plant/line/edge/" + "/".join(levels), payload)
        listener.say({"trigger_id": "kept"}, "trigger", "sheet", retain=True)
        listener.say({"trigger_id": "after"}, "trigger", "sheet")
        results = until(lambda: listener.of("result", "sheet"), what="result")
        until(lambda: listener.of("alert"), what="alert")
        assert daemon.process is not None and daemon.process.poll() is None
        # "kept" reaches a subscriber that was there already without its retain flag: it is an ordinary trigger.
        until(lambda: "after" in {r["trigger_id"] for r in listener.of("result", "sheet")}, what="the good one")
        assert {r["trigger_id"] for r in results} <= {"kept", "after", "a", "b"}
        refused = until(lambda: [v for v in listener.of("verdict", "sheet") if v["trigger_id"] == "b"], what="an answer")
        assert refused[0]["reason"] == "invalid_trigger", "whose id can be read is answered"
        assert "Traceback" not in daemon.log
    assert any(alert["code"] == "bad_message" for alert in listener.of("alert"))


def test_a_trigger_that_the_broker_kept_is_refused(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener:
        listener.say({"trigger_id": "old"}, "trigger", "sheet", retain=True)
        with DaemonProcess(folder):
            ready(listener)
            until(lambda: any("retained" in a["text"] for a in listener.of("alert")), what="alert")
            assert not listener.of("result", "sheet")


def test_a_replay_goes_to_the_client_that_asked(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(trigger="free"))
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        head = until(lambda: next((h for h in listener.of("head", "sheet") if h["hi"] == 60), None), what="head", timeout_s=30)
        request = {"request_id": "r1", "client": "mes", "stream": head["stream"], "lo": 5, "hi": 9}
        listener.say(request, "replay", "sheet", "request")
        answer = until(lambda: len(a := listener.of("replay", "sheet", "mes")) == 6 and a, what="replay")
        listener.say({**request, "stream": "other"}, "replay", "sheet", "request")
        until(lambda: any(a.get("error") for a in listener.of("replay", "sheet", "mes")), what="refusal")
    assert [r["seq"] for r in answer[:5]] == [5, 6, 7, 8, 9]
    assert answer[5]["schema"] == "ei.replay-end.v1"
    assert (answer[5]["lo"], answer[5]["hi"]) == (5, 9)


def test_the_daemon_is_ready_without_broker_or_camera_and_results_wait(tmp_path: Path, mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(trigger="free"))
    with DaemonProcess(folder) as daemon:
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        time.sleep(3)
        mosquitto.start()
        with subscribing(mosquitto.port) as subscriber:
            assert len(collected(subscriber, 60)) == 60
        assert daemon.stop() == 0
    missing = device_folder(tmp_path / "no-camera", mosquitto.port, line_yaml("dir:///nowhere"))
    with listening(mosquitto.port) as listener, DaemonProcess(missing):
        until(lambda: any(h["status"] == "failure" for h in listener.of("health")), what="health")
        assert listener.of("health")[-1]["reasons"][0]["code"] == "camera_fault"
        assert {facts["state"] for facts in listener.of("health")[-1]["cameras"].values()} == {"fault"}


def test_a_bundle_that_fails_its_samples_leaves_the_station_not_ready_and_the_daemon_up(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(bundle="missing"))
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: any("no such bundle" in r.get("reason", "") for r in listener.of("ready", "sheet")), what="not ready")
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        result = until(lambda: listener.of("result", "sheet"), what="result")[0]
        assert (result["verdict"], result["reason"]) == ("undecided", "not_ready")
        assert daemon.process is not None and daemon.process.poll() is None


def test_commands_halt_start_and_select_a_product(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)

        def command(name: str, **more: str) -> bool:
            number = len(listener.of("reply", "hmi")) + 1
            listener.say({"request_id": f"{number}", "client": "hmi", "station": "sheet", **more}, "command", name)
            until(lambda: len(listener.of("reply", "hmi")) == number, what="reply")
            return bool(listener.of("reply", "hmi")[-1]["ok"])

        assert command("halt")
        until(lambda: listener.of("ready", "sheet")[-1]["state"] == "halted", what="halted")
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        assert until(lambda: listener.of("result", "sheet"), what="result")[0]["reason"] == "not_ready"
        assert command("start")
        assert command("select-product", product="paper")
        assert not command("select-product", product="glass")
        assert not command("dance")
        assert "allowed: paper" in listener.of("reply", "hmi")[-2]["error"]["hint"]


def test_a_stop_says_offline_at_once(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: any(s["online"] for s in listener.of("state")), what="online")
        began = time.monotonic()
        assert daemon.stop(3.0) == 0
        assert time.monotonic() - began < 3.0
        until(lambda: not listener.of("state")[-1]["online"], 2.0, "offline after stop")


def test_the_readiness_of_a_device_that_is_killed_ends_with_it(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        ready(listener)
        daemon.kill()
        until(lambda: listener.of("ready", "sheet")[-1]["reason"] == "the device is gone", 20, "the will of ready")
        until(lambda: not listener.of("state")[-1]["online"], 20, "the will of state")
    last, state = listener.of("ready", "sheet")[-1], listener.of("state")[-1]
    assert not last["ready"]
    assert last["session"] == state["session"]


def test_sighup_takes_a_new_line_and_refuses_a_bad_one(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        ready(listener)
        assert daemon.process is not None
        (folder / "line.yaml").write_text(line_yaml().replace("version: 3", "version: [3"))
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: any(a["code"] == "configuration_refused" for a in listener.of("alert")), what="refusal")
        (folder / "line.yaml").write_text(line_yaml().replace("version: 3", "version: 4"))
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: any(s.get("configuration_version") == 4 for s in listener.of("state")), what="version 4")


def test_results_of_a_station_that_is_gone_are_still_sent(tmp_path: Path, mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(trigger="free"))
    with DaemonProcess(folder) as daemon:
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        time.sleep(4)
        daemon.stop()
        (folder / "line.yaml").write_text(line_yaml().replace("  sheet:", "  renamed:"))
        mosquitto.start()
        with subscribing(mosquitto.port) as subscriber:
            daemon.start()
            assert {r.station for r in collected(subscriber, 10)} == {"sheet"}


def test_two_stations_run_in_one_process_and_one_bad_camera_does_not_stop_the_other(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    line = line_yaml(trigger="free").replace(
        "recipes:\n", "  other:\n    trigger: free\n    product: paper\n    products: {paper: whole}\n"
        '    cameras: {top: {uri: "dir:///nowhere"}}\nrecipes:\n', 1,
    )  # fmt: skip
    folder = device_folder(tmp_path / "device", mosquitto.port, line)
    with DaemonProcess(folder), subscribing(mosquitto.port) as subscriber:
        assert {r.station for r in collected(subscriber, 60)} == {"sheet"}


def test_a_second_daemon_on_the_same_state_is_refused(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with DaemonProcess(folder) as daemon:
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        second = DaemonProcess(folder).start()
        assert second.process is not None
        assert second.process.wait(15) == 2
        assert "another edge-inspector runs" in daemon.log


TWO_CAMERAS = f"""\
schema: ei.line.v1
stations:
  cell:
    trigger: software
    expires_ms: 5000
    products: {{sheet: both, strip: one}}
    cameras:
      top: {{uri: "dir://{ENGINES / "recording"}?loop=1"}}
      side: {{uri: "SIDE", timeout_ms: 500}}
recipes:
  both:
    cameras:
      top:
        mm_per_px: 0.05
        rois:
          left: {{bundle: paper, rectangle: {{x_px: 0, y_px: 0, w_px: 108, h_px: 128}}}}
          corner: {{bundle: paper, polygon: [[8, 0], [127, 0], [127, 120]], threshold: 50.0}}
      side: {{rois: {{all: {{bundle: paper}}}}}}
  one: {{cameras: {{top: {{rois: {{all: {{bundle: paper}}}}}}}}}}
"""


def test_several_cameras_regions_and_products_make_one_verdict_per_part(tmp_path: Path, mosquitto: Mosquitto) -> None:
    side = f"dir://{ENGINES / 'recording'}?loop=1"
    folder = device_folder(tmp_path / "device", mosquitto.port, TWO_CAMERAS.replace("SIDE", side))
    with listening(mosquitto.port) as listener, DaemonProcess(folder), subscribing(mosquitto.port) as subscriber:
        ready(listener, "cell")
        for trigger_id, product in (("T-1", "sheet"), ("T-2", "strip"), ("T-3", "sheet"), ("T-4", None)):
            listener.say({"trigger_id": trigger_id, **({"product": product} if product else {})}, "trigger", "cell")
        results = {r.trigger_id: r for r in collected(subscriber, 4)}
    both, one = results["T-1"], results["T-2"]
    assert {(f.camera, f.roi) for f in both.findings} == {("top", "left"), ("top", "corner"), ("side", "all")}
    assert {f.threshold for f in both.findings if f.roi == "corner"} == {50.0}
    assert [(f.camera, f.roi) for f in one.findings] == [("top", "all")]
    assert both.recipe is not None
    assert one.recipe is not None
    assert (both.recipe.id, one.recipe.id) == ("both", "one")
    assert results["T-3"].recipe == both.recipe
    assert results["T-4"].reason is Reason.UNKNOWN_PRODUCT, "no product named, and the station has no default"


def test_one_missing_camera_makes_the_part_undecided_never_a_partial_pass(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, TWO_CAMERAS.replace("SIDE", "synthetic://?fault=silent"))
    with listening(mosquitto.port) as listener, DaemonProcess(folder), subscribing(mosquitto.port) as subscriber:
        ready(listener, "cell")
        listener.say({"trigger_id": "T-1", "product": "sheet"}, "trigger", "cell")
        listener.say({"trigger_id": "T-2", "product": "strip"}, "trigger", "cell")
        results = {r.trigger_id: r for r in collected(subscriber, 2)}
    assert (results["T-1"].verdict, results["T-1"].reason) == (Verdict.UNDECIDED, Reason.MISSING_IMAGE)
    assert "side" in results["T-1"].detail
    assert results["T-2"].verdict is not Verdict.UNDECIDED


def test_a_long_wait_for_an_image_never_trips_the_watchdog(tmp_path: Path, mosquitto: Mosquitto) -> None:
    line = line_yaml("synthetic://?fault=silent", expires_ms=8000).replace('fault=silent"', 'fault=silent", timeout_ms: 60000')
    folder = device_folder(tmp_path / "device", mosquitto.port, line)
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        ready(listener)
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        result = until(lambda: listener.of("result", "sheet"), 15, "result")[0]
        assert result["verdict"] == "undecided"
        assert not [cause for told in listener.of("health") for cause in told["reasons"] if cause["code"] == "hanging"]
