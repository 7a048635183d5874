"""What lies in the state folder is for its owner alone, whoever starts the daemon, but for pictures that a group may read."""

from __future__ import annotations

import grp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_inspector.access import Access, access_of, private
from edge_inspector.checks import check_device
from edge_inspector.errors import InspectorError
from tests.line import DaemonProcess, Mosquitto, device_folder, line_yaml, listening, until


def modes(folder: Path) -> dict[str, int]:
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): path.lstat().st_mode & 0o777 for path in paths if path.exists()}


def as_member(group: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program as another user, who is in that group alone."""
    become = ["setpriv", "--reuid=12345", f"--regid={group}", "--clear-groups"]
    return subprocess.run([*become, *command], capture_output=True, text=True, check=False)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users may enter; pytest's own they may not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_every_file_of_the_state_is_its_owners_alone_but_for_the_pictures_that_a_group_reads(
    open_folder: Path, mosquitto: Mosquitto
) -> None:
    group = grp.getgrgid(65534 if _is_group(65534) and not os.geteuid() else os.getegid())
    storage = f"storage: {{evidence_group: {group.gr_name}}}\n"
    folder = device_folder(open_folder / "device", mosquitto.port, line_yaml(), extra=storage)
    state = folder / "state"
    (state / "bundles" / "old").mkdir(parents=True)
    for path in (state / "outbox.damaged-1.db", state / "bundles" / "old" / "manifest.json"):
        path.write_text("{}")
        path.chmod(0o644)
    before = os.umask(0o000)
    try:
        with listening(mosquitto.port) as listener, DaemonProcess(folder):
            until(lambda: any(r["ready"] for r in listener.of("ready", "sheet")), what="ready")
            for part in range(8):
                listener.say({"trigger_id": f"T-{part}"}, "trigger", "sheet")
            frames = until(lambda: list(state.glob("evidence/*/*/frames.json")), what="pictures")[0]
            found = modes(state)
            if not os.geteuid():
                read = as_member(group.gr_gid, "cat", str(frames))
                assert read.returncode == 0, read.stderr
                assert json.loads(read.stdout)
                assert as_member(group.gr_gid, "cat", str(state / "outbox.db")).returncode
                assert as_member(group.gr_gid, "touch", str(frames)).returncode
                assert as_member(group.gr_gid, "ls", str(state)).returncode
    finally:
        os.umask(before)
    found |= {name: mode for name, mode in modes(state).items() if name.startswith("evidence")}  # nothing is written any more
    assert found.pop(".") == 0o710
    assert {"outbox.db", "outbox.db-wal", "outbox.db-shm", "lock", "ballast", "bundles/old/manifest.json"} <= found.keys()
    for name, mode in found.items():
        folder_mode, file_mode = (0o750, 0o640) if name.startswith("evidence") else (0o700, 0o600)
        assert mode in (folder_mode if "." not in Path(name).name else file_mode, file_mode), f"{name}: {mode:o}"


def _is_group(number: int) -> bool:
    try:
        grp.getgrgid(number)
    except KeyError:
        return False
    return True


def test_a_group_that_is_not_there_or_not_ours_is_one_clear_error(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with pytest.raises(InspectorError, match="no group 'inspectors-of-pictures'") as caught:
        access_of("inspectors-of-pictures")
    assert "groupadd" in caught.value.hint
    folder = device_folder(tmp_path, mosquitto.port, line_yaml(), extra="storage: {evidence_group: inspectors-of-pictures}\n")
    faults = [f for f in check_device(folder / "device.yaml") if not f.ok]
    assert [fault.thing for fault in faults] == ["evidence"]
    with DaemonProcess(folder) as daemon:
        assert daemon.process is not None
        assert daemon.process.wait(20) != 0
    assert "there is no group" in daemon.log
    if not os.geteuid():
        code = "import os; from edge_inspector.access import access_of; os.setgid(12345); os.setgroups([]); os.setuid(12345)"
        command = [sys.executable, "-c", f"{code}; access_of('root')"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "is not in the group 'root'" in found.stderr, found.stderr


def test_the_umask_is_given_back(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with private(tmp_path / "state", Access()):
            (tmp_path / "state" / "file").write_text("")
        assert modes(tmp_path / "state") == {".": 0o700, "file": 0o600}
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
