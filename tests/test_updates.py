"""Remote orders beside the line: none holds up another, none keeps the heartbeat waiting."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tests.line import DaemonProcess, Listener, Mosquitto, listening, preloadable, until
from tests.plant import LINE, Plant, ended, ready, reported, want
from tests.test_fetch import Dripping


def configured(listener: Listener, version: int, outcome: str) -> dict[str, Any]:
    """The report in which a line configuration has come to this outcome."""

    def found() -> dict[str, Any] | None:
        told = (listener.of("config", "reported") or [{}])[-1]
        last = told.get("last") or {}
        return told if (last.get("version"), last.get("outcome")) == (version, outcome) else None

    return until(found, 30, f"version {version} {outcome}")  # type: ignore[no-any-return]


def document(plant: Plant, version: int) -> dict[str, Any]:
    import yaml

    line: dict[str, Any] = yaml.safe_load(LINE.format(pictures=plant.device.parent / "pictures", expires_ms=2000))
    roi = {"bundle": "tiny", "threshold": 0.5 + version / 100}
    line["recipes"]["whole"]["cameras"]["top"]["rois"]["all"] = roi
    return {**line, "version": version}


def test_a_source_that_drips_holds_up_no_other_order_and_cancel_ends_it(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    server = Dripping(tmp_path, "answer", every_s=1.0)
    device = plant.device / "device.yaml"
    device.write_text(device.read_text().replace("remote: {", f"remote: {{ca_file: {server.certificate}, "))
    with listening(mosquitto.port) as listener, DaemonProcess(plant.device) as daemon:
        ready(listener)
        want(listener, 2, server.url)
        until(lambda: (reported(listener).get("phase") or {}).get("name") == "fetch", what="a fetch")
        listener.say({"by": "ben", "line": document(plant, 2), "confirm_s": 0}, "config", "desired", retain=True)
        configured(listener, 2, "committed")
        assert reported(listener)["phase"]["name"] == "fetch", "it is still being fetched"
        listener.say({"by": "ben", "version": 2, "action": "cancel"}, "bundle", "tiny", "confirm")
        ended(listener, 2, "cancelled")
        want(listener, 3, plant.release(3), shadow_parts=0)
        ended(listener, 3, "trial")
        until(lambda: not (plant.device / "state" / "bundles" / "tiny" / "2").exists(), 30, "its files gone")
        assert "Traceback" not in daemon.log
    server.close()


def test_a_disk_that_is_slow_for_remote_orders_keeps_no_heartbeat_waiting(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    flag, pings = tmp_path / "slow", list[float]()
    environment = {
        "LD_PRELOAD": preloadable("slowdisk", tmp_path), "SLOW_DISK_FLAG": str(flag),
        "SLOW_DISK_NAME": "configuration.json", "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, listening(mosquitto.port) as listener:
        heard.bind(str(tmp_path / "notify"))
        over = threading.Event()

        def hear() -> None:
            heard.settimeout(0.2)
            while not over.is_set():
                try:
                    pings.extend([time.monotonic()] * (heard.recv(4096) == b"WATCHDOG=1"))
                except TimeoutError:
                    continue

        thread = threading.Thread(target=hear)
        thread.start()
        with DaemonProcess(plant.device, environment):
            ready(listener)
            flag.touch()
            began = time.monotonic()
            listener.say({"by": "ben", "line": document(plant, 2), "confirm_s": 0}, "config", "desired", retain=True)
            configured(listener, 2, "committed")
            took = time.monotonic() - began
            flag.unlink()
        over.set()
        thread.join()
    assert took > 6, "the disk must have been slow"
    during = [at for at in pings if began < at < began + took]
    gaps = [b - a for a, b in zip([began, *during], [*during, began + took], strict=True)]
    assert max(gaps) < 4, gaps


def test_what_fails_before_a_release_is_tried_is_not_held_against_it(tmp_path: Path, mosquitto: Mosquitto) -> None:
    plant = Plant(tmp_path, mosquitto.port)
    broken = '  broken: {trigger: software, product: tiny, products: {tiny: whole}, cameras: {top: {uri: "dir:///nowhere"}}}\n'
    text = (plant.device / "line.yaml").read_text()
    (plant.device / "line.yaml").write_text(text.replace("recipes:\n", f"{broken}recipes:\n"))
    with listening(mosquitto.port) as listener, DaemonProcess(plant.device):
        ready(listener)
        until(lambda: any("broken/top" in str(told["reasons"]) for told in listener.of("health")), 30, "a fault")
        want(listener, 2, plant.release(2), shadow_parts=0)
        ended(listener, 2, "trial")
        kept = json.loads((plant.device / "state" / "bundles" / "tiny" / "rollout.json").read_text())
    assert kept["trial"]["failures"] == ["broken/top: camera_fault"], "else it would be rolled back after 15 s"
