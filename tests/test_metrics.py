"""What Prometheus scrapes: true figures, by its own parser; nothing where nobody asked for it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.line import DaemonProcess, Mosquitto, device_folder, free_port, line_yaml, listening, until


def scraped(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.documentation for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_every_figure_is_that_of_the_line(tmp_path: Path, mosquitto: Mosquitto) -> None:
    port = free_port()
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(), extra=f"metrics: {{port: {port}}}\n")
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
        for n in range(6):
            listener.say({"trigger_id": f"T-{n}"}, "trigger", "sheet")
        results = until(lambda: r if len(r := listener.of("result", "sheet")) == 6 else None, what="results")
        until(lambda: scraped(port).get(("edge_inspector_outbox_pending", ())) == 0, what="what is acknowledged")
        frames = "edge_inspector_camera_frames_total", (("camera", "top"), ("station", "sheet"))
        until(lambda: scraped(port).get(frames, 0) >= 6, what="the next look at the cameras")
        found = scraped(port)
    station = ("station", "sheet")
    for verdict in ("pass", "fail"):
        reason = "below_threshold" if verdict == "pass" else "above_threshold"
        key = ("edge_inspector_results_total", (("reason", reason), station, ("verdict", verdict)))
        assert found.get(key, 0) == sum(r["verdict"] == verdict for r in results)
    infer = ("stage", "infer"), station
    assert found["edge_inspector_stage_seconds_count", infer] == 6
    told = sum(r["times_ms"]["infer"] for r in results) / 1e3
    assert found["edge_inspector_stage_seconds_sum", infer] == pytest.approx(told, rel=1e-6)
    region = (("bundle", "paper"), ("camera", "top"), ("roi", "all"), station)
    ratios = [r["findings"][0]["ratio"] for r in results]
    assert found["edge_inspector_score_ratio_sum", region] == pytest.approx(sum(ratios), rel=1e-6)
    assert found["edge_inspector_camera_up", (("camera", "top"), station)] == 1
    assert found["edge_inspector_camera_frames_total", (("camera", "top"), station)] >= 6
    assert found["edge_inspector_mqtt_connected", ()] == 1
    assert found["edge_inspector_configuration_version", ()] == 3
    assert found["edge_inspector_reject_ratio", (station,)] == sum(r["verdict"] == "fail" for r in results) / 6
    silent = {labels: age for (name, labels), age in found.items() if name == "edge_inspector_loop_silent_seconds"}
    assert {labels[0][1] for labels in silent} >= {"broker", "outbox", "station-sheet"}
    assert max(silent.values()) < 5
    assert any(name == "edge_inspector_bundle_info" and ("bundle", "paper") in labels for name, labels in found)
    assert sum(value for (name, _), value in found.items() if name == "edge_inspector_health") == 1


def test_a_port_that_is_taken_stops_no_line(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml(), extra=f"metrics: {{port: {mosquitto.port}}}\n")
    with listening(mosquitto.port) as listener, DaemonProcess(folder):
        until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
        until(
            lambda: any(c["code"] == "metrics_unserved" for told in listener.of("health") for c in told["reasons"]),
            what="health",
        )


def test_nothing_is_served_where_nobody_asked_for_it(tmp_path: Path, mosquitto: Mosquitto) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:
        until(lambda: listener.of("ready", "sheet") and listener.of("ready", "sheet")[-1]["ready"], what="ready")
        assert daemon.process is not None
        assert [c for c in psutil.Process(daemon.process.pid).net_connections() if c.status == "LISTEN"] == []
