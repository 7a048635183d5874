"""systemd: notify socket, watchdog, the unit; evidence and health."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from edge_inspector import health
from edge_inspector.cli import service
from edge_inspector.config import Device, DeviceConfig
from edge_inspector.messages import Cause
from edge_inspector.outbox import Counts
from edge_inspector.systemd import JournalHandler, Watchdog, is_journal, notify
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, listening, needed, until
from tests.tiny import tiny_bundle

UNIT = Path(__file__).resolve().parents[1] / "systemd" / "edge-inspector@.service"


def test_the_daemon_tells_systemd_ready_status_watchdog_and_stopping(tmp_path: Path, mosquitto: Mosquitto) -> None:
    mosquitto.stop()  # a missing broker must not hold up READY
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml("dir:///nowhere"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        with DaemonProcess(folder, {"NOTIFY_SOCKET": str(tmp_path / "notify")}) as daemon:
            heard: list[str] = []

            def complete() -> bool:
                heard.append(listener.recv(4096).decode())
                return "WATCHDOG=1" in heard and any("STATUS=" in h for h in heard)

            until(complete, what="WATCHDOG and STATUS")
            assert heard[0] == "READY=1"
            assert any("no broker" in h for h in heard if h.startswith("STATUS="))
            assert daemon.stop() == 0
            until(lambda: listener.recv(4096) == b"STOPPING=1", what="STOPPING")


def test_nothing_is_sent_where_systemd_is_not_and_a_lost_socket_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not notify("READY=1", {})
    for address in (str(tmp_path / "gone"), "@gone", "x" * 200):
        caplog.clear()
        assert not notify("STATUS=1", {"NOTIFY_SOCKET": address})
        assert not notify("STATUS=2", {"NOTIFY_SOCKET": address})
        assert [record.getMessage().startswith("systemd does not hear us") for record in caplog.records] == [True]


def test_a_daemon_whose_notify_socket_is_lost_judges_on_and_says_when_its_stations_are_ready(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml("synthetic://?fps=10", bundle="tiny"))
    tiny_bundle(folder / "bundles")
    kept = [x for x in (folder / "device.yaml").read_text().splitlines() if not x.startswith(("trust:", "bundles:"))]
    (folder / "device.yaml").write_text("\n".join([*kept, "trust: bundles/trust", "bundles: bundles", ""]))
    shutil.move(folder / "bundles" / "tiny", tmp_path / "tiny")
    with (
        listening(mosquitto.port) as listener,
        DaemonProcess(folder, {"NOTIFY_SOCKET": str(tmp_path / "gone")}) as daemon,
    ):
        until(lambda: "station sheet is not ready: " in daemon.log, what="why it is not ready")
        assert "ready: sheet" not in daemon.log
        until(lambda: "started: stations sheet; configuration version" in daemon.log, what="a start")
        shutil.move(tmp_path / "tiny", folder / "bundles" / "tiny")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "ready: sheet" in daemon.log, what="ready")
        until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), what="ready")
        listener.say({"trigger_id": "T-1"}, "trigger", "sheet")
        until(lambda: listener.of("result", "sheet"), what="a result")
        assert daemon.log.count("systemd does not hear us") == 1
        assert "check the state folder" not in daemon.log
        assert daemon.stop() == 0


def test_a_loop_that_hangs_is_named_and_stops_the_pings() -> None:
    watchdog = Watchdog(patience_s=0.05)
    tick = watchdog.loop("a")
    watchdog.loop("b")
    time.sleep(0.1)
    tick()
    assert watchdog.ping() == ["b"]
    watchdog.forget("b")
    tick()
    assert watchdog.ping() == []


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    needed(shutil.which("systemd-analyze"), "apt install systemd")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/edge-inspector/bin/edge-inspector", "/bin/true"))
    drop_in = tmp_path / f"{UNIT.name}.d" / "jetson.conf"
    drop_in.parent.mkdir()
    for add in (False, True):
        if add:
            drop_in.write_text((UNIT.parent / "jetson.conf").read_text())
        one = unit.with_name(UNIT.name.replace("@", "@press-1"))
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(one)], capture_output=True, text=True, check=False
        )
        assert [line for line in checked.stderr.splitlines() if "edge-inspector" in line or "jetson" in line] == []


def test_the_unit_is_exposed_as_little_as_a_daemon_with_cameras_gpu_and_network_can_be() -> None:
    needed(shutil.which("systemd-analyze"), "apt install systemd")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=18", str(UNIT)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout.splitlines()[-1]
    assert "Overall exposure level" in checked.stdout


def test_a_program_elsewhere_is_what_the_unit_runs_and_a_dry_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        service.install("press-1", dry_run=True)
    assert ended.value.exit_code == 1
    told = capsys.readouterr()
    assert "would be refused: /etc/edge-inspector/press-1/device.yaml: is not there" in told.err.replace("\n", " ")
    assert f"ExecStart={Path(sys.executable).parent}/edge-inspector run --config /etc/edge-inspector/%i/device.yaml" in told.out
    assert "would run: systemctl restart edge-inspector@press-1.service" in told.err
    assert not (service.UNITS / service.TEMPLATE).exists()
    service.uninstall("press-1", dry_run=True)
    assert "would run: systemctl disable --now" in capsys.readouterr().err


def test_a_dry_run_says_all_that_install_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    needed(os.geteuid() == 0 or None, "root: it writes below /etc")
    folder = service.CONFIGURATIONS / f"dry-run-{os.getpid()}"
    made = not service.CONFIGURATIONS.exists()
    try:
        device_folder(folder, 1, "stations: {", extra="storage: {folder: /data}\n")
        (folder / "keys").mkdir()
        (folder / "keys" / "signing.key").write_text("x")
        (folder / "keys" / "signing.key").chmod(0o644)
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state" / "outbox.db").touch()
        (folder / "trust").mkdir(mode=0o700)
        with pytest.raises(typer.Exit):
            service.install(folder.name, dry_run=True)
    finally:
        shutil.rmtree(service.CONFIGURATIONS if made else folder)
    told = " ".join(capsys.readouterr().err.split())
    for words in ("line.yaml: 1 fault", "state in /data", "results and orders of before", "signing.key: others can read it"):
        assert words in told, told


def test_records_reach_the_journal_with_their_fields_and_never_wait_for_it(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        handler = JournalHandler(str(tmp_path / "journal"))
        record = logging.LogRecord("edge_inspector", logging.WARNING, "", 1, "two\nlines", None, None)
        record.station, record.seq = "press-1", 42
        handler.emit(record)
        entry = journal.recv(65536)
        assert b"MESSAGE\n" + struct.pack("<Q", 9) + b"two\nlines\n" in entry
        assert {b"PRIORITY=4", b"EI_STATION=press-1", b"EI_SEQ=42"} <= set(entry.splitlines())
        assert b"EI_TRIGGER_ID" not in entry
        bad = logging.LogRecord("edge_inspector", logging.INFO, "", 1, "%d", ("no number",), None)
        logging.raiseExceptions, before = False, logging.raiseExceptions
        handler.emit(bad)
        logging.raiseExceptions = before
        for _ in range(10_000):
            handler.emit(record)
        assert handler.lost > 0, "nobody reads: what does not fit is lost, and counted"
        handler.close()
    assert not is_journal({})


def test_a_device_below_etc_keeps_its_state_below_var_lib_and_systemd_hands_its_secrets_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"schema": "ei.device.v1", "identity": {"site": "plant", "line": "line", "device": "edge"}}
    device = Device(DeviceConfig.model_validate(config), Path("/etc/edge-inspector/press-1"))
    assert device.state == Path("/var/lib/edge-inspector/press-1")
    assert Device(DeviceConfig.model_validate(config), Path("/srv/line")).state == Path("/srv/line/state")
    named = DeviceConfig.model_validate({**config, "storage": {"folder": "/data"}})
    assert Device(named, Path("/etc/edge-inspector/press-1")).state == Path("/data")
    assert device.path("credentials/broker-password") == Path("/etc/edge-inspector/press-1/credentials/broker-password")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    assert device.path("credentials/broker-password") == Path("/run/credentials/x/credentials_broker-password")
    assert device.path("keys/ca.pem") == Path("/etc/edge-inspector/press-1/keys/ca.pem")


def test_the_gravest_cause_is_the_status(tmp_path: Path) -> None:
    clock = health.clock()
    causes = [
        Cause(code="disk_high", severity="maintenance_required", thing="disk", text=""),
        Cause(code="camera_fault", severity="failure", thing="s/top", text=""),
    ]
    told = health.assess(causes, Counts(), clock, 0, {})
    assert told.status == "failure"
    assert [cause.code for cause in told.reasons] == ["camera_fault", "disk_high"]
    assert health.assess([], Counts(), clock, 0, {}).status == "normal"
    failing = health.storage_causes(Counts(failing="database or disk is full", dropped_unsent=3), tmp_path)
    assert {"outbox_failing", "outbox_dropped"} <= {cause.code for cause in failing}
