"""The shipped unit under a real systemd: installed, hardened, killed, hung. EDGE_INSPECTOR_LONG=1 does it often enough to tell.

What no machine without the hardware can show: V4L2 devices and NVIDIA's inside the unit. The camera here is a GigE Vision one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.machine import Machine, monotonic_us, stopped
from tests.line import ENGINES, MOSQUITTO, Listener, Mosquitto, device_folder, line_yaml, listening, needed, until
from tests.test_aravis import Simulator
from tests.test_aravis import installed as aravis_is_here
from tests.tiny import coded_bundle

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
UNIT = "edge-inspector@press-1.service"
STATE = "var/lib/private/edge-inspector/press-1"
WATCHDOG_S = 10.0
RESTART_S = 0.5
SLACK_S = 1.0
"""What systemd itself, and two shared cores, may add."""
LINE = line_yaml("synthetic://?seed=1&fps=20&grey=1", trigger="free", bundle="coded")
PASSWORD = ", username: edge, password_file: credentials/broker-password"


@contextmanager
def installed(tmp_path: Path, broker: Mosquitto, line: str = LINE, login: str = "", storage: str = "") -> Iterator[Machine]:
    """A machine with the service press-1, installed by the shipped verb."""
    with Machine(tmp_path / "machine") as machine:
        coded_bundle(tmp_path / "made")
        folder = device_folder(machine.files / "etc" / "edge-inspector" / "press-1", broker.port, line, extra=storage)
        shutil.copytree(tmp_path / "made" / "trust", folder / "trust")
        shutil.copytree(tmp_path / "made" / "coded", folder / "bundles" / "coded")
        text = (folder / "device.yaml").read_text().replace(str(ENGINES / "trust"), "trust").replace(str(ENGINES), "bundles")
        (folder / "device.yaml").write_text(text.replace("keepalive_s: 5", f"keepalive_s: 5{login}"))
        if login:
            (folder / "credentials").mkdir(mode=0o700)
            (folder / "credentials" / "broker-password").write_text("secret\n")
        if storage:
            machine.run("groupadd", "--system", "quality")
        machine.run("edge-inspector", "service", "install", "press-1")
        yield machine


def judged(listener: Listener) -> int:
    return sum(result["verdict"] == "pass" for result in listener.of("result", "sheet"))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Mosquitto]:
    """A broker that wants a password."""
    needed(MOSQUITTO, "apt install mosquitto")
    broker, passwords = Mosquitto(tmp_path / "mosquitto"), tmp_path / "passwords"
    subprocess.run([str(shutil.which("mosquitto_passwd")), "-c", "-b", str(passwords), "edge", "secret"], check=True)
    conf = broker.folder / "mosquitto.conf"
    conf.write_text(
        conf.read_text().replace("allow_anonymous true", "allow_anonymous false") + f"\npassword_file {passwords}\n"
    )
    broker.start()
    yield broker
    broker.stop()


def test_the_installed_service_judges_a_cameras_frames_behind_its_walls(tmp_path: Path, guarded: Mosquitto) -> None:
    needed(aravis_is_here(), "apt install libaravis-0.8-0")
    camera = Simulator()
    camera.start()
    line = line_yaml("gige://127.0.0.1", trigger="free", bundle="coded")
    try:
        with installed(tmp_path, guarded, line, PASSWORD) as machine:
            until(lambda: "connected" in machine.shown(UNIT, "StatusText")["StatusText"], 30, "the broker, with its password")
            status = json.loads(machine.run("edge-inspector", "service", "status", "--json"))
            assert (status["press-1"]["ActiveState"], status["press-1"]["UnitFileState"]) == ("active", "enabled")
            until(lambda: " 0 pass" not in machine.shown(UNIT, "StatusText")["StatusText"], 60, "a part that passed")
            # A part that passes leaves no entry: which one is the first that has one is the camera's and the clock's.
            entry = until(lambda: machine.journal(UNIT, "EI_STATION=sheet"), 60, "a part in the journal")[0]
            assert entry["EI_STATION"] == "sheet"
            assert entry["EI_TRIGGER_ID"].startswith("free-")
            process, inside = machine.main(UNIT), machine.shown(UNIT, "MainPID")["MainPID"]
            assert process.uids().real != 0
            homes = Path(f"/proc/{process.pid}/root/root")
            assert list((machine.root / "root").iterdir())
            assert not list(homes.iterdir())
            written = machine.run("nsenter", "-t", inside, "-m", "touch", "/etc/here", may_fail=True)
            assert "Read-only" in written
            assert (machine.files / STATE / "outbox.db").exists()
            machine.run("edge-inspector", "service", "uninstall", "press-1")
            assert "no instance" in machine.run("edge-inspector", "service", "status", may_fail=True)
            assert not (machine.files / "etc/systemd/system/edge-inspector@.service").exists()
            assert (machine.files / STATE / "outbox.db").exists()
    finally:
        camera.stop()


def test_the_pictures_of_the_service_are_open_to_one_group(tmp_path: Path, mosquitto: Mosquitto) -> None:
    storage = "storage: {evidence_group: quality, evidence_passed: 1.0}\n"
    with installed(tmp_path, mosquitto, storage=storage) as machine:
        pictures = machine.files / STATE / "evidence" / "passed"
        part = until(lambda: next(pictures.glob("*/frames.json"), None), 60, "a part's pictures").parent
        group = int(machine.run("getent", "group", "quality").split(":")[2])
        for folder in (pictures.parent, pictures, part):
            assert (folder.stat().st_mode & 0o777, folder.stat().st_gid) == (0o750, group)
        for file in part.iterdir():
            assert (file.stat().st_mode & 0o777, file.stat().st_gid) == (0o640, group)
        results = pictures.parents[1] / "outbox.db"
        assert results.stat().st_mode & 0o777 == 0o600


def test_what_cannot_start_is_refused_with_what_the_daemon_said(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with Machine(tmp_path / "machine") as machine:
        told = machine.run("edge-inspector", "service", "install", "press-1", may_fail=True)
        assert "edge-inspector init /etc/edge-inspector/press-1" in told
        machine.run("edge-inspector", "init", "/etc/edge-inspector/press-1")
        secret = machine.files / "etc/edge-inspector/press-1/line.yaml"
        secret.chmod(0o600)
        assert "cannot be read by the service" in machine.run("edge-inspector", "service", "install", "press-1", may_fail=True)
        secret.chmod(0o644)
        device = secret.with_name("device.yaml")
        device.write_text(device.read_text().replace("# username", "username").replace("# password_file", "password_file"))
        told = machine.run("edge-inspector", "service", "install", "press-1", may_fail=True)
        assert "no password to read" in told.partition("it said:")[2], told
        assert "is no name" in machine.run("edge-inspector", "service", "install", "Press 1", may_fail=True)


def times_us(machine: Machine) -> tuple[int, int]:
    """When the main process was started, and when it was READY, last."""
    told = machine.shown(UNIT, "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    return int(told["ExecMainStartTimestampMonotonic"]), int(told["ActiveEnterTimestampMonotonic"])


def back_s(machine: Machine, since_us: int, timeout_s: float, listener: Listener | None = None) -> tuple[float, float]:
    """Seconds from a fault to READY, and those of them that the start itself took. `listener` listens meanwhile: verdicts expire."""

    def ready() -> tuple[int, int] | None:
        if listener is not None:
            listener.pump()
        started, active = times_us(machine)
        return (started, active) if active > started > since_us else None

    started, active = until(ready, timeout_s, "READY again")
    return (active - since_us) / 1e6, (active - started) / 1e6


def test_the_service_is_back_after_every_kill(tmp_path: Path, mosquitto: Mosquitto) -> None:
    kills, over = (50 if LONG else 6), []
    with installed(tmp_path, mosquitto) as machine:
        for _ in range(kills):
            process, at = machine.main(UNIT), monotonic_us()
            process.kill()
            took, start = back_s(machine, at, 30)
            over.append(took - start - RESTART_S)
        assert int(machine.shown(UNIT, "NRestarts")["NRestarts"]) == kills
        assert max(over) <= SLACK_S
    print(f"\n{kills} kills: READY {statistics.median(over) * 1e3:.0f} ms, at most {max(over) * 1e3:.0f} ms, "
          f"after RestartSec and the start itself")  # fmt: skip


@pytest.mark.parametrize("thread", ["station-sheet", "outbox-committe", "broker"] if LONG else ["station-sheet"])
def test_a_thread_that_hangs_is_noticed_and_the_service_is_back(tmp_path: Path, mosquitto: Mosquitto, thread: str) -> None:
    rounds, took, told = (8 if LONG else 1), [], []
    with installed(tmp_path, mosquitto) as machine, listening(mosquitto.port) as listener:
        for _ in range(rounds):
            count = judged(listener)
            until(lambda seen=count: judged(listener) > seen, 60, "parts that pass")  # type: ignore[misc]
            verdicts = len(listener.of("verdict", "sheet"))
            with stopped(machine.main(UNIT), thread):
                at = monotonic_us()
                seconds, start = back_s(machine, at, 60, listener)
            took.append(seconds - start)
            told.append(len(listener.of("verdict", "sheet")) - verdicts)
        dumped = [entry for entry in machine.journal(UNIT) if "Fatal Python error: Aborted" in str(entry["MESSAGE"])]
        assert len(dumped) == rounds, "where every thread was"
    print(f"\n{thread}: READY at most {max(took):.1f} s after it hung, less the start itself; {told} verdicts meanwhile")
    assert max(took) <= 1.6 * WATCHDOG_S
    if thread == "broker":
        assert min(told) > 20, "a hung publisher must not stop verdicts"


def test_a_hanging_camera_is_replaced_and_the_service_goes_on(tmp_path: Path, mosquitto: Mosquitto) -> None:
    needed(aravis_is_here(), "apt install libaravis-0.8-0")
    rounds, camera = (8 if LONG else 1), Simulator()
    camera.start()
    try:
        line = line_yaml("gige://127.0.0.1", trigger="free", bundle="coded")
        with installed(tmp_path, mosquitto, line) as machine, listening(mosquitto.port) as listener:
            main = machine.main(UNIT)
            for _ in range(rounds):
                count = judged(listener)
                until(lambda seen=count: judged(listener) > seen, 60, "parts that pass")  # type: ignore[misc]
                children = main.children()
                assert len(children) == 1
                children[0].suspend()
                count = judged(listener)
                until(lambda seen=count: judged(listener) > seen + 5, 30, "parts by another child")  # type: ignore[misc]
                assert not children[0].is_running()
            assert machine.main(UNIT) == main
    finally:
        camera.stop()
