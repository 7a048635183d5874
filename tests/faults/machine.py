"""A machine with a real systemd: systemd-nspawn on an overlay of this one's files; what it writes is gone afterwards.

It shares this machine's network. The program lies in /opt/edge-inspector as the unit has it, a virtual environment that sees
this repository and this interpreter's packages.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.line import needed, until

CODE = Path(__file__).resolve().parents[2]
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
WALL = 0x40000000
"""waitpid(2), __WALL: threads, too."""
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


class Machine:
    """Runs from `with` on. Needs root and systemd-nspawn; where these are not, the test is skipped by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.files = folder, folder / "root", folder / "upper"
        self._process: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def __enter__(self) -> Machine:
        if os.geteuid() != 0:
            pytest.skip("systemd-nspawn needs root")
        needed(shutil.which("systemd-nspawn"), "apt install systemd-container dbus")
        self.folder.mkdir()
        _checked("mount", "-t", "tmpfs", "tmpfs", str(self.folder))
        for path in (self.root, self.files, self.folder / "work"):
            path.mkdir()
        for hidden in ("etc/systemd/system", "var/log/journal", "var/lib/edge-inspector", "etc/edge-inspector", "opt"):
            (self.files / hidden).mkdir(parents=True)
            os.setxattr(self.files / hidden, "trusted.overlay.opaque", b"y")  # nothing of this machine's own is there
        overlay = f"lowerdir=/,upperdir={self.files},workdir={self.folder / 'work'}"
        _checked("mount", "-t", "overlay", "overlay", "-o", overlay, str(self.root))
        try:
            self._boot(self._install())
        except BaseException:
            self.__exit__()
            raise
        return self

    def _boot(self, bound: list[str]) -> None:
        with (self.folder / "console").open("wb") as log:
            process = self._process = subprocess.Popen(
                ["systemd-nspawn", "--boot", "--quiet", f"--directory={self.root}", f"--machine=ei-{os.getpid()}", "--register=no",
                 "--keep-unit", *bound, "systemd.unit=basic.target"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.leader = until(lambda: process.poll() is not None or _first(process.pid), what="PID 1")
        if process.poll() is not None:
            console = (self.folder / "console").read_text(errors="replace")[-300:]
            pytest.skip(f"systemd-nspawn cannot boot a machine in this one: {console}")
        until(lambda: self.run("systemctl", "is-active", "basic.target", may_fail=True).strip() == "active", 60, "the boot")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # an orderly end
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for path in (self.root, self.folder):
            subprocess.run(["umount", "-l", str(path)], check=False)

    def _install(self) -> list[str]:
        """A virtual environment in /opt/edge-inspector; returns nspawn's options for what it sees."""
        venv = self.files / "opt" / "edge-inspector"
        packages = venv / "lib" / VERSION / "site-packages"
        packages.mkdir(parents=True)
        (venv / "bin").mkdir()
        (venv / "bin" / "python").symlink_to(f"/opt/python/bin/{VERSION}")
        (venv / "pyvenv.cfg").write_text("home = /opt/python/bin\ninclude-system-site-packages = false\n")
        (packages / "edge-inspector.pth").write_text("/opt/code\n/opt/packages\n")
        manager = self.files / "etc" / "systemd" / "system.conf.d"
        manager.mkdir(parents=True)  # an interpreter that was built for another place knows its library only there
        (manager / "python.conf").write_text("[Manager]\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n")
        program = venv / "bin" / "edge-inspector"
        program.write_text("#!/opt/edge-inspector/bin/python\nfrom edge_inspector.cli import main\nmain()\n")
        program.chmod(0o755)
        seen = {sys.base_prefix: "/opt/python", str(CODE): "/opt/code", sysconfig.get_path("purelib"): "/opt/packages"}
        for path in seen.values():
            (self.files / path[1:]).mkdir(exist_ok=True)
        return [f"--bind-ro={there}:{here}" for there, here in seen.items()]

    def run(self, *command: str, may_fail: bool = False) -> str:
        """What a command in the machine prints, run as root."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.leader), "-a", "env", "-i", "PATH=/opt/edge-inspector/bin:/usr/sbin:/usr/bin", *command],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert may_fail or done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout + (done.stderr if may_fail else "")

    def shown(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as systemd tells them."""
        text = self.run("systemctl", "show", "-p", ",".join(properties), unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def main(self, unit: str) -> psutil.Process:
        """The main process of a running unit, as this machine numbers it."""
        inside = self.shown(unit, "MainPID")["MainPID"]
        for process in psutil.Process(self.leader).children(recursive=True):
            if _inside(process.pid) == inside:
                return process
        raise AssertionError(f"no process {inside} in the machine")

    def journal(self, unit: str, *matches: str) -> list[dict[str, Any]]:
        """Entries of a unit's journal that have these fields."""
        text = self.run("journalctl", "--no-pager", "-o", "json", "-u", unit, *matches)
        return [json.loads(line) for line in text.splitlines()]


def _inside(pid: int) -> str:
    """A process's number in its own machine; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].splitlines()[0].split()[-1]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _first(nspawn: int) -> int:
    """PID 1 of its machine, as this one numbers it; 0 before it is there. nspawn's child before that one only makes it."""
    return next((child.pid for child in psutil.Process(nspawn).children() if _inside(child.pid) == "1"), 0)


def _checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def stopped(process: psutil.Process, thread: str) -> Iterator[None]:
    """Hold one thread of a process, and no other, for as long as the process lives or this lasts (ptrace(2)).

    Where threads hang: in a system call. Elsewhere it may hold Python's lock, and all others would hang with it.
    """
    tasks = {int(path.name): (path / "comm").read_text().strip() for path in Path(f"/proc/{process.pid}/task").iterdir()}
    tid = next((number for number, name in tasks.items() if name == thread), None)
    assert tid is not None, f"no thread {thread!r} among {sorted(tasks.values())}"
    libc = ctypes.CDLL(None, use_errno=True)

    def held_in_a_call() -> bool:
        assert libc.ptrace(PTRACE_ATTACH, tid, None, None) == 0, os.strerror(ctypes.get_errno())
        os.waitpid(tid, WALL)
        if not Path(f"/proc/{process.pid}/task/{tid}/syscall").read_text().startswith("-1"):
            return True
        libc.ptrace(PTRACE_DETACH, tid, None, None)
        return False

    until(held_in_a_call, what="a system call of that thread")
    reaper = threading.Thread(target=os.waitpid, args=(tid, WALL), daemon=True)  # else its end would wait for us, its tracer
    reaper.start()
    try:
        yield
    finally:
        if reaper.is_alive():
            libc.ptrace(PTRACE_DETACH, tid, None, None)


def monotonic_us() -> int:
    """The clock of systemd's ...Monotonic properties."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
